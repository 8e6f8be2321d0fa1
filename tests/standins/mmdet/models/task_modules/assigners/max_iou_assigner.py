import torch

from .assign_result import AssignResult
from .iou2d_calculator import BboxOverlaps2D


class MaxIoUAssigner:
    def __init__(
        self,
        pos_iou_thr,
        neg_iou_thr,
        min_pos_iou=0.0,
        gt_max_assign_all=True,
        ignore_iof_thr=-1,
        ignore_wrt_candidates=True,
        match_low_quality=True,
        gpu_assign_thr=-1,
        iou_calculator=None,
        perm_repeat_gt_cfg=None,
    ):
        self.pos_iou_thr, self.neg_iou_thr, self.min_pos_iou = pos_iou_thr, neg_iou_thr, min_pos_iou
        self.gt_max_assign_all, self.match_low_quality = gt_max_assign_all, match_low_quality
        self.ignore_iof_thr, self.ignore_wrt_candidates = ignore_iof_thr, ignore_wrt_candidates
        self.gpu_assign_thr, self.perm_repeat_gt_cfg = gpu_assign_thr, perm_repeat_gt_cfg
        options = {key: value for key, value in (iou_calculator or {}).items() if key != "type"}
        self.iou_calculator = BboxOverlaps2D(**options)

    def assign(self, pred_instances, gt_instances, gt_instances_ignore=None, **kwargs):
        priors, boxes = pred_instances.priors, gt_instances.bboxes
        overlaps = self.iou_calculator(boxes, priors)
        if self.ignore_iof_thr > 0 and gt_instances_ignore is not None and gt_instances_ignore.bboxes.numel() > 0:
            inside = self.iou_calculator(priors, gt_instances_ignore.bboxes, mode="iof").max(dim=1).values
            overlaps[:, inside > self.ignore_iof_thr] = -1
        return self.assign_wrt_overlaps(overlaps, gt_instances.labels)

    def assign_wrt_overlaps(self, overlaps, gt_labels):
        num_gts, num_priors = overlaps.shape
        gt_inds = overlaps.new_full((num_priors,), -1 if num_gts else 0, dtype=torch.long)
        labels = torch.full_like(gt_inds, -1)
        if num_gts == 0 or num_priors == 0:
            return AssignResult(num_gts, gt_inds, overlaps.new_zeros(num_priors), labels)
        max_overlaps, best = overlaps.max(dim=0)
        lowest, negative = self.neg_iou_thr if isinstance(self.neg_iou_thr, tuple) else (0, self.neg_iou_thr)
        gt_inds[(max_overlaps >= lowest) & (max_overlaps < negative)] = 0
        gt_inds = torch.where(max_overlaps >= self.pos_iou_thr, best + 1, gt_inds)
        if self.match_low_quality:
            for box, row in enumerate(overlaps):
                if row.max() >= self.min_pos_iou:
                    gt_inds[row == row.max() if self.gt_max_assign_all else row.argmax()] = box + 1
        positive = gt_inds > 0
        labels[positive] = gt_labels[gt_inds[positive] - 1]
        return AssignResult(num_gts, gt_inds, max_overlaps, labels)
