"""box_regression_loss against loops in float64, and against torchvision's losses."""

import math

import pytest
import torch

from retinanet_ext import box_regression_loss, match_anchors

GRIDS = [(4, 6), (2, 3), (1, 2)]
NUM_CELL_ANCHORS = 3
NUM_ANCHORS = NUM_CELL_ANCHORS * sum(h * w for h, w in GRIDS)


def make_case(dtype=torch.float32, seed=0, batch=3):
    """Levels of deltas, anchors, ground truth and matches of a small pyramid; image 1 has no box."""
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(batch, 4 * NUM_CELL_ANCHORS, h, w, generator=generator).to(dtype) for h, w in GRIDS]
    anchors = random_boxes(NUM_ANCHORS, generator)
    gt_boxes = [random_boxes(count, generator) for count in (5, 0, 8)[:batch]]
    matched = match_anchors(anchors, gt_boxes, 0.3, 0.2)
    assert (matched == -2).any()
    return levels, anchors, gt_boxes, matched


def random_boxes(num, generator):
    corner = torch.rand(num, 2, generator=generator) * 60
    return torch.cat([corner, corner + 5 + torch.rand(num, 2, generator=generator) * 40], dim=1)


def loop_loss(levels, anchors, gt_boxes, matched, loss, beta, weights, normalizer):
    """The definition in Python's floats: level, row, column, anchor; channel 4 a + c."""
    total = 0.0
    for image in range(len(gt_boxes)):
        image_loss, row = 0.0, 0
        for level in levels:
            _, channels, height, width = level.shape
            for y in range(height):
                for x in range(width):
                    for a in range(channels // 4):
                        gt_row = matched[image, row].item()
                        if gt_row >= 0:
                            deltas = level[image, 4 * a : 4 * a + 4, y, x].tolist()
                            image_loss += anchor_loss(
                                deltas,
                                anchors[row].tolist(),
                                gt_boxes[image][gt_row].tolist(),
                                loss,
                                beta,
                                weights,
                            )
                        row += 1
        total += image_loss / normalizer[image]
    return total


def anchor_loss(deltas, anchor, gt_box, loss, beta, weights):
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    cx, cy = anchor[0] + w / 2, anchor[1] + h / 2
    if loss == "giou":
        dx, dy, dw, dh = (d / weight for d, weight in zip(deltas, weights, strict=True))
        clip = math.log(1000 / 16)
        bw, bh = math.exp(min(dw, clip)) * w, math.exp(min(dh, clip)) * h
        bx, by = cx + dx * w, cy + dy * h
        return giou_loss((bx - bw / 2, by - bh / 2, bx + bw / 2, by + bh / 2), gt_box)
    gw, gh = gt_box[2] - gt_box[0], gt_box[3] - gt_box[1]
    expected = (
        (gt_box[0] + gw / 2 - cx) / w,
        (gt_box[1] + gh / 2 - cy) / h,
        math.log(gw / w),
        math.log(gh / h),
    )
    total = 0.0
    for delta, target, weight in zip(deltas, expected, weights, strict=True):
        distance = abs(delta - weight * target)
        smooth = loss == "smooth_l1" and distance < beta
        total += distance**2 / (2 * beta) if smooth else distance - (beta / 2 if loss == "smooth_l1" else 0)
    return total


def giou_loss(a, b):
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(w, 0) * max(h, 0)
    union = area_a + area_b - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - (intersection / (union + 1e-7) - (hull - union) / (hull + 1e-7))


LOSSES = [("l1", 1.0), ("smooth_l1", 0.5), ("smooth_l1", 1 / 9), ("giou", 1.0)]


@pytest.mark.parametrize(("loss", "beta"), LOSSES)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_agrees_with_a_loop(loss, beta, weights):
    levels, anchors, gt_boxes, matched = make_case(torch.float64)
    anchors, gt_boxes = anchors.double(), [boxes.double() for boxes in gt_boxes]
    normalizer = torch.tensor([2.0, 3.0, 7.0], dtype=torch.float64)
    found = box_regression_loss(levels, anchors, gt_boxes, matched, loss, beta, weights, normalizer)
    expected = loop_loss(levels, anchors, gt_boxes, matched, loss, beta, weights, normalizer.tolist())
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-12)  # the float64 roundings of some hundred terms


@pytest.mark.parametrize(("loss", "beta"), LOSSES)
def test_float32_is_as_near_to_float64_as_torchvision(loss, beta):
    utils = pytest.importorskip("torchvision.models.detection._utils", reason="compares with torchvision")
    levels, anchors, gt_boxes, matched = make_case()
    rows = torch.cat([level.reshape(3, 3, 4, -1).permute(0, 3, 1, 2).reshape(3, -1, 4) for level in levels], 1)
    coder = utils.BoxCoder((1.0, 1.0, 1.0, 1.0))

    def torchvisions(dtype):
        total = 0
        for image in range(3):
            fg = torch.where(matched[image] >= 0)[0]
            boxes = gt_boxes[image][matched[image, fg].long()].to(dtype)
            total = total + utils._box_loss(
                loss, coder, anchors[fg].to(dtype), boxes, rows[image, fg].to(dtype), {"beta": beta}
            ) / max(1, len(fg))
        return total.item() / 3

    foreground = (matched >= 0).sum(dim=1)
    normalizer = 3 * foreground.clamp(min=1).float()
    found = box_regression_loss(levels, anchors, gt_boxes, matched, loss, beta, normalizer=normalizer).item()
    exact = torchvisions(torch.float64)
    # the mean is rounded to float32 whatever the sums are worth: a few units in the last place besides
    assert abs(found - exact) <= 2 * abs(torchvisions(torch.float32) - exact) + 4 * 2**-23 * abs(exact)


def as_channels_last(level):
    return level.contiguous(memory_format=torch.channels_last)


def as_rows(level):
    batch, channels, height, width = level.shape
    return level.reshape(batch, channels // 4, 4, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4)


def as_strided(level):
    return level.repeat_interleave(2, dim=3)[..., ::2]


@pytest.mark.parametrize("layout", [as_channels_last, as_rows, as_strided])
@pytest.mark.parametrize("loss", ["l1", "giou"])
def test_layouts_agree_to_the_bit_and_each_gets_its_gradient(layout, loss):
    levels, anchors, gt_boxes, matched = make_case()
    levels = [level.requires_grad_() for level in levels]
    plain = box_regression_loss(levels, anchors, gt_boxes, matched, loss)
    expected = torch.autograd.grad(plain, levels)
    other = box_regression_loss([layout(level) for level in levels], anchors, gt_boxes, matched, loss)
    found = torch.autograd.grad(other, levels)
    assert torch.equal(plain, other)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_all_levels_in_one_tensor_packed_boxes_and_anchors_of_each_image():
    levels, anchors, gt_boxes, matched = make_case()
    expected = box_regression_loss(levels, anchors, gt_boxes, matched)
    rows = torch.cat([as_rows(level) for level in levels], dim=1)
    assert torch.equal(box_regression_loss(rows, anchors, gt_boxes, matched), expected)
    packed = torch.cat([*gt_boxes, torch.full((4, 4), float("nan"))])
    offsets = torch.tensor([0, 5, 5, 13], dtype=torch.int32)
    assert torch.equal(box_regression_loss(levels, anchors, packed, matched, gt_offsets=offsets), expected)
    assert torch.equal(box_regression_loss(levels, anchors.expand(3, -1, -1), gt_boxes, matched), expected)
    assert torch.equal(box_regression_loss(levels, anchors, gt_boxes, matched.long()), expected)


@pytest.mark.parametrize("loss", ["l1", "smooth_l1", "giou"])
def test_only_foreground_is_touched(loss):
    levels, anchors, gt_boxes, matched = make_case()
    rows = torch.cat([as_rows(level) for level in levels], dim=1)
    foreground = (matched >= 0)[..., None].expand_as(rows)
    poisoned = torch.where(foreground, rows, float("nan")).requires_grad_()
    total = box_regression_loss(poisoned, anchors, gt_boxes, matched, loss)
    total.backward()
    assert torch.equal(total, box_regression_loss(rows, anchors, gt_boxes, matched, loss))
    assert (poisoned.grad[~foreground] == 0).all()
    assert (poisoned.grad[foreground] != 0).any()
    assert poisoned.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "beta"), LOSSES)
def test_gradcheck(loss, beta):
    levels, anchors, gt_boxes, matched = make_case(torch.float64)
    levels = [level.requires_grad_() for level in levels]
    normalizer = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def total(*levels):
        return box_regression_loss(levels, anchors, gt_boxes, matched, loss, beta, normalizer=normalizer)

    assert torch.autograd.gradcheck(total, levels)


def test_normalizer():
    levels, anchors, gt_boxes, matched = make_case(torch.float64)
    each = [
        box_regression_loss([lv[i : i + 1] for lv in levels], anchors, gt_boxes[i : i + 1], matched[i : i + 1])
        for i in range(3)
    ]
    normalizer = torch.tensor([2.0, 4.0, 8.0], requires_grad=True)
    found = box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=normalizer)
    assert found.item() == pytest.approx((each[0] / 2 + each[1] / 4 + each[2] / 8).item(), rel=1e-14)
    assert not found.requires_grad
    for scalar in (5, 5.0, torch.tensor(5), torch.tensor(5.0)):
        found = box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=scalar)
        assert found.item() == pytest.approx(sum(each).item() / 5, rel=1e-14)


def test_no_foreground_and_empty_inputs_give_zero_and_zero_gradients():
    levels, anchors, _, _ = make_case()
    levels = [level.requires_grad_() for level in levels]
    none = [torch.zeros(0, 4)] * 3
    total = box_regression_loss(levels, anchors, none, torch.full((3, NUM_ANCHORS), -1))
    total.backward()
    assert total.item() == 0
    assert all((level.grad == 0).all() for level in levels)

    empty = torch.zeros(0, NUM_ANCHORS, 4, requires_grad=True)
    total = box_regression_loss(empty, anchors, [], torch.zeros(0, NUM_ANCHORS, dtype=torch.int32))
    total.backward()
    assert total.item() == 0
    no_anchors = torch.zeros(2, 0, 4)
    assert box_regression_loss(no_anchors, torch.zeros(0, 4), none[:2], torch.zeros(2, 0, dtype=torch.long)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype):
    levels, anchors, gt_boxes, matched = make_case(dtype)
    found = box_regression_loss(levels, anchors, gt_boxes, matched)
    assert found.dtype == torch.float32
    assert torch.equal(found, box_regression_loss([lv.float() for lv in levels], anchors, gt_boxes, matched))


def test_beta_of_zero_is_l1():
    levels, anchors, gt_boxes, matched = make_case()
    smooth = box_regression_loss(levels, anchors, gt_boxes, matched, "smooth_l1", 0.0)
    assert torch.equal(smooth, box_regression_loss(levels, anchors, gt_boxes, matched, "l1"))


LEVELS, ANCHORS, GT_BOXES, MATCHED = make_case()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(deltas=3), TypeError, "box_regression_loss: deltas: expected a tensor or a list"),
        (dict(deltas=[]), ValueError, "deltas: expected at least one level"),
        (dict(deltas=[LEVELS[0].long()]), TypeError, r"deltas\[0\]: expected a floating tensor, got .*int64"),
        (dict(deltas=[torch.zeros(3, 7, 2, 2)]), ValueError, r"deltas\[0\]: expected \[B, 4 \* A, H, W\]"),
        (dict(deltas=[LEVELS[0], LEVELS[1][:1]]), ValueError, r"deltas\[1\]: expected a batch of 3"),
        (dict(deltas=[LEVELS[0], LEVELS[1].half()]), TypeError, r"deltas\[1\]: expected torch.float32"),
        (dict(deltas=LEVELS[:2]), ValueError, "anchors: expected 90, as many as deltas, got 96"),
        (dict(gt_boxes=GT_BOXES[:2]), ValueError, "gt_boxes: expected those of 3 images.*got 2"),
        (
            dict(matched=MATCHED.float()),
            TypeError,
            "matched: expected a tensor of int32 or int64, got torch.float32",
        ),
        (dict(matched=MATCHED[:, 1:]), ValueError, r"matched: expected shape \[3, 96\], got \[3, 95\]"),
        (dict(loss="l2"), ValueError, "loss: expected one of .*got 'l2'"),
        (dict(beta=-1.0), ValueError, "beta: expected a number of at least 0"),
        (dict(weights=(1, 1, 1)), ValueError, "weights: expected four positive numbers"),
        (
            dict(normalizer=torch.ones(2)),
            ValueError,
            r"normalizer: expected a scalar or shape \[3\], got \[2\]",
        ),
    ],
)
def test_errors_name_the_argument(change, error, text):
    arguments = dict(deltas=LEVELS, anchors=ANCHORS, gt_boxes=GT_BOXES, matched=MATCHED) | change
    with pytest.raises(error, match=text):
        box_regression_loss(**arguments)
