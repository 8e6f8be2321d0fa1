"""Other people's models and checkpoints: weights in and out."""

from .checkpoint_files import read_weights
from .weights import LoadReport, load_weights, save_torchvision_weights

__all__ = ["LoadReport", "load_weights", "read_weights", "save_torchvision_weights"]
