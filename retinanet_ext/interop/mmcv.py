"""mmcv's operators on ours: `nms`, `batched_nms` and `sigmoid_focal_loss`, wherever mmcv and mmdet name them.

Each has the original's signature (of mmcv 2.x), computes with ours exactly what ours and mmcv's both define, and hands
everything else to mmcv's own: NumPy arrays, other types than float32, `offset=1`, other kinds of suppression, rotated
boxes, arguments by names of older releases. docs/interop.md lists what differs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from numbers import Real

import numpy as np
import torch
from torch import Tensor

try:
    import mmcv.ops
    from mmcv.ops.focal_loss import SigmoidFocalLossFunction
except ModuleNotFoundError as error:
    if error.name != "mmcv._ext":
        raise
    raise ImportError(
        "patch: mmcv is installed without its operators here (mmcv-lite), so there is nothing to patch", name=error.name
    ) from None

from .. import ops
from .ordinary import are_ordinary
from .patching import FunctionReplacement, Replacement, original_of

PACKAGES = ("mmcv", "mmdet")
NO_LABEL = torch.iinfo(torch.int64).min  # no class of anybody's: the rows that a loss leaves out
_mmcv_nms = sys.modules["mmcv.ops.nms"]  # (mmcv.ops.nms is the function)
_CONFIG = {"type", "iou_threshold", "offset", "score_threshold", "max_num", "split_thr", "class_agnostic"}


def _with_older_names(function: Callable, original: Callable) -> Callable:
    """Arguments by other names than the signature's are the original's: it knows those of older releases."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments, **options):
        if options.keys() <= signature.parameters.keys():
            return function(*arguments, **options)
        return original(*arguments, **options)

    call.__signature__ = signature
    return call


def _nms(boxes, scores, iou_threshold, offset=0, score_threshold=0, max_num=-1):
    if (
        _NMS.held
        and _are_boxes(boxes, scores)
        and offset == 0
        and _are_numbers(iou_threshold, score_threshold)
        and isinstance(max_num, int)
    ):
        kept = _kept(boxes, scores, None, iou_threshold, score_threshold, max_num)
        return torch.cat((boxes[kept], scores[kept, None]), dim=1), kept
    return _NMS.original(boxes, scores, iou_threshold, offset, score_threshold, max_num)


def _batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
    if (
        _BATCHED_NMS.held
        and isinstance(nms_cfg, Mapping)
        and nms_cfg.keys() <= _CONFIG
        and _is_nms(nms_cfg.get("type", "nms"))
        and nms_cfg.get("offset", 0) == 0
        and _are_numbers(nms_cfg.get("iou_threshold"), nms_cfg.get("score_threshold", 0), nms_cfg.get("split_thr", 0))
        and nms_cfg["iou_threshold"] >= 0  # below, boxes of other classes suppress each other too
        and isinstance(nms_cfg.get("max_num", -1), int)
        and _are_boxes(boxes, scores)
        and len(boxes) > 0  # without them mmcv has an error
        and isinstance(idxs, Tensor)
        and idxs.shape == scores.shape
        and idxs.device == boxes.device
        and not idxs.is_floating_point()
        and not idxs.is_complex()
    ):
        # Many boxes are suppressed label by label, also where labels are not to count: that is what mmcv does.
        is_split = len(boxes) >= nms_cfg.get("split_thr", 10000)
        labels = None if nms_cfg.get("class_agnostic", class_agnostic) and not is_split else idxs
        limits = nms_cfg.get("score_threshold", 0), nms_cfg.get("max_num", -1)
        kept = _kept(boxes, scores, labels, nms_cfg["iou_threshold"], *limits)
        return torch.cat((boxes[kept], scores[kept, None]), dim=1), kept
    return _BATCHED_NMS.original(boxes, scores, idxs, nms_cfg, class_agnostic)


def _kept(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float, score_threshold: float, max_num: int
) -> Tensor:
    """Rows of ``boxes`` by descending score: those above the threshold, suppressed, at most ``max_num`` if positive."""
    rows = None
    if score_threshold > 0:
        rows = (scores > score_threshold).nonzero().squeeze(1)
        boxes, scores = boxes[rows], scores[rows]
        labels = None if labels is None else labels[rows]
    iou_threshold = float(np.float32(iou_threshold))  # mmcv's operator takes it as a float32
    if labels is None:
        kept = ops.nms(boxes, scores, iou_threshold)
    else:
        kept = ops.batched_nms(boxes, scores, labels, iou_threshold)
    if max_num > 0:
        kept = kept[:max_num]
    return kept if rows is None else rows[kept]


def _are_boxes(boxes: object, scores: object) -> bool:
    """Float32, as mmcv's operator takes them, [N, 4] and [N]."""
    return (
        are_ordinary(boxes, scores)
        and boxes.dtype == scores.dtype == torch.float32
        and boxes.dim() == 2
        and boxes.shape[1] == 4
        and scores.shape == boxes.shape[:1]
    )


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, Real) for value in values)


def _is_nms(kind: object) -> bool:
    """Whether a configuration's type is mmcv's own `nms`, by its name or itself."""
    if isinstance(kind, str):
        kind = vars(_mmcv_nms).get(kind)
    return original_of(kind) is _NMS.original


def _sigmoid_focal_loss(input, target, gamma=2.0, alpha=0.25, weight=None, reduction="mean"):
    if (
        _SIGMOID_FOCAL_LOSS.held
        and are_ordinary(input)
        and input.dim() == 2
        and is_row_labels(target, input)
        and (weight is None or (are_ordinary(input, weight) and weight.shape == input.shape[1:]))
        and is_focal_loss(gamma, alpha)
        and reduction in ("none", "mean", "sum")
    ):
        kind = "none" if reduction == "none" else "sum"
        factors = None if weight is None else weight.detach()  # mmcv has no gradient for it
        loss = ops.sigmoid_focal_loss(input, target, alpha, gamma, kind, weight=factors, ignore_index=NO_LABEL)
        if reduction == "mean":
            loss = loss / len(input)  # over rows, not elements
        return loss.to(input.dtype)
    return _SIGMOID_FOCAL_LOSS.original(input, target, gamma, alpha, weight, reduction)


def is_row_labels(target: object, logits: Tensor) -> bool:
    """Whether it is the class of each row of logits [N, K], int64 as mmcv and mmdet have it."""
    return (
        type(target) is Tensor
        and target.dtype == torch.int64
        and target.shape == logits.shape[:1]
        and target.device == logits.device
    )


def is_mmcv_focal_loss(function: object) -> bool:
    return original_of(function) is _SIGMOID_FOCAL_LOSS.original


def is_focal_loss(gamma: object, alpha: object) -> bool:
    """Whether ours has the same formula: to mmcv and mmdet a negative alpha is a number like any other."""
    return _are_numbers(gamma, alpha) and 0 <= gamma < float("inf") and 0 <= alpha <= 1


_NMS = FunctionReplacement(PACKAGES, _mmcv_nms.nms, _with_older_names(_nms, _mmcv_nms.nms))
_BATCHED_NMS = FunctionReplacement(PACKAGES, _mmcv_nms.batched_nms, _batched_nms)
_SIGMOID_FOCAL_LOSS = FunctionReplacement(
    PACKAGES,
    mmcv.ops.sigmoid_focal_loss,  # `apply` of an autograd Function
    _sigmoid_focal_loss,
    declared=functools.partial(SigmoidFocalLossFunction.forward, None),
)

REPLACEMENTS: dict[str, Replacement] = {
    "nms": _NMS,
    "batched_nms": _BATCHED_NMS,
    "sigmoid_focal_loss": _SIGMOID_FOCAL_LOSS,
}
