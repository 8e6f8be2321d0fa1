"""sigmoid_focal_loss under autograd: gradcheck, graphs used twice, second derivatives, gradients of other arguments."""

import copy
import threading

import pytest
import torch

from retinanet_ext import reference, sigmoid_focal_loss

FORWARD = torch.ops.retinanet_ext.sigmoid_focal_loss
DOUBLE_BACKWARD = "sigmoid_focal_loss: second derivatives are not implemented"
RAW = (None, None, 0.25, 2.0, 0.0, -2)  # weight, class_alpha, alpha, gamma, label_smoothing, ignore_index

OPTIONS = [
    {},
    {"gamma": 0.0},
    {"gamma": 0.5, "alpha": -1},
    {"gamma": 1.5},
    {"alpha": torch.tensor([0.2, 0.9, -1.0, 0.5], dtype=torch.float64)},
]
INDEX_OPTIONS = [
    {"label_smoothing": 0.1},
    {"weight": torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64), "gamma": 3.0},
    {"ignore_index": 1},
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS + INDEX_OPTIONS, ids=str)
def test_gradcheck(options, reduction):
    inputs = (torch.randn(5, 4, dtype=torch.float64) * 2).requires_grad_()
    indices = torch.tensor([0, 3, -1, -2, 4])
    soft = torch.rand(5, 4, dtype=torch.float64)
    for targets in (indices,) if options in INDEX_OPTIONS else (indices, soft):
        assert torch.autograd.gradcheck(
            lambda x, t=targets: sigmoid_focal_loss(x, t, reduction=reduction, **options), (inputs,)
        )
    transposed = (torch.randn(4, 5, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x.t(), indices, reduction=reduction, **options), (transposed,)
    )


@pytest.mark.parametrize("case", ["indices", "weighted", "soft", "soft transposed", "half", "float32 loss", "by class"])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck_of_the_raw_operators(case, reduction):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports it")
    options = {"weight": None, "class_alpha": None, "label_smoothing": 0.0}
    inputs = torch.randn(6, 5, dtype=torch.bfloat16 if case in ("half", "float32 loss") else torch.float32)
    targets = torch.tensor([0, 4, -1, -2, 5, 2])
    if case.startswith("soft"):
        inputs, targets = (torch.randn(5, 6).t() for _ in range(2)) if "transposed" in case else (inputs, inputs)
        targets = targets.sigmoid()
    elif case == "weighted":
        options |= {"weight": torch.rand(5), "label_smoothing": 0.1}
    elif case == "by class":
        options["class_alpha"] = torch.rand(5)
    arguments = (
        options["weight"],
        options["class_alpha"],
        0.25,
        1.5,
        options["label_smoothing"],
        -2,
        reduction,
    )
    wide = case == "float32 loss"
    torch.library.opcheck(FORWARD, (inputs.detach().requires_grad_(), targets, *arguments, wide))
    loss = FORWARD(inputs, targets, *arguments, wide)
    torch.library.opcheck(
        torch.ops.retinanet_ext.sigmoid_focal_loss_backward,
        (torch.ones_like(loss), inputs, targets, *arguments),
    )


def test_the_raw_operator_has_the_wrappers_gradient():
    inputs, targets = torch.randn(9, 4, requires_grad=True), torch.randint(-2, 5, (9,))
    for number, reduction in enumerate(("none", "mean", "sum")):
        raw = FORWARD(inputs, targets, *RAW, number, False)
        loss = sigmoid_focal_loss(inputs, targets, reduction=reduction)
        assert torch.equal(raw, loss)
        results = [torch.autograd.grad(value.sum(), inputs)[0] for value in (raw, loss)]
        assert torch.equal(*results)


@pytest.mark.parametrize("name", ["targets", "weight", "class_alpha"])
def test_the_raw_operator_refuses_gradients_it_lacks(name):
    inputs = torch.randn(3, 4, requires_grad=True)
    by_class = torch.rand(4, requires_grad=True)
    targets = torch.rand(3, 4, requires_grad=True) if name == "targets" else torch.tensor([0, -1, 3])
    weight, class_alpha = (by_class if name == option else None for option in ("weight", "class_alpha"))
    loss = FORWARD(inputs, targets, weight, class_alpha, 0.25, 2.0, 0.0, -2, 2, False)
    with pytest.raises(RuntimeError, match=f"no gradient for {name}"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_double_backward_says_so(reduction, soft):
    inputs = torch.randn(5, 4, requires_grad=True)
    targets = torch.rand(5, 4) if soft else torch.randint(-1, 4, (5,))
    raw = FORWARD(inputs, targets, *RAW, {"none": 0, "sum": 2}[reduction], False)
    for loss in (sigmoid_focal_loss(inputs, targets, reduction=reduction), raw):
        (gradient,) = torch.autograd.grad(loss.square().sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
            gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
        torch.func.grad(
            lambda x: torch.func.grad(lambda y: sigmoid_focal_loss(y, targets, reduction="sum"))(x).square().sum()
        )(inputs.detach())


def test_first_derivatives_with_create_graph():
    """A graph kept for other parts of the model does not disturb the first derivative."""
    inputs, targets = torch.randn(5, 4, requires_grad=True), torch.randint(-1, 4, (5,))
    loss = sigmoid_focal_loss(inputs, targets, reduction="sum")
    (plain,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    (graphed,) = torch.autograd.grad(loss, inputs, create_graph=True)
    assert graphed.requires_grad
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_retained_graph_gives_the_same_gradient_twice(reduction, dtype):
    inputs, targets = torch.randn(50, 7, dtype=dtype, requires_grad=True), torch.randint(-2, 7, (50,))
    loss = sigmoid_focal_loss(inputs, targets, reduction=reduction).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)[0]
    scaled = torch.autograd.grad(loss, inputs, torch.tensor(2.0, dtype=loss.dtype), retain_graph=True)[0]
    first_copy = first.clone()
    again = torch.autograd.grad(loss, inputs)[0]
    assert torch.equal(first, first_copy)
    assert torch.equal(again, first)
    assert torch.equal(scaled, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_gradients_accumulate_over_several_losses():
    inputs, targets = torch.randn(5, 4, requires_grad=True), torch.randint(-1, 4, (5,))
    (single,) = torch.autograd.grad(sigmoid_focal_loss(inputs, targets, reduction="sum"), inputs)
    for _ in range(3):
        sigmoid_focal_loss(inputs, targets, reduction="sum").backward()
    torch.testing.assert_close(inputs.grad, 3 * single, rtol=1e-6, atol=0)


def test_writing_to_a_saved_tensor_is_caught():
    for position in (0, 1):
        x, targets = torch.randn(5, 4, requires_grad=True), torch.randint(-1, 4, (5,))
        inputs = x * 1
        loss = sigmoid_focal_loss(inputs, targets, reduction="sum")
        (inputs, targets)[position].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_no_argument_is_written_to():
    inputs, targets = torch.randn(5, 4), torch.randint(-2, 4, (5,))
    weight, alpha = torch.rand(4), torch.tensor([0.5, -1, 0.2, 1.0])
    before = copy.deepcopy((inputs, targets, weight, alpha))
    leaf = inputs.requires_grad_()
    sigmoid_focal_loss(leaf, targets, alpha, weight=weight, label_smoothing=0.1).sum().backward()
    for now, then in zip((inputs.detach(), targets, weight, alpha), before, strict=True):
        assert torch.equal(now, then)


def test_only_inputs_that_require_a_gradient_make_a_graph():
    inputs, targets = torch.randn(5, 4), torch.randint(-1, 4, (5,))
    assert not sigmoid_focal_loss(inputs, targets).requires_grad
    with torch.no_grad():
        assert not sigmoid_focal_loss(inputs.requires_grad_(), targets).requires_grad
    with torch.inference_mode():
        assert not sigmoid_focal_loss(inputs, targets).requires_grad


def test_saved_tensor_hooks_and_checkpointing():
    inputs, targets = torch.randn(5, 4, requires_grad=True), torch.randint(-1, 4, (5,))
    (expected,) = torch.autograd.grad(sigmoid_focal_loss(inputs, targets, reduction="sum"), inputs)
    with torch.autograd.graph.save_on_cpu():
        loss = sigmoid_focal_loss(inputs, targets, reduction="sum")
    assert torch.equal(torch.autograd.grad(loss, inputs)[0], expected)
    loss = torch.utils.checkpoint.checkpoint(
        lambda x: sigmoid_focal_loss(x, targets, reduction="sum"), inputs, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(loss, inputs)[0], expected)


def test_calls_from_several_python_threads():
    inputs, targets = torch.randn(400, 80, requires_grad=True), torch.randint(-1, 80, (400,))
    (expected,) = torch.autograd.grad(sigmoid_focal_loss(inputs, targets, reduction="sum"), inputs)
    results = []

    def work():
        loss = sigmoid_focal_loss(inputs, targets, reduction="sum")
        results.append(torch.autograd.grad(loss, inputs)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["targets", "weight", "alpha"])
def test_arguments_that_require_a_gradient_get_the_references(name, reduction):
    inputs = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    other = torch.rand(9, 4) if name == "targets" else torch.rand(4)
    other = other.double().requires_grad_()
    targets = other if name == "targets" else torch.randint(-2, 5, (9,))
    options = {} if name == "targets" else {name: other}

    def call(function):
        loss = function(inputs, targets, gamma=1.5, reduction=reduction, **options)
        return loss, *torch.autograd.grad(loss.sum(), (inputs, other))

    for result, expected in zip(call(sigmoid_focal_loss), call(reference.sigmoid_focal_loss), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(
        lambda x, o: sigmoid_focal_loss(
            x,
            o if name == "targets" else targets,
            gamma=1.5,
            reduction=reduction,
            **({} if name == "targets" else {name: o}),
        ),
        (inputs, other),
    )
    (through_func,) = torch.func.grad(
        lambda o: sigmoid_focal_loss(
            inputs.detach(),
            o if name == "targets" else targets,
            gamma=1.5,
            reduction=reduction,
            **({} if name == "targets" else {name: o}),
        ).sum(),
        argnums=(0,),
    )(other.detach())
    torch.testing.assert_close(through_func, call(reference.sigmoid_focal_loss)[2], rtol=1e-12, atol=1e-15)
    with torch.no_grad():  # nothing to differentiate: the kernel, with the same value
        loss = sigmoid_focal_loss(inputs, targets, gamma=1.5, reduction=reduction, **options)
    torch.testing.assert_close(loss, call(reference.sigmoid_focal_loss)[0].detach(), rtol=1e-12, atol=0)


def test_float16_gradients_under_a_loss_scale():
    """Where the gradient of the unscaled loss would be subnormal in float16, that of the scaled loss has its digits."""
    inputs = torch.linspace(-5, -3, 64, dtype=torch.float16).reshape(8, 8).requires_grad_()
    targets = torch.full((8,), -1)
    (gradient,) = torch.autograd.grad(65536 * sigmoid_focal_loss(inputs, targets, reduction="mean"), inputs)
    wide = inputs.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(65536 * sigmoid_focal_loss(wide, targets, reduction="mean"), wide)
    assert (gradient.abs() > torch.finfo(torch.float16).tiny).all()
    torch.testing.assert_close(gradient.float(), expected, rtol=2**-11 + 1e-6, atol=0)
