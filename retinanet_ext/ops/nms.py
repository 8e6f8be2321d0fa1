"""Non-maximum suppression.

One definition for all of it. The order is by descending score; NaN scores come first, -0 equals +0, and of
equal scores the lower index comes first. A box is suppressed when its IoU with a kept box of higher rank is
above the threshold. IoU is computed in float32 (float64 for float64) and compared with the threshold as a
double; there is no +1 anywhere; an IoU of NaN suppresses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _load  # noqa: F401 - registers the operators
from ..reference.nms import PaddedNMS
from .box_checks import INTEGERS, check_device, check_floating, check_no_vmap

_nms = torch.ops.retinanet_ext.nms.default
_padded = torch.ops.retinanet_ext.batched_nms_padded.default


@torch.library.register_fake("retinanet_ext::nms")
def _fake_nms(boxes, scores, labels, iou_threshold):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake("retinanet_ext::batched_nms_padded")
def _fake_padded(boxes, scores, labels, num_valid, iou_threshold, max_detections):
    batch = boxes.shape[0]
    indices = boxes.new_empty((batch, max_detections), dtype=torch.int64)
    return indices, boxes.new_empty((batch,), dtype=torch.int32)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: a drop-in for ``torchvision.ops.nms`` with a defined order of ties.

    Args:
        boxes: ``[N, 4]``, (x1, y1, x2, y2), floating.
        scores: ``[N]``, of the type of ``boxes``.
        iou_threshold: a box with an IoU above this with a better kept one is dropped.

    Returns:
        int64 ``[K]``: rows of ``boxes`` that are kept, by descending score. (On CUDA the host waits for their number.)

    Raises:
        RuntimeError: wrong shapes or types, with torchvision's words.
        TypeError: something that is no floating tensor.
        ValueError: mixed devices.
    """
    _check_boxes_scores("nms", boxes, scores)
    return _keep(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppression among boxes of the same label only: a drop-in for ``torchvision.ops.batched_nms``.

    Labels are compared. The boxes are not moved apart by an offset for each label, which costs digits and
    changes what is kept.

    Args:
        boxes: ``[N, 4]``, (x1, y1, x2, y2), floating.
        scores: ``[N]``, of the type of ``boxes``.
        idxs: ``[N]``, the label of each box.
        iou_threshold: a box with an IoU above this with a better kept one of its label is dropped.

    Returns:
        int64 ``[K]``: rows of ``boxes`` that are kept, by descending score. (On CUDA the host waits for their number.)

    Raises:
        RuntimeError: wrong shapes or types, with torchvision's words.
        TypeError: something that is no tensor of the right kind.
        ValueError: mixed devices.
    """
    check_no_vmap("batched_nms", idxs)
    _check_boxes_scores("batched_nms", boxes, scores)
    if not isinstance(idxs, Tensor):
        raise TypeError(f"batched_nms: idxs: expected a tensor, got {type(idxs).__name__}")
    if idxs.shape != scores.shape:
        raise RuntimeError(
            f"batched_nms: boxes and idxs should have same number of elements in dimension 0, "
            f"got {boxes.shape[0]} and {list(idxs.shape)}"
        )
    check_device("batched_nms", "idxs", idxs, boxes.device)
    return _keep(boxes, scores, _label_numbers(idxs), iou_threshold)


def _keep(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    boxes, scores = _computable(boxes), _computable(scores)
    return _nms(boxes[None], scores[None], None if labels is None else labels[None], float(iou_threshold))


def _computable(values: Tensor) -> Tensor:
    """In the type to compute in: float64 stays, everything narrower is float32."""
    return values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32)


def _label_numbers(labels: Tensor) -> Tensor:
    """Labels as int64, equal exactly where the labels are: a NaN equals nothing, not even itself."""
    if not labels.is_floating_point():
        return labels.long()
    bits = (labels.detach().double() + 0.0).view(torch.int64)
    # Patterns of NaN that no other label has, one for each row.
    unlike = torch.arange(labels.shape[0], device=labels.device) - (1 << 51)
    return torch.where(labels.isnan(), unlike, bits)


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
    num_valid: Tensor | None = None,
) -> PaddedNMS:
    """`batched_nms` of each image of a batch, with outputs of a fixed shape.

    Args:
        boxes: ``[B, N, 4]``, (x1, y1, x2, y2), floating.
        scores: ``[B, N]``, of the type of ``boxes``.
        labels: integers ``[B, N]``.
        iou_threshold: a box with an IoU above this with a better kept one of its label is dropped.
        max_detections: ``D``; only the best so many are kept.
        num_valid: int32 or int64 ``[B]``: how many of the ``N`` rows of each image count; the others are not
            looked at. All of them if None.

    Returns:
        A named tuple: ``indices`` int64 ``[B, D]``, kept rows by descending score, then -1; ``counts`` int32
        ``[B]``.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, ``max_detections`` below
            0.
    """
    op = "batched_nms_padded"
    check_no_vmap(op, boxes, scores, labels, num_valid)
    check_floating(op, "boxes", boxes)
    check_floating(op, "scores", scores)
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"{op}: boxes: expected shape [B, N, 4], got {list(boxes.shape)}")
    if scores.dtype != boxes.dtype:
        raise TypeError(f"{op}: scores: expected {boxes.dtype}, as boxes, got {scores.dtype}")
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: labels: expected a tensor of integers, got {got}")
    for name, value in (("scores", scores), ("labels", labels)):
        if value.shape != boxes.shape[:2]:
            raise ValueError(f"{op}: {name}: expected shape {list(boxes.shape[:2])}, got {list(value.shape)}")
        check_device(op, name, value, boxes.device)
    if max_detections < 0:
        raise ValueError(f"{op}: max_detections: expected at least 0, got {max_detections}")
    if num_valid is not None:
        if not isinstance(num_valid, Tensor) or num_valid.dtype not in (torch.int32, torch.int64):
            got = num_valid.dtype if isinstance(num_valid, Tensor) else type(num_valid).__name__
            raise TypeError(f"{op}: num_valid: expected a tensor of int32 or int64, got {got}")
        if num_valid.shape != boxes.shape[:1]:
            raise ValueError(f"{op}: num_valid: expected shape [{boxes.shape[0]}], got {list(num_valid.shape)}")
        check_device(op, "num_valid", num_valid, boxes.device)
    boxes, scores = _computable(boxes), _computable(scores)
    num_valid = None if num_valid is None else num_valid.clamp(0, boxes.shape[1]).int()
    return PaddedNMS(*_padded(boxes, scores, labels.long(), num_valid, float(iou_threshold), int(max_detections)))


def _check_boxes_scores(op: str, boxes: Tensor, scores: Tensor) -> None:
    """torchvision's checks with torchvision's words, which callers may match."""
    check_no_vmap(op, boxes, scores)
    check_floating(op, "boxes", boxes)
    check_floating(op, "scores", scores)
    if boxes.dim() != 2:
        raise RuntimeError(f"{op}: boxes should be a 2d tensor, got {boxes.dim()}D")
    if boxes.shape[1] != 4:
        raise RuntimeError(f"{op}: boxes should have 4 elements in dimension 1, got {boxes.shape[1]}")
    if scores.dim() != 1:
        raise RuntimeError(f"{op}: scores should be a 1d tensor, got {scores.dim()}D")
    # Sizes by shape, never by len(): torch.export would take a dynamic size for a constant.
    if boxes.shape[0] != scores.shape[0]:
        raise RuntimeError(
            f"{op}: boxes and scores should have same number of elements in dimension 0, "
            f"got {boxes.shape[0]} and {scores.shape[0]}"
        )
    if boxes.dtype != scores.dtype:
        raise RuntimeError(f"{op}: boxes should have the same type as scores, got {boxes.dtype} and {scores.dtype}")
    check_device(op, "scores", scores, boxes.device)
