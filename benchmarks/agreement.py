"""Whether two sides found the same objects, in whatever order those of nearly equal scores come."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def unmatched(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, rtol: float, pixels: float) -> int:
    """How many of our detections of an image have no partner of their own among theirs: the same label, a score within
    `rtol` of it, each coordinate within `pixels`. Both hold `boxes` [N, 4], `scores` [N] and `labels` [N]."""
    (boxes, scores, labels), (other_boxes, other_scores, other_labels) = (
        [side["boxes"].double().cpu(), side["scores"].double().cpu(), side["labels"].cpu()] for side in (mine, theirs)
    )
    partners = labels[:, None] == other_labels
    partners &= (scores[:, None] - other_scores).abs() <= rtol * other_scores
    partners &= (boxes[:, None] - other_boxes).abs().amax(-1) <= pixels
    free = set(range(len(other_labels)))
    alone = 0
    for row, near in enumerate(partners):
        candidates = free.intersection(near.nonzero().flatten().tolist())
        if candidates:
            free.remove(min(candidates, key=lambda column: abs(column - row)))
        else:
            alone += 1
    return alone


def same_detections(
    mine: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    *,
    rtol: float = 1e-5,
    pixels: float = 0.01,
    open_share: float = 0.0,
) -> None:
    """AssertionError unless an image's detections are the same, but for `open_share` of them: where scores tie, or are
    as good as equal, the sides may differ in which box suppresses which and in who comes last."""
    count, other_count = len(mine["labels"]), len(theirs["labels"])
    assert abs(count - other_count) <= open_share * other_count, f"{count} detections beside {other_count}"
    alone = unmatched(mine, theirs, rtol=rtol, pixels=pixels)
    assert alone <= open_share * other_count, f"{alone} of {count} detections are not among the other side's"
