"""sigmoid_focal_loss on CUDA: values, layouts and the edges of its numbers.

Judged by the documented accuracy against the float64 reference on the CPU, at the very numbers that the inputs hold.
Streams, devices and transforms: test_focal_loss_cuda_transforms.py. CUDA graphs, host synchronisation, identical bits,
size and sanitizers: test_focal_loss_cuda_gates.py.
"""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from retinanet_ext import reference, sigmoid_focal_loss

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HUGE = [3e38, 3.4e38, 1e30, 1e5, 800.0, 104.0, 88.8, 22.0, 1e-20, 1e-45, 0.0]


def by_name(dtype):
    return str(dtype).removeprefix("torch.")


def spread_logits(rows, classes, dtype=torch.float32, seed=0):
    """Logits over [-100, 100], dense near zero, in random order."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * classes
    wide = torch.linspace(-100, 100, count - count // 2, dtype=torch.float64)
    near = torch.randn(count // 2, generator=generator, dtype=torch.float64) * 4
    return torch.cat([wide, near])[torch.randperm(count, generator=generator)].reshape(rows, classes).to(dtype)


def class_targets(rows, classes, every=2, dtype=torch.int64, seed=0):
    """Background rows, and at every `every`-th one each kind in turn: a class, the label K, beyond K, ignored."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.full((rows,), -1)
    chosen = len(targets[::every])
    kinds = torch.tensor([0, 0, classes, classes + 5, -2, -7])[torch.arange(chosen) % 6]
    drawn = torch.randint(0, classes, (chosen,), generator=generator)
    targets[::every] = torch.where(torch.arange(chosen) % 6 < 2, drawn, kinds)
    return targets.to(dtype)


def place(value):
    """A tensor on the device that lies there as `value` lies in its memory here, gaps and offset included."""
    if not isinstance(value, torch.Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    memory = value.detach().as_strided((size,), (1,), 0).to(DEVICE)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def loss_and_gradient(function, inputs, targets, grad=None, **options):
    inputs = inputs.detach().requires_grad_()
    loss = function(inputs, targets, **options)
    (gradient,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if grad is None else grad)
    return loss.detach(), gradient


def exact(inputs, targets, grad=None, **options):
    """Loss and gradient of the reference in float64, on the CPU."""
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    targets = targets.double() if targets.is_floating_point() else targets
    grad = None if grad is None else grad.double()
    return loss_and_gradient(reference.sigmoid_focal_loss, inputs.double(), targets, grad, **options)


def gradient_size(x, targets, alpha=0.25, gamma=2.0, weight=None, label_smoothing=0.0, ignore_index=-2):
    """What the terms of an element's gradient add up to without their signs: its error is judged by that where they
    cancel, which they do for soft targets and under label smoothing."""
    x, soft = x.double(), targets.is_floating_point()
    t = targets.double() if soft else (targets.unsqueeze(-1) == torch.arange(x.shape[-1])).double()
    alpha = alpha.double() if isinstance(alpha, torch.Tensor) else torch.tensor(float(alpha))
    a = torch.where(alpha < 0, 1.0, alpha * t + (1 - alpha) * (1 - t))
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    miss = p * (1 - t) + q * t
    if soft:
        ce = (1 - t) * -logsigmoid(-x) + t * -logsigmoid(x)
        return a * miss**gamma * (gamma * p * q / miss * (1 - 2 * t).abs() * ce + p * (1 - t) + q * t)
    z, h = torch.where(t == 1, -x, x), label_smoothing / 2
    size = a * miss**gamma * (gamma * torch.sigmoid(-z) * (-logsigmoid(-z) + h * z.abs()) + miss + h)
    if weight is not None:
        foreground = (targets >= 0) & (targets < x.shape[-1])
        row = torch.where(foreground, weight.double()[targets.clamp(0, x.shape[-1] - 1).long()], 1.0)
        size = size * row.unsqueeze(-1)
    return size.masked_fill((targets == ignore_index).unsqueeze(-1), 0)


def assert_accurate(result, truth, size=None):
    """Within 2e-5 of `size`, the truth's own by default, where that is at least 1e-30, and below 1.1e-30 elsewhere;
    halves within half a step of their dtype on top. float64 has 1e-12 for the 2e-5."""
    info = torch.finfo(result.dtype)
    relative = 1e-12 if info.bits == 64 else 2e-5
    size = truth.abs() if size is None else size.abs()
    assert result.shape == truth.shape
    assert torch.isfinite(result).all()
    error = (result.cpu().double() - truth).abs()
    if info.bits == 16:
        error = error - (truth.abs() * (info.eps / 2)).clamp_min(info.tiny * info.eps / 2)
    kept = size >= 1e-30
    worst = max((error / size)[kept].tolist(), default=0.0)
    assert worst <= relative, f"relative error {worst:.2e}"
    assert (error[~kept] <= 1.1e-30).all()


def check(inputs, targets, grad=None, **options):
    """Loss and gradient on the device, of tensors that lie there as they lie here."""
    placed = {name: place(value) for name, value in options.items()}
    results = loss_and_gradient(sigmoid_focal_loss, place(inputs), place(targets), place(grad), **placed)
    loss, gradient = exact(inputs, targets, grad, **options)
    reduction = options.pop("reduction", "none")
    size = gradient_size(inputs, targets, **options)
    if reduction == "mean":
        kept = torch.ones_like(targets, dtype=torch.bool) if targets.is_floating_point() else targets != -2
        size = size / (kept.sum() * (1 if targets.is_floating_point() else inputs.shape[-1]))
    if grad is not None:
        size = size * grad.double().abs()
    assert results[1].dtype == inputs.dtype
    assert_accurate(results[0], loss)
    assert_accurate(results[1], gradient, size)
    return results


OPTIONS = {
    "plain": {},
    "gamma 0": {"gamma": 0.0},
    "gamma 0.5": {"gamma": 0.5, "alpha": 0.0},
    "gamma 1.5": {"gamma": 1.5, "alpha": 1.0},
    "gamma 5": {"gamma": 5.0},
    "cross-entropy": {"gamma": 0.0, "alpha": -1},
    "alpha by class": {"alpha": torch.linspace(0, 1, 13).index_fill(0, torch.tensor([4]), -1.0)},
}
INDEX_OPTIONS = OPTIONS | {
    "weight": {"weight": torch.linspace(0, 3, 13)},
    "smoothed": {"label_smoothing": 0.1, "gamma": 1.5},
    "smoothed, gamma 2": {"label_smoothing": 0.01},
    "all by class": {
        "alpha": torch.linspace(0.1, 1, 13),
        "weight": torch.linspace(2, 0.5, 13),
        "label_smoothing": 0.2,
        "gamma": 0.5,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("name", INDEX_OPTIONS)
def test_class_indices(name, dtype):
    index = torch.int32 if name in ("gamma 0.5", "weight") else torch.int64
    check(spread_logits(400, 13, dtype), class_targets(400, 13, dtype=index), **INDEX_OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("form", ["soft", "soft in the compute dtype", "hard"])
@pytest.mark.parametrize("name", OPTIONS)
def test_floating_targets(name, form, dtype):
    inputs = spread_logits(200, 13, dtype)
    targets = torch.rand(200, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    if form == "hard":
        targets = targets.round()
    elif form != "soft":
        targets = targets.to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(inputs, targets, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("form", ["indices", "sparse indices", "smoothed", "soft"])
def test_reductions(form, reduction, dtype):
    """Public path, whatever it chooses for training, and the raw operators: sum or mean, with the same gradient."""
    options = {"label_smoothing": 0.1} if form == "smoothed" else {}
    inputs = spread_logits(500, 13, dtype).clamp(-30, 30)
    targets = (
        torch.rand(500, 13).to(dtype) if form == "soft" else class_targets(500, 13, 100 if "sparse" in form else 2)
    )
    loss, gradient = check(inputs, targets, reduction=reduction, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    raw = (None, None, 0.25, 2.0, options.get("label_smoothing", 0.0), -2, {"mean": 1, "sum": 2}[reduction])
    x, t = place(inputs), place(targets)
    assert_accurate(OPS.sigmoid_focal_loss(x, t, *raw, False), loss.cpu().double())
    raw_gradient = OPS.sigmoid_focal_loss_backward(torch.ones_like(loss), x, t, *raw)
    assert torch.equal(raw_gradient, gradient)
    both_loss, both_gradient = OPS.sigmoid_focal_loss_with_grad(x, t, *raw)
    assert both_loss.dtype == loss.dtype
    assert_accurate(both_loss, exact(inputs, targets, reduction=reduction, **options)[0])
    assert torch.equal(both_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=by_name)
def test_a_training_step_is_the_same_whatever_came_before(dtype):
    """Factors above the loss, graphs used twice, gradients that add up: none may meet a gradient made for another."""
    inputs, targets = spread_logits(300, 21, dtype).clamp(-20, 20).to(DEVICE), class_targets(300, 21, 40).to(DEVICE)
    raw = (None, None, 0.25, 2.0, 0.0, -2, 2)
    unit = OPS.sigmoid_focal_loss_backward(torch.ones((), device=DEVICE), inputs, targets, *raw)
    info = torch.finfo(dtype)
    for factor in (1.0, 3.0, 3.0, 1.0, 1.0, 1024.0, 1.0):
        torch.cuda.synchronize()
        leaf = inputs.clone().requires_grad_()
        loss = sigmoid_focal_loss(leaf, targets, reduction="sum")
        (loss * factor).backward(retain_graph=True)
        # The unit gradient was rounded before the factor: to a step of fixed size where it is subnormal.
        torch.testing.assert_close(leaf.grad, unit * factor, rtol=info.eps * 2, atol=info.tiny * info.eps * factor)
        first = leaf.grad.clone()
        (loss * factor).backward()
        assert torch.equal(leaf.grad, first * 2)


GAPS = float("nan")  # lies beside every view: reading it would show


def inside(view):
    return view.copy_(torch.empty(view.shape).uniform_(-6, 6))


LAYOUTS = {
    "row slices": lambda: inside(torch.full((23, 19), GAPS)[:, 5:12]),
    "every third row": lambda: inside(torch.full((69, 7), GAPS)[::3]),
    "every second column": lambda: inside(torch.full((23, 14), GAPS)[:, ::2]),
    "transposed": lambda: inside(torch.full((7, 23), GAPS)).t(),
    "expanded row": lambda: inside(torch.full((1, 7), GAPS)).expand(23, 7),
    "expanded scalar": lambda: inside(torch.full((1, 1), GAPS)).expand(23, 7),
    "overlapping rows": lambda: inside(torch.full((60,), GAPS)).as_strided((23, 7), (2, 1)),
    "batch of row slices": lambda: inside(torch.full((2, 5, 11), GAPS)[:, 1:4, 2:9]),
    "batch of images [B, n, K]": lambda: inside(torch.full((3, 50, 9), GAPS)),
    "classes first": lambda: inside(torch.full((2, 7, 5), GAPS)).transpose(1, 2),
    "image head": lambda: inside(torch.full((2, 7, 3, 5), GAPS)).permute(0, 2, 3, 1),
    "channels_last head": lambda: (
        inside(torch.full((2, 7, 3, 5), GAPS)).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    ),
    "channels_last map": lambda: inside(torch.full((2, 7, 3, 5), GAPS)).contiguous(memory_format=torch.channels_last),
    "one class of many": lambda: inside(torch.full((23, 7), GAPS)[:, 3:4]),
    "one vector": lambda: inside(torch.full((7,), GAPS)),
    "size-1 dimensions": lambda: inside(torch.full((1, 23, 1, 7), GAPS).transpose(0, 2)),
}


def alike(view, dtype, fresh=False):
    """A tensor that lies in its memory as `view` does: the same numbers, or fresh ones in [0, 1]."""
    size = view.untyped_storage().nbytes() // view.element_size()
    memory = torch.rand(size) if fresh else view.as_strided((size,), (1,), 0)
    return memory.to(dtype).as_strided(view.shape, view.stride(), view.storage_offset())


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, dtype):
    inputs = alike(LAYOUTS[name](), dtype)
    targets = torch.randint(-2, inputs.shape[-1] + 1, inputs.shape[:-1])
    check(inputs, targets)
    check(inputs, torch.stack([targets, targets], -1).int()[..., 0], alike(inputs, dtype, fresh=True))
    check(inputs, targets, reduction="sum")
    soft = alike(inputs, dtype, fresh=True)
    loss, gradient = check(inputs, soft)
    if name in ("transposed", "classes first", "image head", "channels_last head", "channels_last map"):
        assert loss.stride() == gradient.stride() == inputs.stride()  # no copy is made to change the layout
    check(inputs, torch.rand(inputs.shape).to(dtype))
    check(inputs, soft, torch.tensor(1.5, dtype=dtype).expand(inputs.shape))
    check(inputs, soft, alpha=torch.rand(inputs.shape[-1]), reduction="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 8])
def test_starts_that_no_vector_load_can_take(offset, dtype):
    """Logits, soft targets and upstream gradient each at an odd place, with odd K."""
    inputs = inside(torch.full((301 * 7 + offset,), GAPS, dtype=dtype)[offset:].view(301, 7))
    check(inputs, class_targets(301, 7, 30), alike(inputs, dtype, fresh=True))
    check(inputs, alike(inputs, dtype, fresh=True), alike(inputs, dtype, fresh=True))
    check(inputs, class_targets(301, 7, 30), reduction="sum")
    check(inputs, torch.rand(301, 7).to(dtype), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 80, 91, 255, 257, 1025, 9001])
def test_classes_and_rows_at_the_edges_of_vectors_and_tiles(classes, dtype):
    """A positive in each column that is at an edge; all-background tiles, mixed ones, and a short last one."""
    edges = sorted({0, 1, 3, 4, 7, 8, classes // 2, classes - 2, classes - 1} & set(range(classes)))
    check(spread_logits(len(edges), classes, dtype), torch.tensor(edges))
    for rows in (1, 48, 49, 4097) if classes < 100 else (1, 17):
        targets = class_targets(rows, classes, 400)
        check(spread_logits(rows, classes, dtype), targets, reduction="sum" if rows % 2 else "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("form", ["indices", "soft"])
def test_a_detector_sized_batch_equals_the_cpu_operator(form, dtype):
    """201,600 x 80: several tiles for each resident block. Both sides are within 2e-5, halves round once on each."""
    inputs = (torch.randn(201_600, 80) * 2 - 4).to(dtype)
    targets = class_targets(201_600, 80, 300) if form == "indices" else torch.rand(201_600, 80).to(dtype)
    info = torch.finfo(dtype)
    rtol, atol = 4e-5 + (info.eps if info.bits == 16 else 0), 1e-6 if form == "soft" else 1.1e-30
    for reduction in ("none", "mean", "sum"):
        expected = loss_and_gradient(sigmoid_focal_loss, inputs, targets, reduction=reduction)
        results = loss_and_gradient(sigmoid_focal_loss, inputs.to(DEVICE), targets.to(DEVICE), reduction=reduction)
        for result, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(result.cpu(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("form", ["background", "positive", "smoothed", "soft 0", "soft 0.4", "soft 1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_every_finite_logit_gives_finite_and_right_numbers(gamma, form, dtype):
    values = torch.tensor(HUGE + [-x for x in HUGE], dtype=torch.float64)
    inputs = values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).unsqueeze(1)
    options = {"alpha": -1, "gamma": gamma, "label_smoothing": 0.125 if form == "smoothed" else 0.0}
    if form.startswith("soft"):
        targets = torch.full_like(inputs, float(form.split()[1]))
    else:
        targets = torch.full((len(inputs),), 0 if form == "positive" else -1)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs.to(DEVICE), targets.to(DEVICE), **options)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    wide_targets = targets.double() if targets.is_floating_point() else targets
    expected = reference.sigmoid_focal_loss(inputs.double(), wide_targets, **options)
    # Below e^-100 float32 may flush. Halves round once more.
    info = torch.finfo(dtype)
    rtol = (2e-5 if info.bits <= 32 else 1e-12) + info.eps / 2
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=rtol, atol=info.tiny * info.eps + 1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("form", ["background", "indices", "smoothed", "by class", "soft"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_nan_spoils_its_own_element_only(gamma, form, dtype):
    """Neighbours share a reciprocal and a vector with it."""
    inputs = torch.randn(40, 21).to(dtype)
    targets = torch.rand(40, 21).to(dtype) if form == "soft" else torch.randint(-1, 21, (40,))
    targets = torch.full((40,), -1) if form == "background" else targets
    options = {"gamma": gamma, "label_smoothing": 0.1 if form == "smoothed" else 0.0}
    if form == "by class":
        options["alpha"] = torch.rand(21).to(DEVICE)
    spoiled = torch.rand(40, 21) < 0.05
    poisoned = inputs.masked_fill(spoiled, math.nan).to(DEVICE)
    for result in loss_and_gradient(sigmoid_focal_loss, poisoned, targets.to(DEVICE), **options):
        assert torch.equal(result.cpu().isnan(), spoiled)
    for reduction in ("sum", "mean"):
        loss, gradient = loss_and_gradient(sigmoid_focal_loss, poisoned, targets.to(DEVICE), reduction=reduction)
        assert loss.isnan()
        assert torch.equal(gradient.cpu().isnan(), spoiled)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_infinite_logits_mask(gamma, dtype):
    """-inf at a background element and +inf at the positive class: no loss, no gradient; the reverse costs infinity."""
    inputs, targets = torch.randn(12, 5).to(dtype), torch.tensor([-1, 0, 5] * 4)
    masked = inputs.clone()
    masked[:, 3] = -math.inf
    masked[targets == 0, 0] = math.inf
    hidden = masked.isinf()
    results = loss_and_gradient(sigmoid_focal_loss, masked.to(DEVICE), targets.to(DEVICE), gamma=gamma)
    truths = exact(inputs, targets, gamma=gamma)
    for result, truth in zip(results, truths, strict=True):
        assert (result.cpu()[hidden] == 0).all()
        assert_accurate(result.cpu()[~hidden], truth[~hidden])
    total = sigmoid_focal_loss(masked.to(DEVICE), targets.to(DEVICE), gamma=gamma, reduction="sum")
    assert_accurate(total, truths[0].masked_fill(hidden, 0).sum())
    certain = torch.tensor([[math.inf]], device=DEVICE)
    assert sigmoid_focal_loss(certain, torch.tensor([-1], device=DEVICE), gamma=gamma).item() == math.inf
    assert sigmoid_focal_loss(-certain, torch.tensor([0], device=DEVICE), gamma=gamma).item() == math.inf


@pytest.mark.parametrize("upstream", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("ignore_index", [-2, 3, -100])
def test_ignored_rows_hide_anything(ignore_index, upstream):
    inputs, targets = torch.randn(90, 9), class_targets(90, 9, 7).masked_fill(torch.arange(90) % 5 == 0, ignore_index)
    ignored = targets == ignore_index
    inputs[ignored] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(3)
    options = {"ignore_index": ignore_index}
    for reduction in ("none", "sum", "mean"):
        x, t = inputs.to(DEVICE), targets.to(DEVICE)
        grad = torch.full((90, 9) if reduction == "none" else (), upstream, device=DEVICE)
        loss, gradient = loss_and_gradient(sigmoid_focal_loss, x, t, grad, reduction=reduction, **options)
        assert torch.isfinite(loss).all()
        assert (gradient.cpu()[ignored] == 0).all()
        assert torch.isfinite(gradient.cpu()[~ignored]).all() == math.isfinite(upstream)
    everything = torch.full((90,), ignore_index, device=DEVICE)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, x, everything, reduction="mean", **options)
    assert loss.isnan()
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_empty_inputs(dtype):
    for shape, soft in (((0, 4), False), ((3, 0), False), ((0,), True), ((0, 4), True), ((2, 0, 4), False)):
        inputs = torch.randn(shape, device=DEVICE).to(dtype)
        targets = torch.rand(shape, device=DEVICE).to(dtype) if soft else torch.zeros(shape[:-1], device=DEVICE).long()
        for reduction in ("none", "sum", "mean"):
            loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, reduction=reduction)
            assert gradient.shape == inputs.shape
            if reduction == "none":
                assert loss.shape == inputs.shape
            else:
                assert loss.isnan() if reduction == "mean" else loss == 0
