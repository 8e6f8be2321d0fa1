"""box_regression_loss on CUDA: values, layouts, edges of its numbers, streams, opcheck and torch.compile.

Judged by the reference in float64, beside the reference in the dtype at hand. CUDA graphs, host synchronisation,
identical bits, size and sanitizers: test_box_loss_cuda_gates.py.
"""

import importlib.util
import math
import os
import shutil

import pytest
import torch

from retinanet_ext import box_regression_loss, reference

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = ("l1", "smooth_l1", "giou")
# H*W of the first is no multiple of a vector, that of the second is one of 4 and not of 8; the last is a single cell.
SIZES = ((13, 21), (6, 10), (3, 5), (1, 2), (1, 1))
LAYOUTS = ("contiguous", "channels_last", "rows", "slices", "unaligned", "expanded", "mixed")


def by_name(dtype):
    return str(dtype).removeprefix("torch.")


def random_boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def laid_out(level, layout):
    """[B, 4A, H, W] numbers as a head may leave them; NaN lies beside every view: reading it would show."""
    batch, channels, height, width = level.shape
    if layout == "channels_last":
        return level.contiguous(memory_format=torch.channels_last)
    if layout == "rows":
        return reference.focal_loss.anchor_rows(level, 4).contiguous()
    if layout == "slices":
        wide = torch.full((batch + 1, channels + 4, height, width + 2), math.nan, dtype=level.dtype)
        wide[1:, 2:-2, :, 1:-1] = level
        return wide[1:, 2:-2, :, 1:-1]
    if layout == "unaligned":
        memory = torch.full((level.numel() + 3,), math.nan, dtype=level.dtype)
        memory[3:] = level.flatten()
        return memory[3:].view(level.shape)
    return level[:1].expand(level.shape) if layout == "expanded" else level


def make_case(layout="contiguous", dtype=torch.float32, batch=3, sizes=SIZES, anchors=3, every=4, seed=0):
    """Levels, anchors, a list of boxes (image 1 has none) and [B, N] matches, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for i, (height, width) in enumerate(sizes):
        level = torch.randn(batch, 4 * anchors, height, width, generator=generator).to(dtype)
        levels.append(laid_out(level, LAYOUTS[i % (len(LAYOUTS) - 1)] if layout == "mixed" else layout))
    count = anchors * sum(height * width for height, width in sizes)
    gt_boxes = [random_boxes((5, 0, 8)[i % 3], generator) for i in range(batch)]
    matched = torch.randint(-2, 0, (batch, count), generator=generator, dtype=torch.int32)
    for image, boxes in enumerate(gt_boxes):
        if len(boxes) > 0:
            drawn = torch.randint(0, len(boxes), (count,), generator=generator, dtype=torch.int32)
            keep = torch.rand(count, generator=generator) < 1 / every
            matched[image] = torch.where(keep, drawn, matched[image])
    return levels, random_boxes(count, generator), gt_boxes, matched


def packed(gt_boxes):
    counts = torch.tensor([0] + [len(boxes) for boxes in gt_boxes])
    spare = torch.full((5, 4), math.nan)
    return torch.cat([*gt_boxes, spare]), counts.cumsum(0).int()


def place(value):
    """A tensor on the device that lies there as `value` lies in its memory here, gaps and offset included."""
    if isinstance(value, list):
        return [place(one) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    memory = value.detach().as_strided((size,), (1,), 0).to(DEVICE)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def loss_and_gradients(function, levels, *arguments, grad=1.0, **options):
    leaves = [level.detach().requires_grad_() for level in levels]
    loss = function(leaves, *arguments, **options)
    return loss.detach(), *torch.autograd.grad(loss * grad, leaves)


def check(case, grad=1.0, **options):
    """No farther from the truth than twice the reference in the same dtype, or some roundings of the largest number."""
    levels, *others = case
    placed = {name: place(value) for name, value in options.items()}
    found = loss_and_gradients(box_regression_loss, place(levels), *map(place, others), grad=grad, **placed)
    if isinstance(options.get("normalizer"), torch.Tensor):
        options["normalizer"] = options["normalizer"].double()
    anchors, gt_boxes, matched = others
    wide_boxes = gt_boxes.double() if isinstance(gt_boxes, torch.Tensor) else [boxes.double() for boxes in gt_boxes]
    wide = [level.double() for level in levels], anchors.double(), wide_boxes, matched
    truth = loss_and_gradients(reference.box_regression_loss, *wide, grad=grad, **options)
    peer = loss_and_gradients(reference.box_regression_loss, levels, *others, grad=grad, **options)
    unit = torch.finfo(found[0].dtype).eps
    for one, other, true, level in zip(found, peer, truth, [None, *levels], strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        error, peer_error = (
            ((value.cpu().double() - true).abs().max() for value in (one, other)) if true.numel() else (0, 0)
        )
        assert error <= 2 * peer_error + 16 * unit * (true.abs().max() if true.numel() else 0)
        if level is not None:
            assert torch.equal(one.cpu() == 0, other == 0)
            if level.dim() == 4 and level.numel() > 0 and level.is_contiguous(memory_format=torch.channels_last):
                assert one.is_contiguous(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_layout_dtype_and_loss(loss, layout, dtype):
    check(make_case(layout, dtype), loss=loss, beta=0.3, weights=(10.0, 9.0, 5.0, 4.0))
    normalizer = torch.tensor([2.0, 9.0, 3.0])
    check(make_case(layout, dtype, every=40, seed=1), grad=1.5, loss=loss, normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("anchors", [1, 2, 9, 64, 129, 300])
def test_anchors_a_cell(anchors, dtype):
    check(make_case("mixed", dtype, 2, ((5, 7), (4, 8), (1, 3)), anchors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=by_name)
def test_giou_of_sizes_beyond_the_limit_of_the_exponent(dtype):
    case = make_case(dtype=dtype)
    growth = torch.tensor([4.0, 4.125, 4.25, 5.0, 50.0, 1e4, -3.0])
    for level in case[0]:
        for channel in (2, 3):
            level[:, channel::4] = growth[torch.randint(len(growth), level[:, channel::4].shape)].to(dtype)
    check(case, loss="giou")


def test_matches_of_64_bits_packed_boxes_and_anchors_of_each_image():
    levels, anchors, gt_boxes, matched = make_case("mixed")
    expected = check((levels, anchors, gt_boxes, matched))
    boxes, offsets = packed(gt_boxes)
    for other in (
        check((levels, anchors, gt_boxes, matched.long())),
        check((levels, anchors, boxes, matched), gt_offsets=offsets),
        check((levels, anchors.expand(3, -1, -1), gt_boxes, matched)),
        check((levels, anchors[None].repeat(3, 1, 1), gt_boxes, torch.stack([matched, matched], -1)[..., 0])),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_more_levels_and_images_than_one_launch_takes():
    check(make_case("mixed", sizes=[(i % 5, 3) for i in range(40)]), normalizer=3.0)
    normalizer = torch.arange(1, 131).float()
    check(make_case("mixed", batch=130, sizes=((3, 4), (1, 2))), normalizer=normalizer)
    levels, anchors, gt_boxes, matched = make_case("mixed", batch=130, sizes=((3, 4), (1, 2)))
    boxes, offsets = packed(gt_boxes)
    check((levels, anchors, boxes, matched), gt_offsets=offsets, normalizer=normalizer)


@pytest.mark.parametrize(
    "normalizer", [7, 2.5, torch.tensor(3.0), torch.tensor(4), torch.tensor([2.0, 9.0, 1.0]), torch.tensor([3, 8, 1])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=by_name)
def test_normalizer(normalizer, dtype):
    check(make_case("mixed", dtype), normalizer=normalizer)


def test_a_scalar_normalizer_in_host_memory():
    levels, anchors, gt_boxes, matched = map(place, make_case())
    expected = box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=3.0)
    assert torch.equal(box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=torch.tensor(3.0)), expected)


@pytest.mark.parametrize("zero", [0, torch.tensor(0.0), torch.tensor([1.0, 0.0, 1.0])], ids=str)
def test_a_normalizer_of_zero_is_infinite_or_nan(zero):
    """Image 1, whose normalizer is the zero of the list, has no foreground."""
    levels, anchors, gt_boxes, matched = map(place, make_case())
    assert not box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=place(zero)).isfinite()
    nothing = torch.full_like(matched, -1)
    assert box_regression_loss(levels, anchors, gt_boxes, nothing, normalizer=place(zero)).isnan()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("upstream", [1.0, math.nan, math.inf])
def test_only_foreground_is_touched(upstream, loss, layout):
    levels, anchors, gt_boxes, matched = make_case(layout)
    first, poisoned = 0, []
    for level in levels:
        foreground = (matched[:, first : first + level.numel() // 12] >= 0)[..., None].expand(-1, -1, 4)
        first += level.numel() // 12
        if level.dim() == 4:
            batch, channels, height, width = level.shape
            foreground = foreground.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        poisoned.append(torch.where(foreground, level, math.nan))
    others = [place(value) for value in (anchors, gt_boxes, matched)]
    expected = loss_and_gradients(box_regression_loss, place(levels), *others, grad=upstream, loss=loss)
    found = loss_and_gradients(box_regression_loss, place(poisoned), *others, grad=upstream, loss=loss)
    assert torch.equal(found[0], expected[0])
    for gradient, level in zip(found[1:], poisoned, strict=True):
        hidden = gradient[level.isnan().to(gradient.device)]
        assert (hidden == 0).all()
        assert not hidden.signbit().any()


@pytest.mark.parametrize("beyond", [0, 1, 2**31 - 10, 2**40, 2**62])
@pytest.mark.parametrize("pack", [False, True])
def test_matches_that_name_no_row_are_background(pack, beyond):
    levels, anchors, gt_boxes, matched = make_case("mixed")
    wild, tame = matched.long(), matched.long()
    for image, boxes in enumerate(gt_boxes):
        wild[image, image::7] = len(boxes) + beyond
        tame[image, image::7] = -1
    boxes, offsets = packed(gt_boxes) if pack else (gt_boxes, None)
    found, expected = (
        loss_and_gradients(
            box_regression_loss, place(levels), place(anchors), place(boxes), place(m), gt_offsets=place(offsets)
        )
        for m in (wild, tame)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("offsets", [[-3, 0, 0, 8], [0, 5, 5, 99], [0, 5, 2**31 - 1, 2**31 - 1], [13, 5, 2, 0]])
def test_wrong_offsets_read_nothing_outside(offsets):
    levels, anchors, gt_boxes, matched = make_case()
    boxes = place(torch.cat(gt_boxes))
    offsets = place(torch.tensor(offsets, dtype=torch.int32))
    arguments = place(levels), place(anchors), boxes, place(matched)
    found = loss_and_gradients(box_regression_loss, *arguments, gt_offsets=offsets)
    assert all(value.isfinite().all() for value in found)


def test_empty_inputs():
    for case in (
        make_case(batch=0),
        make_case(sizes=((0, 3), (4, 0))),
        make_case(sizes=((4, 6), (0, 3), (1, 2))),
    ):
        check(case)
        check(case, normalizer=torch.ones(case[3].shape[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_detector_sized_batch(layout, dtype):
    """Two images of 800 x 1333: the pyramid of a RetinaNet, where one anchor in 500 is foreground."""
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    check(make_case(layout, dtype, 2, sizes, 9, every=500), normalizer=torch.tensor([40.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
def test_opcheck(dtype):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports it, and it is not installed")
    case = make_case("contiguous", dtype, sizes=((3, 5), (1, 2)))
    levels, anchors, gt_boxes, matched = map(place, case)
    levels[1] = levels[1].contiguous(memory_format=torch.channels_last)
    for normalizer in (None, torch.tensor([2.0, 9.0, 1.0], device=DEVICE)):
        arguments = (anchors, gt_boxes, None, matched, normalizer, 2, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0)
        leaves = [level.clone().requires_grad_() for level in levels]
        torch.library.opcheck(OPS.box_regression_loss, (leaves, *arguments))
        one = torch.ones((), device=DEVICE)
        torch.library.opcheck(OPS.box_regression_loss_backward, (one, levels, *arguments))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("loss", LOSSES)
def test_compile_fullgraph_under_autocast(loss, backend):
    if backend == "inductor" and importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile needs triton for CUDA, and it is not installed")
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "cc", "clang"))):
        pytest.skip("triton needs a C compiler, and there is none on the PATH")
    torch.compiler.reset()
    levels, anchors, gt_boxes, matched = map(place, make_case("mixed", torch.bfloat16))
    normalizer = torch.tensor([2.0, 9.0, 1.0], device=DEVICE)

    def step(leaves, anchors, gt_boxes, matched):
        with torch.autocast("cuda", torch.bfloat16):
            return box_regression_loss(leaves, anchors, gt_boxes, matched, loss, normalizer=normalizer)

    expected = loss_and_gradients(step, levels, anchors, gt_boxes, matched)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = loss_and_gradients(compiled, levels, anchors, gt_boxes, matched)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=2e-6, atol=0)


def test_the_current_stream_is_used():
    """On the default stream the operator would overtake the copies, which wait behind a long kernel."""
    levels, *others = map(place, make_case())
    expected = loss_and_gradients(box_regression_loss, levels, *others)
    late = [torch.zeros_like(level) for level in levels]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
        for level, value in zip(late, levels, strict=True):
            level.copy_(value)
        results = loss_and_gradients(box_regression_loss, late, *others)
    stream.synchronize()
    assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    levels, anchors, gt_boxes, matched = make_case()
    first, second = (
        loss_and_gradients(
            box_regression_loss,
            [level.to(device) for level in levels],
            anchors.to(device),
            [boxes.to(device) for boxes in gt_boxes],
            matched.to(device),
        )
        for device in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0
    for result, truth in zip(second, first, strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), truth.cpu())
