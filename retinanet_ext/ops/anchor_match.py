"""Matching anchors with ground-truth boxes, IoU, and the box coder.

Boxes are ``(x1, y1, x2, y2)`` unless a format says otherwise. ``N`` anchors an image, ``M`` ground-truth
boxes of an image, ``B`` images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference.anchor_match import DELTA_CLIP, AssignedTargets

POLICIES = ("safe", "torchvision", "detectron2", "mmdet")
BOX_FORMATS = ("xyxy", "xywh", "cxcywh")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Boxes = Sequence[Tensor] | Tensor  # one [M_i, 4] an image, or [capacity, 4] with gt_offsets


def match_anchors(
    anchors: Tensor,
    gt_boxes: Boxes,
    fg_iou_thresh: float = 0.5,
    bg_iou_thresh: float = 0.4,
    allow_low_quality_matches: bool = True,
    *,
    policy: str = "safe",
    min_pos_iou: float = 0.0,
    gt_ignore: Sequence[Tensor] | Tensor | None = None,
    gt_offsets: Tensor | None = None,
) -> Tensor:
    """The ground-truth box that each anchor is trained on.

    An anchor takes the box of highest IoU, the first one on a tie: with an IoU of at least ``fg_iou_thresh``
    that box, with less than ``bg_iou_thresh`` background, and between the two it is left out of the loss. IoU
    is computed in float32 (float64 for float64) exactly as `box_iou` does; the thresholds are rounded to the
    same type; a NaN IoU counts as 0. Boxes with a side that is not positive, or not finite, are dropped
    before anything else.

    Low-quality matches give a box its best anchors even where their IoU is below ``fg_iou_thresh``:

    - "torchvision" and "detectron2": every anchor whose IoU is bit-equal to some box's best gets *its own*
      best box (whatever its IoU). A box that overlaps no anchor has a best of 0 and so makes foreground of
      every anchor that it does not overlap; that is what those libraries do, and it is kept for parity.
    - "safe": the same, but a box that overlaps no anchor changes nothing.
    - "mmdet": such an anchor gets *that* box, the last one of several, even if it had another with an IoU of
      at least ``fg_iou_thresh``, where the box's best is at least ``min_pos_iou``.

    Args:
        anchors: ``[N, 4]``, or ``[B, N, 4]`` when images differ. Floating.
        gt_boxes: ``[M_i, 4]`` for each image; or the boxes of all images in one tensor ``[capacity, 4]``,
            with ``gt_offsets``. Floating.
        fg_iou_thresh: least IoU of a foreground anchor, in [0, 1].
        bg_iou_thresh: anchors below this are background, in [0, fg_iou_thresh].
        allow_low_quality_matches: whether the policy applies at all.
        policy: "safe", "torchvision", "detectron2" or "mmdet".
        min_pos_iou: for "mmdet" only, in [0, 1].
        gt_ignore: bool ``[M_i]`` for each image (``[capacity]`` with ``gt_offsets``): regions to ignore
            (crowds). They are never matched; an anchor with at least half of its own area inside one, and no
            match, is left out.
        gt_offsets: int32 ``[B + 1]``: image b has the rows ``gt_offsets[b]:gt_offsets[b + 1]``. Rows past the
            last offset are never read.

    Returns:
        int32 ``[B, N]``: the row of the matched box among those of its image, -1 background, -2 left out.

    Raises:
        TypeError: an argument that is no tensor (or list of tensors), or of a wrong type.
        ValueError: wrong shapes, mixed devices, thresholds out of range, an unknown policy.
        RuntimeError: called under vmap.

    Source:
        torchvision's and detectron2's ``Matcher``, mmdet's ``MaxIoUAssigner``.
    """
    _check_match(
        "match_anchors",
        anchors,
        gt_boxes,
        fg_iou_thresh,
        bg_iou_thresh,
        policy,
        min_pos_iou,
        gt_ignore,
        gt_offsets,
    )
    return reference.match_anchors(
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


def assign_targets(
    anchors: Tensor,
    gt_boxes: Boxes,
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
    """What `multilevel_focal_loss` and `box_regression_loss` need of the ground truth, in anchor order.

    Args:
        anchors, gt_boxes, fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches: as in `match_anchors`.
        gt_labels: the class of each box, integers ``[M_i]`` for each image (``[capacity]`` with
            ``gt_offsets``).
        policy, min_pos_iou, gt_ignore, gt_offsets: as in `match_anchors`.

    Returns:
        A named tuple: ``labels`` int32 ``[B, N]``, the class, -1 background, -2 left out; ``matched`` int32
        ``[B, N]`` as `match_anchors` returns it; ``num_foreground`` int32 ``[B]``. All on the anchors'
        device.

    Raises:
        TypeError, ValueError: as `match_anchors`, and for ``gt_labels`` that do not fit ``gt_boxes``.
    """
    name = "assign_targets"
    _check_match(name, anchors, gt_boxes, fg_iou_thresh, bg_iou_thresh, policy, min_pos_iou, gt_ignore, gt_offsets)
    _check_per_box(name, "gt_labels", gt_labels, gt_boxes, INTEGERS)
    return reference.assign_targets(
        anchors,
        gt_boxes,
        gt_labels,
        fg_iou_thresh,
        bg_iou_thresh,
        allow_low_quality_matches,
        policy=policy,
        min_pos_iou=min_pos_iou,
        gt_ignore=gt_ignore,
        gt_offsets=gt_offsets,
    )


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """Intersection over union of every pair of boxes: a drop-in for ``torchvision.ops.box_iou``.

    In float32 and float64 the result is torchvision's to the bit: ``area = (x2 - x1) * (y2 - y1)``,
    ``union = (area1 + area2) - intersection``, every operation rounded on its own. Halves are computed in
    float32, from the first subtraction on. Two boxes without area have an IoU of NaN (0 / 0). Differentiable.

    Args:
        boxes1: ``[..., N, 4]``.
        boxes2: ``[..., M, 4]``.
        fmt: "xyxy", corners; "xywh", corner and size; "cxcywh", centre and size.

    Returns:
        ``[..., N, M]``; float32, or float64 if a box is.

    Raises:
        TypeError: something that is no tensor of real numbers.
        ValueError: a last dimension other than 4, mixed devices, an unknown ``fmt``.
    """
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype == torch.bool:
            raise TypeError(f"box_iou: {name}: expected a tensor of real numbers, got {_describe(boxes)}")
        if boxes.dim() < 2 or boxes.shape[-1] != 4:
            raise ValueError(f"box_iou: {name}: expected shape [..., n, 4], got {list(boxes.shape)}")
    check_device("box_iou", "boxes2", boxes2, boxes1.device)
    if fmt not in BOX_FORMATS:
        raise ValueError(f"box_iou: fmt: expected one of {BOX_FORMATS}, got {fmt!r}")
    return reference.box_iou(boxes1, boxes2, fmt)


def encode_boxes(gt_boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes as deltas from anchors (Girshick et al., 2014, appendix C): what the box subnet is trained on.

    ``dx = wx (cx - cx_a) / w_a``, ``dy`` likewise, ``dw = ww log(w / w_a)``, ``dh`` likewise. Differentiable.

    Args:
        gt_boxes: ``[..., 4]``, floating.
        anchors: ``[..., 4]``, floating; leading dimensions broadcast with those of ``gt_boxes``.
        weights: ``(wx, wy, ww, wh)``, positive.

    Returns:
        ``[..., 4]``, (dx, dy, dw, dh), in the wider of the two types; halves are computed in float32.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, weights that are not
            positive.
    """
    _check_coder("encode_boxes", "gt_boxes", gt_boxes, anchors, weights)
    return reference.encode_boxes(gt_boxes, anchors, weights)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = DELTA_CLIP,
) -> Tensor:
    """Boxes from deltas and anchors, the inverse of `encode_boxes`. Differentiable.

    Args:
        deltas: (dx, dy, dw, dh) ``[..., 4]``, floating.
        anchors: ``[..., 4]``, floating; leading dimensions broadcast with those of ``deltas``.
        weights: ``(wx, wy, ww, wh)``, positive.
        clip: dw and dh, after division by their weight, are at most this: no box is more than e^clip times
            its anchor. log(1000 / 16) in every RetinaNet.

    Returns:
        ``[..., 4]`` in the wider of the two types; halves are computed in float32.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, weights that are not
            positive.
    """
    _check_coder("decode_boxes", "deltas", deltas, anchors, weights)
    return reference.decode_boxes(deltas, anchors, weights, clip)


def _describe(value: object) -> str:
    """A value's type for an error message; of a tensor its element type."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def check_no_vmap(op: str, value: object) -> None:
    """Operators whose work depends on the values take batches themselves and cannot be vmapped."""
    if isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value):
        raise RuntimeError(f"{op}: vmap is not supported: pass the whole batch, or call it for each image")


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{op}: {name}: expected all tensors on one device, {device}, got {value.device}")


def check_floating(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name}: expected a floating tensor, got {_describe(value)}")


def check_anchors(op: str, anchors: Tensor, batch: int | None = None) -> None:
    """``anchors`` is floating ``[N, 4]``, or ``[B, N, 4]`` for the batch, if that is known."""
    check_floating(op, "anchors", anchors)
    if anchors.dim() not in (2, 3) or anchors.shape[-1] != 4:
        raise ValueError(f"{op}: anchors: expected shape [N, 4] or [B, N, 4], got {list(anchors.shape)}")
    if batch is not None and anchors.dim() == 3 and len(anchors) != batch:
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
                f"got {_describe(gt_boxes)}"
            )
        named_boxes = [(f"gt_boxes[{image}]", boxes) for image, boxes in enumerate(gt_boxes)]
    else:
        if not isinstance(gt_offsets, Tensor) or gt_offsets.dtype != torch.int32:
            raise TypeError(f"{op}: gt_offsets: expected a tensor of torch.int32, got {_describe(gt_offsets)}")
        if gt_offsets.dim() != 1 or len(gt_offsets) == 0:
            raise ValueError(f"{op}: gt_offsets: expected shape [B + 1], got {list(gt_offsets.shape)}")
        check_device(op, "gt_offsets", gt_offsets, device)
        named_boxes = [("gt_boxes", gt_boxes)]
    for name, boxes in named_boxes:
        check_no_vmap(op, boxes)
        check_floating(op, name, boxes)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{op}: {name}: expected shape [M, 4], got {list(boxes.shape)}")
        check_device(op, name, boxes, device)
    return len(gt_boxes) if gt_offsets is None else len(gt_offsets) - 1


def _check_per_box(
    op: str, name: str, values: Sequence[Tensor] | Tensor, gt_boxes: Boxes, dtypes: tuple[torch.dtype, ...]
) -> None:
    """``values`` has a number for each box, and is packed if the boxes are."""
    if isinstance(gt_boxes, Tensor):
        pairs = [(name, values, gt_boxes)]
    else:
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            raise TypeError(f"{op}: {name}: expected a list of [M_i], one an image, got {_describe(values)}")
        if len(values) != len(gt_boxes):
            raise ValueError(f"{op}: {name}: expected one for each of {len(gt_boxes)} images, got {len(values)}")
        pairs = [(f"{name}[{image}]", *pair) for image, pair in enumerate(zip(values, gt_boxes, strict=True))]
    for where, value, boxes in pairs:
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            expected = "integers" if len(dtypes) > 1 else str(dtypes[0])
            raise TypeError(f"{op}: {where}: expected a tensor of {expected}, got {_describe(value)}")
        if value.shape != boxes.shape[:1]:
            raise ValueError(f"{op}: {where}: expected shape [{len(boxes)}], got {list(value.shape)}")
        check_device(op, where, value, boxes.device)


def _check_match(
    op: str,
    anchors: Tensor,
    gt_boxes: Boxes,
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    policy: str,
    min_pos_iou: float,
    gt_ignore: Sequence[Tensor] | Tensor | None,
    gt_offsets: Tensor | None,
) -> None:
    check_no_vmap(op, anchors)
    check_anchors(op, anchors)
    check_anchors(op, anchors, check_gt_boxes(op, gt_boxes, gt_offsets, anchors.device))
    if gt_ignore is not None:
        _check_per_box(op, "gt_ignore", gt_ignore, gt_boxes, (torch.bool,))
    if not 0 <= fg_iou_thresh <= 1:
        raise ValueError(f"{op}: fg_iou_thresh: expected a number in [0, 1], got {fg_iou_thresh}")
    if not 0 <= bg_iou_thresh <= fg_iou_thresh:
        raise ValueError(
            f"{op}: bg_iou_thresh: expected a number in [0, fg_iou_thresh], [0, {fg_iou_thresh}], got {bg_iou_thresh}"
        )
    if policy not in POLICIES:
        raise ValueError(f"{op}: policy: expected one of {POLICIES}, got {policy!r}")
    if not 0 <= min_pos_iou <= 1:
        raise ValueError(f"{op}: min_pos_iou: expected a number in [0, 1], got {min_pos_iou}")


def _check_coder(op: str, name: str, values: Tensor, anchors: Tensor, weights: Sequence[float]) -> None:
    for argument, tensor in ((name, values), ("anchors", anchors)):
        check_floating(op, argument, tensor)
        if tensor.dim() < 1 or tensor.shape[-1] != 4:
            raise ValueError(f"{op}: {argument}: expected shape [..., 4], got {list(tensor.shape)}")
    check_device(op, "anchors", anchors, values.device)
    try:
        torch.broadcast_shapes(values.shape, anchors.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: anchors: expected a shape that broadcasts with {list(values.shape)}, got {list(anchors.shape)}"
        ) from None
    check_weights(op, weights)
