"""The public operators: argument checks, documentation, autograd and fake kernels around the compiled library."""

from .anchor_match import assign_targets, match_anchors
from .box_coder import decode_boxes, encode_boxes
from .box_iou import box_iou
from .box_loss import box_regression_loss
from .focal_loss import sigmoid_focal_loss
from .multilevel_focal_loss import multilevel_focal_loss
from .nms import batched_nms, batched_nms_padded, nms
from .postprocess import detect

__all__ = [
    "assign_targets",
    "batched_nms",
    "batched_nms_padded",
    "box_iou",
    "box_regression_loss",
    "decode_boxes",
    "detect",
    "encode_boxes",
    "match_anchors",
    "multilevel_focal_loss",
    "nms",
    "sigmoid_focal_loss",
]
