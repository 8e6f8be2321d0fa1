"""sigmoid_focal_loss on CUDA: graphs, host synchronisation, identical bits, more than 2^31 elements, sanitizer cases.

Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own.
"""

import math

import pytest
import torch
from cuda_gates import bits, capture, host_must_not_wait

from retinanet_ext import reference, sigmoid_focal_loss

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample(rows, classes, dtype=torch.float32, soft=False, seed=0, device=DEVICE):
    """Detector-like logits, and a row in twenty that is no background: a class, beyond the classes, ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator) * 2 - 2).to(device, dtype)
    if soft:
        return logits, torch.rand(rows, classes, generator=generator).to(device, dtype)
    targets = torch.full((rows,), -1)
    targets[::20] = torch.randint(-2, classes + 2, (len(targets[::20]),), generator=generator)
    return logits, targets.to(device)


def loss_and_gradient(inputs, targets, grad=None, function=sigmoid_focal_loss, **options):
    inputs = inputs.detach().requires_grad_()
    loss = function(inputs, targets, **options)
    (gradient,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if grad is None else grad)
    return loss.detach(), gradient


@pytest.mark.graph
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["indices", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("captured", [1.0, 3.0])
def test_replays_of_loss_and_gradient_follow_their_inputs(captured, reduction, form, dtype):
    """Other logits, targets (another number of ignored rows) and upstream gradients than those at the capture, where an
    upstream gradient of 1 lets a training step compute its gradient in advance."""
    inputs, targets = sample(700, 37, dtype, form == "soft")
    inputs.requires_grad_()
    upstream = torch.full_like(sigmoid_focal_loss(inputs.detach(), targets, reduction=reduction), captured)

    def step():
        loss = sigmoid_focal_loss(inputs, targets, reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss, inputs, upstream)

    graph, results = capture(step)
    for seed, factor in enumerate((1.0, 3.0, 0.5, 1.0), start=1):
        other_inputs, other_targets = sample(700, 37, dtype, form == "soft", seed)
        if form == "indices":
            other_targets[seed::7] = -2
        with torch.no_grad():
            inputs.copy_(other_inputs)
        targets.copy_(other_targets)
        upstream.fill_(factor)
        for result in results:
            result.fill_(math.nan)
        graph.replay()
        expected = loss_and_gradient(other_inputs, other_targets, upstream, reduction=reduction)
        for result, truth in zip(results, expected, strict=True):
            assert torch.equal(bits(result), bits(truth))


@pytest.mark.graph
def test_replays_of_inference_and_of_one_pass():
    """Factors by class too are read at the replay."""
    inputs, targets = sample(700, 37, torch.bfloat16)
    by_class = torch.rand(37, device=DEVICE)

    def step():
        losses = []
        for options in ({}, {"gamma": 1.5, "label_smoothing": 0.1}, {"alpha": by_class, "weight": by_class}):
            for reduction in ("none", "mean", "sum"):
                losses.append(sigmoid_focal_loss(inputs, targets, reduction=reduction, **options))
        one_pass = OPS.sigmoid_focal_loss_with_grad(inputs, targets, by_class, by_class, 1.0, 1.5, 0.0, -2, 1)
        return *losses, *one_pass

    graph, results = capture(step)
    inputs.copy_(sample(700, 37, torch.bfloat16, seed=1)[0])
    targets.copy_(sample(700, 37, seed=1)[1])
    by_class.fill_(0.4)
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    for result, truth in zip(results, step(), strict=True):
        assert torch.equal(bits(result), bits(truth))


@pytest.mark.graph
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_training_step_learns_as_an_eager_one(dtype, divided):
    """Loss, gradient and update in one graph; the divisor, the number of positives, changes from step to step."""
    start = torch.randn(16, 37, device=DEVICE, dtype=dtype) / 4
    features, targets = torch.randn(700, 16, device=DEVICE, dtype=dtype), sample(700, 37)[1]
    divisor = torch.ones((), device=DEVICE)
    weight = start.clone().requires_grad_()

    def step(weight, features, targets, divisor):
        loss = sigmoid_focal_loss(features @ weight, targets, reduction="sum")
        loss = loss / divisor if divided else loss
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight.sub_(gradient, alpha=0.01)
        return loss.detach()

    graph, loss = capture(lambda: step(weight, features, targets, divisor))
    with torch.no_grad():
        weight.copy_(start)
    eager = start.clone().requires_grad_()
    for seed in range(1, 6):
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(700, 16, generator=generator).to(DEVICE, dtype)
        other_targets = sample(700, 37, seed=seed)[1]
        features.copy_(other)
        targets.copy_(other_targets)
        divisor.fill_(seed)
        graph.replay()
        expected = step(eager, other, other_targets, torch.full((), float(seed), device=DEVICE))
        # The matrix product may sum in another order under capture: some roundings in each of five steps.
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(weight, eager, rtol=tolerance, atol=tolerance)


def unaligned(tensor):
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


CALLS = {
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "soft": {"reduction": "mean", "soft": True},
    "by class": {"reduction": "sum", "alpha": torch.linspace(0, 1, 37), "weight": torch.ones(37)},
    "smoothed": {"reduction": "sum", "label_smoothing": 0.1, "gamma": 1.5},
    "narrow targets": {"reduction": "mean", "index": torch.int16},
    "unaligned": {"reduction": "sum", "view": unaligned},
    "transposed": {"reduction": "sum", "view": lambda tensor: tensor.t().contiguous().t()},
    "divided afterwards": {"reduction": "sum", "divided": True},
}


@pytest.mark.sync
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_call_makes_the_host_wait(name, dtype):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in CALLS[name].items()}
    view, divided = options.pop("view", lambda tensor: tensor), options.pop("divided", False)
    inputs, targets = sample(700, 37, dtype, options.pop("soft", False))
    targets = targets.to(options.pop("index", targets.dtype))
    inputs = view(inputs).requires_grad_()

    def step():
        loss = sigmoid_focal_loss(inputs, targets, **options)
        loss = loss / 3 if divided else loss
        return loss, *torch.autograd.grad(loss, inputs, torch.ones_like(loss))

    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        results = step()
    with host_must_not_wait():
        results = step()
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.sync
def test_the_check_sees_a_host_that_waits():
    values = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), host_must_not_wait():
        values.sum().item()
    # torch's own check does not cover every wait, and none of our library's.
    with pytest.raises((AssertionError, RuntimeError), match=r"the host waited|synchronizing"), host_must_not_wait():
        torch.cuda.synchronize()


@pytest.mark.identity
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["indices", "smoothed", "soft"])
def test_same_bits_in_100_runs(form, dtype):
    """Half of the runs share the device with other work, which moves the blocks about."""
    inputs, targets = sample(60_000, 80, dtype, form == "soft")
    options = {"label_smoothing": 0.1} if form == "smoothed" else {}
    raw = (None, None, 0.25, 2.0, options.get("label_smoothing", 0.0), -2)

    def step():
        results = []
        for reduction in ("none", "mean", "sum"):
            results += loss_and_gradient(inputs, targets, reduction=reduction, **options)
        for reduction in (1, 2):
            results += OPS.sigmoid_focal_loss_with_grad(inputs, targets, *raw, reduction)
        return results

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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["indices", "smoothed"])
def test_one_pass_has_the_bits_of_two(form, dtype):
    """Which of them a training step takes may depend on the step before; with more tiles than blocks on the device."""
    inputs, targets = sample(201_600, 80, dtype)
    for gamma in (2.0, 1.5):
        for reduction in (1, 2):
            raw = (None, None, 0.25, gamma, 0.1 if form == "smoothed" else 0.0, -2, reduction)
            one_pass = OPS.sigmoid_focal_loss_with_grad(inputs, targets, *raw)
            loss = OPS.sigmoid_focal_loss(inputs, targets, *raw, False)
            gradient = OPS.sigmoid_focal_loss_backward(torch.ones_like(loss), inputs, targets, *raw)
            for result, truth in zip(one_pass, (loss, gradient), strict=True):
                assert torch.equal(bits(result), bits(truth))


def need_memory(gigabytes):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, and {free / 1e9:.0f} GB are free")


def poison(like):
    """Leaves NaN in the memory that the next result of this size is likely to get."""
    torch.full_like(like, math.nan)


def assert_accurate(result, truth):
    """Within 2e-5 of the truth where that is at least 1e-30, halves within half a step on top; on the device."""
    info = torch.finfo(result.dtype)
    error = (result.double() - truth).abs()
    if info.bits == 16:
        error -= (truth.abs() * (info.eps / 2)).clamp_min(info.tiny * info.eps / 2)
    kept = truth.abs() >= 1e-30
    assert torch.where(kept, error / truth.abs(), 0).max().item() <= 2e-5  # no NaN passes
    assert torch.where(kept, 0, error).max().item() <= 1.1e-30


def rows_of_every_kind(rows, classes):
    """int32 targets on the device; the last rows are a positive, an ignored and a background one."""
    targets = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    targets[::1000] = torch.arange(len(targets[::1000]), device=DEVICE, dtype=torch.int32) % classes
    targets[7::5003] = -2
    targets[-3:] = torch.tensor([classes - 1, -2, -1], device=DEVICE, dtype=torch.int32)
    return targets


@pytest.mark.large
@pytest.mark.parametrize(
    ("rows", "classes", "form"),
    [(2**31 // 80 + 1000, 80, "indices"), (2**31 + 4097, 1, "indices"), (2**31 // 91 + 1000, 91, "floating")],
    ids=["more elements", "more rows", "floating targets"],
)
def test_more_than_2_31_elements(rows, classes, form):
    """Every element of loss and gradient, and the sums, against the reference in float64, chunk by chunk."""
    need_memory(60)
    inputs = torch.empty(rows, classes, dtype=torch.bfloat16, device=DEVICE).normal_(-2, 3)
    assert inputs.numel() > 2**31
    if form == "indices":
        targets = rows_of_every_kind(rows, classes)
        kept = int((targets != -2).sum()) * classes
    else:
        targets, kept = torch.empty_like(inputs).bernoulli_(0.01), rows * classes
    raw = (None, None, 0.25, 2.0, 0.0, -2)
    one = torch.ones((), device=DEVICE)
    sums = [sigmoid_focal_loss(inputs, targets, reduction="sum"), sigmoid_focal_loss(inputs, targets, reduction="mean")]
    poison(inputs)
    gradient = OPS.sigmoid_focal_loss_backward(one, inputs, targets, *raw, 2)
    poison(inputs)
    mean, mean_gradient = OPS.sigmoid_focal_loss_with_grad(inputs, targets, *raw, 1)
    poison(inputs)
    loss = sigmoid_focal_loss(inputs, targets)
    truth_sum = 0.0
    chunk = 40_000_000 // classes
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        wide_targets = targets[part].double() if form == "floating" else targets[part]
        function = reference.sigmoid_focal_loss
        truth, truth_gradient = loss_and_gradient(inputs[part].double(), wide_targets, function=function)
        assert_accurate(loss[part], truth)
        assert_accurate(gradient[part], truth_gradient)
        assert_accurate(mean_gradient[part], truth_gradient / kept)
        truth_sum += truth.sum().item()
    for value, divisor in ((sums[0], 1), (sums[1], kept), (mean, kept)):
        assert value.double().item() * divisor == pytest.approx(truth_sum, rel=2e-5)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["indices", "narrow indices by class", "soft", "soft in the compute dtype"])
def test_small_calls_of_every_kernel(form, dtype):
    """For compute-sanitizer: few launches, partial vectors and tiles, data from the CPU. Against the CPU operator."""
    for rows, classes in ((37, 7), (203, 80), (4097, 1), (3, 1300)):
        inputs, targets = sample(rows, classes, dtype, form.startswith("soft"), device="cpu")
        weight = class_alpha = None
        if form == "narrow indices by class":
            targets, weight, class_alpha = targets.int(), torch.rand(classes), torch.rand(classes)
        elif form == "soft in the compute dtype":
            targets = targets.to(torch.float64 if dtype == torch.float64 else torch.float32)
        raw = (weight, class_alpha, 0.25, 1.5 if weight is not None else 2.0, 0.0, -2)
        calls = {}
        for device in ("cpu", "cuda"):
            x, t, *options = (v.to(device) if isinstance(v, torch.Tensor) else v for v in (inputs, targets, *raw))
            results = calls[device] = []
            for reduction in (0, 1, 2):
                loss = OPS.sigmoid_focal_loss(x, t, *options, reduction, False)
                grad = torch.ones(loss.shape, dtype=loss.dtype).to(device)
                results += [loss, OPS.sigmoid_focal_loss_backward(grad, x, t, *options, reduction)]
                if reduction:
                    results += OPS.sigmoid_focal_loss_with_grad(x, t, *options, reduction)
            for factor in (1, 3):  # a training step whose gradient is ready, and one that has to compute it anew
                leaf = x.detach().requires_grad_()
                (sigmoid_focal_loss(leaf, t, reduction="mean") * factor).backward()
                results.append(leaf.grad)
            odd = torch.cat([inputs.flatten()[:1], inputs.flatten()]).to(device)[1:].view(inputs.shape)
            results.append(OPS.sigmoid_focal_loss(odd, t, *options, 0, True))
        for result, truth in zip(calls["cuda"], calls["cpu"], strict=True):
            info = torch.finfo(truth.dtype)
            rtol, atol = 4e-5 + (info.eps if info.bits == 16 else 0), 1e-6
            torch.testing.assert_close(result.cpu(), truth, rtol=rtol, atol=atol)
