"""sigmoid_focal_loss at the edges of its numbers, and the same bits for every thread count, run and position."""

import math

import pytest
import torch
from started_anew import INSTRUCTION_SETS, on_instruction_sets

from retinanet_ext import reference, sigmoid_focal_loss

HUGE = [3e38, 3.4e38, 1e30, 1e5, 800.0, 104.0, 88.8, 22.0, 1e-20, 1e-45, 0.0]


def loss_and_gradient(inputs, targets, grad=None, function=sigmoid_focal_loss, **options):
    inputs = inputs.detach().requires_grad_()
    loss = function(inputs, targets, **options)
    (gradient,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if grad is None else grad)
    return loss.detach(), gradient


def bits(tensor):
    """Bit patterns, so that NaN equals NaN and 0 differs from -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.5, 0.99, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(
    "form", ["background", "positive", "smoothed", "fully smoothed", "soft 0", "soft 0.4", "soft 1"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_finite_logit_gives_finite_and_right_numbers(gamma, form, dtype):
    values = torch.tensor(HUGE + [-x for x in HUGE], dtype=torch.float64)
    inputs = values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).unsqueeze(1)
    options = {"alpha": -1, "gamma": gamma}
    if form.startswith("soft"):
        targets = torch.full_like(inputs, float(form.split()[1]))
    else:
        targets = torch.full((len(inputs),), 0 if form == "positive" else -1)
    if "smoothed" in form:
        options["label_smoothing"] = 1.0 if form.startswith("fully") else 0.125
    loss, gradient = loss_and_gradient(inputs, targets, **options)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    wide_targets = targets.double() if targets.is_floating_point() else targets
    expected = reference.sigmoid_focal_loss(inputs.double(), wide_targets, **options)
    # Below e^-100 float32 may flush. Halves round once more.
    info = torch.finfo(dtype)
    rtol = (2e-5 if info.bits <= 32 else 1e-12) + info.eps / 2
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=info.tiny * info.eps + 1e-30)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("form", ["indices", "smoothed", "by class", "soft"])
def test_nan_spoils_its_own_element_only(gamma, reduction, form):
    inputs = torch.randn(40, 21)
    targets = torch.rand(40, 21) if form == "soft" else torch.randint(-1, 21, (40,))
    options = {"gamma": gamma, "label_smoothing": 0.1 if form == "smoothed" else 0.0}
    if form == "by class":
        options["alpha"] = torch.rand(21)
    loss, gradient = loss_and_gradient(inputs, targets, **options)
    spoiled = torch.zeros(40, 21, dtype=torch.bool)
    spoiled[torch.randint(0, 40, (25,)), torch.randint(0, 21, (25,))] = True
    if form != "soft":
        spoiled[targets == 20, 20] = True  # positives too
    poisoned = inputs.masked_fill(spoiled, math.nan)
    grad = torch.ones(40, 21) if reduction == "none" else torch.tensor(1.0)
    result, result_gradient = loss_and_gradient(poisoned, targets, grad, reduction=reduction, **options)
    assert result_gradient[spoiled].isnan().all()
    assert torch.equal(result_gradient[~spoiled], gradient[~spoiled])
    if reduction == "sum":
        assert result.isnan()
    else:
        assert result[spoiled].isnan().all()
        assert torch.equal(result[~spoiled], loss[~spoiled])


def test_nan_soft_target_spoils_its_own_element_only():
    inputs, targets = torch.randn(9, 30), torch.rand(9, 30)
    loss, gradient = loss_and_gradient(inputs, targets)
    spoiled = torch.rand(9, 30) < 0.1
    result, result_gradient = loss_and_gradient(inputs, targets.masked_fill(spoiled, math.nan))
    assert result[spoiled].isnan().all()
    assert torch.equal(result[~spoiled], loss[~spoiled])
    assert result_gradient[spoiled].isnan().all()
    assert torch.equal(result_gradient[~spoiled], gradient[~spoiled])


def test_a_nan_upstream_gradient_stays_where_it_is():
    inputs, targets = torch.randn(20, 7), torch.randint(-1, 7, (20,))
    grad = torch.ones(20, 7)
    grad[3, 2] = math.nan
    _, gradient = loss_and_gradient(inputs, targets, grad)
    assert gradient.isnan().nonzero().tolist() == [[3, 2]]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_infinite_logits_mask(gamma, dtype):
    """-inf, how detectors mask a class of a background row, and +inf at the positive class: no loss, no gradient."""
    inputs = torch.randn(12, 5).to(dtype)
    targets = torch.tensor([-1, 0, 5] * 4)
    plain = loss_and_gradient(inputs, targets, gamma=gamma)
    masked = inputs.clone()
    masked[:, 3] = -math.inf
    masked[targets == 0, 0] = math.inf
    for result, before in zip(loss_and_gradient(masked, targets, gamma=gamma), plain, strict=True):
        hidden = masked.isinf()
        assert (result[hidden] == 0).all()
        assert torch.equal(result[~hidden], before[~hidden])
    total = sigmoid_focal_loss(masked, targets, gamma=gamma, reduction="sum")
    expected = plain[0].double().masked_fill(hidden, 0).sum()
    torch.testing.assert_close(total.double(), expected, rtol=torch.finfo(dtype).eps * 20, atol=0)
    certain = torch.tensor([[math.inf]])  # the wrong answer with all certainty costs infinitely much
    assert sigmoid_focal_loss(certain, torch.tensor([-1]), gamma=gamma).item() == math.inf
    assert sigmoid_focal_loss(-certain, torch.tensor([0]), gamma=gamma).item() == math.inf


def every_path(inputs, targets, soft):
    """Losses, sums and gradients of all that a call may be: the results whose bits must not change."""
    weight, alpha = torch.linspace(0.5, 2, inputs.shape[1]), torch.linspace(0, 1, inputs.shape[1])
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = inputs.to(dtype)
        for options in (
            {},
            {"gamma": 1.5, "weight": weight},
            {"label_smoothing": 0.1},
            {"alpha": alpha, "reduction": "mean"},
            {"reduction": "sum"},
        ):
            results += loss_and_gradient(x, targets, **options)
        results += loss_and_gradient(x, soft, reduction="sum")
        results += loss_and_gradient(x, soft, gamma=1.5)
    return results


def test_same_bits_for_any_thread_count_and_on_every_run(num_threads):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2003, 37, generator=generator) * 5  # five chunks, the last one short
    targets = torch.randint(-2, 38, (2003,), generator=generator)
    targets[torch.rand(2003, generator=generator) < 0.9] = -1
    soft = torch.rand(2003, 37, generator=generator)
    num_threads(1)
    expected = every_path(inputs, targets, soft)
    for threads in (1, 2, 3):
        num_threads(threads)
        for result, before in zip(every_path(inputs, targets, soft), expected, strict=True):
            assert torch.equal(bits(result), bits(before))


def test_same_bits_wherever_an_element_lies():
    """In a vector, in its remainder, in a long run of background rows or a row of its own."""
    value = torch.tensor(-1.2345)
    for gamma in (1.5, 2.0):
        alone = loss_and_gradient(value.view(1, 1), torch.tensor([-1]), gamma=gamma)
        for rows, classes in ((1, 1001), (1001, 1), (77, 13), (3, 600)):
            many = loss_and_gradient(value.expand(rows, classes), torch.full((rows,), -1), gamma=gamma)
            for result, one in zip(many, alone, strict=True):
                assert (bits(result) == bits(one)).all()


def losses_and_gradients():
    inputs = (torch.randn(301, 37) * 20).requires_grad_()
    targets = torch.randint(-2, 38, (301,))
    results = []
    for x, t, options in (
        (inputs, targets, {}),
        (inputs, targets, {"gamma": 1.5}),
        (inputs, targets, {"label_smoothing": 0.1}),
        (inputs, targets, {"reduction": "sum"}),
        (inputs, torch.rand(301, 37), {"gamma": 0.5}),
        (inputs.bfloat16(), targets, {}),
        (inputs.half(), targets, {"alpha": torch.rand(37)}),
    ):
        loss = sigmoid_focal_loss(x, t, **options)
        results += [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]
    return results


def test_every_instruction_set_agrees(tmp_path, monkeypatch):
    monkeypatch.delenv("RETINANET_EXT_CPU_ISA", raising=False)
    results = on_instruction_sets(losses_and_gradients, tmp_path, (*INSTRUCTION_SETS, "nonsense"))
    results["default"] = losses_and_gradients()
    for isa, tensors in results.items():
        for result, expected in zip(tensors, results["baseline"], strict=True):
            # Each is within 2e-5 of the truth; fused multiply-adds tell them apart, and halves may round otherwise.
            half = result.dtype in (torch.float16, torch.bfloat16)
            rtol = torch.finfo(result.dtype).eps if half else 4e-5
            torch.testing.assert_close(result, expected, rtol=rtol, atol=1e-6, msg=lambda m, isa=isa: f"{isa}: {m}")
    for result, expected in zip(results["nonsense"], results["default"], strict=True):
        assert torch.equal(bits(result), bits(expected))
