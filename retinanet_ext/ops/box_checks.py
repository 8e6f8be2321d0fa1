"""Argument checks of the operators on boxes; every message names the operator, the argument, and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Boxes = Sequence[Tensor] | Tensor  # one [M_i, 4] an image, or [capacity, 4] with gt_offsets


def describe(value: object) -> str:
    """A value's type for an error message; of a tensor its element type."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def no_vmap_message(op: str) -> str:
    instead = "pass the whole batch, or call it for each image"
    if op in ("nms", "batched_nms"):
        instead = "how many rows stay differs by image; batched_nms_padded takes the whole batch"
    return f"{op}: vmap is not supported: {instead}"


def check_no_vmap(op: str, *values: object) -> None:
    """Operators whose work depends on the values take batches themselves and cannot be vmapped.

    ``values``: arguments, tensors and lists of tensors among them.
    """
    for value in values:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor) and torch._C._functorch.is_batchedtensor(tensor):
                raise RuntimeError(no_vmap_message(op))


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{op}: {name}: expected all tensors on one device, {device}, got {value.device}")


def check_floating(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name}: expected a floating tensor, got {describe(value)}")


def check_anchors(op: str, anchors: Tensor, batch: int | None = None) -> None:
    """``anchors`` is floating ``[N, 4]``, or ``[B, N, 4]`` for the batch, if that is known."""
    check_floating(op, "anchors", anchors)
    if anchors.dim() not in (2, 3) or anchors.shape[-1] != 4:
        raise ValueError(f"{op}: anchors: expected shape [N, 4] or [B, N, 4], got {list(anchors.shape)}")
    if batch is not None and anchors.dim() == 3 and anchors.shape[0] != batch:
        raise ValueError(f"{op}: anchors: expected [N, 4] or [{batch}, N, 4], got {list(anchors.shape)}")


def check_weights(op: str, weights: Sequence[float]) -> None:
    if len(weights) != 4 or not all(weight > 0 for weight in weights):
        raise ValueError(f"{op}: weights: expected four positive numbers (wx, wy, ww, wh), got {weights}")


def check_gt_boxes(op: str, gt_boxes: Boxes, gt_offsets: Tensor | None, device: torch.device) -> int:
    """A list of ``[M_i, 4]``, or ``[capacity, 4]`` with int32 offsets ``[B + 1]``. Returns ``B``."""
    if gt_offsets is None:
        if isinstance(gt_boxes, Tensor) or not isinstance(gt_boxes, Sequence):
            raise TypeError(
                f"{op}: gt_boxes: expected a list of [M_i, 4], one an image, or packed with gt_offsets, "
                f"got {describe(gt_boxes)}"
            )
        named_boxes = [(f"gt_boxes[{image}]", boxes) for image, boxes in enumerate(gt_boxes)]
    else:
        if not isinstance(gt_offsets, Tensor) or gt_offsets.dtype != torch.int32:
            raise TypeError(f"{op}: gt_offsets: expected a tensor of torch.int32, got {describe(gt_offsets)}")
        if gt_offsets.dim() != 1 or gt_offsets.shape[0] == 0:
            raise ValueError(f"{op}: gt_offsets: expected shape [B + 1], got {list(gt_offsets.shape)}")
        check_device(op, "gt_offsets", gt_offsets, device)
        named_boxes = [("gt_boxes", gt_boxes)]
    for name, boxes in named_boxes:
        check_floating(op, name, boxes)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{op}: {name}: expected shape [M, 4], got {list(boxes.shape)}")
        check_device(op, name, boxes, device)
    # by shape, not len(): torch.export would take a dynamic size for a constant
    return len(gt_boxes) if gt_offsets is None else gt_offsets.shape[0] - 1


def check_per_box(
    op: str, name: str, values: Sequence[Tensor] | Tensor, gt_boxes: Boxes, dtypes: tuple[torch.dtype, ...]
) -> None:
    """``values`` has a number for each box, and is packed if the boxes are."""
    if isinstance(gt_boxes, Tensor):
        pairs = [(name, values, gt_boxes)]
    else:
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            raise TypeError(f"{op}: {name}: expected a list of [M_i], one an image, got {describe(values)}")
        if len(values) != len(gt_boxes):
            raise ValueError(f"{op}: {name}: expected one for each of {len(gt_boxes)} images, got {len(values)}")
        pairs = [(f"{name}[{image}]", *pair) for image, pair in enumerate(zip(values, gt_boxes, strict=True))]
    for where, value, boxes in pairs:
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            expected = "integers" if len(dtypes) > 1 else str(dtypes[0])
            raise TypeError(f"{op}: {where}: expected a tensor of {expected}, got {describe(value)}")
        if value.shape != boxes.shape[:1]:
            raise ValueError(f"{op}: {where}: expected shape [{len(boxes)}], got {list(value.shape)}")
        check_device(op, where, value, boxes.device)
