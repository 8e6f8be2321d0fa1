"""The box regression loss over foreground anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .anchor_match import (
    Boxes,
    check_anchors,
    check_device,
    check_floating,
    check_gt_boxes,
    check_no_vmap,
    check_weights,
)

LOSSES = ("l1", "smooth_l1", "giou")


def box_regression_loss(
    deltas: Sequence[Tensor] | Tensor,
    anchors: Tensor,
    gt_boxes: Boxes,
    matched: Tensor,
    loss: str = "l1",
    beta: float = 1.0 / 9.0,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    normalizer: Tensor | float | None = None,
    gt_offsets: Tensor | None = None,
) -> Tensor:
    """The loss of the box subnet: ``sum_b loss_b / normalizer_b``, over foreground anchors alone.

    What other anchors predict is never read: their gradient is exactly zero even where the prediction is not
    finite. torchvision's loss has ``normalizer_b = B * max(1, foreground anchors of image b)``.

    Args:
        deltas: a level at a time as the convolution leaves it, ``[B, 4 * A, H, W]`` (channel ``4 * a + c``,
            any memory format) or ``[B, H * W * A, 4]``; or all levels as ``[B, N, 4]``. Floating.
        anchors: ``[N, 4]`` or ``[B, N, 4]``, in the order level, row, column, anchor of the cell.
        gt_boxes: ``[M_i, 4]`` for each image; or packed ``[capacity, 4]`` with ``gt_offsets``.
        matched: int32 or int64 ``[B, N]``, as `match_anchors` returns it; negative is not foreground.
        loss: "l1" and "smooth_l1" compare deltas with those of the matched box, the sum of the four
            differences; "giou" is 1 - GIoU of the decoded box (Rezatofighi et al., 2019), with torchvision's
            eps of 1e-7.
        beta: where "smooth_l1" goes over from ``d**2 / (2 beta)`` to ``d - beta / 2``; 0 is "l1". (1/9 in the
            RetinaNet paper's code and in mmdet, 0.1 in detectron2, 1 in PyTorch.)
        weights: ``(wx, wy, ww, wh)`` of the box coder, positive.
        normalizer: a number, a scalar tensor or ``[B]``; 1 if None. It gets no gradient.
        gt_offsets: int32 ``[B + 1]``, see `match_anchors`.

    Returns:
        A scalar, float32 (float64 if the deltas are). Halves are computed in float32.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, an unknown ``loss``, a
            negative ``beta``, weights that are not positive.
    """
    op = "box_regression_loss"
    batch, num_anchors, device = _check_deltas(op, deltas)
    check_anchors(op, anchors, batch)
    if anchors.shape[-2] != num_anchors:
        raise ValueError(f"{op}: anchors: expected {num_anchors}, as many as deltas, got {anchors.shape[-2]}")
    check_device(op, "anchors", anchors, device)
    num_images = check_gt_boxes(op, gt_boxes, gt_offsets, device)
    if num_images != batch:
        raise ValueError(f"{op}: gt_boxes: expected those of {batch} images, as deltas have, got {num_images}")
    if not isinstance(matched, Tensor) or matched.dtype not in (torch.int32, torch.int64):
        got = matched.dtype if isinstance(matched, Tensor) else type(matched).__name__
        raise TypeError(f"{op}: matched: expected a tensor of int32 or int64, got {got}")
    if matched.shape != (batch, num_anchors):
        raise ValueError(f"{op}: matched: expected shape [{batch}, {num_anchors}], got {list(matched.shape)}")
    check_device(op, "matched", matched, device)
    if loss not in LOSSES:
        raise ValueError(f"{op}: loss: expected one of {LOSSES}, got {loss!r}")
    if not beta >= 0:
        raise ValueError(f"{op}: beta: expected a number of at least 0, got {beta}")
    check_weights(op, weights)
    if isinstance(normalizer, Tensor):
        if normalizer.dim() > 0 and normalizer.shape != (batch,):
            raise ValueError(f"{op}: normalizer: expected a scalar or shape [{batch}], got {list(normalizer.shape)}")
        if normalizer.dim() > 0:
            check_device(op, "normalizer", normalizer, device)
    return reference.box_regression_loss(
        deltas, anchors, gt_boxes, matched, loss, beta, weights, normalizer, gt_offsets
    )


def _check_deltas(op: str, deltas: Sequence[Tensor] | Tensor) -> tuple[int, int, torch.device]:
    """Every level ``[B, 4 * A, H, W]`` or ``[B, n, 4]``. Returns ``B``, ``N`` and the device."""
    levels = [("deltas", deltas)] if isinstance(deltas, Tensor) else _named_levels(op, "deltas", deltas)
    num_anchors = 0
    for name, level in levels:
        check_no_vmap(op, level)
        check_floating(op, name, level)
        if level.dim() == 4 and level.shape[1] % 4 == 0:
            num_anchors += level.shape[1] // 4 * level.shape[2] * level.shape[3]
        elif level.dim() == 3 and level.shape[2] == 4:
            num_anchors += level.shape[1]
        else:
            raise ValueError(f"{op}: {name}: expected [B, 4 * A, H, W] or [B, n, 4], got {list(level.shape)}")
    first = levels[0][1]
    for name, level in levels[1:]:
        if len(level) != len(first):
            raise ValueError(f"{op}: {name}: expected a batch of {len(first)}, as the first level, got {len(level)}")
        if level.dtype != first.dtype:
            raise TypeError(f"{op}: {name}: expected {first.dtype}, as the first level, got {level.dtype}")
        check_device(op, name, level, first.device)
    return len(first), num_anchors, first.device


def _named_levels(op: str, name: str, levels: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    if not isinstance(levels, Sequence):
        raise TypeError(f"{op}: {name}: expected a tensor or a list of tensors, got {type(levels).__name__}")
    if len(levels) == 0:
        raise ValueError(f"{op}: {name}: expected at least one level, got an empty list")
    return [(f"{name}[{index}]", level) for index, level in enumerate(levels)]
