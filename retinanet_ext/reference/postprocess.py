"""From head outputs to detections, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .anchor_match import decode_boxes
from .focal_loss import anchor_rows, compute_dtype
from .nms import batched_nms, descending_order


class Detections(NamedTuple):
    """What `detect` returns: the best ``D`` detections of each image, best first, and padding after them.

    Attributes:
        boxes: ``[B, D, 4]``, pixels of the network's input, padding 0.
        scores: ``[B, D]``, padding 0.
        labels: int64 ``[B, D]``, padding -1.
        indices: int64 ``[B, D]``, ``anchor * K + class``, padding -1.
        counts: int32 ``[B]``, how many detections each image has.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    indices: Tensor
    counts: Tensor


def _select_topk(logits: Tensor, score_thresh: float, topk: int) -> Tensor:
    """Flat indices of the ``topk`` largest logits with a sigmoid above the threshold, best first.

    Of equal logits the lower index comes first and stays. The sigmoid is compared with the threshold in
    float32 (float64 for float64 logits).
    """
    candidates = (torch.sigmoid(logits) > score_thresh).nonzero().squeeze(1)
    if len(candidates) > topk > 0:
        cutoff = logits[candidates].topk(topk).values[-1]
        candidates = candidates[logits[candidates] >= cutoff]  # with all that tie with the last one
    return candidates[descending_order(logits[candidates])[:topk]]


def _num_classes(logits: Tensor, deltas: Tensor) -> int:
    """``K`` of one level: logits ``[B, A * K, H, W]`` and deltas ``[B, 4 * A, H, W]``, or ``[B, n, K]``."""
    return logits.shape[2] if logits.dim() == 3 else logits.shape[1] * 4 // deltas.shape[1]


def clip_boxes(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Boxes ``[n, 4]`` clipped to an image of ``image_size`` ``[2]``, (height, width)."""
    height, width = image_size.to(boxes.dtype)
    limit = torch.stack((width, height, width, height))
    return torch.minimum(boxes.clamp(min=0), limit)


def detect(
    cls_logits: Sequence[Tensor] | Tensor,
    box_deltas: Sequence[Tensor] | Tensor,
    anchors: Tensor,
    image_sizes: Sequence[tuple[int, int]] | Tensor,
    *,
    score_thresh: float = 0.05,
    topk_per_level: int = 1000,
    nms_thresh: float = 0.5,
    max_detections: int = 300,
    clip_before_nms: bool = True,
) -> Detections:
    """See `retinanet_ext.ops.detect`."""
    delta_levels = [box_deltas] if isinstance(box_deltas, Tensor) else box_deltas
    logit_levels = [cls_logits] if isinstance(cls_logits, Tensor) else cls_logits
    num_classes = _num_classes(logit_levels[0], delta_levels[0])
    delta_levels = [anchor_rows(level, 4) for level in delta_levels]
    image_sizes = torch.as_tensor(image_sizes, device=anchors.device)
    level_sizes = [level.shape[1] for level in delta_levels]
    deltas = torch.cat(delta_levels, dim=1)

    compute = compute_dtype(logit_levels[0].dtype)
    dtype = compute_dtype(torch.promote_types(deltas.dtype, anchors.dtype))
    batch = len(deltas)
    out = Detections(
        boxes=torch.zeros((batch, max_detections, 4), dtype=dtype, device=anchors.device),
        scores=torch.zeros((batch, max_detections), dtype=compute, device=anchors.device),
        labels=torch.full((batch, max_detections), -1, device=anchors.device),
        indices=torch.full((batch, max_detections), -1, device=anchors.device),
        counts=torch.zeros(batch, dtype=torch.int32, device=anchors.device),
    )
    if num_classes == 0:
        return out
    for image in range(batch):
        indices, logits, first_anchor = [], [], 0
        for level, level_size in zip(logit_levels, level_sizes, strict=True):
            level_logits = anchor_rows(level[image : image + 1], num_classes).flatten().to(compute)
            selected = _select_topk(level_logits, score_thresh, topk_per_level)
            indices.append(selected + first_anchor * num_classes)
            logits.append(level_logits[selected])
            first_anchor += level_size
        indices, logits = torch.cat(indices), torch.cat(logits)

        anchor_ids, labels = indices // num_classes, indices % num_classes
        image_anchors = anchors if anchors.dim() == 2 else anchors[image]
        boxes = decode_boxes(deltas[image, anchor_ids].to(dtype), image_anchors[anchor_ids].to(dtype))
        if clip_before_nms:
            boxes = clip_boxes(boxes, image_sizes[image])
        # levels follow each other in the order of flat indices: the stable order breaks ties by index
        keep = batched_nms(boxes, logits, labels, nms_thresh)[:max_detections]
        boxes = boxes[keep]
        if not clip_before_nms:
            boxes = clip_boxes(boxes, image_sizes[image])

        out.boxes[image, : len(keep)] = boxes
        out.scores[image, : len(keep)] = torch.sigmoid(logits[keep])
        out.labels[image, : len(keep)] = labels[keep]
        out.indices[image, : len(keep)] = indices[keep]
        out.counts[image] = len(keep)
    return out
