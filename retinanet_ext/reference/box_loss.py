"""The box regression loss over foreground anchors, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .anchor_match import at_least, decode_boxes, encode_boxes, split_packed
from .focal_loss import anchor_rows, compute_dtype


def _giou_loss(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - GIoU of each pair of rows (Rezatofighi et al., 2019), ``[n, 4]`` and ``[n, 4]`` to ``[n]``."""
    sizes1, sizes2 = boxes1[:, 2:] - boxes1[:, :2], boxes2[:, 2:] - boxes2[:, :2]
    overlap = torch.min(boxes1[:, 2:], boxes2[:, 2:]) - torch.max(boxes1[:, :2], boxes2[:, :2])
    overlap = at_least(overlap, 0)
    hull = torch.max(boxes1[:, 2:], boxes2[:, 2:]) - torch.min(boxes1[:, :2], boxes2[:, :2])

    intersection = overlap.prod(dim=1)
    union = sizes1.prod(dim=1) + sizes2.prod(dim=1) - intersection
    hull_area = hull.prod(dim=1)
    return 1 - (intersection / (union + eps) - (hull_area - union) / (hull_area + eps))


def box_regression_loss(
    deltas: Sequence[Tensor] | Tensor,
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    matched: Tensor,
    loss: str = "l1",
    beta: float = 1.0 / 9.0,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    normalizer: Tensor | float | None = None,
    gt_offsets: Tensor | None = None,
) -> Tensor:
    """See `retinanet_ext.ops.box_regression_loss`."""
    if gt_offsets is not None:
        gt_boxes = split_packed(gt_boxes, gt_offsets)
    levels = [deltas] if isinstance(deltas, Tensor) else deltas
    deltas = torch.cat([anchor_rows(level, 4) for level in levels], dim=1)
    compute = compute_dtype(deltas.dtype)

    losses = []
    for image, image_boxes in enumerate(gt_boxes):
        foreground = (matched[image] >= 0).nonzero().squeeze(1)
        fg_deltas = deltas[image, foreground].to(compute)
        fg_anchors = (anchors if anchors.dim() == 2 else anchors[image])[foreground].to(compute)
        fg_boxes = image_boxes[matched[image, foreground].long()].to(compute)
        if loss == "giou":
            image_loss = _giou_loss(decode_boxes(fg_deltas, fg_anchors, weights), fg_boxes).sum()
        else:
            expected = encode_boxes(fg_boxes, fg_anchors, weights)
            image_loss = F.smooth_l1_loss(fg_deltas, expected, reduction="sum", beta=0.0 if loss == "l1" else beta)
        losses.append(image_loss)

    per_image = torch.stack(losses) if losses else deltas.sum(dim=(1, 2)).to(compute)
    if normalizer is not None:
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.detach().to(compute)
        per_image = per_image / normalizer
    return per_image.sum()
