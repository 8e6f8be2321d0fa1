"""Which inputs of a torchvision RetinaNet our operators and torchvision's code have the same answer for.

Everything else, errors among it, is left to torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..reference.focal_loss import compute_dtype
from .levels import Levels

Targets = Sequence[Mapping[str, Tensor]]


def are_taken(images: Sequence[Tensor], targets: Targets | None, training: bool) -> bool:
    """Whether torchvision takes them, as far as it looks before it resizes them."""
    if training and (targets is None or not all(_are_boxes(target["boxes"]) for target in targets)):
        return False
    return all(image.dim() >= 2 for image in images)


def _are_boxes(boxes: object) -> bool:
    return isinstance(boxes, Tensor) and boxes.dim() == 2 and boxes.shape[-1] == 4


def have_degenerate_boxes(targets: Targets) -> bool:
    """Boxes without width or height, which torchvision refuses; NaN is neither."""
    return any(bool((target["boxes"][:, 2:] <= target["boxes"][:, :2]).any()) for target in targets)


def have_boxes_and_labels(targets: Targets) -> bool:
    """Boxes [M, 4] and integer labels [M] that torchvision reads as they are."""
    for target in targets:
        boxes, labels = target.get("boxes"), target.get("labels")
        if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor):
            return False
        if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            return False
        if labels.dtype not in (torch.int64, torch.int32) or labels.device != boxes.device:
            return False
        if torch.is_grad_enabled() and boxes.requires_grad:
            return False
    return len(targets) > 0 and len({target["boxes"].device for target in targets}) == 1


def values_fit(targets: Targets, num_classes: int) -> bool:
    """No box without area, no label that torchvision wraps around or refuses. Waits for the device once."""
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    boxes_fit = (boxes[:, 2:] > boxes[:, :2]).all() & boxes.isfinite().all()
    return bool(boxes_fit & ((labels >= 0) & (labels < num_classes)).all())


def layouts_fit(targets: Targets, logits: Levels, deltas: Levels, anchors: list[Tensor]) -> bool:
    """Targets for each image, in the type that we and torchvision compute in."""
    wide = compute_dtype(deltas[0].dtype)
    return (
        len(targets) == len(anchors)
        and have_boxes_and_labels(targets)
        and all(target["boxes"].dtype == wide and target["boxes"].device == deltas[0].device for target in targets)
        and compute_dtype(logits[0].dtype) == wide
        and anchors_fit(deltas, anchors)
    )


def anchors_fit(deltas: Levels, anchors: list[Tensor]) -> bool:
    """[N, 4] for each image of the batch, in no other precision than the deltas."""
    first = anchors[0]
    return len(anchors) == len(deltas[0]) and all(
        image.shape == first.shape
        and compute_dtype(image.dtype) == compute_dtype(deltas[0].dtype)
        and not (torch.is_grad_enabled() and image.requires_grad)
        for image in anchors
    )


def sizes_fit(logits: Levels, deltas: Levels, anchors: list[Tensor], num_classes: int) -> bool:
    """As many classes as the head says, and an anchor for each prediction."""
    if num_classes < 1 or not anchors_fit(deltas, anchors):
        return False
    rows = len(anchors[0])
    return [sum(level[0].numel() for level in levels) for levels in (logits, deltas)] == [rows * num_classes, rows * 4]


def rows_fit(logits: Levels, deltas: Levels, anchors: list[list[Tensor]]) -> bool:
    """Logits [B, n, K], deltas [B, n, 4] and anchors [n, 4] of the same levels and images, K > 0."""
    if not anchors or not logits or not len(logits) == len(deltas) == len(anchors[0]):
        return False
    batch, num_classes = len(anchors), logits[0].shape[-1]
    for index, (level_logits, level_deltas) in enumerate(zip(logits, deltas, strict=True)):
        rows = level_logits.shape[1] if level_logits.dim() == 3 else -1
        if level_logits.shape != (batch, rows, num_classes) or level_deltas.shape != (batch, rows, 4):
            return False
        if any(len(image) != len(logits) or image[index].shape != (rows, 4) for image in anchors):
            return False
    return num_classes > 0 and anchors_fit(deltas, [image[0] for image in anchors])
