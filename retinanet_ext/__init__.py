"""Fast operators for dense object detection in PyTorch, and a thin RetinaNet on top of them."""

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

__version__ = "0.1.0"

__all__ = [
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
    "reference",
    "sigmoid_focal_loss",
]
