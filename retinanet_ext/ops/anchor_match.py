"""Matching anchors with ground-truth boxes.

Boxes are ``(x1, y1, x2, y2)``. ``N`` anchors an image, ``M`` ground-truth boxes of an image, ``B`` images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _load  # noqa: F401 - registers the operators
from ..reference.anchor_match import AssignedTargets
from .box_checks import INTEGERS, Boxes, check_anchors, check_gt_boxes, check_no_vmap, check_per_box

_match = torch.ops.retinanet_ext.match_anchors.default
_assign = torch.ops.retinanet_ext.assign_targets.default

_POLICY_CODES = {"safe": 0, "torchvision": 1, "detectron2": 1, "mmdet": 2}  # as in csrc/anchor_match
POLICIES = tuple(_POLICY_CODES)
_WIDE = (torch.int32, torch.int64)  # the integers that the kernels read


def _fake_matched(anchors: Tensor, gt_boxes: list[Tensor], gt_offsets: Tensor | None) -> Tensor:
    batch = len(gt_boxes) if gt_offsets is None else gt_offsets.shape[0] - 1
    return anchors.new_empty((batch, anchors.shape[-2]), dtype=torch.int32)


@torch.library.register_fake("retinanet_ext::match_anchors")
def _fake_match(anchors, gt_boxes, gt_ignore, gt_offsets, *_options):
    return _fake_matched(anchors, gt_boxes, gt_offsets)


@torch.library.register_fake("retinanet_ext::assign_targets")
def _fake_assign(anchors, gt_boxes, gt_labels, gt_ignore, gt_offsets, *_options):
    matched = _fake_matched(anchors, gt_boxes, gt_offsets)
    return torch.empty_like(matched), matched, matched.new_empty(matched.shape[:1])


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
    is computed in float32 (float64 where the anchors or any boxes are float64) exactly as `box_iou` does; the
    thresholds are rounded to the same type; a NaN IoU counts as 0. The matrix of all IoUs is never formed:
    memory is O(B N + boxes). Boxes with a side that is not positive, or not finite, are dropped
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
    anchors, gt_boxes = _in_one_dtype(anchors, gt_boxes)
    return _match(
        anchors,
        gt_boxes,
        _as_list(gt_ignore),
        gt_offsets,
        float(fg_iou_thresh),
        float(bg_iou_thresh),
        bool(allow_low_quality_matches),
        _POLICY_CODES[policy],
        float(min_pos_iou),
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
    check_no_vmap(name, gt_labels)
    _check_match(name, anchors, gt_boxes, fg_iou_thresh, bg_iou_thresh, policy, min_pos_iou, gt_ignore, gt_offsets)
    check_per_box(name, "gt_labels", gt_labels, gt_boxes, INTEGERS)
    anchors, gt_boxes = _in_one_dtype(anchors, gt_boxes)
    gt_labels = [labels if labels.dtype in _WIDE else labels.int() for labels in _as_list(gt_labels)]
    if len({labels.dtype for labels in gt_labels}) > 1:
        gt_labels = [labels.long() for labels in gt_labels]
    targets = _assign(
        anchors,
        gt_boxes,
        gt_labels,
        _as_list(gt_ignore),
        gt_offsets,
        float(fg_iou_thresh),
        float(bg_iou_thresh),
        bool(allow_low_quality_matches),
        _POLICY_CODES[policy],
        float(min_pos_iou),
    )
    return AssignedTargets(*targets)


def _as_list(values: Sequence[Tensor] | Tensor | None) -> list[Tensor]:
    """One tensor an image, or the packed one; none at all for None."""
    if values is None:
        return []
    return [values] if isinstance(values, Tensor) else list(values)


def _in_one_dtype(anchors: Tensor, gt_boxes: Boxes) -> tuple[Tensor, list[Tensor]]:
    """Anchors and boxes in the type to compute in, which the kernels take: float64 where any is, else float32."""
    gt_boxes = _as_list(gt_boxes)
    dtypes = {anchors.dtype, *(boxes.dtype for boxes in gt_boxes)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    if dtypes != {dtype}:
        anchors, gt_boxes = anchors.to(dtype), [boxes.to(dtype) for boxes in gt_boxes]
    return anchors.detach(), [boxes.detach() for boxes in gt_boxes]


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
    check_no_vmap(op, anchors, gt_boxes, gt_ignore, gt_offsets)
    check_anchors(op, anchors)
    check_anchors(op, anchors, check_gt_boxes(op, gt_boxes, gt_offsets, anchors.device))
    if gt_ignore is not None:
        check_per_box(op, "gt_ignore", gt_ignore, gt_boxes, (torch.bool,))
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
