"""mmdet's `MaxIoUAssigner` without the matrix of all IoUs."""

from __future__ import annotations

import sys
from numbers import Real

import torch
from mmdet.models.task_modules.assigners.assign_result import AssignResult
from mmdet.models.task_modules.assigners.iou2d_calculator import BboxOverlaps2D
from mmdet.models.task_modules.assigners.max_iou_assigner import MaxIoUAssigner
from torch import Tensor

from .. import ops
from .ordinary import is_eager
from .originals import has_own, is_of

_ASSIGN = vars(MaxIoUAssigner)["assign"]
_iou2d = sys.modules[BboxOverlaps2D.__module__]
_bbox_overlaps = sys.modules[_iou2d.bbox_overlaps.__module__]
_SMALLEST_UNION = 1e-6  # smaller ones count as this to mmdet


class LazyAssignResult(AssignResult):
    """Whose `max_overlaps`, the best IoU of each prior, which losses do not ask for, is computed when it is."""

    def __init__(self, num_gts: int, gt_inds: Tensor, labels: Tensor, priors: Tensor, gt_bboxes: Tensor):
        self._boxes = priors, gt_bboxes
        super().__init__(num_gts=num_gts, gt_inds=gt_inds, max_overlaps=None, labels=labels)

    @property
    def max_overlaps(self) -> Tensor:
        if self._max_overlaps is None:
            self._max_overlaps = _best_overlaps(*self._boxes)
        return self._max_overlaps

    @max_overlaps.setter
    def max_overlaps(self, value: Tensor | None) -> None:
        self._max_overlaps = value


def assign(self, pred_instances, gt_instances, gt_instances_ignore=None, **kwargs) -> AssignResult:
    """``gt_inds`` [N]: 0 background, -1 left out, otherwise the row of the box and 1; ``labels``: its class or -1.

    ``gpu_assign_thr``, which moves the matrix to the CPU where it would be too large, has nothing to move here.
    """
    priors, gt_bboxes, gt_labels = pred_instances.priors, gt_instances.bboxes, gt_instances.labels
    ignored = None if gt_instances_ignore is None else gt_instances_ignore.bboxes
    if not (_has_our_rule(self, ignored) and _are_ours(priors, gt_bboxes, gt_labels)):
        return _ASSIGN(self, pred_instances, gt_instances, gt_instances_ignore, **kwargs)
    matched = ops.match_anchors(
        priors,
        [gt_bboxes],
        self.pos_iou_thr,
        self.neg_iou_thr,
        bool(self.match_low_quality),
        policy="mmdet",
        min_pos_iou=self.min_pos_iou,
    )[0].long()
    gt_inds = torch.where(matched == -2, -1, matched + 1)
    labels = torch.where(matched >= 0, gt_labels[matched.clamp(min=0)], -1)
    return LazyAssignResult(len(gt_bboxes), gt_inds, labels, priors.detach(), gt_bboxes.detach())


ASSIGNER_METHODS = {"assign": assign}


def _has_our_rule(assigner: MaxIoUAssigner, ignored: Tensor | None) -> bool:
    calculator = assigner.iou_calculator
    thresholds = (assigner.pos_iou_thr, assigner.neg_iou_thr, assigner.min_pos_iou)
    return (
        has_own(assigner, MaxIoUAssigner, "assign_wrt_overlaps")
        and has_own(calculator, BboxOverlaps2D, "__call__")
        and calculator.dtype != "fp16"
        and is_of(_iou2d.bbox_overlaps, _bbox_overlaps)
        and all(isinstance(threshold, Real) for threshold in thresholds)
        and isinstance(assigner.neg_iou_thr, float)  # of any other number mmdet makes no background
        and 0 <= assigner.neg_iou_thr <= assigner.pos_iou_thr <= 1
        and 0 <= assigner.min_pos_iou <= 1
        and bool(assigner.gt_max_assign_all or not assigner.match_low_quality)
        and assigner.perm_repeat_gt_cfg is None
        and (assigner.ignore_iof_thr <= 0 or ignored is None or ignored.numel() == 0)
    )


def _are_ours(priors: object, gt_bboxes: object, gt_labels: object) -> bool:
    """Plain boxes of one type that mmdet computes in, with an area. Waits for the device once."""
    if type(priors) is not Tensor or type(gt_bboxes) is not Tensor or not is_eager(priors):
        return False
    if priors.dtype not in (torch.float32, torch.float64) or gt_bboxes.dtype != priors.dtype:
        return False
    if any(boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) == 0 for boxes in (priors, gt_bboxes)):
        return False
    if type(gt_labels) is not Tensor or gt_labels.shape != gt_bboxes.shape[:1] or gt_labels.dtype != torch.int64:
        return False
    if not priors.device == gt_bboxes.device == gt_labels.device:
        return False
    has_area = (gt_bboxes[:, 2:] > gt_bboxes[:, :2]).all() & (_areas(gt_bboxes) > 2 * _SMALLEST_UNION).all()
    return bool(has_area & gt_bboxes.isfinite().all() & priors.isfinite().all())


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _best_overlaps(priors: Tensor, gt_bboxes: Tensor) -> Tensor:
    """[N], the bits of mmdet's calculator: the IoU of each prior and the box that it overlaps most."""
    best = ops.match_anchors(priors, [gt_bboxes], 0.0, 0.0, False)[0].long()
    boxes = gt_bboxes[best.clamp(min=0)]
    sides = (torch.minimum(boxes[:, 2:], priors[:, 2:]) - torch.maximum(boxes[:, :2], priors[:, :2])).clamp(min=0)
    overlaps = sides[:, 0] * sides[:, 1]
    return overlaps / (_areas(boxes) + _areas(priors) - overlaps).clamp(min=_SMALLEST_UNION)
