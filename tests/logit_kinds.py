"""Logits that make it hard to choose the best of them: what tests of `detect` share."""

import torch

LOGIT_KINDS = ("random", "all equal", "rising", "falling", "few values", "infinite and NaN")


def logits_of_kind(kind, levels):
    """The levels, or others of their shapes."""
    if kind == "all equal":
        return [torch.full_like(level, 0.5) for level in levels]
    if kind in ("rising", "falling"):
        step = 1e-3 if kind == "rising" else -1e-3
        return [(torch.arange(level.numel()) * step).view(level.shape).to(level.dtype) for level in levels]
    if kind == "few values":
        return [level.round() for level in levels]
    levels = [level.clone() for level in levels]
    if kind == "infinite and NaN":
        for value, every in ((float("inf"), 5), (float("-inf"), 7), (float("nan"), 11)):
            for level in levels:
                level.view(-1)[::every] = value
    return levels
