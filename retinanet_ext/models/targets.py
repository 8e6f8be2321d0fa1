"""Checks of what a user passes to the model: a mistake is named by image, not found as a NaN loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.box_checks import INTEGERS


def check_images(images: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The images as a list.

    Raises:
        TypeError: something else than a list of floating tensors (or one tensor ``[B, 3, H, W]``).
        ValueError: no image at all, or one that is not ``[3, H, W]`` with positive sides.
    """
    if not isinstance(images, Sequence | Tensor):
        raise TypeError(f"images: expected a list of tensors [3, H, W], got {type(images).__name__}")
    images = list(images)
    if not images:
        raise ValueError("images: expected at least one image, got an empty list")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{index}]: expected a tensor [3, H, W], got {type(image).__name__}")
        if not image.is_floating_point():
            raise TypeError(f"images[{index}]: expected a floating type with values in 0..1, got {image.dtype}")
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(f"images[{index}]: expected shape [3, H, W], got {list(image.shape)}")
    return images


def check_targets(
    targets: Sequence[Mapping[str, Tensor]] | None, images: Sequence[Tensor], num_classes: int
) -> Sequence[Mapping[str, Tensor]]:
    """The targets, if every one of them is right; the values of the whole batch cost one device sync.

    Under ``torch.compile`` types and shapes are checked, and values are not.

    Raises:
        TypeError: a target that is not a dictionary, or a ``boxes``, ``labels`` or ``ignore`` of another
            type.
        ValueError: no or too few targets, wrong shapes, boxes that are not finite or without area, or labels
            outside ``[0, num_classes)``.
    """
    if targets is None:
        raise ValueError("targets: expected a dictionary for each image, got None")
    if len(targets) != len(images):
        raise ValueError(f"targets: expected one for each of {len(images)} images, got {len(targets)}")
    for index, (target, image) in enumerate(zip(targets, images, strict=True)):
        _check_layout(index, target, image)
    if torch.compiler.is_compiling():
        return targets  # a branch on values would cut the graph in two

    all_right = torch.stack(
        [_boxes_right(t["boxes"]).all() & _labels_right(t["labels"], num_classes).all() for t in targets]
    ).all()
    if not all_right:
        for index, target in enumerate(targets):
            _report_values(index, target, num_classes)
    return targets


def _check_layout(index: int, target: Mapping[str, Any], image: Tensor) -> None:
    """Types, shapes and devices: nothing that would have to wait for the device."""
    where = f"targets[{index}]"
    if not isinstance(target, Mapping):
        raise TypeError(f"{where}: expected a dictionary with 'boxes' and 'labels', got {type(target).__name__}")
    for key in ("boxes", "labels"):
        if key not in target:
            raise ValueError(f"{where}: expected the key '{key}', got {sorted(target)}")
    for key in ("boxes", "labels", "ignore"):
        value = target.get(key)
        if value is None and key == "ignore":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}['{key}']: expected a tensor, got {type(value).__name__}")
        if value.device != image.device:
            raise ValueError(f"{where}['{key}']: expected it on the image's device {image.device}, got {value.device}")

    boxes, labels, ignore = target["boxes"], target["labels"], target.get("ignore")
    if not boxes.is_floating_point():
        raise TypeError(f"{where}['boxes']: expected a floating type, got {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}['boxes']: expected shape [M, 4], got {list(boxes.shape)}")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{where}['labels']: expected an integer type, got {labels.dtype}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"{where}['labels']: expected shape [{len(boxes)}], got {list(labels.shape)}")
    if ignore is not None and ignore.dtype != torch.bool:
        raise TypeError(f"{where}['ignore']: expected torch.bool, got {ignore.dtype}")
    if ignore is not None and ignore.shape != boxes.shape[:1]:
        raise ValueError(f"{where}['ignore']: expected shape [{len(boxes)}], got {list(ignore.shape)}")


def _boxes_right(boxes: Tensor) -> Tensor:
    """bool ``[M]``"""
    return boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _labels_right(labels: Tensor, num_classes: int) -> Tensor:
    """bool ``[M]``"""
    labels = labels.long()  # uint8 would wrap num_classes
    return (labels >= 0) & (labels < num_classes)


def _report_values(index: int, target: Mapping[str, Tensor], num_classes: int) -> None:
    """Raise for the first wrong box or label of this image, if it has one."""
    boxes, labels = target["boxes"], target["labels"]
    for row in (~_boxes_right(boxes)).nonzero().flatten().tolist():
        raise ValueError(
            f"targets[{index}]['boxes'][{row}]: expected a finite (x1, y1, x2, y2) with x1 < x2 and y1 < y2, "
            f"got {tuple(boxes[row].tolist())}"
        )
    for row in (~_labels_right(labels, num_classes)).nonzero().flatten().tolist():
        raise ValueError(
            f"targets[{index}]['labels'][{row}]: expected a class in [0, {num_classes}), got {int(labels[row])}"
        )
