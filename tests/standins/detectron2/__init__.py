"""Stands in for detectron2 where it is not installed: what of its interface the adapters meet, in plain PyTorch.

After detectron2 0.6 and its main branch of 2024 (RetinaNet as a DenseDetector): names, arguments, return values,
conventions of labels and order of steps are detectron2's, the code is not.
"""

__version__ = "stand-in"
