from .anchor_generator import DefaultAnchorGenerator
from .matcher import Matcher
from .meta_arch import RetinaNet

__all__ = ["DefaultAnchorGenerator", "Matcher", "RetinaNet"]
