"""Every operator in plain PyTorch: the readable truth that tests and benchmarks compare with."""

from .anchor_match import (
    AssignedTargets,
    assign_targets,
    box_iou,
    decode_boxes,
    encode_boxes,
    match_anchors,
)
from .box_loss import box_regression_loss
from .focal_loss import multilevel_focal_loss, sigmoid_focal_loss
from .nms import PaddedNMS, batched_nms, batched_nms_padded, nms
from .postprocess import Detections, detect

__all__ = [
    "AssignedTargets",
    "Detections",
    "PaddedNMS",
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
