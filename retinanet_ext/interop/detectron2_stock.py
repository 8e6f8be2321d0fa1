"""Which parts of a detectron2 RetinaNet are detectron2's own: only what it wrote may be computed in another way."""

from __future__ import annotations

import math
import sys
from numbers import Real

from detectron2.modeling import box_regression as d2_box_regression
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import retinanet as d2_retinanet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes
from fvcore.nn import focal_loss as fv_focal_loss
from torch import nn

from .originals import has_own, is_of
from .patching import original_of

# (Names that the packages above also have for functions.)
d2_boxes = sys.modules[Boxes.__module__]
d2_nms = sys.modules["detectron2.layers.nms"]

CLIP = math.log(1000 / 16)  # of size deltas, as ours
_FOCAL_LOSSES = (
    original_of(fv_focal_loss.sigmoid_focal_loss),
    original_of(fv_focal_loss.sigmoid_focal_loss_jit),
)


def iou_thresholds(model: nn.Module) -> tuple[float, float] | None:
    """Of foreground and of background, where matching is detectron2's; None where it is somebody else's.

    `Matcher` has a label for each range between its thresholds: 0 background, -1 left out, 1 foreground.
    """
    matcher = model.anchor_matcher
    if not has_own(matcher, Matcher, "__call__", "set_low_quality_matches_"):
        return None
    lowest, *inner, highest = matcher.thresholds
    labels = list(matcher.labels)
    if (lowest, highest) != (-math.inf, math.inf) or (len(inner), labels) not in ((1, [0, 1]), (2, [0, -1, 1])):
        return None
    background, foreground = inner[0], inner[-1]
    if not all(isinstance(threshold, Real) for threshold in inner) or not 0 <= background <= foreground <= 1:
        return None
    return foreground, background


def has_own_iou() -> bool:
    return is_of(d2_retinanet.pairwise_iou, d2_boxes)


def has_own_class_loss(model: nn.Module) -> bool:
    return (
        any(original_of(d2_retinanet.sigmoid_focal_loss_jit) is loss for loss in _FOCAL_LOSSES)
        and isinstance(model.focal_loss_alpha, Real)
        and model.focal_loss_alpha <= 1  # below 0: not balanced
        and isinstance(model.focal_loss_gamma, Real)
        and 0 <= model.focal_loss_gamma < math.inf
    )


def has_own_box_loss(model: nn.Module) -> bool:
    """Whether it is a box loss that we have: "smooth_l1" or "giou" of an ordinary coder."""
    if not is_of(d2_retinanet._dense_box_regression_loss, d2_box_regression) or not has_own_coder(model):
        return False
    if model.box_reg_loss_type == "giou":
        return model.box2box_transform.scale_clamp == CLIP
    return model.box_reg_loss_type == "smooth_l1" and isinstance(model.smooth_l1_beta, Real)


def has_own_coder(model: nn.Module) -> bool:
    coder = model.box2box_transform
    return (
        has_own(coder, Box2BoxTransform, "get_deltas", "apply_deltas")
        and len(coder.weights) == 4
        and all(isinstance(weight, Real) and weight > 0 for weight in coder.weights)
    )


def has_own_inference(model: nn.Module) -> bool:
    limits = (model.test_topk_candidates, model.max_detections_per_image)
    return (
        has_own(model, d2_retinanet.RetinaNet, "inference_single_image")
        and has_own(model, DenseDetector, "_decode_multi_level_predictions", "_decode_per_level_predictions")
        and takes_levels(model)
        and has_own_coder(model)
        and model.box2box_transform.scale_clamp == CLIP
        and all(isinstance(limit, int) and limit >= 0 for limit in limits)
        and all(isinstance(threshold, Real) for threshold in (model.test_score_thresh, model.test_nms_thresh))
        and model.test_nms_thresh >= 0  # below, boxes of other classes suppress each other too
        and is_of(d2_retinanet.batched_nms, d2_nms)
    )


def takes_levels(model: nn.Module) -> bool:
    """Whether the head's outputs, as convolutions leave them, are permuted to rows and nothing else is done to them."""
    return has_own(model, DenseDetector, "_transpose_dense_predictions")
