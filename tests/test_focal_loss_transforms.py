"""sigmoid_focal_loss under torch.compile, torch.export, torch.func and autocast."""

import pytest
import torch

from retinanet_ext import reference, sigmoid_focal_loss

REDUCTIONS = ("none", "mean", "sum")
OPTIONS = [
    {},
    {"gamma": 1.5, "label_smoothing": 0.1, "ignore_index": 2},
    {"weight": torch.linspace(0.5, 2, 5)},
    {"alpha": torch.tensor([0.1, 0.9, -1.0, 0.5, 0.3])},
]


def sample(*batch, soft=False, rows=7, classes=5, dtype=torch.float32):
    inputs = torch.randn(*batch, rows, classes).to(dtype)
    if soft:
        return inputs, torch.rand(*batch, rows, classes).to(dtype)
    return inputs, torch.randint(-2, classes + 1, (*batch, rows))


def loss_and_gradient(function, inputs, targets):
    inputs = inputs.detach().requires_grad_()
    loss = function(inputs, targets)
    (gradient,) = torch.autograd.grad((loss * torch.linspace(1, 2, loss.numel()).view_as(loss)).sum(), inputs)
    return loss.detach(), gradient


def with_options(**options):
    return lambda inputs, targets: sigmoid_focal_loss(inputs, targets, **options)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_compile_fullgraph(reduction, soft, options):
    if soft and ("weight" in options or "label_smoothing" in options):
        options = {"gamma": 1.5}
    eager = with_options(reduction=reduction, **options)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for inputs, targets in (sample(soft=soft), sample(soft=soft, rows=5)):
        if soft:
            inputs, targets = inputs.t().contiguous().t(), targets.t().contiguous().t()
        for result, expected in zip(
            loss_and_gradient(compiled, inputs, targets),
            loss_and_gradient(eager, inputs, targets),
            strict=True,
        ):
            assert torch.equal(result, expected)
        assert compiled(inputs, targets).stride() == eager(inputs, targets).stride()


def test_compile_with_inductor():
    """Forward and backward of a small head, the code generator and its stride assumptions included."""
    layer = torch.nn.Conv2d(3, 4 * 5, 3, padding=1)

    def step(images, targets):
        rows = layer(images).view(2, 4, 5, 6, 6).permute(0, 3, 4, 1, 2)
        return sigmoid_focal_loss(rows.reshape(2, -1, 5), targets, reduction="sum") / 10

    images, targets = torch.randn(2, 3, 6, 6), torch.randint(-2, 5, (2, 144))
    expected = step(images, targets)
    expected.backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    loss = torch.compile(step, fullgraph=True)(images, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-4, atol=1e-5)


def test_compile_with_dynamic_shapes_compiles_once():
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(with_options(reduction="mean"), fullgraph=True, dynamic=True, backend=compilations)
    counts = []
    for rows in (7, 12, 31):
        inputs, targets = sample(rows=rows)
        assert torch.equal(compiled(inputs, targets), sigmoid_focal_loss(inputs, targets, reduction="mean"))
        counts.append(compilations.frame_count)
    assert counts == counts[:1] * 3


def test_compile_under_autocast():
    inputs, targets = sample(dtype=torch.bfloat16)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return sigmoid_focal_loss(x, targets)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, step(inputs))


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
def test_compile_of_vmap():
    inputs, targets = sample(3)
    mapped = torch.func.vmap(with_options(reduction="sum"))
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, targets), mapped(inputs, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["targets", "weight"])
def test_compile_where_the_reference_takes_over(name):
    inputs, targets = sample(soft=name == "targets")
    other = targets if name == "targets" else torch.rand(5)
    other.requires_grad_()

    def call(x, o):
        if name == "targets":
            return sigmoid_focal_loss(x, o, reduction="sum")
        return sigmoid_focal_loss(x, targets, reduction="sum", weight=o)

    result = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs, other)
    torch.testing.assert_close(result, call(inputs, other), rtol=1e-6, atol=0)
    assert torch.autograd.grad(result, other)[0].any()


class FocalLoss(torch.nn.Module):
    def __init__(self, reduction):
        super().__init__()
        self.reduction = reduction

    def forward(self, inputs, targets):
        return sigmoid_focal_loss(inputs, targets, gamma=1.5, reduction=self.reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("strict", [True, False])
def test_export(reduction, strict):
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        FocalLoss(reduction),
        sample(),
        dynamic_shapes={"inputs": {0: rows}, "targets": {0: rows}},
        strict=strict,
    )
    assert any("sigmoid_focal_loss" in str(node.target) for node in program.graph.nodes)
    for size in (7, 40):
        inputs, targets = sample(rows=size)
        assert torch.equal(program.module()(inputs, targets), FocalLoss(reduction)(inputs, targets))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vmap_equals_the_loop(reduction, soft, dtype):
    eager = with_options(reduction=reduction, gamma=1.5)
    inputs, targets = sample(3, soft=soft, dtype=dtype)
    if not soft:
        targets[1] = -2  # an entry whose mean is of no elements
    expected = torch.stack([eager(x, t) for x, t in zip(inputs, targets, strict=True)])
    result = torch.func.vmap(eager)(inputs, targets)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0, equal_nan=True)
    last = torch.func.vmap(eager, in_dims=(-1, 1), out_dims=-1)(inputs.movedim(0, -1), targets.movedim(0, 1))
    torch.testing.assert_close(last, expected.movedim(0, -1), rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(
        torch.func.vmap(eager, (0, None))(inputs, targets[0]),
        torch.stack([eager(x, targets[0]) for x in inputs]),
        rtol=1e-6,
        atol=0,
    )
    torch.testing.assert_close(
        torch.func.vmap(eager, (None, 0))(inputs[0], targets),
        torch.stack([eager(inputs[0], t) for t in targets]),
        rtol=1e-6,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_vmap_of_grad_equals_the_loop(reduction, soft, options):
    """Per-sample gradients."""
    if soft and ("weight" in options or "label_smoothing" in options):
        options = {"gamma": 0.5}
    inputs, targets = sample(4, soft=soft)
    gradient = torch.func.grad(with_options(reduction=reduction, **options))
    expected = torch.stack([gradient(x, t) for x, t in zip(inputs, targets, strict=True)])
    torch.testing.assert_close(torch.func.vmap(gradient)(inputs, targets), expected, rtol=4e-6, atol=1e-12)
    shared = torch.stack([gradient(inputs[0], t) for t in targets])
    torch.testing.assert_close(torch.func.vmap(gradient, (None, 0))(inputs[0], targets), shared, rtol=4e-6, atol=1e-12)
    looped = [
        loss_and_gradient(with_options(reduction=reduction, **options), x, t)[1]
        for x, t in zip(inputs, targets, strict=True)
    ]
    torch.testing.assert_close(expected, torch.stack(looped), rtol=4e-6, atol=1e-12)


def test_grad_of_vmap_and_nested_vmap():
    inputs, targets = sample(3, 2)
    eager = with_options(reduction="mean")
    nested = torch.func.vmap(torch.func.vmap(eager))
    kept = targets.clamp(min=-1)
    expected = torch.stack(
        [torch.stack([eager(x, t) for x, t in zip(*pair, strict=True)]) for pair in zip(inputs, kept, strict=True)]
    )
    torch.testing.assert_close(nested(inputs, kept), expected, rtol=1e-6, atol=0)
    gradient = torch.func.grad(lambda x: nested(x, kept).sum())(inputs)
    looped = torch.func.grad(lambda x: sum(eager(x[i, j], kept[i, j]) for i in range(3) for j in range(2)))(inputs)
    torch.testing.assert_close(gradient, looped, rtol=4e-6, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_jacrev_and_vjp(soft):
    inputs, targets = sample(soft=soft, rows=3, classes=4)
    inputs, targets = inputs.double(), targets.double() if soft else targets
    eager = with_options()
    jacobian = torch.func.jacrev(eager)(inputs, targets)
    _, gradient = loss_and_gradient(lambda x, t: eager(x, t).sum(), inputs, targets)
    diagonal = torch.zeros(12, 12, dtype=torch.float64)
    diagonal.diagonal().copy_(gradient.flatten())
    torch.testing.assert_close(jacobian.view(12, 12), diagonal, rtol=1e-12, atol=0)
    mean = torch.func.jacrev(with_options(reduction="mean"))(inputs, targets)
    kept = 12 if soft else int((targets != -2).sum()) * 4
    torch.testing.assert_close(mean, gradient / kept, rtol=1e-12, atol=0)
    cotangent = torch.randn(3, 4, dtype=torch.float64)
    _, pull = torch.func.vjp(lambda x: eager(x, targets), inputs)
    torch.testing.assert_close(pull(cotangent)[0], cotangent * gradient, rtol=1e-12, atol=0)
    many = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(pull)(many)[0], many * gradient, rtol=1e-12, atol=0)


def test_vmap_without_elements():
    for reduction in REDUCTIONS:
        eager = with_options(reduction=reduction)
        for inputs, targets in (
            (torch.randn(3, 0, 5), torch.zeros(3, 0)),
            (torch.randn(3, 7, 0), torch.zeros(3, 7)),
        ):
            targets = targets.long()
            expected = torch.stack([eager(x, t) for x, t in zip(inputs, targets, strict=True)])
            torch.testing.assert_close(torch.func.vmap(eager)(inputs, targets), expected, equal_nan=True)
        nothing = torch.func.vmap(eager)(torch.randn(0, 7, 5), torch.zeros(0, 7, dtype=torch.int64))
        assert nothing.shape == ((0, 7, 5) if reduction == "none" else (0,))


@pytest.mark.parametrize("name", ["weight", "alpha"])
def test_vmap_over_class_factors_says_so(name):
    inputs, targets = sample()
    with pytest.raises(RuntimeError, match="must not be batched by vmap"):
        torch.func.vmap(lambda values: sigmoid_focal_loss(inputs, targets, **{name: values}))(torch.rand(3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("soft", [False, True])
def test_autocast_returns_float32_and_casts_no_input(dtype, soft):
    inputs, targets = sample(soft=soft, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wide_targets = targets.to(wide) if soft else targets
    expected, _ = loss_and_gradient(with_options(), inputs.to(wide), wide_targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = loss_and_gradient(with_options(), inputs, targets)
        total = sigmoid_focal_loss(inputs, targets, reduction="sum")
    assert loss.dtype == total.dtype == wide
    assert gradient.dtype == dtype
    assert torch.equal(loss, expected)  # a cast of the inputs to bfloat16 would show
    _, wide_gradient = loss_and_gradient(with_options(), inputs.to(wide), wide_targets)
    assert torch.equal(gradient, wide_gradient.to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert sigmoid_focal_loss(inputs, targets).dtype == dtype
    with torch.autocast("cuda", torch.bfloat16, enabled=True) if torch.cuda.is_available() else torch.no_grad():
        assert sigmoid_focal_loss(inputs, targets).dtype == dtype  # another device's autocast


def test_autocast_of_the_reference_agrees():
    inputs, targets = sample(dtype=torch.bfloat16)
    weight = torch.rand(5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert sigmoid_focal_loss(inputs, targets, weight=weight).dtype == torch.float32
        assert reference.sigmoid_focal_loss(inputs, targets).dtype == torch.float32


def test_forward_mode_is_refused_not_wrong():
    inputs, targets = sample()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: sigmoid_focal_loss(x, targets), (inputs,), (torch.ones_like(inputs),))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_meta_tensors(reduction):
    """A device without autocast."""
    logits = torch.empty(3, 4, device="meta", requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.empty(3, dtype=torch.int64, device="meta"), reduction=reduction)
    assert loss.shape == (() if reduction == "sum" else (3, 4))
    loss.sum().backward()
    assert logits.grad.shape == (3, 4)


def test_the_divisor_of_a_float64_mean_is_float64():
    """float32 counts exactly only to 2^24."""
    from retinanet_ext.ops import focal_loss

    options = focal_loss.Options(0.25, 2.0, 0.0, -2, focal_loss.REDUCTIONS["mean"])
    inputs = torch.zeros(2, 3, 4, dtype=torch.float64)
    for targets in (torch.zeros_like(inputs), torch.zeros(2, 3, dtype=torch.int64)):
        assert focal_loss._mean_divisor(inputs, targets, options).dtype == torch.float64
