from .nms import batched_nms, nms
from .wrappers import cat

__all__ = ["batched_nms", "cat", "nms"]
