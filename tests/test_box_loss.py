"""box_regression_loss against loops in float64, and against torchvision's losses.

Autograd, transforms, torch.compile and opcheck: test_box_loss_autograd.py.
"""

import math

import pytest
import torch

from retinanet_ext import box_regression_loss, match_anchors, reference

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


GROWTH = [math.log(1000 / 16), 4.0, 4.13, 4.14, 5.0, 50.0, 1e4, -3.0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_giou_of_sizes_at_and_beyond_the_limit_of_the_exponent(weights):
    """The loss stays that of 1000 / 16 of the anchor's size, and a size beyond the limit has no gradient."""
    levels, anchors, gt_boxes, matched = make_case(torch.float64)
    anchors, gt_boxes = anchors.double(), [boxes.double() for boxes in gt_boxes]
    generator = torch.Generator().manual_seed(1)
    growth = torch.tensor(GROWTH, dtype=torch.float64)
    for level in levels:
        for channel in (2, 3):
            sizes = level[:, channel::4]
            sizes.copy_(growth[torch.randint(len(growth), sizes.shape, generator=generator)] * weights[channel])
    arguments = (anchors, gt_boxes, matched, "giou", 1.0, weights)
    found, gradients = loss_and_gradients(box_regression_loss, levels, *arguments)
    expected = loop_loss(levels, anchors, gt_boxes, matched, "giou", 1.0, weights, [1.0] * 3)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    _, truth = loss_and_gradients(reference.box_regression_loss, levels, *arguments)
    for level, gradient, right in zip(levels, gradients, truth, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-12)
        for channel in (2, 3):
            beyond = level[:, channel::4] > 4.136 * weights[channel]
            assert (gradient[:, channel::4][beyond] == 0).all()
    narrow = [level.float() for level in levels]
    loss, narrow_gradients = loss_and_gradients(box_regression_loss, narrow, *arguments)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(one == 0, two == 0) for one, two in zip(narrow_gradients, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("loss", "beta"), [("l1", 1.0), ("smooth_l1", 0.5)])
def test_kinks_are_pytorchs(loss, beta, dtype):
    """Anchors that are their boxes have targets of exactly 0, and a delta is its own distance."""
    anchors = torch.tensor([[0, 0, 8, 8], [8, 8, 24, 40]], dtype=dtype)
    deltas = torch.tensor([0.0, -0.0, beta, -beta, beta / 2, -2 * beta, 1.0, -1.0], dtype=dtype).view(1, 2, 4)
    matched = torch.tensor([[0, 1]])
    found, (gradient,) = loss_and_gradients(box_regression_loss, [deltas], anchors, [anchors], matched, loss, beta)
    leaf = deltas.clone().requires_grad_()
    zeros = torch.zeros_like(leaf)
    functional = torch.nn.functional
    if loss == "l1":
        expected = functional.l1_loss(leaf, zeros, reduction="sum")
    else:
        expected = functional.smooth_l1_loss(leaf, zeros, beta=beta, reduction="sum")
    expected.backward()
    assert torch.equal(found, expected.detach())
    assert torch.equal(gradient, leaf.grad)


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


def loss_and_gradients(function, levels, *arguments, **options):
    leaves = [level.detach().requires_grad_() for level in levels]
    loss = function(leaves, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [lambda level: level, as_channels_last, as_rows, as_strided])
@pytest.mark.parametrize(("loss", "beta"), LOSSES)
def test_as_near_to_float64_as_the_reference(loss, beta, layout, dtype):
    """Gradients of the l1 loss equal the reference's to the bit: signs over a normalizer that is a power of two."""
    levels, anchors, gt_boxes, matched = make_case(dtype)
    levels = [layout(level) for level in levels]
    arguments = (anchors, gt_boxes, matched, loss, beta, (10.0, 10.0, 5.0, 5.0), torch.tensor([2.0, 4.0, 8.0]))
    found, gradients = loss_and_gradients(box_regression_loss, levels, *arguments)
    peer, peer_gradients = loss_and_gradients(reference.box_regression_loss, levels, *arguments)
    if dtype == torch.float64:
        exact, exact_gradients, least = peer, peer_gradients, 1e-13
    else:
        wide = [level.double() for level in levels]
        exact, exact_gradients = loss_and_gradients(reference.box_regression_loss, wide, *arguments)
        least = torch.finfo(torch.float32).eps
    assert found.dtype == peer.dtype
    assert abs(found.double() - exact) <= 2 * abs(peer.double() - exact) + least * abs(exact)
    for one, other, true, level in zip(gradients, peer_gradients, exact_gradients, levels, strict=True):
        assert one.dtype == level.dtype
        assert one.shape == level.shape
        assert torch.equal(one == 0, true == 0)
        if loss == "l1":
            assert torch.equal(one, other)
        error, peer_error = ((value.double() - true).abs().max() for value in (one, other))
        assert error <= 2 * peer_error + least * true.abs().max()


def test_gradients_lie_as_their_levels():
    levels, anchors, gt_boxes, matched = make_case()
    levels = [as_channels_last(levels[0]), levels[1], as_strided(levels[2])]
    _, gradients = loss_and_gradients(box_regression_loss, levels, anchors, gt_boxes, matched)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    assert gradients[1].is_contiguous()
    assert gradients[2].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["l1", "smooth_l1", "giou"])
def test_same_bits_for_any_number_of_threads(num_threads, loss, dtype):
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 36, height, width, generator=generator).to(dtype) for height, width in ((60, 80), (9, 7))]
    count = 9 * (60 * 80 + 63)
    anchors, gt_boxes = random_boxes(count, generator), [random_boxes(40, generator) for _ in range(2)]
    matched = torch.randint(-20, 40, (2, count), generator=generator)
    results = []
    for threads in (1, 2, 3, 7):
        num_threads(threads)
        loss_value, gradients = loss_and_gradients(box_regression_loss, levels, anchors, gt_boxes, matched, loss)
        results.append([loss_value, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("anchor_type", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("box_type", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_anchors_and_boxes_of_any_type_are_computed_in_the_compute_type(dtype, box_type, anchor_type):
    levels, anchors, gt_boxes, matched = make_case(dtype)
    anchors, gt_boxes = anchors.to(anchor_type), [boxes.to(box_type) for boxes in gt_boxes]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = box_regression_loss(levels, anchors.to(compute), [boxes.to(compute) for boxes in gt_boxes], matched)
    assert torch.equal(box_regression_loss(levels, anchors, gt_boxes, matched), expected)


def test_strides_of_anchors_boxes_and_matches():
    levels, anchors, gt_boxes, matched = make_case()
    expected = box_regression_loss(levels, anchors, gt_boxes, matched)
    anchors = torch.cat([anchors, anchors * math.nan], dim=1)[:, :4]
    gt_boxes = [boxes.t().contiguous().t() for boxes in gt_boxes]
    matched = torch.stack([matched, matched - 7], dim=-1)[..., 0]
    assert torch.equal(box_regression_loss(levels, anchors, gt_boxes, matched), expected)
    unaligned = torch.cat([torch.zeros(1), anchors.flatten()])[1:].view(-1, 4)
    assert torch.equal(box_regression_loss(levels, unaligned, gt_boxes, matched), expected)


def test_levels_without_cells_and_more_levels_than_a_launch_takes():
    generator = torch.Generator().manual_seed(0)
    sizes = [(i % 3, 2) for i in range(40)]
    levels = [torch.randn(2, 12, height, width, generator=generator) for height, width in sizes]
    count = 3 * sum(height * width for height, width in sizes)
    anchors, gt_boxes = random_boxes(count, generator), [random_boxes(4, generator) for _ in range(2)]
    matched = torch.randint(-4, 4, (2, count), generator=generator)
    found = loss_and_gradients(box_regression_loss, levels, anchors, gt_boxes, matched)
    expected = loss_and_gradients(reference.box_regression_loss, levels, anchors, gt_boxes, matched)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_degenerate_boxes_are_encoded_as_the_reference_encodes_them():
    """Infinite or NaN, the image's loss and the row's gradient with it; other images' gradients are not touched."""
    levels, anchors, gt_boxes, matched = make_case()
    gt_boxes[2][3, 2] = gt_boxes[2][3, 0]
    gt_boxes[2][4, 2] = gt_boxes[2][4, 0] - 1
    matched[2, 5], matched[2, 6] = 3, -1
    for row in (3, 4):
        matched[2, 6] = row
        for loss in ("l1", "giou"):
            found = loss_and_gradients(box_regression_loss, levels, anchors, gt_boxes, matched, loss)
            expected = loss_and_gradients(reference.box_regression_loss, levels, anchors, gt_boxes, matched, loss)
            torch.testing.assert_close(found[0], expected[0], equal_nan=True)
            torch.testing.assert_close(found[1], expected[1], equal_nan=True)


@pytest.mark.parametrize("loss", ["l1", "smooth_l1", "giou"])
def test_nan_of_a_foreground_prediction_is_the_references(loss):
    levels, anchors, gt_boxes, matched = make_case(torch.float64)
    matched[0, 7] = 1
    for channel in range(4):
        broken = [level.clone() for level in levels]
        broken[0][0, 4 + channel, 0, 2] = math.nan  # anchor 1 of cell 2: row 7
        found, gradients = loss_and_gradients(box_regression_loss, broken, anchors, gt_boxes, matched, loss)
        expected, truth = loss_and_gradients(reference.box_regression_loss, broken, anchors, gt_boxes, matched, loss)
        assert found.isnan()
        assert expected.isnan()
        torch.testing.assert_close(gradients, truth, equal_nan=True)


@pytest.mark.parametrize("wrong", [5, 2**31 - 1])
@pytest.mark.parametrize("pack", [False, True])
def test_a_match_without_a_box_is_an_error(pack, wrong):
    levels, anchors, gt_boxes, matched = make_case()
    matched[0, 17] = wrong
    arguments = dict(gt_boxes=gt_boxes)
    if pack:
        arguments = dict(gt_boxes=torch.cat(gt_boxes), gt_offsets=torch.tensor([0, 5, 5, 13], dtype=torch.int32))
    leaves = [level.requires_grad_() for level in levels]
    message = "matched names a row that gt_boxes lack: anchor 17 of image 0, which has 5 boxes"
    with pytest.raises(RuntimeError, match=f"box_regression_loss: {message}"):
        box_regression_loss(leaves, anchors, matched=matched, **arguments)


@pytest.mark.parametrize("offsets", [[-1, 5, 5, 13], [0, 5, 4, 13], [0, 5, 5, 14]])
def test_offsets_that_point_outside_are_an_error(offsets):
    levels, anchors, gt_boxes, matched = make_case()
    with pytest.raises(RuntimeError, match=r"gt_offsets must not fall, and lie in \[0, 13\], the rows of gt_boxes"):
        box_regression_loss(
            levels, anchors, torch.cat(gt_boxes), matched, gt_offsets=torch.tensor(offsets, dtype=torch.int32)
        )


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.zeros(3)], ids=str)
def test_a_normalizer_of_zero_is_infinite_or_nan(zero):
    levels, anchors, gt_boxes, matched = make_case()
    assert not box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=zero).isfinite()
    nothing = torch.full_like(matched, -1)
    assert box_regression_loss(levels, anchors, gt_boxes, nothing, normalizer=zero).isnan()


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
