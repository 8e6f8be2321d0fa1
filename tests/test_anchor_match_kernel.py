"""The anchor matching CUDA kernels, run by the emulator: the real code, in several orders of its threads.

RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under AddressSanitizer and
UndefinedBehaviorSanitizer: see docs/testing.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retinanet_ext import reference

DTYPES = {"float32": torch.float32, "float64": torch.float64}
POLICIES = {"safe": 0, "torchvision": 1, "mmdet": 2}
# All legal on a GPU; a result that differs between two of them depends on the order of threads.
SCHEDULES = [
    {"order": "forward"},
    {"order": "backward", "live_blocks": 2},
    {"order": "random", "seed": 1, "live_blocks": 3},
    {"order": "random", "seed": 2},
]


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_anchor_match_emulator")


def grid_anchors(height=6, width=7, stride=8, sizes=(16.0, 28.0), dtype=torch.float32):
    """[height * width * 3 * sizes, 4]: anchors on a regular grid, which tie with one another all the time."""
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    cell = [
        [-w / 2, -h / 2, w / 2, h / 2] for size in sizes for w, h in ((size, size), (2 * size, size), (size, 2 * size))
    ]
    return (centers + torch.tensor(cell)).reshape(-1, 4).to(dtype)


def random_boxes(count, extent=56, dtype=torch.float32, seed=0):
    """Boxes with whole numbers as coordinates: many have several best anchors."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(-10, extent, (count, 2), generator=generator)
    size = torch.randint(3, 50, (count, 2), generator=generator)
    return torch.cat((corner, corner + size), dim=1).to(dtype)


def numpy_list(tensors):
    return [tensor.numpy() for tensor in tensors]


def check(
    emulator, anchors, boxes, *, labels=None, ignore=None, policy="safe", schedules=SCHEDULES, shift=0, **options
):
    """The kernels' results equal the reference's, in every order of the threads."""
    if labels is None:
        labels = [(torch.arange(len(image)) + 3) % 7 for image in boxes]  # no box has its row as its label
    expected = reference.assign_targets(
        anchors,
        boxes,
        labels,
        options.get("fg_iou_thresh", 0.5),
        options.get("bg_iou_thresh", 0.4),
        options.get("low_quality", True),
        policy=policy,
        min_pos_iou=options.get("min_pos_iou", 0.0),
        gt_ignore=ignore,
    )
    for schedule in schedules:
        got = emulator.match(
            anchors.numpy(),
            numpy_list(boxes),
            labels=numpy_list(labels),
            ignore=[] if ignore is None else numpy_list(ignore),
            policy=POLICIES[policy],
            shift=shift,
            **options,
            **schedule,
        )
        for name, mine, right in zip(expected._fields, got, expected, strict=True):
            np.testing.assert_array_equal(mine, right.numpy(), err_msg=f"{name}, {schedule}")
    return expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_batch(emulator, dtype, policy):
    """Images with more boxes than a warp has lanes, with few, with one, and with none; a last tile that is not full."""
    anchors = grid_anchors(dtype=DTYPES[dtype])
    assert len(anchors) % emulator.tile != 0
    boxes = [random_boxes(count, dtype=DTYPES[dtype], seed=count) for count in (70, 0, 5, 1)]
    expected = check(emulator, anchors, boxes, policy=policy)
    assert (expected.num_foreground[[0, 2, 3]] > 0).all()
    assert expected.num_foreground[1] == 0
    assert (expected.matched == -2).any()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("low_quality", [True, False])
def test_thresholds(emulator, policy, low_quality):
    anchors = grid_anchors()
    boxes = [random_boxes(20)]
    for fg_iou_thresh, bg_iou_thresh in ((0.7, 0.3), (1.0, 0.0), (0.0, 0.0), (0.5, 0.5)):
        check(
            emulator,
            anchors,
            boxes,
            policy=policy,
            low_quality=low_quality,
            fg_iou_thresh=fg_iou_thresh,
            bg_iou_thresh=bg_iou_thresh,
            schedules=SCHEDULES[1:3],
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_box_that_overlaps_no_anchor(emulator, policy):
    """Two of the policies make foreground of every anchor; of two such boxes mmdet's takes the last."""
    far = torch.tensor([[5000.0, 5000.0, 5010.0, 5020.0], [-900.0, 0.0, -890.0, 10.0]])
    boxes = [torch.cat((random_boxes(40), far)), torch.cat((far[:1], random_boxes(3)))]
    anchors = grid_anchors()
    expected = check(emulator, anchors, boxes, policy=policy, schedules=SCHEDULES[1:3])
    flooded = (expected.num_foreground == len(anchors)).all()
    assert flooded == (policy != "safe")
    check(emulator, anchors, boxes, policy=policy, min_pos_iou=0.2, schedules=SCHEDULES[:2])


@pytest.mark.parametrize("policy", POLICIES)
def test_regions_to_ignore(emulator, policy):
    boxes = [random_boxes(45), random_boxes(3), torch.tensor([[0.0, 0.0, 80.0, 60.0]])]
    ignore = [torch.arange(45) % 3 == 0, torch.tensor([False, True, False]), torch.tensor([True])]
    expected = check(emulator, grid_anchors(), boxes, ignore=ignore, policy=policy)
    assert (expected.matched[2] == -2).any()
    assert expected.num_foreground[2] == 0


def test_improper_boxes_and_anchors(emulator):
    """Boxes that are degenerate or not finite take no part, and move nobody's row; of such anchors the IoU is 0."""
    nan, inf = float("nan"), float("inf")
    boxes = random_boxes(40)
    boxes[0] = torch.tensor([5.0, 5.0, 5.0, 20.0])
    boxes[7] = torch.tensor([30.0, 5.0, 20.0, 20.0])
    boxes[33] = torch.tensor([nan, 5.0, 20.0, 20.0])
    boxes[34] = torch.tensor([0.0, 5.0, inf, 20.0])
    anchors = grid_anchors()
    anchors[3] = nan
    anchors[40, 2] = inf
    anchors[41] = anchors[41].flip(0)
    anchors[200, 0] = nan
    anchors[130] = torch.tensor([-inf, -inf, inf, inf])
    for policy in POLICIES:
        expected = check(emulator, anchors, [boxes], policy=policy, schedules=SCHEDULES[1:3])
        assert not torch.isin(expected.matched, torch.tensor([0, 7, 33, 34])).any()
    check(emulator, anchors, [boxes[[0, 7]]], schedules=SCHEDULES[:1])


def test_extreme_sizes(emulator):
    """Areas that overflow, that vanish, and numbers near the smallest: nothing may be left out by a rounding."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-22, 3e-20, 1e-19, 1e17, 3e18, 1e30):
        anchors = grid_anchors() * scale
        boxes = random_boxes(24) * scale
        boxes[1::3] *= 10.0 ** torch.randint(-3, 4, (8, 1), generator=generator)
        check(emulator, anchors, [boxes], schedules=SCHEDULES[:1])


def test_anchors_of_each_image(emulator):
    anchors = torch.stack([grid_anchors(), grid_anchors() + 5, grid_anchors().flip(0)])
    check(emulator, anchors, [random_boxes(12), random_boxes(0), random_boxes(33)])


@pytest.mark.parametrize("images_per_launch", [1, 2])
@pytest.mark.parametrize("per_image", [False, True])
def test_images_of_several_launches(emulator, per_image, images_per_launch):
    """Each launch has a table of its own images; a third one has fewer than the others."""
    anchors = grid_anchors()
    if per_image:
        anchors = torch.stack([anchors + 3 * image for image in range(5)])
    boxes = [random_boxes(count, seed=count) for count in (12, 0, 35, 4, 7)]
    ignore = [torch.arange(len(image)) % 4 == 3 for image in boxes]
    expected = check(
        emulator, anchors, boxes, ignore=ignore, schedules=SCHEDULES[2:3], images_per_launch=images_per_launch
    )
    assert (expected.num_foreground[[0, 2, 3, 4]] > 0).all()


@pytest.mark.parametrize("count", [1, 3, 4, 127, 128, 129, 1025])
def test_numbers_of_anchors(emulator, count):
    """Lanes, tiles, warps and blocks that are not full; results of an image that begin anywhere."""
    anchors = grid_anchors(16, 16)[:count]
    boxes = [random_boxes(6), random_boxes(2, seed=1), random_boxes(9, seed=2)]
    for shift in (0, 1):
        check(emulator, anchors, boxes, shift=shift, schedules=SCHEDULES[1:2])


@pytest.mark.parametrize("count", [125, 126, 127])
def test_last_anchors_of_one_image(emulator, count):
    """Aligned results that end within a vector: nothing is written past them."""
    check(emulator, grid_anchors()[:count], [random_boxes(6)], schedules=SCHEDULES[:1])


def test_thresholds_of_zero(emulator):
    """Every anchor is foreground, of the first box that takes part where it overlaps none; without boxes none is."""
    boxes = random_boxes(8)
    boxes[:3, 2:] = boxes[:3, :2]
    options = {"fg_iou_thresh": 0.0, "bg_iou_thresh": 0.0, "schedules": SCHEDULES[:1]}
    expected = check(emulator, grid_anchors(), [boxes, boxes[:2], boxes[:0]], **options)
    assert (expected.matched[0] == 3).any()
    assert expected.num_foreground.tolist() == [len(grid_anchors()), 0, 0]


def test_foreground_inside_a_region_to_ignore(emulator):
    """It stays foreground, of the first box too."""
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [0.0, 0.0, 60.0, 60.0]])
    expected = check(emulator, grid_anchors(), [boxes], ignore=[torch.tensor([False, True])], schedules=SCHEDULES[:1])
    assert (expected.matched == 0).any()


def test_no_anchors(emulator):
    got = emulator.match(np.zeros((0, 4), np.float32), [random_boxes(3).numpy()], labels=[np.zeros(3, np.int64)])
    assert got[0].shape == (1, 0)
    assert got[2].tolist() == [0]


def test_first_box_of_equal_ones(emulator):
    """Boxes that are all the same, in one warp's turn and in several."""
    boxes = random_boxes(1).repeat(70, 1)
    expected = check(emulator, grid_anchors(), [boxes], schedules=SCHEDULES[:2])
    assert set(expected.matched.unique().tolist()) <= {-2, -1, 0}
    expected = check(emulator, grid_anchors(), [boxes], policy="mmdet", schedules=SCHEDULES[:2])
    assert 69 in expected.matched


@pytest.mark.parametrize("wide", [True, False])
def test_packed_boxes(emulator, wide):
    """Offsets on the device; rows past the last one are never read, whatever they say nothing else is."""
    anchors = grid_anchors()
    boxes = [random_boxes(40), random_boxes(0), random_boxes(7, seed=3)]
    ignore = [torch.arange(len(image)) % 5 == 1 for image in boxes]
    labels = [torch.arange(len(image)) for image in boxes]
    expected = reference.assign_targets(anchors, boxes, labels, gt_ignore=ignore)
    spare = torch.full((3, 4), 9.0)
    arguments = dict(
        labels=[torch.cat([*labels, torch.zeros(3, dtype=torch.long)]).to(torch.long if wide else torch.int32).numpy()],
        ignore=[torch.cat([*ignore, torch.zeros(3, dtype=torch.bool)]).numpy()],
    )
    packed = torch.cat([*boxes, spare]).numpy()
    got = emulator.match(anchors.numpy(), [packed], offsets=np.array([0, 40, 40, 47], np.int32), **arguments)
    for mine, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, right.numpy())
    for offsets in ([-3, 40, 20, 90], [-1, 40, 39, 51]):
        got = emulator.match(anchors.numpy(), [packed], offsets=np.array(offsets, np.int32), **arguments)
        np.testing.assert_array_equal(got[1][0], expected.matched[0].numpy())
        assert got[2][1] == 0


def test_matched_rows_alone(emulator):
    anchors, boxes = grid_anchors(), [random_boxes(20)]
    labels, matched, foreground = emulator.match(anchors.numpy(), numpy_list(boxes))
    assert labels is None
    assert foreground is None
    np.testing.assert_array_equal(matched, reference.match_anchors(anchors, boxes).numpy())
