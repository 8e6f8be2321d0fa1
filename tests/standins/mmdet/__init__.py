"""Stands in for mmdet where it is not installed: what of its interface the adapters meet, in plain PyTorch.

After mmdet 3.3: names, arguments, return values, conventions of labels and order of steps are mmdet's, the code is not.
"""

__version__ = "stand-in"
