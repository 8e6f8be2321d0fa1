"""The benchmarks' own checks and records: that wrong sides do not agree, and what is said of a peer that is missing."""

import pytest
import torch
from agreement import same_detections, unmatched


@pytest.fixture
def found():
    """An image's detections, as torchvision returns them."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(50, 2, generator=generator) * 400
    boxes = torch.cat([corner, corner + 20 + torch.rand(50, 2, generator=generator) * 100], dim=1)
    scores = torch.linspace(0.9, 0.1, 50)
    return {"boxes": boxes, "scores": scores, "labels": torch.arange(50) % 7}


def changed(found, name, change):
    return {**found, name: change(found[name].clone())}


def test_detections_of_equal_scores_in_another_order_are_the_same(found):
    tied = changed(found, "scores", lambda scores: scores.index_fill_(0, torch.arange(10, 13), scores[10]))
    order = torch.arange(50)
    order[10:13] = torch.tensor([12, 10, 11])
    same_detections({name: value[order] for name, value in tied.items()}, tied)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("boxes", lambda boxes: boxes + 0.5),
        ("boxes", lambda boxes: boxes[:, [1, 0, 3, 2]]),
        ("labels", lambda labels: labels + 1),
        ("scores", lambda scores: scores * 1.001),
        ("scores", lambda scores: scores.mul_(float("nan"))),
        ("boxes", lambda boxes: boxes[:1].expand(50, 4)),
    ],
    ids=["shifted", "transposed", "next class", "other scores", "not a number", "one box for all"],
)
def test_other_detections_are_not_the_same(found, name, change):
    with pytest.raises(AssertionError, match="detections are not among the other side's"):
        same_detections(changed(found, name, change), found, open_share=0.5)


def test_one_wrong_detection_is_too_many_unless_some_are_open(found):
    wrong = changed(found, "labels", lambda labels: labels.index_fill_(0, torch.tensor([3]), 9))
    assert unmatched(wrong, found, rtol=1e-5, pixels=0.01) == 1
    same_detections(wrong, found, open_share=0.02)
    with pytest.raises(AssertionError, match="1 of 50 detections"):
        same_detections(wrong, found)


def test_a_detection_is_nobodys_twice(found):
    doubled = {name: value[[0, 0, *range(2, 50)]] for name, value in found.items()}
    assert unmatched(doubled, found, rtol=1e-5, pixels=0.01) == 1


def test_fewer_detections_are_not_the_same(found):
    with pytest.raises(AssertionError, match="40 detections beside 50"):
        same_detections({name: value[:40] for name, value in found.items()}, found, open_share=0.1)
