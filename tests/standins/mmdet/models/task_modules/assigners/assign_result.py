import torch


class AssignResult:
    """`gt_inds`: 0 background, -1 left out, otherwise the row of the box and 1."""

    def __init__(self, num_gts, gt_inds, max_overlaps, labels):
        self.num_gts = num_gts
        self.gt_inds = gt_inds
        self.max_overlaps = max_overlaps
        self.labels = labels

    def add_gt_(self, gt_labels):
        """The boxes themselves as further priors, before the others."""
        self.gt_inds = torch.cat([torch.arange(1, len(gt_labels) + 1), self.gt_inds])
        self.max_overlaps = torch.cat([self.max_overlaps.new_ones(len(gt_labels)), self.max_overlaps])
        self.labels = torch.cat([gt_labels, self.labels])
