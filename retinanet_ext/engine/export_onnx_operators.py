"""`retinanet_ext::detect` in standard ONNX operators. Importing this module needs onnxscript."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import FLOAT, INT32, INT64
from onnxscript import opset18 as op

from retinanet_ext.reference.anchor_match import DELTA_CLIP


def detect(
    cls_logits: Sequence[FLOAT],  # [B, A * K, H, W] a level
    box_deltas: Sequence[FLOAT],  # [B, 4 * A, H, W] a level
    anchors: FLOAT,  # [N, 4]
    image_sizes: FLOAT,  # [B, 2]
    size_list: Sequence[float],
    num_classes: int,
    score_thresh: float,
    topk_per_level: int,
    nms_thresh: float,
    max_detections: int,
    clip_before_nms: bool,
) -> tuple[FLOAT, FLOAT, INT64, INT64, INT32]:
    """See `retinanet_ext.ops.detect`: the same candidates in the same order.

    Candidates are sorted by logit, and NonMaxSuppression ranks them by their place in that order instead of by a score:
    its own order of equal scores, which ONNX leaves open, decides nothing. TopK's is defined, the lower index first.
    """
    logits, anchor_ids, labels = _candidates(cls_logits, box_deltas, num_classes, score_thresh, topk_per_level)
    deltas = op.Concat(*[_rows(level, 4) for level in box_deltas], axis=1)
    boxes = _decode(
        op.GatherND(deltas, op.Unsqueeze(anchor_ids, _ints(2)), batch_dims=1), op.Gather(anchors, anchor_ids, axis=0)
    )
    if clip_before_nms:
        boxes = _clip(boxes, image_sizes)
    kept = _suppress(boxes, logits, labels, num_classes, nms_thresh, max_detections)
    rank, place = _best(kept, max_detections)
    found = op.Greater(rank, _float(0))
    best = op.GatherND(boxes, op.Unsqueeze(place, _ints(2)), batch_dims=1)
    if not clip_before_nms:
        best = _clip(best, image_sizes)
    scores = op.Sigmoid(op.GatherElements(logits, place, axis=1))
    best_labels = op.GatherElements(labels, place, axis=1)
    indices = op.Add(op.Mul(op.GatherElements(anchor_ids, place, axis=1), _int(num_classes)), best_labels)
    return (
        op.Where(op.Unsqueeze(found, _ints(2)), best, _float(0)),
        op.Where(found, scores, _float(0)),
        op.Where(found, best_labels, _int(-1)),
        op.Where(found, indices, _int(-1)),
        op.ReduceSum(op.Cast(found, to=INT32.dtype), _ints(1), keepdims=0),
    )


def _candidates(cls_logits, box_deltas, num_classes: int, score_thresh: float, topk: int):
    """The best of each level, M in all, by descending logit and then by ascending anchor and class: logits, -inf where
    the score is not above the threshold, anchors and labels, each [B, M]."""
    values, anchor_ids, labels = [], [], []
    first_anchor = _int(0)
    classes = _int(num_classes)
    for logits, deltas in zip(cls_logits, box_deltas, strict=True):
        flat = op.Flatten(_rows(logits, num_classes), axis=1)
        passing = op.Where(op.Greater(op.Sigmoid(flat), _float(score_thresh)), flat, _float(-np.inf))
        k = op.Min(op.Shape(flat, start=1, end=2), _ints(topk))
        value, index = op.TopK(passing, k, axis=1)
        values.append(value)
        anchor_ids.append(op.Add(op.Div(index, classes), first_anchor))
        labels.append(op.Mod(index, classes))
        first_anchor = op.Add(first_anchor, op.Squeeze(op.Shape(_rows(deltas, 4), start=1, end=2)))
    joined = op.Concat(*values, axis=1)
    # Levels follow each other in the order of indices, so that TopK's lower index is the lower anchor here too.
    value, order = op.TopK(joined, op.Shape(joined, start=1, end=2), axis=1)
    sort = [op.GatherElements(op.Concat(*parts, axis=1), order, axis=1) for parts in (anchor_ids, labels)]
    return value, *sort


def _suppress(boxes, logits, labels, num_classes: int, nms_thresh: float, max_detections: int):
    """[B, M]: the rank of what survives, M for the best candidate, and 0 for the rest."""
    count = op.Squeeze(op.Shape(logits, start=1, end=2))
    ranks = op.Cast(op.Range(count, _int(0), _int(-1)), to=FLOAT.dtype)
    rank = op.Where(op.Greater(logits, _float(-np.inf)), ranks, _float(0))  # [B, M]
    classes = op.Unsqueeze(_ints(*range(num_classes)), _ints(0, 2))
    of_class = op.Equal(op.Unsqueeze(labels, _ints(1)), classes)  # [B, K, M]
    selected = op.NonMaxSuppression(
        boxes,
        op.Where(of_class, op.Unsqueeze(rank, _ints(1)), _float(0)),
        _ints(max_detections),
        op.Constant(value_floats=[float(nms_thresh)]),
        op.Constant(value_floats=[0.5]),
    )
    places = op.Gather(selected, _ints(0, 2), axis=1)  # image and candidate
    nothing = op.ConstantOfShape(op.Shape(rank))  # float32 zeros
    return op.ScatterND(nothing, places, op.GatherND(rank, places))


def _best(kept, max_detections: int):
    """The D highest ranks and their places, [B, D]; where there are fewer, ranks of 0 and any place."""
    padded = op.Pad(kept, op.Constant(value_ints=[0, 0, 0, max_detections]))
    rank, place = op.TopK(padded, _ints(max_detections), axis=1)
    last = op.Sub(op.Shape(kept, start=1, end=2), _ints(1))
    return rank, op.Min(place, last)


def _rows(level, channels: int):
    """[B, A * C, H, W] to [B, H * W * A, C]."""
    split = op.Reshape(level, op.Constant(value_ints=[0, level.shape[1] // channels, channels, -1]))
    return op.Reshape(op.Transpose(split, perm=[0, 3, 1, 2]), op.Constant(value_ints=[0, -1, channels]))


def _decode(deltas, anchors):
    """[B, M, 4] of deltas and anchors to boxes, operation by operation as `retinanet_ext.reference.decode_boxes`."""
    x1, y1, x2, y2 = op.Split(anchors, num_outputs=4, axis=2)
    dx, dy, dw, dh = op.Split(deltas, num_outputs=4, axis=2)
    half, clip = _float(0.5), _float(DELTA_CLIP)
    corners = []
    for low, high, shift, stretch in ((x1, x2, dx, dw), (y1, y2, dy, dh)):
        side = op.Sub(high, low)
        center = op.Add(op.Mul(shift, side), op.Add(low, op.Mul(half, side)))
        half_side = op.Mul(half, op.Mul(op.Exp(op.Min(stretch, clip)), side))
        corners.append((op.Sub(center, half_side), op.Add(center, half_side)))
    (left, right), (top, bottom) = corners
    return op.Concat(left, top, right, bottom, axis=2)


def _clip(boxes, image_sizes):
    """Boxes [B, n, 4] within their images; `image_sizes` [B, 2] are heights and widths."""
    limits = op.Gather(image_sizes, op.Constant(value_ints=[1, 0, 1, 0]), axis=1)
    return op.Min(op.Max(boxes, _float(0)), op.Unsqueeze(limits, _ints(1)))


def _int(value: int):
    return op.Constant(value_int=value)


def _ints(*values: int):
    return op.Constant(value_ints=list(values))


def _float(value: float):
    return op.Constant(value_float=float(value))
