"""Matching anchors with ground-truth boxes, IoU and the box coder, in plain PyTorch.

Boxes are ``(x1, y1, x2, y2)``. ``N`` anchors and ``M`` ground-truth boxes an image, ``B`` images. These
functions are the truth the compiled operators are tested against; arguments are checked by
`retinanet_ext.ops`, not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BACKGROUND = -1
BETWEEN_THRESHOLDS = -2  # neither foreground nor background: left out of every loss

DELTA_CLIP = math.log(1000.0 / 16)  # largest dw, dh that decoding accepts: a factor of 62.5

_PAIRS_A_BLOCK = 1 << 20  # at most so many IoU values are held at once (or one ground-truth box against all anchors)


class AssignedTargets(NamedTuple):
    """What `assign_targets` returns.

    Attributes:
        labels: int32 ``[B, N]``, the class of each anchor, -1 background, -2 left out.
        matched: int32 ``[B, N]``, the row of the ground-truth box of each anchor, -1 background, -2 left out.
        num_foreground: int32 ``[B]``, how many anchors of each image have a class.
    """

    labels: Tensor
    matched: Tensor
    num_foreground: Tensor


def at_least(values: Tensor, limit: float) -> Tensor:
    """``clamp(min=limit)`` whose derivative at the limit is 1, as the compiled operators and torch 2.13 have it. (Torch
    2.15 has 0.)"""
    return torch.where(values >= limit, values, values.detach().clamp(min=limit))


def at_most(values: Tensor, limit: float) -> Tensor:
    """``clamp(max=limit)``, likewise."""
    return torch.where(values <= limit, values, values.detach().clamp(max=limit))


def upcast(boxes: Tensor) -> Tensor:
    """Boxes in the type to compute in: float32 for halves, int32 for small integers, else their own."""
    if boxes.dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        return boxes
    return boxes.float() if boxes.is_floating_point() else boxes.int()


def split_packed(packed: Tensor, offsets: Tensor) -> list[Tensor]:
    """Rows ``offsets[b]:offsets[b + 1]`` for each image b. Rows past the last offset are not read."""
    bounds = offsets.tolist()
    return [packed[first:last] for first, last in pairwise(bounds)]


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """IoU of every pair, ``[..., N, M]``, with every operation rounded on its own, in torchvision's order."""
    boxes1, boxes2 = upcast(boxes1), upcast(boxes2)
    if fmt == "xyxy":
        lo1, hi1, lo2, hi2 = boxes1[..., :2], boxes1[..., 2:], boxes2[..., :2], boxes2[..., 2:]
        size1, size2 = hi1 - lo1, hi2 - lo2
    else:
        size1, size2 = boxes1[..., 2:], boxes2[..., 2:]
        if fmt == "xywh":
            lo1, hi1 = boxes1[..., :2], boxes1[..., :2] + size1
            lo2, hi2 = boxes2[..., :2], boxes2[..., :2] + size2
        else:  # cxcywh
            lo1, hi1 = boxes1[..., :2] - size1 / 2, boxes1[..., :2] + size1 / 2
            lo2, hi2 = boxes2[..., :2] - size2 / 2, boxes2[..., :2] + size2 / 2
    area1, area2 = size1[..., 0] * size1[..., 1], size2[..., 0] * size2[..., 1]

    overlap = torch.min(hi1[..., None, :], hi2[..., None, :, :]) - torch.max(lo1[..., None, :], lo2[..., None, :, :])
    overlap = at_least(overlap, 0)
    intersection = overlap[..., 0] * overlap[..., 1]
    union = area1[..., None] + area2[..., None, :] - intersection
    return intersection / union


def _iou_blocks(gt_boxes: Tensor, anchors: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of ``box_iou(gt_boxes, anchors)`` a block at a time, each with the index of its first row.

    A pair whose IoU is not a number (a degenerate or NaN anchor) does not overlap.
    """
    rows = max(1, _PAIRS_A_BLOCK // max(1, len(anchors)))
    for first in range(0, len(gt_boxes), rows):
        iou = box_iou(gt_boxes[first : first + rows], anchors)
        yield first, iou.masked_fill(iou.isnan(), 0.0)


def _restored_by_best(gt_boxes: Tensor, anchors: Tensor, gt_best: Tensor, may_restore: Tensor) -> Tensor:
    """int64 ``[N]``: the highest row of a box that an anchor is the best of (bit-equal IoU), or -1."""
    restored = torch.full((len(anchors),), -1, device=anchors.device)
    for first, iou in _iou_blocks(gt_boxes, anchors):
        rows = torch.arange(first, first + len(iou), device=anchors.device)
        is_best = (iou == gt_best[rows, None]) & may_restore[rows, None]
        restored = torch.maximum(restored, torch.where(is_best, rows[:, None], -1).amax(dim=0))
    return restored


def _match_image(
    anchors: Tensor,  # [N, 4]
    gt_boxes: Tensor,  # [M, 4], none degenerate
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    allow_low_quality_matches: bool,
    policy: str,
    min_pos_iou: float,
) -> Tensor:
    """int64 ``[N]``: the matched row of ``gt_boxes``, -1 or -2."""
    if len(gt_boxes) == 0 or len(anchors) == 0:
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)

    best_iou = torch.full((len(anchors),), -1.0, dtype=gt_boxes.dtype, device=anchors.device)
    best_gt = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    gt_best = []  # the IoU of each box with its best anchor
    for first, iou in _iou_blocks(gt_boxes, anchors):
        block_iou, block_gt = iou.max(dim=0)  # the first row on a tie
        better = block_iou > best_iou
        best_iou = torch.where(better, block_iou, best_iou)
        best_gt = torch.where(better, block_gt + first, best_gt)
        gt_best.append(iou.amax(dim=1))
    gt_best = torch.cat(gt_best)

    matched = torch.where(best_iou >= fg_iou_thresh, best_gt, BETWEEN_THRESHOLDS)
    matched = torch.where(best_iou < bg_iou_thresh, BACKGROUND, matched)
    if not allow_low_quality_matches:
        return matched

    if policy == "mmdet":
        restored = _restored_by_best(gt_boxes, anchors, gt_best, gt_best >= min_pos_iou)
        return torch.where(restored >= 0, restored, matched)
    may_restore = gt_best > 0 if policy == "safe" else torch.ones_like(gt_best, dtype=torch.bool)
    restored = _restored_by_best(gt_boxes, anchors, gt_best, may_restore)
    return torch.where(restored >= 0, best_gt, matched)


def _mostly_inside_any(anchors: Tensor, regions: Tensor) -> Tensor:
    """bool ``[N]``: at least half of the anchor's own area lies inside one of ``regions`` ``[R, 4]``."""
    inside = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    area = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    for region in regions:
        overlap = torch.min(anchors[:, 2:], region[2:]) - torch.max(anchors[:, :2], region[:2])
        overlap = overlap.clamp(min=0)
        inside |= overlap[:, 0] * overlap[:, 1] / area >= 0.5
    return inside


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    fg_iou_thresh: float = 0.5,
    bg_iou_thresh: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    policy: str = "safe",
    min_pos_iou: float = 0.0,
    gt_ignore: Sequence[Tensor] | Tensor | None = None,
    gt_offsets: Tensor | None = None,
) -> Tensor:
    """See `retinanet_ext.ops.match_anchors`."""
    if gt_offsets is not None:
        gt_boxes = split_packed(gt_boxes, gt_offsets)
        gt_ignore = None if gt_ignore is None else split_packed(gt_ignore, gt_offsets)

    result = torch.full((len(gt_boxes), anchors.shape[-2]), BACKGROUND, dtype=torch.int32, device=anchors.device)
    dtype = upcast(anchors).dtype
    for image_boxes in gt_boxes:
        dtype = torch.promote_types(dtype, upcast(image_boxes).dtype)
    for image, image_boxes in enumerate(gt_boxes):
        image_anchors = (anchors if anchors.dim() == 2 else anchors[image]).to(dtype)
        image_boxes = image_boxes.to(dtype)

        sides = image_boxes[:, 2:] - image_boxes[:, :2]
        valid = ((sides > 0) & (sides < math.inf)).all(dim=1)
        ignored = torch.zeros_like(valid) if gt_ignore is None else gt_ignore[image]
        rows = (valid & ~ignored).nonzero().squeeze(1)

        matched = _match_image(
            image_anchors,
            image_boxes[rows],
            fg_iou_thresh,
            bg_iou_thresh,
            allow_low_quality_matches,
            policy,
            min_pos_iou,
        )
        if len(rows) > 0:
            matched = torch.where(matched >= 0, rows[matched.clamp(min=0)], matched)
        in_ignored = _mostly_inside_any(image_anchors, image_boxes[valid & ignored])
        result[image] = torch.where((matched < 0) & in_ignored, BETWEEN_THRESHOLDS, matched)
    return result


def assign_targets(
    anchors: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    gt_labels: Sequence[Tensor] | Tensor,
    fg_iou_thresh: float = 0.5,
    bg_iou_thresh: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    policy: str = "safe",
    min_pos_iou: float = 0.0,
    gt_ignore: Sequence[Tensor] | Tensor | None = None,
    gt_offsets: Tensor | None = None,
) -> AssignedTargets:
    """See `retinanet_ext.ops.assign_targets`."""
    matched = match_anchors(
        anchors,
        gt_boxes,
        fg_iou_thresh,
        bg_iou_thresh,
        allow_low_quality_matches,
        policy=policy,
        min_pos_iou=min_pos_iou,
        gt_ignore=gt_ignore,
        gt_offsets=gt_offsets,
    )
    if gt_offsets is not None:
        gt_labels = split_packed(gt_labels, gt_offsets)
    labels = matched.clone()
    for image, image_labels in enumerate(gt_labels):
        foreground = matched[image] >= 0
        labels[image, foreground] = image_labels[matched[image, foreground].long()].to(torch.int32)
    return AssignedTargets(labels, matched, (matched >= 0).sum(dim=1, dtype=torch.int32))


def _centers_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    sizes = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sizes, sizes


def encode_boxes(gt_boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """See `retinanet_ext.ops.encode_boxes`."""
    dtype = torch.promote_types(gt_boxes.dtype, anchors.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    gt_centers, gt_sizes = _centers_and_sizes(gt_boxes.to(compute))
    centers, sizes = _centers_and_sizes(anchors.to(compute))
    wx, wy, ww, wh = weights
    shifts, scales = gt_centers - centers, torch.log(gt_sizes / sizes)
    deltas = (
        wx * shifts[..., 0] / sizes[..., 0],
        wy * shifts[..., 1] / sizes[..., 1],
        ww * scales[..., 0],
        wh * scales[..., 1],
    )
    return torch.stack(deltas, dim=-1).to(dtype)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = DELTA_CLIP,
) -> Tensor:
    """See `retinanet_ext.ops.decode_boxes`."""
    dtype = torch.promote_types(deltas.dtype, anchors.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    centers, sizes = _centers_and_sizes(anchors.to(compute))
    dx, dy, dw, dh = deltas.to(compute).unbind(dim=-1)
    wx, wy, ww, wh = weights

    center_x = dx / wx * sizes[..., 0] + centers[..., 0]
    center_y = dy / wy * sizes[..., 1] + centers[..., 1]
    half_w = 0.5 * (torch.exp(at_most(dw / ww, clip)) * sizes[..., 0])
    half_h = 0.5 * (torch.exp(at_most(dh / wh, clip)) * sizes[..., 1])
    corners = (center_x - half_w, center_y - half_h, center_x + half_w, center_y + half_h)
    return torch.stack(corners, dim=-1).to(dtype)
