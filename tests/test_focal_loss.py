"""Values of sigmoid_focal_loss on the CPU: loss and gradient against the stable form in float64."""

import itertools
import math

import pytest
import torch

from retinanet_ext import reference, sigmoid_focal_loss

GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
ALPHAS = (0.25, -1, 0, 1)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def spread_logits(rows, classes, dtype=torch.float32, seed=0):
    """Logits over [-100, 100], dense near zero, in random order."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * classes
    wide = torch.linspace(-100, 100, count - count // 2, dtype=torch.float64)
    near = torch.randn(count // 2, generator=generator, dtype=torch.float64) * 4
    values = torch.cat([wide, near])[torch.randperm(count, generator=generator)]
    return values.reshape(rows, classes).to(dtype)


def class_targets(rows, classes, dtype=torch.int64, seed=0):
    """Every kind of row: classes, -1, the label K, beyond K, ignored."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, classes, (rows,), generator=generator)
    others = torch.tensor([-1, classes, classes + 5, -2, -1, -7])
    values[::2] = others[torch.randint(0, len(others), (len(values[::2]),), generator=generator)]
    return values.to(dtype)


def loss_and_gradient(function, inputs, targets, grad=None, **options):
    """The elementwise loss, and the gradient for an upstream gradient of ones or ``grad``."""
    inputs = inputs.detach().requires_grad_()
    loss = function(inputs, targets, **options)
    (gradient,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if grad is None else grad)
    return loss.detach(), gradient


def exact(inputs, targets, **options):
    """The float64 reference at the very numbers that ``inputs`` holds."""
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    targets = targets.double() if targets.is_floating_point() else targets
    return loss_and_gradient(reference.sigmoid_focal_loss, inputs.double(), targets, **options)


def assert_relative(result, expected, bound=2e-5, size=None):
    """Within ``bound`` of ``expected``, or of ``size``, what the terms of a sum that cancels add up to."""
    size = expected.abs() if size is None else size
    assert torch.isfinite(result).all()
    kept = size >= 1e-30
    assert kept.any()
    assert ((result.double() - expected).abs()[kept] / size[kept]).max() <= bound
    assert (result[~kept].abs() <= 1.1e-30).all()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_class_indices(gamma, alpha):
    inputs, targets = spread_logits(400, 13), class_targets(400, 13)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, alpha=alpha, gamma=gamma)
    expected_loss, expected_gradient = exact(inputs, targets, alpha=alpha, gamma=gamma)
    assert_relative(loss, expected_loss)
    assert_relative(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_ends_of_the_indices_type_are_background(dtype):
    limits = torch.iinfo(dtype)
    inputs = spread_logits(5, 13)
    targets = torch.tensor([limits.min, limits.max, 3, limits.max - 1, -1], dtype=dtype)
    background = torch.tensor([-1, 13, 3, 13, -1], dtype=dtype)
    results = loss_and_gradient(sigmoid_focal_loss, inputs, targets)
    for result, expected in zip(results, loss_and_gradient(sigmoid_focal_loss, inputs, background), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_hard_floating_targets_equal_class_indices(gamma, alpha):
    inputs, targets = spread_logits(200, 13), class_targets(200, 13).clamp(-1, 13)
    one_hot = (targets.unsqueeze(1) == torch.arange(13)).float()
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, one_hot, alpha=alpha, gamma=gamma)
    expected_loss, expected_gradient = exact(inputs, targets, alpha=alpha, gamma=gamma)
    assert_relative(loss, expected_loss)
    assert_relative(gradient, expected_gradient)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_soft_targets(gamma, alpha):
    inputs = spread_logits(200, 13)
    targets = torch.rand(200, 13, generator=torch.Generator().manual_seed(1))
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, alpha=alpha, gamma=gamma)
    expected_loss, expected_gradient = exact(inputs, targets, alpha=alpha, gamma=gamma)
    assert_relative(loss, expected_loss)
    # The gradient is a difference that crosses zero: judged by the two parts' magnitudes, each at most
    # (1 + γ) a (1 + |x|) m^γ, since p q / m ≤ 1 and the cross-entropy is at most |x| + ln 2.
    x, t = inputs.double(), targets.double()
    miss = torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t
    a = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1
    ce = (1 - t) * -torch.nn.functional.logsigmoid(-x) + t * -torch.nn.functional.logsigmoid(x)
    pq = torch.sigmoid(x) * torch.sigmoid(-x)
    size = (
        a
        * miss**gamma
        * (gamma * pq / miss * (1 - 2 * t).abs() * ce + torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t)
    )
    assert_relative(gradient, expected_gradient, size=size)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("soft", [False, True])
def test_alpha_by_class(gamma, soft):
    """An element below 0 turns balancing off for its column."""
    inputs = spread_logits(200, 5)
    alpha = torch.tensor([0.0, 1.0, 0.25, -1.0, 0.7])
    targets = torch.randint(0, 2, (200, 5)).float() if soft else class_targets(200, 5)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, alpha=alpha, gamma=gamma)
    expected_loss, expected_gradient = exact(inputs, targets, alpha=alpha, gamma=gamma)
    assert_relative(loss, expected_loss)
    assert_relative(gradient, expected_gradient)
    for column, value in enumerate(alpha.tolist()):
        target = targets[:, column : column + 1] if soft else torch.where(targets == column, 0, -1)
        alone = sigmoid_focal_loss(inputs[:, column : column + 1], target, value, gamma)[:, 0]
        kept = torch.ones(200, dtype=torch.bool) if soft else targets != -2
        torch.testing.assert_close(loss[kept, column], alone[kept], rtol=4e-5, atol=1e-30)  # 2e-5 each


def test_alpha_by_class_takes_soft_targets():
    inputs, targets, alpha = spread_logits(70, 9), torch.rand(70, 9), torch.rand(9)
    alpha[4] = -1
    expected, _ = exact(inputs, targets, alpha=alpha, gamma=1.5)
    assert_relative(sigmoid_focal_loss(inputs, targets, alpha, 1.5), expected)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 2.5])
@pytest.mark.parametrize("alpha", [0.25, -1, torch.tensor([0.1, 0.9, 0.5, -1.0, 0.3, 0.2, 1.0])], ids=str)
def test_weight_is_the_rows_target_class(gamma, alpha):
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 8.0])
    inputs, targets = spread_logits(300, 7), class_targets(300, 7)
    options = {"weight": weight, "alpha": alpha, "gamma": gamma}
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, **options)
    expected_loss, expected_gradient = exact(inputs, targets, **options)
    assert_relative(loss, expected_loss)
    assert_relative(gradient, expected_gradient)
    plain = sigmoid_focal_loss(inputs, targets, alpha, gamma)
    background = (targets < 0) | (targets >= 7)
    factor = torch.where(background, 1.0, weight[targets.clamp(0, 6)])
    torch.testing.assert_close(loss, plain * factor.unsqueeze(1), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("smoothing", [0.01, 0.1, 1.0])
def test_label_smoothing(gamma, smoothing):
    inputs, targets = spread_logits(300, 7), class_targets(300, 7)
    weight = torch.linspace(0.5, 2, 7)
    options = {"alpha": 0.25, "gamma": gamma, "label_smoothing": smoothing, "weight": weight}
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, **options)
    expected_loss, expected_gradient = exact(inputs, targets, **options)
    assert_relative(loss, expected_loss)
    # a σ^γ (γ q (softplus - h z) + p - h) crosses zero: judged by the sum of its terms' magnitudes.
    positive = targets.unsqueeze(1) == torch.arange(7)
    z = torch.where(positive, -inputs, inputs).double()
    p, q, h = torch.sigmoid(z), torch.sigmoid(-z), smoothing / 2
    row = torch.where((targets >= 0) & (targets < 7), weight.double()[targets.clamp(0, 6)], 1.0)
    a = torch.where(positive, 0.25, 0.75) * row.unsqueeze(1)
    terms = gamma * q * (-torch.nn.functional.logsigmoid(-z) + h * z.abs()) + p + h
    size = (a * p**gamma * terms).masked_fill((targets == -2).unsqueeze(1), 0)
    assert_relative(gradient, expected_gradient, size=size)


def test_label_smoothing_smooths_the_cross_entropy_alone():
    """apex: the modulation and alpha keep the hard label; so does a target of s/2 with the hard label's factor."""
    inputs, targets = torch.randn(50, 4), torch.randint(-1, 4, (50,))
    s, positive = 0.2, targets.unsqueeze(1) == torch.arange(4)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        inputs, positive * (1 - s) + s / 2, reduction="none"
    )
    p = torch.sigmoid(inputs)
    factor = torch.where(positive, 0.25 * (1 - p) ** 1.5, 0.75 * p**1.5)
    loss = sigmoid_focal_loss(inputs, targets, 0.25, 1.5, label_smoothing=s)
    torch.testing.assert_close(loss, factor * cross_entropy, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("ignore_index", [-2, -1, 3, 9, 200])
def test_every_value_of_the_targets(dtype, ignore_index):
    classes = 9
    values = [0, 3, 8, 9, 14, 100, 127, 200 if dtype == torch.uint8 else 0]
    values += [] if dtype == torch.uint8 else [-1, -2, -7, -128]
    values += [2**31 - 1, -(2**31)] if dtype in (torch.int32, torch.int64) else []
    values += [2**32, 2**32 + 3, -(2**32) + 3, 2**62] if dtype == torch.int64 else []
    targets = torch.tensor(values, dtype=dtype)
    inputs = torch.randn(len(values), classes)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, ignore_index=ignore_index)
    for row, value in enumerate(values):
        if value == ignore_index:
            expected_loss = expected_gradient = torch.zeros(classes)
        else:
            one_hot = (torch.arange(classes) == value).float()
            expected_loss, expected_gradient = exact(inputs[row], one_hot)
        torch.testing.assert_close(loss[row].double(), expected_loss.double(), rtol=2e-5, atol=0)
        torch.testing.assert_close(gradient[row].double(), expected_gradient.double(), rtol=2e-5, atol=0)


def test_ignored_rows_hide_anything():
    """Zero loss and gradient whatever the logits and the upstream gradient are, in loss, sum and mean."""
    inputs = torch.randn(6, 5)
    targets = torch.tensor([0, -2, -1, -2, 4, -2])
    for index, poison in ((1, math.nan), (3, math.inf), (5, -math.inf)):
        inputs[index] = poison
    grad = torch.ones(6, 5)
    grad[1::2] = math.nan
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, grad)
    kept = torch.tensor([0, 2, 4])
    expected, expected_gradient = exact(inputs[kept], targets[kept])
    for result, truth in ((loss, expected), (gradient, expected_gradient)):
        assert (result[1::2] == 0).all()
        assert_relative(result[kept], truth)
    for reduction, divisor in (("sum", 1), ("mean", 15)):
        value, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, reduction=reduction)
        torch.testing.assert_close(value.double(), expected.sum() / divisor, rtol=1e-6, atol=0)
        assert (gradient[1::2] == 0).all()
        torch.testing.assert_close(gradient[kept].double(), expected_gradient / divisor, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["indices", "soft", "soft in float32"])
def test_reductions_and_their_dtypes(dtype, form):
    inputs = spread_logits(150, 11, dtype).clamp(-20, 20)
    if form == "indices":
        targets, count = class_targets(150, 11), int((class_targets(150, 11) != -2).sum()) * 11
    else:
        targets, count = torch.rand(150, 11).to(dtype if form == "soft" else torch.float32), 150 * 11
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected, _ = exact(inputs, targets)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets)
    assert loss.dtype == gradient.dtype == dtype
    wide_targets = targets.to(wide) if targets.is_floating_point() else targets
    _, elementwise = loss_and_gradient(sigmoid_focal_loss, inputs.to(wide), wide_targets)
    for reduction, divisor in (("sum", 1), ("mean", count)):
        value, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, reduction=reduction)
        assert value.dtype == wide
        assert gradient.dtype == dtype
        assert value.shape == ()
        torch.testing.assert_close(value.double(), expected.sum() / divisor, rtol=1e-6, atol=0)
        # The factor's rounding and the product's, and one to the dtype: half a step of its smallest where subnormal.
        info = torch.finfo(dtype)
        rtol, atol = 4 * torch.finfo(wide).eps + info.eps / 2, info.tiny * info.eps
        torch.testing.assert_close(gradient.to(wide), elementwise / divisor, rtol=rtol, atol=atol)


def test_sums_do_not_drift():
    """2.5 million equal losses: a running float32 sum would be off in the third digit, this one in the seventh."""
    inputs, targets = torch.full((31_250, 80), 0.1), torch.full((31_250,), -1)
    one = sigmoid_focal_loss(inputs[:1, :1], targets[:1]).double().item()
    value = sigmoid_focal_loss(inputs, targets, reduction="sum").double().item()
    assert value == pytest.approx(one * 2_500_000, rel=2e-7)
    value = sigmoid_focal_loss(inputs.bfloat16(), targets, reduction="mean").double().item()
    rounded = sigmoid_focal_loss(inputs[:1, :1].bfloat16().float(), targets[:1]).item()
    assert value == pytest.approx(rounded, rel=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_no_elements_is_nan_and_has_zero_gradient(dtype):
    for inputs, targets in (
        (torch.randn(3, 4, dtype=dtype), torch.full((3,), -2)),
        (torch.randn(0, 4, dtype=dtype), torch.zeros(0, dtype=torch.int64)),
        (torch.randn(3, 0, dtype=dtype), torch.full((3,), -1)),
        (torch.randn(0, 4, dtype=dtype), torch.randn(0, 4)),
    ):
        value, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, reduction="mean")
        assert value.isnan()
        assert (gradient == 0).all()
        value, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, reduction="sum")
        assert value == 0
        assert (gradient == 0).all()
        assert gradient.shape == inputs.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["indices", "soft", "soft in float32", "smoothed"])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_half_results_are_the_float32_results_rounded_once(dtype, form, gamma):
    inputs = spread_logits(128, 40, dtype, seed=3)
    options = {"gamma": gamma, "label_smoothing": 0.1 if form == "smoothed" else 0.0}
    targets = class_targets(128, 40)
    if form.startswith("soft"):
        targets = torch.rand(128, 40)
        targets = targets.to(dtype) if form == "soft" else targets
    wide_targets = targets.float() if targets.is_floating_point() else targets
    grad = torch.randn(128, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets, grad, **options)
    wide = loss_and_gradient(sigmoid_focal_loss, inputs.float(), wide_targets, grad.float(), **options)
    assert torch.equal(loss, wide[0].to(dtype))
    assert torch.equal(gradient, wide[1].to(dtype))


@pytest.mark.parametrize(
    ("inputs", "targets"), list(itertools.product(DTYPES, DTYPES)), ids=lambda dtype: str(dtype).split(".")[1]
)
def test_mixed_dtypes_lose_nothing_of_the_targets(inputs, targets):
    x, t = torch.randn(30, 6).to(inputs), torch.rand(30, 6).to(targets)
    loss, gradient = loss_and_gradient(sigmoid_focal_loss, x, t)
    assert loss.dtype == gradient.dtype == inputs
    compute = torch.float64 if inputs == torch.float64 else torch.float32
    expected, expected_gradient = exact(x, t.to(compute))
    tolerance = {
        "rtol": (2e-5 if compute == torch.float32 else 1e-12) + torch.finfo(inputs).eps / 2,
        "atol": 1e-7,
    }
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


def test_float64_keeps_float64():
    inputs, targets = spread_logits(200, 9, torch.float64), class_targets(200, 9)
    for options in (
        {},
        {"gamma": 1.5},
        {"label_smoothing": 0.1},
        {"alpha": torch.linspace(0, 1, 9).double()},
    ):
        loss, _ = loss_and_gradient(sigmoid_focal_loss, inputs, targets, **options)
        expected, _ = exact(inputs, targets, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("gamma", [0, 1.5, 2, 3])
@pytest.mark.parametrize("alpha", [-1, 0.25])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torchvision_parity(gamma, alpha, reduction):
    """A drop-in where torchvision's own 1 - (1 - p) has its digits, |x| <= 15; the comparison is in float64."""
    ops = pytest.importorskip("torchvision.ops", reason="torchvision's own loss is compared with")
    inputs = torch.empty(100, 20, dtype=torch.float64).uniform_(-15, 15)
    for targets in (torch.rand(100, 20).double(), torch.randint(0, 2, (100, 20)).double()):
        loss, gradient = loss_and_gradient(
            sigmoid_focal_loss, inputs, targets, alpha=alpha, gamma=gamma, reduction=reduction
        )
        theirs, their_gradient = loss_and_gradient(
            ops.sigmoid_focal_loss, inputs, targets, alpha=alpha, gamma=gamma, reduction=reduction
        )
        # 1 - p_t cancels to e^-15 at worst: 1e-16 / 3e-7.
        torch.testing.assert_close(loss, theirs, rtol=1e-8, atol=1e-20)
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-8, atol=1e-17)
