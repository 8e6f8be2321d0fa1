from .dense_detector import DenseDetector
from .retinanet import RetinaNet

__all__ = ["DenseDetector", "RetinaNet"]
