"""The CUDA kernels of non-maximum suppression, run by the emulator: the real code, in several orders of its threads.

RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under AddressSanitizer and
UndefinedBehaviorSanitizer: see docs/testing.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retinanet_ext import reference

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SCHEDULES = [
    {"order": "forward"},
    {"order": "backward", "live_blocks": 2},
    {"order": "random", "seed": 1, "live_blocks": 3},
]


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_nms_emulator")


def clustered(count, clusters=12, seed=0, dtype=torch.float32, batch=1):
    """[batch, count, 4]: boxes that overlap a lot; scores that tie now and then; labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(clusters, (batch, count), generator=generator)
    center = (torch.rand(clusters, 2, generator=generator) * 200)[picked]
    center = center + torch.randn(batch, count, 2, generator=generator) * 6
    size = torch.rand(batch, count, 2, generator=generator) * 40 + 20
    scores = (torch.rand(batch, count, generator=generator) * count).round() / count
    boxes = torch.cat((center - size / 2, center + size / 2), dim=2).to(dtype)
    return boxes, scores.to(dtype), torch.randint(3, (batch, count), generator=generator)


def check_padded(emulator, boxes, scores, labels, threshold, most, num_valid=None, schedules=SCHEDULES):
    expected = reference.batched_nms_padded(boxes, scores, labels, threshold, most, num_valid)
    for schedule in schedules:
        got = emulator.batched_nms_padded(
            boxes.numpy(),
            scores.numpy(),
            labels.numpy(),
            threshold,
            most,
            num_valid=None if num_valid is None else num_valid.int().numpy(),
            **schedule,
        )
        for name, mine, right in zip(expected._fields, got, expected, strict=True):
            np.testing.assert_array_equal(mine, right.numpy(), err_msg=f"{name}, {schedule}")
    return expected


def check_nms(emulator, boxes, scores, labels, threshold, schedules=SCHEDULES, **options):
    """boxes [N, 4], scores [N], labels [N] or None."""
    if labels is None:
        expected = reference.nms(boxes, scores, threshold)
    else:
        expected = reference.batched_nms(boxes, scores, labels, threshold)
    for schedule in schedules:
        got = emulator.nms(
            boxes[None].numpy(),
            scores[None].numpy(),
            None if labels is None else labels[None].numpy(),
            threshold,
            **options,
            **schedule,
        )
        np.testing.assert_array_equal(got, expected.numpy(), err_msg=str(schedule))
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_padded_batches(emulator, threshold, dtype):
    """Images with all, some, one and none of their rows; more rows than a tile; fewer kept than there is room for."""
    boxes, scores, labels = clustered(150, dtype=DTYPES[dtype], batch=4)
    num_valid = torch.tensor([150, 65, 1, 0])
    expected = check_padded(emulator, boxes, scores, labels, threshold, 100, num_valid)
    assert (expected.counts[0] < 64) == (threshold < 0.5)
    assert expected.counts[0] > expected.counts[1] > 1
    assert expected.counts[2:].tolist() == [1, 0]
    check_padded(emulator, boxes, scores, labels, threshold, 100, schedules=SCHEDULES[1:])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_last_tile_of_any_size(emulator, count):
    """Every candidate counts: nothing is suppressed, then everything but the best."""
    apart = torch.arange(count)[None, :, None] * 30.0 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    scores = torch.randperm(count)[None] / count
    labels = torch.zeros(1, count, dtype=torch.int64)
    assert check_padded(emulator, apart, scores, labels, 0.5, count, schedules=SCHEDULES[:2]).counts == count
    assert len(check_nms(emulator, apart[0], scores[0], None, 0.5, schedules=SCHEDULES[:2])) == count
    same = apart[:, :1].expand(1, count, 4).contiguous()
    assert check_padded(emulator, same, scores, labels, 0.5, count, schedules=SCHEDULES[:1]).counts == 1
    assert len(check_nms(emulator, same[0], scores[0], None, 0.5, schedules=SCHEDULES[:1])) == 1


@pytest.mark.parametrize("most", [0, 1, 31, 32, 33, 63, 64, 65, 66, 100])
def test_stops_at_most(emulator, most):
    """In the middle of a tile, and at its end; the kept list has exactly that much room."""
    boxes = torch.arange(130)[None, :, None] * 30.0 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    scores = torch.randperm(130)[None] / 130
    labels = torch.arange(130)[None] % 2
    check_padded(emulator, boxes, scores, labels, 0.5, most, schedules=SCHEDULES[:2])


def test_chains_are_settled_in_order(emulator):
    """Each box suppresses the next, so that every second one is kept, across tiles and within them."""
    boxes = torch.arange(200)[:, None] * torch.tensor([3.0, 0.0, 3.0, 0.0]) + torch.tensor([0.0, 0.0, 10.0, 10.0])
    scores = 1 - torch.arange(200) / 200
    labels = torch.zeros(200, dtype=torch.int64)
    expected = check_nms(emulator, boxes, scores, labels, 0.5)
    assert expected.tolist() == list(range(0, 200, 2))
    check_nms(emulator, boxes, scores, labels, 0.5, band=64)
    check_padded(emulator, boxes[None], scores[None], labels[None], 0.5, 200)


@pytest.mark.parametrize("labels_of", ["none", "few", "all different", "negative and huge"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nms_in_one_band(emulator, dtype, labels_of):
    boxes, scores, labels = (tensor[0] for tensor in clustered(300, dtype=DTYPES[dtype]))
    labels = {
        "none": None,
        "few": labels,
        "all different": torch.arange(300),
        "negative and huge": (labels - 1) * (1 << 61),
    }[labels_of]
    check_nms(emulator, boxes, scores, labels, 0.4)


@pytest.mark.parametrize("band", [64, 100, 128, 299, 300])
def test_nms_in_several_bands(emulator, band):
    """What an earlier band keeps suppresses in later ones, and what it suppressed suppresses nothing."""
    boxes, scores, labels = (tensor[0] for tensor in clustered(300))
    expected = check_nms(emulator, boxes, scores, labels, 0.4, schedules=SCHEDULES[1:], band=band)
    assert 40 < len(expected) < 120
    far = torch.arange(300)[:, None] * 30.0 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    assert len(check_nms(emulator, far, scores, None, 0.4, schedules=SCHEDULES[:1], band=band)) == 300


def test_sweep_of_more_than_a_tile_of_kept_boxes(emulator):
    """300 kept boxes of one band; a later box is suppressed by the last of them, another by none."""
    boxes = torch.arange(620)[:, None] * 30.0 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    boxes[310:619] = boxes[1:310]  # the same again
    boxes[400] += 3000.0 * 30
    expected = check_nms(emulator, boxes, 1 - torch.arange(620) / 620, None, 0.5, schedules=SCHEDULES[1:2], band=310)
    assert len(expected) == 312


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_boxes_than_a_chunk_of_the_sort(emulator, dtype):
    """Three sorted runs, the last short: ranks across chunks, with ties. Few labels are equal, to keep it quick."""
    count = 2 * emulator.sort_chunk + 100
    boxes, scores, _ = clustered(count, dtype=DTYPES[dtype], batch=2)
    labels = (torch.arange(count) // 8).expand(2, count).contiguous()
    scores = (scores * 500).round() / 500
    num_valid = torch.tensor([count, emulator.sort_chunk + 1])
    check_padded(emulator, boxes, scores, labels, 0.1, 150, num_valid, schedules=SCHEDULES[2:])


def test_scores_of_all_kinds(emulator):
    """NaN first, then +inf; -0 ties with +0; -inf last. Equal ones by row."""
    special = torch.tensor([0.0, -0.0, float("nan"), 1.0, float("inf"), float("-inf"), -1.0, 1e-45, -float("nan")])
    scores = special.repeat(9)
    boxes = torch.arange(81)[:, None] * 30.0 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    for dtype in DTYPES.values():
        check_nms(emulator, boxes.to(dtype), scores.to(dtype), None, 0.5, schedules=SCHEDULES[:2])


def test_boxes_of_all_kinds(emulator):
    """Inverted, without area, not a number, infinite: an IoU that is not a number suppresses nothing."""
    boxes, scores, labels = (tensor[0] for tensor in clustered(120))
    boxes[5] = torch.tensor([10.0, 10.0, 5.0, 5.0])
    boxes[6], boxes[7], boxes[8] = 20.0, float("nan"), torch.tensor([0.0, 0.0, float("inf"), 9.0])
    boxes[40:44] = boxes[5:9]
    for threshold in (-0.5, 0.0, 0.5, 1.0, float("nan"), float("inf")):
        check_nms(emulator, boxes, scores, None, threshold, schedules=SCHEDULES[:1])
        check_padded(emulator, boxes[None], scores[None], labels[None], threshold, 120, schedules=SCHEDULES[1:2])


def test_iou_at_the_threshold_suppresses_nothing(emulator):
    """IoU of exactly 1/2, which float32 holds; one number above it does."""
    boxes = torch.tensor([[0.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, 4.0]])
    scores = torch.tensor([0.5, 0.25])
    assert len(check_nms(emulator, boxes, scores, None, 0.5)) == 2
    assert len(check_nms(emulator, boxes, scores, None, 0.5 - 2**-30)) == 1


def test_row_counts_that_cannot_be(emulator):
    """num_valid below 0 and beyond the rows: nothing outside the tensor is read."""
    boxes, scores, labels = clustered(70, batch=2)
    got = emulator.batched_nms_padded(
        boxes.numpy(), scores.numpy(), labels.numpy(), 0.5, 70, num_valid=np.array([-3, 1000], dtype=np.int32)
    )
    expected = reference.batched_nms_padded(boxes, scores, labels, 0.5, 70, torch.tensor([0, 70]))
    for mine, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, right.numpy())
