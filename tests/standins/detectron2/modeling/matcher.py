import math

import torch


class Matcher:
    """The best box of each prediction, and a label by the range of thresholds that its overlap falls into."""

    def __init__(self, thresholds, labels, allow_low_quality_matches=False):
        assert thresholds[0] > 0
        self.thresholds = [-math.inf, *thresholds, math.inf]
        assert len(labels) == len(thresholds) + 1
        self.labels = labels
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix):
        """[M, N] overlaps of boxes with predictions. Returns int64 [N], the box, and int8 [N], the label."""
        count = match_quality_matrix.shape[1]
        labels = torch.full((count,), self.labels[0], dtype=torch.int8, device=match_quality_matrix.device)
        if match_quality_matrix.numel() == 0:
            return labels.long() * 0, labels
        assert (match_quality_matrix >= 0).all()
        overlaps, matches = match_quality_matrix.max(dim=0)
        for label, threshold in zip(self.labels[1:], self.thresholds[1:-1], strict=True):
            labels[overlaps >= threshold] = label
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(labels, match_quality_matrix)
        return matches, labels

    def set_low_quality_matches_(self, match_labels, match_quality_matrix):
        """Every prediction with the best overlap of some box, ties too, is foreground of its own best box."""
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        match_labels[(match_quality_matrix == best).any(dim=0)] = 1
