"""From head outputs to detections in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import (
    _load,  # noqa: F401 - registers the operators
    reference,
)
from ..reference.focal_loss import compute_dtype
from ..reference.postprocess import Detections
from .box_checks import check_anchors, check_device, check_floating, check_no_vmap

_detect = torch.ops.retinanet_ext.detect.default


@torch.library.register_fake("retinanet_ext::detect")
def _fake_detect(cls_logits, box_deltas, anchors, *options):
    max_detections = options[6]
    shape = (cls_logits[0].shape[0], max_detections)
    dtype = torch.float64 if torch.float64 in (box_deltas[0].dtype, anchors.dtype) else torch.float32
    return (
        anchors.new_empty((*shape, 4), dtype=dtype),
        anchors.new_empty(shape, dtype=compute_dtype(cls_logits[0].dtype)),
        anchors.new_empty(shape, dtype=torch.int64),
        anchors.new_empty(shape, dtype=torch.int64),
        anchors.new_empty(shape[:1], dtype=torch.int32),
    )


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
    """All of RetinaNet's post-processing: threshold, top-k of each level, decode, clip, suppression, best D.

    A candidate is an anchor and a class. Those with ``sigmoid(logit) > score_thresh`` compete, the
    ``topk_per_level`` best of each level go on, are decoded and clipped to their image, suppress each other
    within their class as in `batched_nms`, and the ``max_detections`` best remain. Everywhere the order is by
    descending logit and then by ascending ``anchor * K + class``, so there are no ties left to chance. The
    score is the sigmoid in float32 (float64 for float64 logits), compared with the threshold in that type;
    NaN logits are no candidates. Not differentiable.

    Args:
        cls_logits: a level at a time as the convolution leaves it, ``[B, A * K, H, W]`` (channel ``a * K +
            k``, any memory format) or ``[B, H * W * A, K]``; or one tensor ``[B, N, K]``, which is one level.
            Floating.
        box_deltas: the same levels, ``[B, 4 * A, H, W]`` or ``[B, H * W * A, 4]``.
        anchors: ``[N, 4]`` or ``[B, N, 4]``, in the order level, row, column, anchor of the cell.
        image_sizes: (height, width) of each image in pixels, a list or ``[B, 2]``.
        score_thresh: candidates have a score above this.
        topk_per_level: at most so many candidates of each level of an image.
        nms_thresh: a detection with an IoU above this with a better one of its class is dropped.
        max_detections: ``D``.
        clip_before_nms: False clips the detections after suppression, as detectron2 does.

    Returns:
        A named tuple: ``boxes`` ``[B, D, 4]``, float32 (float64 if an input is); ``scores`` ``[B, D]``;
        ``labels`` int64 ``[B, D]``; ``indices`` int64 ``[B, D]``, ``anchor * K + class``; ``counts`` int32
        ``[B]``. Rows past an image's count hold 0, 0, -1 and -1.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, a limit below 0.

    Source:
        torchvision's ``RetinaNet.postprocess_detections``, with its ties decided.
    """
    op = "detect"
    logit_levels = [cls_logits] if isinstance(cls_logits, Tensor) else cls_logits
    delta_levels = [box_deltas] if isinstance(box_deltas, Tensor) else box_deltas
    for name, levels in (("cls_logits", logit_levels), ("box_deltas", delta_levels)):
        if not isinstance(levels, Sequence):
            raise TypeError(f"{op}: {name}: expected a tensor or a list of tensors, got {type(levels).__name__}")
    if not logit_levels or len(logit_levels) != len(delta_levels):
        raise ValueError(
            f"{op}: cls_logits, box_deltas: expected as many levels, at least one, "
            f"got {len(logit_levels)} and {len(delta_levels)}"
        )
    check_no_vmap(op, logit_levels, delta_levels, anchors, image_sizes)
    batch, num_anchors, num_classes, device = _check_levels(op, logit_levels, delta_levels)
    check_anchors(op, anchors, batch)
    if anchors.shape[-2] != num_anchors:
        raise ValueError(f"{op}: anchors: expected {num_anchors}, as many as box_deltas, got {anchors.shape[-2]}")
    check_device(op, "anchors", anchors, device)
    _check_image_sizes(op, image_sizes, batch)
    for name, limit in (("topk_per_level", topk_per_level), ("max_detections", max_detections)):
        if limit < 0:
            raise ValueError(f"{op}: {name}: expected at least 0, got {limit}")
    if num_classes > 0:
        return Detections(
            *_detect(
                [level.detach() for level in logit_levels],
                [level.detach() for level in delta_levels],
                anchors.detach(),
                *_split_sizes(image_sizes, device),
                num_classes,
                float(score_thresh),
                int(topk_per_level),
                float(nms_thresh),
                int(max_detections),
                bool(clip_before_nms),
            )
        )
    with torch.no_grad():
        return reference.detect(
            logit_levels,
            delta_levels,
            anchors,
            image_sizes,
            score_thresh=score_thresh,
            topk_per_level=topk_per_level,
            nms_thresh=nms_thresh,
            max_detections=max_detections,
            clip_before_nms=clip_before_nms,
        )


def _check_levels(
    op: str, logit_levels: Sequence[Tensor], delta_levels: Sequence[Tensor]
) -> tuple[int, int, int, torch.device]:
    """Logits and deltas of each level are of the same anchors, with one K. Returns B, N, K and the device."""
    for name, levels in (("cls_logits", logit_levels), ("box_deltas", delta_levels)):
        for index, level in enumerate(levels):
            check_floating(op, f"{name}[{index}]", level)
            check_device(op, f"{name}[{index}]", level, logit_levels[0].device)
            if level.dtype != levels[0].dtype:
                raise TypeError(f"{op}: {name}[{index}]: expected {levels[0].dtype} at every level, got {level.dtype}")
    # Sizes by shape, never by len(): torch.export would take a dynamic batch for a constant.
    batch, num_anchors, classes = logit_levels[0].shape[0], 0, set()
    for index, (logits, deltas) in enumerate(zip(logit_levels, delta_levels, strict=True)):
        maps = logits.dim() == 4 and deltas.dim() == 4 and deltas.shape[1] > 0 and deltas.shape[1] % 4 == 0
        rows = logits.dim() == 3 and deltas.dim() == 3 and deltas.shape[2] == 4
        if maps and logits.shape[2:] == deltas.shape[2:] and logits.shape[1] % (deltas.shape[1] // 4) == 0:
            per_cell = deltas.shape[1] // 4
            classes.add(logits.shape[1] // per_cell)
            num_anchors += per_cell * deltas.shape[2] * deltas.shape[3]
        elif rows and logits.shape[1] == deltas.shape[1]:
            classes.add(logits.shape[2])
            num_anchors += deltas.shape[1]
        else:
            raise ValueError(
                f"{op}: cls_logits[{index}], box_deltas[{index}]: expected [B, A * K, H, W] and "
                f"[B, 4 * A, H, W], or [B, n, K] and [B, n, 4], "
                f"got {list(logits.shape)} and {list(deltas.shape)}"
            )
        if logits.shape[0] != batch or deltas.shape[0] != batch:
            raise ValueError(
                f"{op}: cls_logits[{index}], box_deltas[{index}]: expected a batch of {batch} at each level, "
                f"got {logits.shape[0]} and {deltas.shape[0]}"
            )
    if len(classes) != 1:
        raise ValueError(f"{op}: cls_logits: expected the same number of classes at every level, got {sorted(classes)}")
    return batch, num_anchors, classes.pop(), logit_levels[0].device


def _split_sizes(
    image_sizes: Sequence[tuple[int, int]] | Tensor, device: torch.device
) -> tuple[Tensor | None, list[float]]:
    """As the operator takes them: a tensor on the device, or numbers."""
    if isinstance(image_sizes, Tensor):
        return image_sizes.to(device, non_blocking=True), []
    return None, [float(side) for size in image_sizes for side in size]


def _check_image_sizes(op: str, image_sizes: Sequence[tuple[int, int]] | Tensor, batch: int) -> None:
    if isinstance(image_sizes, Tensor):
        if image_sizes.shape != (batch, 2):
            raise ValueError(f"{op}: image_sizes: expected shape [{batch}, 2], got {list(image_sizes.shape)}")
    elif len(image_sizes) != batch or any(len(size) != 2 for size in image_sizes):
        raise ValueError(f"{op}: image_sizes: expected {batch} pairs (height, width), got {list(image_sizes)}")
