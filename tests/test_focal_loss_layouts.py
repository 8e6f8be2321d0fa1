"""sigmoid_focal_loss reads any layout, whatever lies around it, and lays its results out as the fake kernels say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import logsigmoid

from retinanet_ext import reference, sigmoid_focal_loss

FORWARD = torch.ops.retinanet_ext.sigmoid_focal_loss
BACKWARD = torch.ops.retinanet_ext.sigmoid_focal_loss_backward


def loss_and_gradient(inputs, targets, grad=None, **options):
    inputs = inputs.detach().requires_grad_()
    loss = sigmoid_focal_loss(inputs, targets, **options)
    (gradient,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if grad is None else grad)
    return loss.detach(), gradient


def assert_same_as_contiguous(inputs, targets, grad=None, **options):
    """A layout changes no value: compared with contiguous copies, within a rounding or two."""
    results = loss_and_gradient(inputs, targets, grad, **options)
    plain = inputs.clone(memory_format=torch.contiguous_format)
    plain_targets = targets.clone(memory_format=torch.contiguous_format)
    plain_grad = None if grad is None else grad.clone(memory_format=torch.contiguous_format)
    expected = loss_and_gradient(plain, plain_targets, plain_grad, **options)
    eps = torch.finfo(inputs.dtype).eps
    for result, truth in zip(results, expected, strict=True):
        assert result.shape == truth.shape
        torch.testing.assert_close(result, truth, rtol=4 * eps, atol=0, equal_nan=True)
    return results


def base(*shape, dtype=torch.float32):
    """Filled with NaN where a test does not write: reading beside the view shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def inside(view, low=-6, high=6):
    view.copy_(torch.empty(view.shape).uniform_(low, high))
    return view


def alike(view, dtype, *, fresh=False):
    """A tensor that lies in its memory as ``view`` does, gaps included: the same numbers, or fresh ones in [0, 1]."""
    size = view.untyped_storage().nbytes() // view.element_size()
    memory = torch.rand(size) if fresh else view.as_strided((size,), (1,), 0)
    return memory.to(dtype).as_strided(view.shape, view.stride(), view.storage_offset())


LAYOUTS = {
    "contiguous": lambda: inside(base(23, 7)),
    "row slices": lambda: inside(base(23, 19)[:, 5:12]),
    "every third row": lambda: inside(base(69, 7)[::3]),
    "every second column": lambda: inside(base(23, 14)[:, ::2]),
    "transposed": lambda: inside(base(7, 23)).t(),
    "storage offset": lambda: inside(base(23 * 7 + 3)[3:].view(23, 7)),
    "expanded row": lambda: inside(base(1, 7)).expand(23, 7),
    "expanded column": lambda: inside(base(23, 1)).expand(23, 7),
    "expanded scalar": lambda: inside(base(1, 1)).expand(23, 7),
    "overlapping rows": lambda: inside(base(60)).as_strided((23, 7), (2, 1)),
    "one row of a wide table": lambda: inside(base(4, 3, 7)[1:2, 2]),
    "three dimensions": lambda: inside(base(2, 5, 7)),
    "batch of row slices": lambda: inside(base(2, 5, 11)[:, 1:4, 2:9]),
    "middle dimension first": lambda: inside(base(5, 2, 7)).transpose(0, 1),
    "classes first": lambda: inside(base(2, 7, 5)).transpose(1, 2),
    "image head": lambda: inside(base(2, 7, 3, 4)).permute(0, 2, 3, 1),
    "channels_last head": lambda: inside(base(2, 7, 3, 4).contiguous(memory_format=torch.channels_last)).permute(
        0, 2, 3, 1
    ),
    "one class": lambda: inside(base(23, 1)),
    "one class of many": lambda: inside(base(23, 7)[:, 3:4]),
    "one vector": lambda: inside(base(7)),
    "strided vector": lambda: inside(base(14)[::2]),
    "size-1 dimensions": lambda: inside(base(1, 23, 1, 7).transpose(0, 2)),
    "odd strides of size-1 dimensions": lambda: inside(base(999)).as_strided((1, 23, 1, 7), (3, 40, 500, 1)),
    "wider than a block": lambda: inside(base(3, 1300)),
    "wider than a block, sliced": lambda: inside(base(3, 1400)[:, 50:1350]),
    "wider than a chunk": lambda: inside(base(2, 20_000)),
    "more rows than a chunk": lambda: inside(base(16_500, 3)),
    "no rows": lambda: base(0, 7),
    "no classes": lambda: base(23, 0),
    "no rows of a slice": lambda: base(0, 19)[:, 5:12],
    "empty batch": lambda: base(0, 5, 7).transpose(0, 1),
}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "gamma": 1.5}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_inputs_with_class_indices(name, options):
    inputs = LAYOUTS[name]()
    classes = inputs.shape[-1]
    targets = torch.randint(-2, classes + 1, inputs.shape[:-1])
    assert_same_as_contiguous(inputs, targets, **options)
    strided = torch.empty(*inputs.shape[:-1], 2, dtype=torch.int64)[..., 0].copy_(targets)
    assert_same_as_contiguous(inputs, strided, **options)
    assert_same_as_contiguous(alike(inputs, torch.float64), targets.int(), **options)
    assert_same_as_contiguous(alike(inputs, torch.bfloat16), targets, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_soft_targets(name, dtype):
    inputs = alike(LAYOUTS[name](), dtype)
    assert_same_as_contiguous(inputs, torch.rand(inputs.shape, dtype=dtype))
    same = alike(inputs, dtype, fresh=True)
    loss, gradient = assert_same_as_contiguous(inputs, same)
    if name in ("transposed", "channels_last head", "image head", "classes first"):
        assert loss.stride() == gradient.stride() == inputs.stride()  # no copy is made to change the layout
    assert_same_as_contiguous(inputs, torch.rand(inputs.shape))
    assert_same_as_contiguous(inputs, torch.rand(1).to(dtype).expand(inputs.shape))
    assert_same_as_contiguous(inputs, same, alpha=torch.rand(inputs.shape[-1]))
    upstream = alike(inputs, dtype, fresh=True)
    assert_same_as_contiguous(inputs, same, upstream)


def test_soft_targets_of_a_segmentation_map():
    """channels_last [B, K, H, W] with targets of the same, and of another layout."""
    inputs = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    targets = torch.rand(2, 5, 4, 3)
    loss, _ = assert_same_as_contiguous(inputs, targets.contiguous(memory_format=torch.channels_last))
    assert loss.is_contiguous(memory_format=torch.channels_last)
    assert_same_as_contiguous(inputs, targets)
    assert_same_as_contiguous(inputs.contiguous(), targets.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 80, 91, 511, 512, 513, 1025])
def test_every_class_of_a_row_is_found(classes):
    """A positive in each column in turn, beside the vector's edges and the block's."""
    columns = sorted({0, 1, 7, 8, 15, 16, 17, classes // 2, classes - 2, classes - 1} & set(range(classes)))
    inputs = torch.randn(len(columns), classes)
    one_hot = torch.zeros(len(columns), classes)
    one_hot[torch.arange(len(columns)), columns] = 1
    results = loss_and_gradient(inputs, torch.tensor(columns))
    for result, expected in zip(results, loss_and_gradient(inputs, one_hot), strict=True):
        torch.testing.assert_close(result, expected, rtol=4e-6, atol=1e-12)


GRADS = {
    "arbitrary": lambda: torch.randn(23, 7),
    "expanded scalar": lambda: torch.tensor(1.7).expand(23, 7),
    "expanded row": lambda: torch.randn(7).expand(23, 7),
    "expanded column": lambda: torch.randn(23, 1).expand(23, 7),
    "transposed": lambda: torch.randn(7, 23).t(),
    "sliced": lambda: torch.randn(23, 12)[:, 3:10],
    "zero": lambda: torch.zeros(23, 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("grad", GRADS)
def test_upstream_gradients(grad, soft, dtype):
    """Each element's gradient times its upstream one."""
    upstream = GRADS[grad]().to(dtype)
    for inputs in (torch.randn(23, 7).to(dtype), torch.randn(7, 23).to(dtype).t()):
        targets = torch.rand(23, 7).to(dtype) if soft else torch.randint(-2, 7, (23,))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        _, local = loss_and_gradient(inputs.to(wide), targets.to(wide) if soft else targets)
        _, gradient = loss_and_gradient(inputs, targets, upstream)
        info = torch.finfo(dtype)
        rtol = 4 * torch.finfo(wide).eps + (info.eps / 2 if info.bits < 32 else 0)
        torch.testing.assert_close(
            gradient, (local * upstream.to(wide)).to(dtype), rtol=rtol, atol=info.tiny * info.eps
        )


def test_upstream_scalar_of_a_reduction():
    inputs, targets = torch.randn(23, 7), torch.randint(-2, 7, (23,))
    _, local = loss_and_gradient(inputs, targets)
    kept = int((targets != -2).sum()) * 7
    for reduction, divisor in (("sum", 1), ("mean", kept)):
        for factor in (1.0, -3.5, 0.0):
            _, gradient = loss_and_gradient(inputs, targets, torch.tensor(factor), reduction=reduction)
            torch.testing.assert_close(gradient, local * factor / divisor, rtol=1e-6, atol=0)


@st.composite
def strided(draw, shape, dtype):
    """A tensor of ``shape`` in some layout: permuted, sliced with steps, expanded, at an offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    expand = [draw(st.sampled_from([False, False, False, True])) for _ in shape]
    sizes = [1 if e else n for n, e in zip(shape, expand, strict=True)]
    padded = [n * s + draw(st.integers(0, 2)) for n, s in zip(sizes, steps, strict=True)]
    memory = base(*[padded[d] for d in order], dtype=dtype)
    view = memory.permute([order.index(d) for d in range(len(shape))])
    view = view[tuple(slice(0, n * s, s) for n, s in zip(sizes, steps, strict=True))]
    return inside(view, 0, 1).expand(shape)


def gradient_size(x, targets, gamma=2.0, alpha=0.25, weight=None, label_smoothing=0.0):
    """What the terms of each element's gradient add up to without their signs: of a difference no more is known."""
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    if targets.is_floating_point():
        miss = (p * (1 - targets) + q * targets).clamp_min(1e-300)
        entropy = (1 - targets) * -logsigmoid(-x) + targets * -logsigmoid(x)
        terms = gamma * p * q / miss * (1 - 2 * targets).abs() * entropy + p * (1 - targets) + q * targets
        return (alpha * targets + (1 - alpha) * (1 - targets)) * miss**gamma * terms
    positive = targets.unsqueeze(-1) == torch.arange(x.shape[-1])
    z, miss, rest = torch.where(positive, -x, x), torch.where(positive, q, p), torch.where(positive, p, q)
    half = label_smoothing / 2
    terms = gamma * rest * (-logsigmoid(-z) + half * z.abs()) + miss + half
    largest = 1 if weight is None or not len(weight) else weight.max().clamp_min(1)
    return torch.where(positive, alpha, 1 - alpha) * miss**gamma * terms * largest


def assert_right(results, inputs, targets, grad, **options):
    """Loss and gradient against the reference in float64, where a logit is finite; NaN where it is NaN. Infinite ones
    are right by their limits where these are of the plain loss of class indices."""
    indices = not targets.is_floating_point()
    x, upstream = inputs.double(), grad.double()
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    wide_targets = targets if indices else targets.double()
    leaf = x.nan_to_num(0, 0, 0).requires_grad_()
    loss = reference.sigmoid_focal_loss(leaf, wide_targets, **wide)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    sizes = loss.detach(), gradient_size(leaf.detach(), wide_targets, **wide) * upstream
    info = torch.finfo(inputs.dtype)
    ignored = (targets == -2).unsqueeze(-1).expand(x.shape) if indices else torch.zeros_like(x, dtype=torch.bool)
    bound = 1e-12 if inputs.dtype == torch.float64 else 2e-5
    for result, expected, size in zip(results, (loss.detach(), gradient), sizes, strict=True):
        off = (result.double() - expected).abs()
        rounding = info.eps / 2 * expected.abs() if info.bits < 32 else 0
        assert (off <= bound * size.abs() + rounding + 1.1e-30)[inputs.isfinite()].all()
        assert (result[ignored] == 0).all()
        assert result[inputs.isnan() & ~ignored].isnan().all()
    if indices and not options["label_smoothing"]:
        hit = targets.unsqueeze(-1) == torch.arange(x.shape[-1])
        masked = inputs.isinf() & ((inputs > 0) == hit)  # -inf of background, +inf of the class itself
        wrong = inputs.isinf() & ~masked & ~ignored
        alpha = torch.where(hit, options.get("alpha", torch.tensor(0.25)), 1 - options.get("alpha", 0.25))
        assert all((result[masked] == 0).all() for result in results)
        assert (results[0][wrong & (alpha > 0)] == torch.inf).all()


EXTREMES = [0.0, -0.0, 1e-40, 20.0, 100.0, -100.0, 1e4, -1e4, 1e30, -1e30, math.inf, -math.inf, math.nan]


@given(st.data())
@settings(max_examples=150)
def test_any_shape_in_any_layout(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=0, max_size=3))
    shape = (*shape, data.draw(st.sampled_from([0, 1, 2, 3, 8, 17])))
    inputs = data.draw(strided(shape, dtype))
    if inputs.numel():
        place = st.tuples(*[st.integers(0, size - 1) for size in shape])
        for at, value in data.draw(st.lists(st.tuples(place, st.sampled_from(EXTREMES)), max_size=6)):
            inputs[at] = value  # of an expanded dimension at all places
    options = {"gamma": data.draw(st.sampled_from([0.0, 0.5, 2.0]))}
    if data.draw(st.booleans()):
        targets = data.draw(strided(shape, data.draw(st.sampled_from([dtype, torch.float32]))))
    else:
        targets = torch.randint(-2, shape[-1] + 1, shape[:-1])
        options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.1]))
        if data.draw(st.booleans()):
            options["weight"] = torch.rand(shape[-1]) + 0.5
    if data.draw(st.booleans()):
        options["alpha"] = torch.rand(shape[-1])
    grad = data.draw(strided(shape, dtype))
    results = assert_same_as_contiguous(inputs, targets, grad, **options)
    assert_right(results, inputs, targets, grad, **options)


def assert_fake_equals_real(operator, arguments):
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
    meta = operator(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
    assert fake.shape == meta.shape == real.shape
    assert fake.dtype == meta.dtype == real.dtype
    assert fake.device == real.device
    if real.numel():  # the stride of one element moves nothing, and torch's own empty_like differs in it
        assert significant_strides(fake) == significant_strides(real)
    return real


def significant_strides(tensor):
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def assert_fakes_equal_real(inputs, targets, alpha=None, wide=False):
    for reduction in (0, 1, 2):
        options = (None, alpha, 0.25, 2.0, 0.0, -2, reduction)
        loss = assert_fake_equals_real(FORWARD, (inputs, targets, *options, wide))
        grads = [torch.ones_like(loss)]
        if reduction == 0:
            grads += [loss.new_ones(()).expand(inputs.shape), alike(inputs, loss.dtype, fresh=True)]
            grads += [torch.ones(inputs.shape, dtype=loss.dtype)]
        for grad in grads:
            assert_fake_equals_real(BACKWARD, (grad, inputs, targets, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fake_kernels_know_every_layout(name, dtype):
    inputs = alike(LAYOUTS[name](), dtype)
    assert_fakes_equal_real(inputs, torch.zeros(inputs.shape[:-1], dtype=torch.int64))
    for targets in (alike(inputs, dtype, fresh=True), torch.rand(inputs.shape)):
        assert_fakes_equal_real(inputs, targets, wide=dtype == torch.bfloat16)
    assert_fakes_equal_real(inputs, targets, alpha=torch.rand(inputs.shape[-1]))


@given(st.data())
@settings(max_examples=30)
def test_fake_kernels_know_any_layout(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 2, 3, 3]), min_size=1, max_size=4)))
    inputs = data.draw(strided(shape, dtype))
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    if data.draw(st.booleans()):
        targets = data.draw(st.sampled_from([torch.zeros_like(inputs), data.draw(strided(shape, dtype))]))
    assert_fakes_equal_real(inputs, targets, wide=data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize(("soft", "smoothing"), [(False, 0.0), (False, 0.1), (True, 0.0)])
def test_an_element_has_the_same_bits_wherever_it_lies(dtype, gamma, soft, smoothing):
    """Runs are evaluated by vectors; the rest of a run must not be rounded otherwise than its whole vectors."""
    rows = 1021
    logits = (torch.randn(rows, 1) * 4).to(dtype)
    targets = torch.rand(rows, 1).to(dtype) if soft else torch.full((rows,), -1)
    options = (None, None, 0.25, gamma, smoothing, -2)
    ops, one = torch.ops.retinanet_ext, torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def loss_and_gradient(first, last):
        part, part_targets = logits[first:last].clone(), targets[first:last].clone()
        return (
            ops.sigmoid_focal_loss(part, part_targets, *options, 0, False),
            ops.sigmoid_focal_loss_backward(one, part, part_targets, *options, 2),
        )

    whole = loss_and_gradient(0, rows)
    for width in (1, 5, 16):
        parts = [loss_and_gradient(i, min(rows, i + width)) for i in range(0, rows, width)]
        for pieces, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 81])
def test_results_larger_than_the_cache_have_the_bits_of_their_parts(dtype, classes):
    """Large results are written around the caches, in large pages; every element arrives, in every dtype."""
    rows = 48 * 2**20 // (classes * dtype.itemsize) + 5
    logits = torch.randn(rows, classes).to(dtype)
    targets = torch.full((rows,), -1)
    targets[::97] = torch.randint(0, classes, (len(targets[::97]),))
    targets[5::101] = -2
    arguments = (None, None, 0.25, 2.0, 0.0, -2)
    ops, one = torch.ops.retinanet_ext, torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    parts = range(0, rows, rows // 13)
    expected = torch.cat(
        [
            ops.sigmoid_focal_loss_backward(one, logits[i : i + rows // 13], targets[i : i + rows // 13], *arguments, 2)
            for i in parts
        ]
    )
    assert torch.equal(ops.sigmoid_focal_loss_backward(one, logits, targets, *arguments, 2), expected)
    assert torch.equal(ops.sigmoid_focal_loss_with_grad(logits, targets, *arguments, 2)[1], expected)
    loss = ops.sigmoid_focal_loss(logits, targets, *arguments, 0, False)
    parts = [
        ops.sigmoid_focal_loss(logits[i : i + rows // 13], targets[i : i + rows // 13], *arguments, 0, False)
        for i in parts
    ]
    assert torch.equal(loss, torch.cat(parts))
    planes = logits.view(1, 1, rows, classes).permute(0, 3, 1, 2).contiguous()  # [1, K, 1, rows]: one anchor a cell
    (gradient,) = ops.multilevel_focal_loss_backward(
        one.float(), [planes], targets.view(1, -1), None, classes, 0.25, 2.0, 1.0
    )
    assert torch.equal(gradient.view(classes, rows).t(), expected)
