import functools
import warnings

import numpy as np
import torch

from .. import _ext


def _renamed(**names):
    """Arguments by their older names are taken, with a warning."""

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            for old in names.keys() & kwargs.keys():
                warnings.warn(f"{old} is {names[old]} by now", DeprecationWarning, stacklevel=2)
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


@_renamed(iou_thr="iou_threshold")
def nms(boxes, scores, iou_threshold: float, offset: int = 0, score_threshold: float = 0, max_num: int = -1):
    """Boxes with their scores [n, 5], and their rows; arrays where arrays come."""
    assert isinstance(boxes, (torch.Tensor, np.ndarray))
    assert isinstance(scores, (torch.Tensor, np.ndarray))
    is_numpy = isinstance(boxes, np.ndarray)
    boxes, scores = torch.as_tensor(boxes), torch.as_tensor(scores)
    assert boxes.size(1) == 4
    assert boxes.size(0) == scores.size(0)
    assert offset in (0, 1)
    rows = (scores > score_threshold).nonzero()[:, 0] if score_threshold > 0 else torch.arange(len(scores))
    inds = rows[
        _ext.nms(boxes[rows].detach(), scores[rows].detach(), iou_threshold=float(iou_threshold), offset=offset)
    ]
    inds = inds[:max_num] if max_num > 0 else inds
    dets = torch.cat((boxes[inds], scores[inds, None]), dim=1)
    return (dets.numpy(), inds.numpy()) if is_numpy else (dets, inds)


@_renamed(iou_thr="iou_threshold")
def soft_nms(boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=1e-3, method="linear", offset=0):
    """Not the formula: what counts here is that it is not ours."""
    dets, inds = nms(boxes, scores, iou_threshold)
    return dets * dets.new_tensor([1, 1, 1, 1, 0.5]), inds


def batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic: bool = False):
    """By label: boxes are moved apart, or taken label by label if they are `split_thr` or more."""
    if nms_cfg is None:
        scores, inds = scores.sort(descending=True)
        return torch.cat([boxes[inds], scores[:, None]], -1), inds
    options = dict(nms_cfg)
    apart = boxes
    if not options.pop("class_agnostic", class_agnostic):
        apart = boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None]
    kind = options.pop("type", "nms")
    suppress = globals()[kind] if isinstance(kind, str) else kind
    if len(boxes) < options.pop("split_thr", 10000):
        dets, keep = suppress(apart, scores, **options)
        return torch.cat([boxes[keep], dets[:, -1:]], -1), keep
    max_num = options.pop("max_num", -1)
    kept_scores = torch.full_like(scores, -torch.inf)
    for label in idxs.unique():
        rows = (idxs == label).nonzero()[:, 0]
        dets, keep = suppress(apart[rows], scores[rows], **options)
        kept_scores[rows[keep]] = dets[:, -1]
    keep = kept_scores.argsort(descending=True, stable=True)[: int((kept_scores > -torch.inf).sum())]
    keep = keep[:max_num] if max_num > 0 else keep
    return torch.cat([boxes[keep], kept_scores[keep, None]], -1), keep
