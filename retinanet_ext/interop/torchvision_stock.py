"""Which parts of a torchvision RetinaNet are torchvision's own: only what it wrote may be computed in another way.

A subclass that overrides a method, a function put on an instance, a hook, another matcher, coder or loss, a function
that somebody has replaced in torchvision's modules: each turns the part it belongs to back to torchvision's code.
"""

from __future__ import annotations

import math
from numbers import Real

from torch import nn
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection import retinanet as tv_retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import boxes as tv_boxes
from torchvision.ops import focal_loss as tv_focal_loss
from torchvision.ops import giou_loss as tv_giou_loss

from .originals import has_own, is_bare, is_of

CLIP = math.log(1000 / 16)  # of size deltas, as ours


def has_own_matching(model: nn.Module) -> bool:
    matcher = getattr(model, "proposal_matcher", None)
    return (
        has_own(matcher, det_utils.Matcher, "__call__", "set_low_quality_matches_")
        and (matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS) == (-1, -2)
        and isinstance(matcher.low_threshold, Real)
        and isinstance(matcher.high_threshold, Real)
        and 0 <= matcher.low_threshold <= matcher.high_threshold <= 1
        and is_of(tv_boxes.box_iou, tv_boxes)
    )


def has_own_loss(head: nn.Module) -> bool:
    return has_own(head, tv_retinanet.RetinaNetHead, "compute_loss")


def has_own_class_loss(head: nn.Module) -> bool:
    return (
        has_own(head, tv_retinanet.RetinaNetClassificationHead, "compute_loss")
        and head.BETWEEN_THRESHOLDS == -2
        and is_of(tv_retinanet.sigmoid_focal_loss, tv_focal_loss)
    )


def has_own_box_loss(head: nn.Module) -> bool:
    """Whether it is a box loss that we have: "l1", "smooth_l1" or "giou" of an ordinary coder."""
    if not has_own(head, tv_retinanet.RetinaNetRegressionHead, "compute_loss"):
        return False
    if not is_of(tv_retinanet._box_loss, det_utils) or not has_own_coder(head.box_coder):
        return False
    if head._loss_type == "giou":
        return head.box_coder.bbox_xform_clip == CLIP and is_of(det_utils.generalized_box_iou_loss, tv_giou_loss)
    return head._loss_type in ("l1", "smooth_l1")


def has_own_coder(coder: object) -> bool:
    return (
        has_own(coder, det_utils.BoxCoder, "encode_single", "decode_single")
        and len(coder.weights) == 4
        and all(isinstance(weight, Real) and weight > 0 for weight in coder.weights)
        and is_of(getattr(det_utils.encode_boxes, "__original_fn", det_utils.encode_boxes), det_utils)
    )


def has_own_postprocessing(model: nn.Module) -> bool:
    limits = (model.topk_candidates, model.detections_per_img)
    return (
        has_own_coder(model.box_coder)
        and model.box_coder.bbox_xform_clip == CLIP
        and all(isinstance(limit, int) and limit >= 0 for limit in limits)
        and all(isinstance(threshold, Real) for threshold in (model.score_thresh, model.nms_thresh))
        and model.nms_thresh >= 0  # below, boxes of other classes suppress each other too
        and is_of(tv_boxes.batched_nms, tv_boxes)
        and is_of(tv_boxes.clip_boxes_to_image, tv_boxes)
    )


def has_own_head(head: nn.Module) -> bool:
    """Whether the head's outputs are those of two convolutional subnets, permuted and joined, and nothing else."""
    if not has_own(head, tv_retinanet.RetinaNetHead, "forward") or not is_bare(head):
        return False
    subnets = (
        (getattr(head, "classification_head", None), tv_retinanet.RetinaNetClassificationHead),
        (getattr(head, "regression_head", None), tv_retinanet.RetinaNetRegressionHead),
    )
    return all(has_own(subnet, cls, "forward") and is_bare(subnet) for subnet, cls in subnets)


def has_shared_anchors(generator: nn.Module) -> bool:
    """Whether every image of a batch has the same anchors."""
    return has_own(generator, AnchorGenerator, "forward", "grid_anchors") and is_bare(generator)
