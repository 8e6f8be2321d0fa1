"""Fast operators for dense object detection in PyTorch, and a thin RetinaNet on top of them."""

from typing import TYPE_CHECKING

from . import reference
from ._load import build_info
from .ops import (
    assign_targets,
    batched_nms,
    batched_nms_padded,
    box_iou,
    box_regression_loss,
    decode_boxes,
    detect,
    encode_boxes,
    match_anchors,
    multilevel_focal_loss,
    nms,
    sigmoid_focal_loss,
)

if TYPE_CHECKING:
    from .interop import accelerate, patch

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "assign_targets",
    "batched_nms",
    "batched_nms_padded",
    "box_iou",
    "box_regression_loss",
    "build_info",
    "decode_boxes",
    "detect",
    "encode_boxes",
    "match_anchors",
    "multilevel_focal_loss",
    "nms",
    "patch",
    "reference",
    "sigmoid_focal_loss",
]


def __getattr__(name: str) -> object:
    """What most programs do not need is imported when it is asked for."""
    if name in ("accelerate", "patch"):
        from . import interop

        return getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
