"""multilevel_focal_loss on CUDA: values, layouts, edges of its numbers, streams, opcheck and torch.compile.

Judged by the documented accuracy against the float64 reference. CUDA graphs, host synchronisation, identical bits, size
and sanitizers: test_multilevel_focal_loss_cuda_gates.py.
"""

import importlib.util
import math
import os
import shutil

import pytest
import torch

from retinanet_ext import multilevel_focal_loss, reference, sigmoid_focal_loss

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# H*W of the first is no multiple of a vector, that of the second is one of 4 and not of 8; the last is a single cell.
SIZES = ((13, 21), (6, 10), (3, 5), (1, 2), (1, 1))
LAYOUTS = (
    *("contiguous", "channels_last", "rows", "slices", "channel slices", "row slices", "anchor slices"),
    *("unaligned", "expanded", "mixed"),
)


def by_name(dtype):
    return str(dtype).removeprefix("torch.")


def laid_out(level, layout, classes):
    """[B, A*K, H, W] numbers as a head may leave them; NaN lies beside every view: reading it would show."""
    batch, channels, height, width = level.shape
    if layout == "channels_last":
        return level.contiguous(memory_format=torch.channels_last)
    if layout == "slices":
        wide = torch.full((batch, channels + 4, height, width + 2), math.nan, dtype=level.dtype)
        wide[:, 2:-2, :, 1:-1] = level
        return wide[:, 2:-2, :, 1:-1]
    if layout == "channel slices":  # one image's planes together, the images apart
        wide = torch.full((batch, channels + 3, height, width), math.nan, dtype=level.dtype)
        wide[:, 1:-2] = level
        return wide[:, 1:-2]
    if layout == "expanded":
        return level[:1].expand(level.shape)
    if layout == "unaligned":
        memory = torch.full((level.numel() + 3,), math.nan, dtype=level.dtype)
        memory[3:] = level.flatten()
        return memory[3:].view(level.shape)
    if layout in ("rows", "row slices", "anchor slices"):
        rows = reference.focal_loss.anchor_rows(level, classes).contiguous()
        nothing = torch.full_like(rows, math.nan)
        if layout == "row slices":
            return torch.cat([rows, nothing], -1)[..., :classes]
        return rows if layout == "rows" else torch.cat([nothing, rows], 1)[:, rows.shape[1] :]
    return level


def head_outputs(layout="contiguous", batch=2, sizes=SIZES, anchors=3, classes=7, dtype=torch.float32, every=3, seed=0):
    """Levels on the CPU, and [B, N] targets of which one in `every` is not background: a class, beyond, or ignored."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for i, (height, width) in enumerate(sizes):
        level = (torch.randn(batch, anchors * classes, height, width, generator=generator) * 4 - 2).to(dtype)
        form = LAYOUTS[i % (len(LAYOUTS) - 1)] if layout == "mixed" else layout
        levels.append(laid_out(level, form, classes))
    targets = torch.full((batch, sum(h * w for h, w in sizes) * anchors), -1)
    drawn = torch.randint(-3, classes + 2, targets.shape, generator=generator)
    return levels, torch.where(torch.arange(targets.numel()).view(targets.shape) % every == 0, drawn, targets)


def place(value):
    """A tensor on the device that lies there as `value` lies in its memory here, gaps and offset included."""
    if isinstance(value, list):
        return [place(level) for level in value]
    if not isinstance(value, torch.Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    memory = value.detach().as_strided((size,), (1,), 0).to(DEVICE)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def loss_and_gradients(function, levels, targets, grad=None, **options):
    leaves = [level.detach().requires_grad_() for level in levels]
    loss = function(leaves, targets, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad)


def exact(levels, targets, grad=1.0, **options):
    """Loss and gradients of the reference in float64. Its own result is a float32 scalar: summed up again here."""
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    leaves = [level.detach().double().requires_grad_() for level in levels]
    normalizer = options.pop("normalizer", None)
    classes = reference.focal_loss.infer_num_classes(levels, targets.shape[1])
    rows = torch.cat([reference.focal_loss.anchor_rows(leaf, classes) for leaf in leaves], 1)
    loss = reference.sigmoid_focal_loss(rows, targets, **options).sum((1, 2))
    loss = (loss / (1.0 if normalizer is None else normalizer)).sum()
    return loss.detach(), *torch.autograd.grad(loss * grad, leaves)


def assert_accurate(result, truth):
    """Within 2e-5 of the truth where that is at least 1e-30, below 1.1e-30 elsewhere; halves within half a step of
    their dtype on top. float64 has 1e-12 for the 2e-5."""
    info = torch.finfo(result.dtype)
    result = result.to(truth.device)
    assert result.shape == truth.shape
    error = (result.double() - truth).abs()
    if info.bits == 16:
        error = error - (truth.abs() * (info.eps / 2)).clamp_min(info.tiny * info.eps / 2)
    kept = truth.abs() >= 1e-30
    worst = torch.where(kept, error / truth.abs(), 0).max().item() if truth.numel() else 0.0
    assert worst <= (1e-12 if info.bits == 64 else 2e-5), f"relative error {worst:.2e}"  # no NaN passes
    assert (torch.where(kept, 0, error) <= 1.1e-30).all()


def check(levels, targets, grad=1.0, **options):
    placed = {name: place(value) for name, value in options.items()}
    upstream = torch.tensor(grad, device=DEVICE)
    loss, *gradients = loss_and_gradients(multilevel_focal_loss, place(levels), place(targets), upstream, **placed)
    truth, *true_gradients = exact(levels, targets, grad, **options)
    assert loss.dtype == torch.float32
    assert_accurate(loss, truth)
    for gradient, true_gradient, level in zip(gradients, true_gradients, levels, strict=True):
        assert gradient.dtype == level.dtype
        assert_accurate(gradient, true_gradient)
        if level.dim() == 4 and level.is_contiguous(memory_format=torch.channels_last):
            assert gradient.is_contiguous(memory_format=torch.channels_last)
    return loss, *gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(layout, dtype):
    check(*head_outputs(layout, dtype=dtype))
    check(*head_outputs(layout, dtype=dtype, every=97), grad=1.5, normalizer=torch.tensor([2.0, 9.0]))


@pytest.mark.parametrize(
    "options", [{"alpha": -1, "gamma": 0.0}, {"alpha": 0.6, "gamma": 1.5}, {"alpha": 1.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=by_name)
def test_options(dtype, options):
    check(*head_outputs("mixed", dtype=dtype), **options)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 8, 9, 16, 33, 80, 91, 365])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
def test_classes_and_anchors(dtype, layout, classes):
    for anchors in (1, 9):
        sizes = ((7, 11), (8, 16), (2, 3))
        check(*head_outputs(layout, 2, sizes, anchors, classes, dtype, every=50))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "mixed"])
def test_more_levels_than_one_launch_takes(layout):
    check(*head_outputs(layout, sizes=[(i % 5, 7) for i in range(40)]), normalizer=3.0)


@pytest.mark.parametrize("index", [torch.int64, torch.int32, torch.int16, torch.int8], ids=by_name)
def test_dtypes_and_strides_of_the_targets(index):
    levels, targets = head_outputs("mixed")
    check(levels, targets.to(index))
    check(levels, torch.stack([targets, targets], -1).to(index)[..., 0])


@pytest.mark.parametrize(
    "normalizer",
    [7, 2.5, torch.tensor(3.0), torch.tensor(4), torch.tensor([2.0, 9.0]), torch.tensor([3, 8]), torch.tensor([5.0])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
def test_normalizer(normalizer, dtype):
    check(*head_outputs("mixed", dtype=dtype), normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_detector_sized_batch(layout, dtype):
    """Two images of 800 x 1333 at K = 80: the pyramid of a RetinaNet, where one anchor in 500 is no background."""
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    levels, targets = head_outputs(layout, 2, sizes, 9, 80, dtype, every=500)
    levels, targets, normalizer = place(levels), place(targets), torch.tensor([20.0, 300.0], device=DEVICE)
    results = loss_and_gradients(multilevel_focal_loss, levels, targets, normalizer=normalizer)
    for result, truth in zip(results, exact(levels, targets, normalizer=normalizer), strict=True):
        assert_accurate(result, truth)
    rows = torch.cat([reference.focal_loss.anchor_rows(level, 80) for level in levels], 1)
    total = sigmoid_focal_loss(rows, targets, reduction="sum")
    torch.testing.assert_close(multilevel_focal_loss(levels, targets), total, rtol=4e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "mixed"])
@pytest.mark.parametrize("sizes", [((4, 6), (0, 3), (1, 2)), ((0, 0), (2, 2)), ((0, 4), (0, 2))], ids=str)
def test_levels_without_cells(layout, sizes):
    check(*head_outputs(layout, sizes=sizes))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "mixed"])
def test_an_empty_batch(layout):
    levels, targets = head_outputs(layout, batch=0)
    for normalizer in (None, 2.0, torch.ones(0)):
        loss, *gradients = check(levels, targets, normalizer=normalizer)
        assert loss == 0
        assert [gradient.shape for gradient in gradients] == [level.shape for level in levels]


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows"])
def test_extreme_nan_and_ignored_logits(layout, dtype):
    """The whole range is accurate; a NaN spoils the sum and its own gradient; an ignored anchor hides anything."""
    levels, targets = head_outputs(layout, dtype=dtype)
    levels = [torch.empty_like(level).uniform_(-100, 100) for level in levels]
    check(levels, targets)
    background = place(levels), torch.full_like(targets, -1).to(DEVICE)
    background[0][0][0, -1] = math.nan  # a plane or a row
    spoiled = background[0][0].isnan()
    loss, *gradients = loss_and_gradients(multilevel_focal_loss, *background)
    assert loss.isnan()
    assert torch.equal(gradients[0].isnan(), spoiled)
    assert not any(gradient.isnan().any() for gradient in gradients[1:])
    hidden = torch.full_like(targets, -2).to(DEVICE)
    for upstream in (1.0, math.nan, math.inf):
        poisoned = [torch.full_like(level, math.nan) for level in background[0]]
        grad = torch.tensor(upstream, device=DEVICE)
        loss, *gradients = loss_and_gradients(multilevel_focal_loss, poisoned, hidden, grad)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=by_name)
def test_a_training_step_is_the_same_whatever_came_before(dtype):
    """Factors above the loss, graphs used twice, gradients that add up: none may meet a gradient made for another."""
    levels, targets = (place(value) for value in head_outputs("mixed", dtype=dtype))
    unit = OPS.multilevel_focal_loss_backward(torch.ones((), device=DEVICE), levels, targets, None, 7, 0.25, 2.0, 1.0)
    info = torch.finfo(dtype)
    for factor in (1.0, 3.0, 3.0, 1.0, 1.0, 1024.0, 1.0):
        torch.cuda.synchronize()
        leaves = [level.clone().requires_grad_() for level in levels]
        loss = multilevel_focal_loss(leaves, targets)
        (loss * factor).backward(retain_graph=True)
        firsts = [leaf.grad.clone() for leaf in leaves]
        (loss * factor).backward()
        for leaf, first, gradient in zip(leaves, firsts, unit, strict=True):
            torch.testing.assert_close(first, gradient * factor, rtol=info.eps * 2, atol=info.tiny * info.eps * factor)
            assert torch.equal(leaf.grad, first * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
def test_opcheck(dtype):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports it, and it is not installed")
    levels, targets = (place(value) for value in head_outputs("contiguous", sizes=((3, 5), (1, 2)), dtype=dtype))
    levels[1] = levels[1].contiguous(memory_format=torch.channels_last)
    for normalizer in (None, torch.tensor([2.0, 9.0], device=DEVICE)):
        arguments = (targets, normalizer, 7, 0.25, 1.5, 1.0)
        leaves = [level.clone().requires_grad_() for level in levels]
        torch.library.opcheck(OPS.multilevel_focal_loss, (leaves, *arguments))
        torch.library.opcheck(OPS.multilevel_focal_loss_with_grad, (levels, *arguments))
        one = torch.ones((), device=DEVICE)
        torch.library.opcheck(OPS.multilevel_focal_loss_backward, (one, levels, *arguments))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_under_autocast(backend):
    if backend == "inductor" and importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile needs triton for CUDA, and it is not installed")
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CC", "gcc"), "cc", "clang"))):
        pytest.skip("triton needs a C compiler, and there is none on the PATH")
    torch.compiler.reset()
    levels, targets = (place(value) for value in head_outputs("mixed", dtype=torch.bfloat16))
    normalizer = torch.tensor([2.0, 9.0], device=DEVICE)

    def step(leaves, targets):
        with torch.autocast("cuda", torch.bfloat16):
            return multilevel_focal_loss(leaves, targets, normalizer=normalizer)

    expected = loss_and_gradients(step, levels, targets)
    results = loss_and_gradients(torch.compile(step, fullgraph=True, backend=backend), levels, targets)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=2e-6, atol=0)


def test_the_current_stream_is_used():
    """On the default stream the operator would overtake the copies, which wait behind a long kernel."""
    levels, targets = (place(value) for value in head_outputs("mixed"))
    levels = [level.contiguous() for level in levels]
    expected = loss_and_gradients(multilevel_focal_loss, levels, targets)
    late = [torch.zeros_like(level) for level in levels]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
        for level, value in zip(late, levels, strict=True):
            level.copy_(value)
        results = loss_and_gradients(multilevel_focal_loss, late, targets)
    stream.synchronize()
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    levels, targets = head_outputs("contiguous")
    first, second = (
        loss_and_gradients(multilevel_focal_loss, [level.to(device) for level in levels], targets.to(device))
        for device in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0
    for result, truth in zip(second, first, strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), truth.cpu())
