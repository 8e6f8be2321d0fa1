"""Non-maximum suppression in plain PyTorch: one definition of order, ties and NaN for every variant.

The order is by descending score, NaN first, -0 equal to +0, and among equal scores the lower index first. A
box is suppressed when its IoU with a kept box of higher rank is above the threshold; a NaN IoU suppresses
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .anchor_match import box_iou

_TILE = 256  # candidates resolved against each other at a time


class PaddedNMS(NamedTuple):
    """What `batched_nms_padded` returns.

    Attributes:
        indices: int64 ``[B, D]``, kept rows of each image by descending score, then -1.
        counts: int32 ``[B]``, how many rows of ``indices`` are kept boxes.
    """

    indices: Tensor
    counts: Tensor


def descending_order(scores: Tensor) -> Tensor:
    """int64 ``[N]``: rows by descending score, NaN first, the lower row first among equals (-0 equals +0)."""
    return torch.sort(scores + 0.0, descending=True, stable=True).indices


def _suppresses(boxes: Tensor, others: Tensor, iou_threshold: float) -> np.ndarray:
    """bool ``[N, M]``: IoU above the threshold, which is compared as a double."""
    return (box_iou(boxes, others).double() > iou_threshold).cpu().numpy()


def _keep_ranked(boxes: Tensor, iou_threshold: float) -> np.ndarray:
    """bool ``[N]``: which of the boxes, best first, survive a greedy scan, a tile of them at a time."""
    keep = np.ones(len(boxes), dtype=bool)
    for first in range(0, len(boxes), _TILE):
        tile = np.flatnonzero(keep[first : first + _TILE]) + first
        tile_boxes = boxes[tile]
        suppresses = _suppresses(tile_boxes, tile_boxes, iou_threshold)
        alive = np.ones(len(tile), dtype=bool)
        for row in range(len(tile)):
            if alive[row]:
                alive[row + 1 :] &= ~suppresses[row, row + 1 :]
        keep[tile] = alive

        later = np.flatnonzero(keep[first + _TILE :]) + first + _TILE
        if len(later) > 0:
            # bounded memory: a tile against as many boxes as make about four million pairs
            for part in np.array_split(later, 1 + len(later) // (1 << 14)):
                keep[part] &= ~_suppresses(boxes[tile[alive]], boxes[part], iou_threshold).any(axis=0)
    return keep


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See `retinanet_ext.ops.nms`."""
    order = descending_order(scores)
    return order[torch.from_numpy(_keep_ranked(boxes[order], iou_threshold)).to(order.device)]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See `retinanet_ext.ops.batched_nms`."""
    order = descending_order(scores)
    boxes, idxs = boxes[order], idxs[order]
    keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
    for label in idxs.unique():  # a label of NaN equals no other: such boxes are kept
        rows = (idxs == label).nonzero().squeeze(1)
        keep[rows] = torch.from_numpy(_keep_ranked(boxes[rows], iou_threshold)).to(order.device)
    return order[keep]


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
    num_valid: Tensor | None = None,
) -> PaddedNMS:
    """See `retinanet_ext.ops.batched_nms_padded`."""
    batch, num_boxes = scores.shape
    indices = torch.full((batch, max_detections), -1, dtype=torch.int64, device=boxes.device)
    counts = torch.zeros(batch, dtype=torch.int32, device=boxes.device)
    for image in range(batch):
        valid = slice(0, num_boxes if num_valid is None else int(num_valid[image]))
        keep = batched_nms(boxes[image, valid], scores[image, valid], labels[image, valid], iou_threshold)
        keep = keep[:max_detections]
        indices[image, : len(keep)] = keep
        counts[image] = len(keep)
    return PaddedNMS(indices, counts)
