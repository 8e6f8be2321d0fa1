"""detectron2's functions on our operators, and those of fvcore that its detectors call.

Each has the original's signature, computes with ours exactly what ours and theirs both define, and hands everything
else to theirs. `Matcher` takes the matrix of all IoUs and stays what it is: the RetinaNet's methods do without both,
and `pairwise_iou` is what makes the matrix elsewhere (proposals, heads). docs/interop.md lists what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from .. import ops
from ..reference.focal_loss import autocast_enabled
from . import detectron2_stock as stock
from .detectron2_retinanet import ACCELERATION
from .ordinary import HALVES, are_ordinary
from .patching import FunctionReplacement, Group, MethodsReplacement, Replacement


def _batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
):
    if (
        _BATCHED_NMS.held
        and are_ordinary(boxes, scores)
        and _becomes_float32(scores)  # as the boxes do: the operator takes one type
        and isinstance(idxs, Tensor)
        and not idxs.is_complex()
        and idxs.device == boxes.device
        and boxes.dim() == 2
        and boxes.shape[1] == 4
        and scores.shape == idxs.shape == boxes.shape[:1]
        and isinstance(iou_threshold, Real)
        and iou_threshold >= 0  # below, boxes of other classes suppress each other too
    ):
        return ops.batched_nms(boxes.float(), scores.float(), idxs, iou_threshold)
    return _BATCHED_NMS.original(boxes, scores, idxs, iou_threshold)


def _becomes_float32(scores: Tensor) -> bool:
    return scores.dtype == torch.float32 or (scores.dtype in HALVES and autocast_enabled(scores))


def _pairwise_iou(boxes1, boxes2) -> Tensor:
    """Boxes of no overlap have 0, also those without area, where `ops.box_iou` divides 0 by 0."""
    if (
        _PAIRWISE_IOU.held
        and type(boxes1) is stock.Boxes
        and type(boxes2) is stock.Boxes
        and are_ordinary(boxes1.tensor, boxes2.tensor)
        and boxes1.tensor.dtype == boxes2.tensor.dtype == torch.float32
    ):
        iou = ops.box_iou(boxes1.tensor, boxes2.tensor)
        return torch.where(iou > 0, iou, 0.0)
    return _PAIRWISE_IOU.original(boxes1, boxes2)


def _focal_loss_or(original: Callable) -> Callable:
    """In float32, whatever the inputs are."""

    def sigmoid_focal_loss(
        inputs: Tensor,
        targets: Tensor,
        alpha: float = -1,
        gamma: float = 2,
        reduction: str = "none",
    ) -> Tensor:
        if _is_focal_loss(inputs, targets, alpha, gamma, reduction):
            balance = alpha if alpha >= 0 else -1
            return ops.sigmoid_focal_loss(inputs.float(), targets.float(), balance, gamma, reduction)
        return original(inputs, targets, alpha, gamma, reduction)

    return sigmoid_focal_loss


def _is_focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> bool:
    return (
        _FOCAL_LOSSES.held
        and are_ordinary(inputs)
        and _is_target(targets, inputs)
        and isinstance(alpha, Real)
        and alpha <= 1
        and isinstance(gamma, Real)
        and 0 <= gamma < float("inf")
        and reduction in ("none", "mean", "sum")
    )


def _is_target(targets: object, inputs: Tensor) -> bool:
    """Any real numbers: fvcore makes them floats."""
    if isinstance(targets, Tensor) and targets.is_floating_point():
        return are_ordinary(inputs, targets) and inputs.shape == targets.shape
    return (
        type(targets) is Tensor
        and not targets.is_complex()
        and targets.device == inputs.device
        and targets.shape == inputs.shape
    )


_BATCHED_NMS = FunctionReplacement("detectron2", stock.d2_nms.batched_nms, _batched_nms)
_PAIRWISE_IOU = FunctionReplacement("detectron2", stock.d2_boxes.pairwise_iou, _pairwise_iou)
_FOCAL_LOSSES = Group(
    *(
        FunctionReplacement(
            ("fvcore", "detectron2"),
            original,
            _focal_loss_or(original),
            declared=stock.fv_focal_loss.sigmoid_focal_loss,
        )
        for original in (stock.fv_focal_loss.sigmoid_focal_loss, stock.fv_focal_loss.sigmoid_focal_loss_jit)
    )
)

REPLACEMENTS: dict[str, Replacement] = {
    "batched_nms": _BATCHED_NMS,
    "pairwise_iou": _PAIRWISE_IOU,
    "sigmoid_focal_loss": _FOCAL_LOSSES,
    "retinanet": MethodsReplacement(ACCELERATION.base, ACCELERATION.methods),
}
