"""Other people's models and checkpoints: weights in and out, and their code on our operators."""

from .checkpoint_files import read_weights
from .drop_in import accelerate, patch, restore
from .patching import Patch
from .weights import LoadReport, load_weights, save_torchvision_weights

__all__ = [
    "LoadReport",
    "Patch",
    "accelerate",
    "load_weights",
    "patch",
    "read_weights",
    "restore",
    "save_torchvision_weights",
]
