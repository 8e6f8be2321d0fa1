"""multilevel_focal_loss on CUDA: graphs, host synchronisation, identical bits, > 2^31 elements, sanitizer cases.

Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own.
"""

import math

import pytest
import torch
from cuda_gates import bits, capture, host_must_not_wait

from retinanet_ext import multilevel_focal_loss, reference

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
A, K = 3, 7
SIZES = ((13, 21), (6, 10), (3, 5), (1, 2), (1, 1))
LAYOUTS = ("contiguous", "channels_last", "rows", "mixed")


def head_outputs(layout, dtype=torch.float32, batch=2, sizes=SIZES, seed=0, device=DEVICE):
    """Levels as a head leaves them, and [B, N] targets of which one in ten is not background."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for i, (height, width) in enumerate(sizes):
        form = LAYOUTS[i % 3] if layout == "mixed" else layout
        shape = (batch, height * width * A, K) if form == "rows" else (batch, A * K, height, width)
        level = (torch.randn(shape, generator=generator) * 3 - 1).to(device, dtype)
        levels.append(level.contiguous(memory_format=torch.channels_last) if form == "channels_last" else level)
    targets = torch.full((batch * sum(h * w for h, w in sizes) * A,), -1)
    targets[::10] = torch.randint(-3, K + 2, targets[::10].shape, generator=generator)
    return levels, targets.view(batch, -1).to(device)


def loss_and_gradients(levels, targets, grad=None, **options):
    leaves = [level.detach().requires_grad_() for level in levels]
    loss = multilevel_focal_loss(leaves, targets, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad)


@pytest.mark.graph
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("captured", [1.0, 3.0])
def test_replays_of_loss_and_gradients_follow_their_inputs(captured, layout, dtype):
    """Other logits, targets, normalizers and upstream gradients than those at the capture, where an upstream gradient
    of 1 lets a training step compute its gradients in advance."""
    levels, targets = head_outputs(layout, dtype)
    leaves = [level.requires_grad_() for level in levels]
    normalizer, upstream = torch.ones(2, device=DEVICE), torch.full((), captured, device=DEVICE)

    def step():
        loss = multilevel_focal_loss(leaves, targets, normalizer=normalizer)
        return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)

    graph, results = capture(step)
    for seed, factor in enumerate((1.0, 3.0, 0.5, 1.0), start=1):
        other_levels, other_targets = head_outputs(layout, dtype, seed=seed)
        other_targets[:, seed::7] = -2
        with torch.no_grad():
            for leaf, level in zip(leaves, other_levels, strict=True):
                leaf.copy_(level)
        targets.copy_(other_targets)
        normalizer.copy_(torch.tensor([1.0, seed]))
        upstream.fill_(factor)
        for result in results:
            result.fill_(math.nan)
        graph.replay()
        expected = loss_and_gradients(other_levels, other_targets, upstream, normalizer=normalizer)
        for result, truth in zip(results, expected, strict=True):
            assert torch.equal(bits(result), bits(truth))


@pytest.mark.graph
def test_replays_of_inference_and_of_one_pass():
    levels, targets = head_outputs("mixed", torch.bfloat16)
    normalizer = torch.ones(2, device=DEVICE)

    def step():
        losses = [
            multilevel_focal_loss(levels, targets, gamma=g, normalizer=n) for g in (2, 1.5) for n in (3, normalizer)
        ]
        loss, gradients = OPS.multilevel_focal_loss_with_grad(levels, targets, normalizer, K, 0.25, 2.0, 1.0)
        return *losses, loss, *gradients

    graph, results = capture(step)
    other_levels, other_targets = head_outputs("mixed", torch.bfloat16, seed=1)
    for level, other in zip(levels, other_levels, strict=True):
        level.copy_(other)
    targets.copy_(other_targets)
    normalizer.fill_(4)
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    for result, truth in zip(results, step(), strict=True):
        assert torch.equal(bits(result), bits(truth))


@pytest.mark.graph
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_training_step_learns_as_an_eager_one(dtype, monkeypatch):
    """A convolutional head over two levels, channels_last; targets and the number of positives change at each step."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sizes = ((12, 20), (6, 10))

    def new_head():
        torch.manual_seed(0)
        head = torch.nn.Conv2d(8, A * K, 3, padding=1).to(DEVICE, dtype, memory_format=torch.channels_last)
        return head, list(head.parameters())

    def features(seed):
        generator = torch.Generator().manual_seed(seed)
        maps = [torch.randn(2, 8, *size, generator=generator) for size in sizes]
        return [m.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last) for m in maps]

    def step(head, parameters, maps, targets):
        foreground = (targets >= 0).sum(1).clamp(min=1) * 2
        loss = multilevel_focal_loss([head(m) for m in maps], targets, normalizer=foreground)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(gradient, alpha=0.1)
        return loss.detach()

    head, parameters = new_head()
    maps, targets = features(0), head_outputs("contiguous", sizes=sizes)[1]
    graph, loss = capture(lambda: step(head, parameters, maps, targets))
    eager, eager_parameters = new_head()
    with torch.no_grad():
        for parameter, start in zip(parameters, eager_parameters, strict=True):
            parameter.copy_(start)
    for seed in range(1, 6):
        other, other_targets = features(seed), head_outputs("contiguous", sizes=sizes, seed=seed)[1]
        for static, value in zip(maps, other, strict=True):
            static.copy_(value)
        targets.copy_(other_targets)
        graph.replay()
        expected = step(eager, eager_parameters, other, other_targets)
        # The convolution may take another algorithm under capture.
        torch.testing.assert_close(loss, expected, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=0)
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


@pytest.mark.sync
@pytest.mark.parametrize("layout", [*LAYOUTS, "slices"])
@pytest.mark.parametrize("normalizer", ["none", "number", "per image", "integers", "divided afterwards"])
def test_no_call_makes_the_host_wait(normalizer, layout):
    levels, targets = head_outputs("contiguous" if layout == "slices" else layout, torch.bfloat16)
    if layout == "slices":
        levels = [torch.nn.functional.pad(level, (1, 1))[..., 1:-1] for level in levels]
        targets = targets.short()
    divisor = {
        "number": 2.5,
        "per image": torch.tensor([2.0, 9.0], device=DEVICE),
        "integers": torch.tensor([2, 9], device=DEVICE),
    }.get(normalizer)
    leaves = [level.requires_grad_() for level in levels]

    def step():
        loss = multilevel_focal_loss(leaves, targets, normalizer=divisor)
        loss = loss / 3 if normalizer == "divided afterwards" else loss
        return loss, *torch.autograd.grad(loss, leaves)

    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        results = step()
    with host_must_not_wait():
        results = step()
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.identity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_100_runs(layout, dtype):
    """Half of the runs share the device with other work, which moves the blocks about."""
    levels, targets = head_outputs(layout, dtype, batch=4, sizes=((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)))
    normalizer = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)

    def step():
        loss, gradients = OPS.multilevel_focal_loss_with_grad(levels, targets, None, K, 0.25, 1.5, 1.0)
        forward = multilevel_focal_loss(levels, targets)
        return [*loss_and_gradients(levels, targets, normalizer=normalizer), loss, *gradients, forward]

    expected = [bits(result) for result in step()]
    other_work, stream = torch.zeros(32 << 20, device=DEVICE), torch.cuda.Stream()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(stream):
                other_work.add_(1)
        for result, truth in zip(step(), expected, strict=True):
            assert torch.equal(bits(result), truth)
    torch.cuda.synchronize()


@pytest.mark.identity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pass_has_the_bits_of_two(layout, dtype):
    """Which of them a training step takes may depend on the step before; with more tiles than blocks on the device."""
    levels, targets = head_outputs(layout, dtype, batch=8, sizes=((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    normalizer = torch.arange(1, 9, device=DEVICE, dtype=compute)
    for gamma in (2.0, 1.5):
        arguments = (levels, targets, normalizer, K, 0.25, gamma, 1.0)
        loss, gradients = OPS.multilevel_focal_loss_with_grad(*arguments)
        assert torch.equal(bits(loss), bits(OPS.multilevel_focal_loss(*arguments)))
        two = OPS.multilevel_focal_loss_backward(torch.ones((), device=DEVICE), *arguments)
        for result, truth in zip(gradients, two, strict=True):
            assert torch.equal(bits(result), bits(truth))


def assert_accurate(result, truth):
    """Within 2e-5 of the truth where that is at least 1e-30, halves within half a step on top; on the device."""
    info = torch.finfo(result.dtype)
    error = (result.double() - truth).abs()
    if info.bits == 16:
        error -= (truth.abs() * (info.eps / 2)).clamp_min(info.tiny * info.eps / 2)
    kept = truth.abs() >= 1e-30
    assert torch.where(kept, error / truth.abs(), 0).max().item() <= 2e-5  # no NaN passes
    assert torch.where(kept, 0, error).max().item() <= 1.1e-30


@pytest.mark.large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [((1728, 1728), (3, 5)), ((1250, 1250), (1249, 1249))], ids=["one level", "together"])
def test_more_than_2_31_elements(sizes, layout):
    """Every element of the gradients, and the sum, against the reference in float64, some rows of cells at a time. The
    one large level is aligned for vectors, the two that are large together are not."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free GPU memory, and {free / 1e9:.0f} GB are free")
    anchors, classes = 9, 80
    levels = []
    for height, width in sizes:
        level = torch.empty(1, anchors * classes, height, width, dtype=torch.bfloat16, device=DEVICE)
        if layout == "channels_last":
            level = torch.empty_like(level, memory_format=torch.channels_last)
        levels.append(level.normal_(-2, 3))
    assert sum(level.numel() for level in levels) > 2**31
    count = sum(height * width for height, width in sizes) * anchors
    targets = torch.full((1, count), -1, device=DEVICE)
    targets[0, ::1000] = torch.arange(len(targets[0, ::1000]), device=DEVICE) % classes
    targets[0, 7::5003] = -2
    targets[0, -3:] = torch.tensor([classes - 1, -2, -1], device=DEVICE)
    for level in levels:
        torch.full_like(level, math.nan)  # in the memory that the gradients are likely to get
    loss, *gradients = loss_and_gradients(levels, targets)
    forward = multilevel_focal_loss(levels, targets)
    total, first = 0.0, 0
    for level, gradient in zip(levels, gradients, strict=True):
        assert gradient.stride() == level.stride()
        _, _, height, width = level.shape
        for y in range(0, height, 32):
            cells = level[:, :, y : y + 32].double().requires_grad_()
            rows = reference.focal_loss.anchor_rows(cells.contiguous(), classes)
            part = targets[:, first : first + rows.shape[1]]
            first += rows.shape[1]
            truth = reference.sigmoid_focal_loss(rows, part, reduction="sum")
            assert_accurate(gradient[:, :, y : y + 32], *torch.autograd.grad(truth, cells))
            total += truth.item()
    assert first == count
    assert loss.item() == pytest.approx(total, rel=2e-5)
    assert forward.item() == pytest.approx(total, rel=2e-5)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_calls_of_every_kernel(layout, dtype):
    """For compute-sanitizer: few launches, partial vectors and tiles, data from the CPU. Against the CPU operator."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for sizes, normalizer, gamma in (
        (SIZES, None, 2.0),
        (((5, 7),), torch.tensor([2.0, 9.0]), 1.5),
        (((0, 3), (40, 41)), None, 2.0),
    ):
        levels, targets = head_outputs(layout, dtype, sizes=sizes, device="cpu")
        calls = {}
        for device in ("cpu", "cuda"):
            logits = [level.to(device) for level in levels]
            divisor = None if normalizer is None else normalizer.to(device, compute)
            arguments = (targets.int().to(device), divisor, K, 0.25, gamma, 1.0)
            one = torch.ones(()).to(device)
            loss, gradients = OPS.multilevel_focal_loss_with_grad(logits, *arguments)
            calls[device] = [OPS.multilevel_focal_loss(logits, *arguments), loss, *gradients]
            calls[device] += OPS.multilevel_focal_loss_backward(one, logits, *arguments)
            for factor in (1, 3):  # a training step whose gradients are ready, and one that has to compute them anew
                leaves = [level.detach().requires_grad_() for level in logits]
                (multilevel_focal_loss(leaves, targets.to(device), normalizer=divisor) * factor).backward()
                calls[device] += [leaf.grad for leaf in leaves]
        for result, truth in zip(calls["cuda"], calls["cpu"], strict=True):
            info = torch.finfo(truth.dtype)
            torch.testing.assert_close(result.cpu(), truth, rtol=4e-5 + info.eps, atol=info.tiny * info.eps + 1e-30)
