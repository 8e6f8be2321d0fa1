"""mmdet's weights and reductions around our focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..reference.focal_loss import autocast_enabled
from .mmcv import NO_LABEL
from .ordinary import are_ordinary

_EPS = torch.finfo(torch.float32).eps  # mmdet adds it to avg_factor


def reduced_focal_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    gamma: float,
    alpha: float,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Tensor | None:
    """The loss of logits ``pred`` [N, K] as mmdet weights and reduces it; None where its own code has to.

    Args:
        target: classes [N], or numbers [N, K].
        weight: [N], or a factor for each element, [N, K] or flattened.
        reduction: "none", "sum", or "mean": over elements, or by ``avg_factor`` if there is one.

    Weights of rows that are 0 and 1 leave rows out, as mmdet's heads have it, and then nothing of the size of ``pred``
    is made besides its gradient. To know that, the host waits for the device.
    """
    dtype = pred.dtype
    if weight is not None:
        if not are_ordinary(pred, weight) or not _fits(weight, pred):
            return None
        dtype = torch.promote_types(dtype, weight.dtype)
        if reduction != "none" and target.dim() == 1 and _leaves_rows_out(weight, pred):
            target, weight = torch.where(weight.flatten() == 0, NO_LABEL, target), None
    whole = "none" if reduction == "none" or weight is not None else "sum"
    loss = ops.sigmoid_focal_loss(pred, target, alpha, gamma, whole, ignore_index=NO_LABEL)
    if weight is not None:
        loss = loss * _broadcast(weight, pred)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / pred.numel() if avg_factor is None else loss / (avg_factor + _EPS)
    return loss if autocast_enabled(pred) else loss.to(dtype)


def _fits(weight: Tensor, pred: Tensor) -> bool:
    rows, columns = pred.shape
    return weight.shape in ((rows, columns), (rows,), (rows, 1), (rows * columns,))


def _leaves_rows_out(weight: Tensor, pred: Tensor) -> bool:
    return (
        weight.numel() == len(pred)
        and not weight.requires_grad
        and not torch.compiler.is_compiling()
        and bool(((weight == 0) | (weight == 1)).all())
    )


def _broadcast(weight: Tensor, pred: Tensor) -> Tensor:
    """[N, 1] or [N, K]; what could be both is of rows, as in mmdet."""
    if weight.shape == pred.shape:
        return weight
    return weight.view(-1, 1) if len(weight) == len(pred) else weight.view(pred.shape)
