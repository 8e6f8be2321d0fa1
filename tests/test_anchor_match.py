"""match_anchors and assign_targets against loops over single numbers, and against torchvision's matcher."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet_ext import assign_targets, match_anchors
from retinanet_ext.reference import anchor_match as reference

POLICIES = ("safe", "torchvision", "detectron2", "mmdet")


def scalar_iou(a, b):
    """float32 IoU of two boxes, one rounding an operation."""
    one = np.float32
    with np.errstate(all="ignore"):
        area_a = one(a[2] - a[0]) * one(a[3] - a[1])
        area_b = one(b[2] - b[0]) * one(b[3] - b[1])
        w = max(one(0), one(min(a[2], b[2]) - max(a[0], b[0])))
        h = max(one(0), one(min(a[3], b[3]) - max(a[1], b[1])))
        return one(w * h) / one(one(area_a + area_b) - one(w * h))


def match_loop(anchors, gt_boxes, fg, bg, low_quality, policy, min_pos_iou, ignore):
    """The rules of match_anchors, a pair at a time."""
    anchors, gt_boxes = anchors.numpy(), gt_boxes.numpy()
    fg, bg, min_pos_iou = np.float32(fg), np.float32(bg), np.float32(min_pos_iou)
    with np.errstate(all="ignore"):
        sides = gt_boxes[:, 2:] - gt_boxes[:, :2]
    valid = [j for j in range(len(gt_boxes)) if (sides[j] > 0).all() and np.isfinite(sides[j]).all()]
    real = [j for j in valid if not ignore[j]]
    iou = {(j, n): scalar_iou(gt_boxes[j], anchors[n]) for j in real for n in range(len(anchors))}
    best = {j: max(iou[j, n] for n in range(len(anchors))) for j in real} if len(anchors) else {}

    result = []
    for n, anchor in enumerate(anchors):
        own, own_iou = -1, np.float32(-1)
        for j in real:
            if iou[j, n] > own_iou:
                own, own_iou = j, iou[j, n]
        matched = -1 if not real or own_iou < bg else own if own_iou >= fg else -2
        if low_quality:
            for j in real:
                if iou[j, n] != best[j]:
                    continue
                if policy == "mmdet" and best[j] >= min_pos_iou:
                    matched = j
                if policy in ("torchvision", "detectron2") or (policy == "safe" and best[j] > 0):
                    matched = own
        area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
        for j in valid:
            if ignore[j] and matched < 0:
                w = max(0, min(anchor[2], gt_boxes[j, 2]) - max(anchor[0], gt_boxes[j, 0]))
                h = max(0, min(anchor[3], gt_boxes[j, 3]) - max(anchor[1], gt_boxes[j, 1]))
                if w * h / area >= 0.5:
                    matched = -2
        result.append(matched)
    return torch.tensor(result, dtype=torch.int32)


def lattice_boxes(num, low=1):
    """Boxes on a coarse lattice: ties and exact thresholds are common. ``low`` 0 allows sides of 0."""
    box = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(low, 6), st.integers(low, 6))
    return st.lists(box, min_size=0, max_size=num).map(
        lambda boxes: torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=torch.float32).reshape(-1, 4)
    )


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    anchors=lattice_boxes(12),
    gt_boxes=lattice_boxes(6, low=0),
    thresholds=st.sampled_from([(0.5, 0.4), (0.5, 0.5), (0.25, 0.0), (1.0, 0.5), (0.0, 0.0)]),
    low_quality=st.booleans(),
    policy=st.sampled_from(POLICIES),
    min_pos_iou=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_agrees_with_a_loop_over_pairs(data, anchors, gt_boxes, thresholds, low_quality, policy, min_pos_iou):
    mask = data.draw(st.lists(st.booleans(), min_size=len(gt_boxes), max_size=len(gt_boxes)))
    ignore = torch.tensor(mask, dtype=torch.bool)
    fg, bg = thresholds
    found = match_anchors(
        anchors, [gt_boxes], fg, bg, low_quality, policy=policy, min_pos_iou=min_pos_iou, gt_ignore=[ignore]
    )
    expected = match_loop(anchors, gt_boxes, fg, bg, low_quality, policy, min_pos_iou, mask)
    assert found.dtype == torch.int32
    assert found.shape == (1, len(anchors))
    assert torch.equal(found[0], expected)


def random_boxes(num, generator, extent=200.0):
    corner = torch.rand(num, 2, generator=generator) * extent
    return torch.cat([corner, corner + 1 + torch.rand(num, 2, generator=generator) * 80], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["torchvision", "detectron2"])
def test_torchvision_matcher(policy, dtype):
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision")
    from torchvision.models.detection._utils import Matcher

    generator = torch.Generator().manual_seed(0)
    anchors = random_boxes(3000, generator).to(dtype)
    far_away = torch.tensor([[5000.0, 5000.0, 5100.0, 5100.0]], dtype=dtype)  # touches no anchor: floods
    for gt_boxes in (random_boxes(40, generator).to(dtype), torch.cat([anchors[:3], far_away, anchors[5:6]])):
        for fg, bg in ((0.5, 0.4), (0.7, 0.3)):
            for low_quality in (True, False):
                expected = Matcher(fg, bg, low_quality)(tv_ops.box_iou(gt_boxes, anchors))
                found = match_anchors(anchors, [gt_boxes], fg, bg, low_quality, policy=policy)
                assert torch.equal(found[0].long(), expected)


def test_box_without_overlap_floods_only_where_parity_asks_for_it():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 9]])
    gt_boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    assert match_anchors(anchors, [gt_boxes], policy="safe").tolist() == [[0, -1, 0]]
    # all three miss box 1, so all three get back their own best box
    assert match_anchors(anchors, [gt_boxes], policy="torchvision").tolist() == [[0, 0, 0]]
    assert match_anchors(anchors, [gt_boxes], policy="mmdet").tolist() == [[1, 1, 1]]
    assert match_anchors(anchors, [gt_boxes], policy="mmdet", min_pos_iou=0.1).tolist() == [[0, -1, 0]]


def test_thresholds_are_inclusive_above_and_exclusive_below():
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    half, below = torch.tensor([[0.0, 0, 10, 5]]), torch.tensor([[0.0, 0, 10, 4]])  # IoU of 0.5 and 0.4

    def match(box):
        return match_anchors(anchors, [box], 0.5, 0.4, allow_low_quality_matches=False).item()

    assert match(half) == 0
    assert match(torch.tensor([[0.0, 0, 10, 4.9999995]])) == -2
    assert match(below) == -2
    assert match(torch.tensor([[0.0, 0, 10, 3.9999998]])) == -1


def test_a_tie_goes_to_the_first_box():
    anchors = torch.tensor([[0.0, 0, 4, 4]])
    gt_boxes = torch.tensor([[50.0, 50, 60, 60], [0, 0, 4, 4], [0, 0, 4, 4]])
    assert match_anchors(anchors, [gt_boxes]).item() == 1
    assert match_anchors(anchors, [gt_boxes], policy="mmdet", min_pos_iou=0.1).item() == 2


def test_degenerate_and_non_finite_boxes_are_dropped_and_rows_keep_their_numbers():
    inf, nan = float("inf"), float("nan")
    anchors = torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]])
    gt_boxes = torch.tensor(
        [
            [0.0, 0, 0, 10],
            [5, 5, 2, 9],
            [nan, 0, 10, 10],
            [0, 0, inf, 10],
            [-3e38, 0, 3e38, 10],  # finite corners, but the side overflows
            [0, 0, 10, 9],
        ]
    )
    for policy in POLICIES:
        assert match_anchors(anchors, [gt_boxes], policy=policy)[0, 0].item() == 5
        assert match_anchors(anchors, [gt_boxes[:5]], policy=policy).tolist() == [[-1, -1]]
    regions = [torch.ones(5, dtype=torch.bool)]
    assert match_anchors(anchors, [gt_boxes[:5]], gt_ignore=regions).tolist() == [[-1, -1]]


def test_an_anchor_that_is_not_a_box_overlaps_nothing():
    nan = float("nan")
    anchors = torch.tensor([[nan, 0, 10, 10], [0, 0, 10, 10], [10, 10, 0, 0]])
    gt_boxes = torch.tensor([[0.0, 0, 10, 10]])
    assert match_anchors(anchors, [gt_boxes]).tolist() == [[-1, 0, -1]]


def test_ignored_boxes():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 21], [100, 100, 110, 110]])
    gt_boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    ignore = torch.tensor([True, False])
    # anchor 1 has exactly half of its area inside the ignored box, anchor 2 a little less
    assert match_anchors(anchors, [gt_boxes], gt_ignore=[ignore]).tolist() == [[-2, -2, -1, 1]]
    # a match wins over the ignored region
    overlapping = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    assert match_anchors(anchors[:1], [overlapping], gt_ignore=[ignore]).tolist() == [[1]]


def test_batches_packed_boxes_and_anchors_of_each_image():
    generator = torch.Generator().manual_seed(1)
    anchors = torch.stack([random_boxes(200, generator) for _ in range(4)])
    gt_boxes = [random_boxes(count, generator) for count in (3, 0, 7, 1)]
    ignore = [torch.rand(len(boxes), generator=generator) < 0.3 for boxes in gt_boxes]
    each = [match_anchors(anchors[image], [gt_boxes[image]], gt_ignore=[ignore[image]])[0] for image in range(4)]
    assert torch.equal(match_anchors(anchors, gt_boxes, gt_ignore=ignore), torch.stack(each))

    offsets = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)
    junk = torch.full((5, 4), float("nan"))
    packed = torch.cat([*gt_boxes, junk])
    packed_ignore = torch.cat([*ignore, torch.ones(5, dtype=torch.bool)])
    found = match_anchors(anchors, packed, gt_ignore=packed_ignore, gt_offsets=offsets)
    assert torch.equal(found, torch.stack(each))


def test_empty_inputs():
    some, none = torch.tensor([[0.0, 0, 4, 4]]), torch.zeros(0, 4)
    for policy in POLICIES:
        assert match_anchors(some, [none, some], policy=policy).tolist() == [[-1], [0]]
        assert match_anchors(none, [some], policy=policy).shape == (1, 0)
        assert match_anchors(some, [], policy=policy).shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_matched_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    anchors, gt_boxes = random_boxes(300, generator).to(dtype), random_boxes(9, generator).to(dtype)
    expected = match_anchors(anchors.float(), [gt_boxes.float()])
    assert torch.equal(match_anchors(anchors, [gt_boxes]), expected)


def test_the_references_result_does_not_depend_on_its_blocks(monkeypatch):
    """Ties within a block and between two: 30 boxes at once, three at a time, and each alone."""
    generator = torch.Generator().manual_seed(3)
    anchors = random_boxes(500, generator).round()
    gt_boxes = torch.cat([random_boxes(20, generator).round(), anchors[:5], anchors[:5]])
    blocks = []
    for pairs, count in ((30 * 500, 1), (3 * 500, 10), (1, 30)):
        monkeypatch.setattr(reference, "_PAIRS_A_BLOCK", pairs)
        assert len(list(reference._iou_blocks(gt_boxes, anchors))) == count
        blocks.append([reference.match_anchors(anchors, [gt_boxes], policy=policy) for policy in POLICIES])
    compiled = [match_anchors(anchors, [gt_boxes], policy=policy) for policy in POLICIES]
    for found in blocks:
        assert all(torch.equal(*pair) for pair in zip(found, compiled, strict=True))


def test_non_contiguous_and_differentiable_inputs():
    generator = torch.Generator().manual_seed(4)
    anchors, gt_boxes = random_boxes(50, generator), random_boxes(5, generator)
    expected = match_anchors(anchors, [gt_boxes])
    strided = anchors.t().contiguous().t().requires_grad_()
    found = match_anchors(strided, [gt_boxes.repeat_interleave(2, dim=0)[::2].requires_grad_()])
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_assign_targets():
    generator = torch.Generator().manual_seed(5)
    anchors = random_boxes(400, generator)
    gt_boxes = [random_boxes(count, generator) for count in (4, 0, 6)]
    gt_labels = [torch.randint(0, 80, (len(boxes),), generator=generator) for boxes in gt_boxes]
    ignore = [torch.arange(len(boxes)) == 2 for boxes in gt_boxes]
    assigned = assign_targets(anchors, gt_boxes, gt_labels, 0.6, 0.3, gt_ignore=ignore)

    assert torch.equal(assigned.matched, match_anchors(anchors, gt_boxes, 0.6, 0.3, gt_ignore=ignore))
    for image in range(3):
        expected = [gt_labels[image][row].item() if row >= 0 else row for row in assigned.matched[image].tolist()]
        assert assigned.labels[image].tolist() == expected
        assert assigned.num_foreground[image].item() == sum(row >= 0 for row in expected)
    assert {tensor.dtype for tensor in assigned} == {torch.int32}
    assert (assigned.labels == -2).any()
    assert assigned.num_foreground[1] == 0
    assert not (assigned.matched == 2).any()

    packed = assign_targets(
        anchors,
        torch.cat(gt_boxes),
        torch.cat(gt_labels),
        0.6,
        0.3,
        gt_ignore=torch.cat(ignore),
        gt_offsets=torch.tensor([0, 4, 4, 10], dtype=torch.int32),
    )
    assert all(torch.equal(a, b) for a, b in zip(packed, assigned, strict=True))


BOXES = torch.tensor([[0.0, 0, 4, 4]])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(anchors=[1, 2]), TypeError, "match_anchors: anchors: expected a floating tensor, got list"),
        (dict(anchors=BOXES.long()), TypeError, "anchors: expected a floating tensor, got .*int64"),
        (dict(anchors=torch.zeros(3, 5)), ValueError, r"anchors: expected shape \[N, 4\].*got \[3, 5\]"),
        (dict(anchors=torch.zeros(2, 3, 4)), ValueError, r"anchors: .*\[1, N, 4\], got \[2, 3, 4\]"),
        (dict(gt_boxes=BOXES), TypeError, "gt_boxes: expected a list"),
        (dict(gt_boxes=[BOXES, torch.zeros(4)]), ValueError, r"gt_boxes\[1\]: expected shape \[M, 4\]"),
        (dict(gt_boxes=[BOXES.long()]), TypeError, r"gt_boxes\[0\]: expected a floating tensor"),
        (dict(gt_boxes=[BOXES.to("meta")]), ValueError, r"gt_boxes\[0\]: expected all tensors on one device"),
        (dict(gt_boxes=BOXES, gt_offsets=torch.tensor([0, 1])), TypeError, "gt_offsets: expected .*int32"),
        (
            dict(gt_boxes=BOXES, gt_offsets=torch.zeros(0, dtype=torch.int32)),
            ValueError,
            "gt_offsets: expected",
        ),
        (dict(gt_ignore=[]), ValueError, "gt_ignore: expected one for each of 1 images, got 0"),
        (dict(gt_ignore=[torch.zeros(1)]), TypeError, r"gt_ignore\[0\]: expected a tensor of torch.bool"),
        (
            dict(gt_ignore=[torch.zeros(2, dtype=torch.bool)]),
            ValueError,
            r"gt_ignore\[0\]: expected shape \[1\]",
        ),
        (dict(fg_iou_thresh=1.5), ValueError, r"fg_iou_thresh: expected a number in \[0, 1\], got 1.5"),
        (dict(bg_iou_thresh=0.6), ValueError, r"bg_iou_thresh: expected .*got 0.6"),
        (dict(policy="best"), ValueError, "policy: expected one of .*got 'best'"),
        (dict(min_pos_iou=-1), ValueError, "min_pos_iou: expected"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    arguments = dict(anchors=BOXES, gt_boxes=[BOXES]) | change
    with pytest.raises(error, match=text):
        match_anchors(**arguments)


def test_errors_of_labels():
    with pytest.raises(TypeError, match=r"assign_targets: gt_labels\[0\]: expected a tensor of integers"):
        assign_targets(BOXES, [BOXES], [torch.zeros(1)])
    with pytest.raises(ValueError, match=r"gt_labels\[0\]: expected shape \[1\], got \[3\]"):
        assign_targets(BOXES, [BOXES], [torch.zeros(3, dtype=torch.long)])
    with pytest.raises(TypeError, match="gt_labels: expected a list"):
        assign_targets(BOXES, [BOXES], torch.zeros(1, dtype=torch.long))


def test_vmap_is_refused_in_plain_words():
    anchors, boxes = torch.rand(2, 5, 4), torch.rand(2, 3, 4)
    with pytest.raises(RuntimeError, match="match_anchors: vmap is not supported"):
        torch.func.vmap(lambda a: match_anchors(a, [boxes[0]]))(anchors)
    with pytest.raises(RuntimeError, match="match_anchors: vmap is not supported"):
        torch.func.vmap(lambda b: match_anchors(anchors[0], [b]))(boxes)
