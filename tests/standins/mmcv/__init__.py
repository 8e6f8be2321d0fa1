"""Stands in for mmcv where it is not installed: what of its interface the adapters meet, in plain PyTorch.

After mmcv 2.0 to 2.2: names, arguments, return values and conventions of labels are mmcv's, the code is not.
"""

__version__ = "2.1.0"
