"""box_regression_loss on CUDA: graphs, host synchronisation, identical bits, > 2^31 elements, sanitizer cases.

Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own.
"""

import math

import pytest
import torch
from cuda_gates import bits, capture, host_must_not_wait

from retinanet_ext import assign_targets, box_regression_loss, multilevel_focal_loss

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
A = 3
SIZES = ((13, 21), (6, 10), (3, 5), (1, 2), (1, 1))
LAYOUTS = ("contiguous", "channels_last", "rows", "mixed")
LOSSES = ("l1", "smooth_l1", "giou")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def make_case(layout, dtype=torch.float32, batch=2, sizes=SIZES, seed=0, device=DEVICE):
    """Levels as a head leaves them, anchors, six boxes an image, and matches of which one in ten is foreground."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for i, (height, width) in enumerate(sizes):
        form = LAYOUTS[i % 3] if layout == "mixed" else layout
        shape = (batch, height * width * A, 4) if form == "rows" else (batch, A * 4, height, width)
        level = torch.randn(shape, generator=generator).to(device, dtype)
        levels.append(level.contiguous(memory_format=torch.channels_last) if form == "channels_last" else level)
    count = sum(height * width for height, width in sizes) * A
    gt_boxes = [random_boxes(6, generator).to(device) for _ in range(batch)]
    matched = torch.randint(-60, 6, (batch, count), generator=generator, dtype=torch.int32)
    return levels, random_boxes(count, generator).to(device), gt_boxes, matched.to(device)


def loss_and_gradients(levels, *arguments, grad=None, **options):
    leaves = [level.detach().requires_grad_() for level in levels]
    loss = box_regression_loss(leaves, *arguments, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad)


@pytest.mark.graph
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pack", [False, True])
def test_replays_follow_their_inputs(pack, loss, layout, dtype):
    """Other deltas, anchors, boxes, numbers of boxes, matches, normalizers and upstream gradients than captured."""
    levels, anchors, gt_boxes, matched = make_case(layout, dtype)
    normalizer, upstream = torch.ones(2, device=DEVICE), torch.ones((), device=DEVICE)
    leaves = [level.requires_grad_() for level in levels]
    boxes, offsets = gt_boxes, None
    if pack:
        boxes, offsets = torch.cat(gt_boxes), torch.tensor([0, 6, 12], dtype=torch.int32, device=DEVICE)

    def step():
        total = box_regression_loss(leaves, anchors, boxes, matched, loss, normalizer=normalizer, gt_offsets=offsets)
        return total.detach(), *torch.autograd.grad(total, leaves, upstream)

    graph, results = capture(step)
    for seed, factor in enumerate((1.0, -3.0, 0.5), start=1):
        other_levels, other_anchors, other_boxes, other_matched = make_case(layout, dtype, seed=seed)
        other_matched[:, seed::7] = -2
        counts = (6, 6)
        if pack:
            counts = (seed, 9 - seed)
            other_boxes = list(torch.cat(other_boxes)[:9].split(counts))
            for image, count in enumerate(counts):
                other_matched[image][other_matched[image] >= count] = count - 1
            boxes[:9] = torch.cat(other_boxes)
            boxes[9:] = math.nan
            offsets.copy_(torch.tensor([0, seed, 9], dtype=torch.int32))
        else:
            for static, value in zip(boxes, other_boxes, strict=True):
                static.copy_(value)
        with torch.no_grad():
            for leaf, level in zip(leaves, other_levels, strict=True):
                leaf.copy_(level)
        anchors.copy_(other_anchors)
        matched.copy_(other_matched)
        normalizer.copy_(torch.tensor([1.0, seed]))
        upstream.fill_(factor)
        for result in results:
            result.fill_(math.nan)
        graph.replay()
        expected = loss_and_gradients(
            other_levels, other_anchors, other_boxes, other_matched, loss, normalizer=normalizer, grad=upstream
        )
        for result, truth in zip(results, expected, strict=True):
            assert torch.equal(bits(result), bits(truth))


@pytest.mark.sync
@pytest.mark.parametrize("layout", [*LAYOUTS, "slices"])
@pytest.mark.parametrize("normalizer", ["none", "number", "per image", "integers", "host scalar"])
@pytest.mark.parametrize("pack", [False, True])
def test_no_call_makes_the_host_wait(pack, normalizer, layout):
    levels, anchors, gt_boxes, matched = make_case("contiguous" if layout == "slices" else layout, torch.bfloat16)
    if layout == "slices":
        levels = [torch.nn.functional.pad(level, (1, 1))[..., 1:-1] for level in levels]
        anchors, matched = anchors.double(), matched.long()
    divisor = {
        "number": 2.5,
        "per image": torch.tensor([2.0, 9.0], device=DEVICE),
        "integers": torch.tensor([2, 9], device=DEVICE),
        "host scalar": torch.tensor(3.0),
    }.get(normalizer)
    offsets = None
    if pack:
        gt_boxes, offsets = torch.cat(gt_boxes), torch.tensor([0, 6, 12], dtype=torch.int32, device=DEVICE)
    leaves = [level.requires_grad_() for level in levels]

    def step():
        loss = box_regression_loss(leaves, anchors, gt_boxes, matched, "giou", normalizer=divisor, gt_offsets=offsets)
        return loss, *torch.autograd.grad(loss, leaves)

    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        results = step()
    with host_must_not_wait():
        results = step()
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.identity
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["l1", "giou"])
def test_same_bits_in_100_runs(loss, layout, dtype):
    """Half of the runs share the device with other work, which moves the blocks about."""
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    case = make_case(layout, dtype, batch=4, sizes=sizes)
    normalizer = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
    expected = [bits(result) for result in loss_and_gradients(*case, loss, normalizer=normalizer)]
    other_work, stream = torch.zeros(32 << 20, device=DEVICE), torch.cuda.Stream()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(stream):
                other_work.add_(1)
        found = loss_and_gradients(*case, loss, normalizer=normalizer)
        assert all(torch.equal(bits(result), truth) for result, truth in zip(found, expected, strict=True))
    torch.cuda.synchronize()


@pytest.mark.large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_31_elements(layout):
    """Every foreground row of the gradient, and zeros everywhere else; foreground in the first and last places."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free GPU memory, and {free / 1e9:.0f} GB are free")
    batch, anchors_a_cell, side = 3, 9, 4501
    count = anchors_a_cell * side * side
    level = torch.empty(batch, 4 * anchors_a_cell, side, side, dtype=torch.bfloat16, device=DEVICE)
    if layout == "channels_last":
        level = torch.empty_like(level, memory_format=torch.channels_last)
    level.normal_()
    assert level.numel() > 2**31
    anchors = torch.tensor([0.0, 0.0, 1.0, 1.0], device=DEVICE).repeat(count, 1)
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]], device=DEVICE)
    matched = torch.full((batch, count), -1, dtype=torch.int32, device=DEVICE)
    places = torch.cat([torch.arange(0, count, 100_003, device=DEVICE), torch.tensor([count - 1], device=DEVICE)])
    matched[:, places] = 0
    torch.full_like(level, math.nan)  # in the memory that the gradient is likely to get
    loss, gradient = loss_and_gradients([level], anchors, [boxes] * batch, matched)
    cells, channels = places // anchors_a_cell, 4 * (places % anchors_a_cell)
    expected = torch.tensor([0.5, 0.5, math.log(2), math.log(2)], dtype=torch.float64, device=DEVICE)
    total = 0.0
    for image in range(batch):
        rows, found = (
            torch.stack([tensor[image, channels + c, cells // side, cells % side] for c in range(4)], dim=1)
            for tensor in (level, gradient)
        )
        difference = rows.double() - expected
        total += difference.abs().sum().item()
        assert torch.equal(found.double(), difference.sign())
    assert sum(part.count_nonzero().item() for part in gradient.flatten(0, 1)) == 4 * batch * len(places)
    assert loss.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_calls_of_every_kernel(layout, dtype):
    """For compute-sanitizer: few launches, partial vectors and tiles, data from the CPU. Against the CPU operator."""
    for sizes, normalizer, pack in (
        (SIZES, None, False),
        (((5, 7),), torch.tensor([2.0, 9.0]), True),
        (((0, 3), (40, 41)), None, True),
    ):
        case = make_case(layout, dtype, sizes=sizes, device="cpu")
        for loss in LOSSES:
            results = {}
            for device in ("cpu", DEVICE):
                levels, anchors, gt_boxes, matched = (
                    [one.to(device) for one in value] if isinstance(value, list) else value.to(device) for value in case
                )
                offsets = None
                if pack:
                    gt_boxes = torch.cat(gt_boxes)
                    offsets = torch.tensor([0, 6, 12], dtype=torch.int32).to(device)
                divisor = None if normalizer is None else normalizer.to(device)
                results[device] = loss_and_gradients(
                    levels, anchors, gt_boxes, matched, loss, normalizer=divisor, gt_offsets=offsets
                )
            for result, truth in zip(results[DEVICE], results["cpu"], strict=True):
                scale = truth.abs().max().item() if truth.numel() else 0.0
                tolerance = 1e-5 + torch.finfo(truth.dtype).eps
                torch.testing.assert_close(result.cpu(), truth, rtol=tolerance, atol=tolerance * scale)


def whole_loss():
    """Both losses with an image's normalizer from the device, and their gradients, as a step; targets are made outside,
    once."""
    levels, anchors, gt_boxes, _ = make_case("contiguous")
    assigned = assign_targets(anchors, gt_boxes, [torch.zeros(6, dtype=torch.int64, device=DEVICE)] * 2, 0.3, 0.2)
    logits = [torch.randn(2, 2 * A, *size, device=DEVICE).requires_grad_() for size in SIZES]
    leaves = [level.requires_grad_() for level in levels]

    def step():
        normalizer = 2 * assigned.num_foreground.clamp(min=1)
        loss = multilevel_focal_loss(logits, assigned.labels, normalizer=normalizer) + box_regression_loss(
            leaves, anchors, gt_boxes, assigned.matched, normalizer=normalizer
        )
        return loss.detach(), *torch.autograd.grad(loss, [*logits, *leaves])

    return step


@pytest.mark.sync
def test_the_whole_loss_of_a_step_makes_no_wait():
    step = whole_loss()
    for _ in range(3):  # libraries and caches are warm
        step()
    with host_must_not_wait():
        step()


@pytest.mark.graph
def test_the_whole_loss_of_a_step_fits_a_graph():
    step = whole_loss()
    graph, results = capture(step)
    expected = step()
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(results, expected, strict=True))
