"""torchvision's functions on our operators.

Each has torchvision's signature, computes with ours exactly what ours and torchvision's both define, and hands
everything else to torchvision's own: wrong arguments (whose errors are torchvision's then), types and devices without
a kernel of ours, tracing, `torch.func` transforms and forward-mode derivatives. docs/interop.md lists what differs.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torchvision.ops import boxes as tv_boxes
from torchvision.ops import focal_loss as tv_focal_loss
from torchvision.tv_tensors import TVTensor

from .. import ops
from ..reference.focal_loss import autocast_enabled
from .ordinary import HALVES, are_ordinary
from .patching import FunctionReplacement, MethodsReplacement, Replacement
from .torchvision_retinanet import ACCELERATION


def _are_ordinary(*tensors: object) -> bool:
    return are_ordinary(*tensors, annotated=(TVTensor,))


def _plain(tensor: Tensor) -> Tensor:
    """Without torchvision's annotations, which its own functions drop as well."""
    return tensor.as_subclass(Tensor) if isinstance(tensor, TVTensor) else tensor


def _computed_boxes(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """As torchvision's operator takes them under autocast: halves widened."""
    boxes, scores = _plain(boxes), _plain(scores)
    if autocast_enabled(boxes):
        boxes, scores = (values.float() if values.dtype in HALVES else values for values in (boxes, scores))
    return boxes, scores


def _can_suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> bool:
    return (
        isinstance(iou_threshold, Real)
        and boxes.dtype == scores.dtype
        and boxes.dim() == 2
        and boxes.shape[1] == 4
        and scores.shape == boxes.shape[:1]
    )


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    if _NMS.held and _are_ordinary(boxes, scores):
        our_boxes, our_scores = _computed_boxes(boxes, scores)
        if _can_suppress(our_boxes, our_scores, iou_threshold):
            return ops.nms(our_boxes, our_scores, iou_threshold)
    return _NMS.original(boxes, scores, iou_threshold)


def _batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
) -> Tensor:
    if _BATCHED_NMS.held and _are_ordinary(boxes, scores) and isinstance(idxs, Tensor):
        our_boxes, our_scores = _computed_boxes(boxes, scores)
        if (
            _can_suppress(our_boxes, our_scores, iou_threshold)
            and iou_threshold >= 0  # below, boxes that torchvision has moved apart suppress each other too
            and idxs.shape == scores.shape
            and idxs.device == boxes.device
            and not idxs.is_complex()
        ):
            return ops.batched_nms(our_boxes, our_scores, _plain(idxs), iou_threshold)
    return _BATCHED_NMS.original(boxes, scores, idxs, iou_threshold)


def _box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    if _BOX_IOU.held and _are_ordinary(boxes1, boxes2) and _has_torchvisions_iou(boxes1, boxes2, fmt):
        return ops.box_iou(_plain(boxes1), _plain(boxes2), fmt)
    return _BOX_IOU.original(boxes1, boxes2, fmt)


def _has_torchvisions_iou(boxes1: Tensor, boxes2: Tensor, fmt: str) -> bool:
    """Whether `ops.box_iou` has the same bits: of two halves of a type torchvision takes the overlap in that type."""
    if boxes1.dtype == boxes2.dtype and boxes1.dtype in HALVES:
        return False
    if fmt != "xyxy" and boxes1.dtype != boxes2.dtype:
        return False  # a corner of half boxes is computed, and so rounded, in halves
    if (boxes1.dtype == torch.float64) != (boxes2.dtype == torch.float64):
        return False
    if fmt not in ("xyxy", "xywh", "cxcywh") or min(boxes1.dim(), boxes2.dim()) < 2:
        return False
    if boxes1.shape[-1] != 4 or boxes2.shape[-1] != 4:
        return False
    batches = zip(reversed(boxes1.shape[:-2]), reversed(boxes2.shape[:-2]), strict=False)
    return all(a == b or 1 in (a, b) for a, b in batches)


def _sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> Tensor:
    if not (
        _SIGMOID_FOCAL_LOSS.held
        and _are_ordinary(inputs, targets)
        and inputs.shape == targets.shape
        and isinstance(alpha, Real)
        and (0 <= alpha <= 1 or alpha == -1)
        and isinstance(gamma, Real)
        and 0 <= gamma < float("inf")
        and reduction in ("none", "mean", "sum")
    ):
        return _SIGMOID_FOCAL_LOSS.original(inputs, targets, alpha, gamma, reduction)
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    loss = ops.sigmoid_focal_loss(_plain(inputs).to(dtype), _plain(targets).to(dtype), alpha, gamma, reduction)
    return loss if autocast_enabled(inputs) else loss.to(dtype)


_NMS = FunctionReplacement("torchvision", tv_boxes.nms, _nms)
_BATCHED_NMS = FunctionReplacement("torchvision", tv_boxes.batched_nms, _batched_nms)
_BOX_IOU = FunctionReplacement("torchvision", tv_boxes.box_iou, _box_iou)
_SIGMOID_FOCAL_LOSS = FunctionReplacement("torchvision", tv_focal_loss.sigmoid_focal_loss, _sigmoid_focal_loss)

REPLACEMENTS: dict[str, Replacement] = {
    "nms": _NMS,
    "batched_nms": _BATCHED_NMS,
    "sigmoid_focal_loss": _SIGMOID_FOCAL_LOSS,
    "box_iou": _BOX_IOU,
    "retinanet": MethodsReplacement(ACCELERATION.base, ACCELERATION.methods),
}
