"""Ring 1: the mathematics that the CPU and CUDA kernels share, as C++ functions over NumPy arrays.

Built by conftest with the flags of the CPU kernels, run under every instruction set they dispatch to, and compared
with float64 (dense grids) and mpmath (the float64 forms and the reference itself). One ulp is 2^-23 here.
"""

import math

import mpmath
import numpy as np
import pytest
import torch

from retinanet_ext import reference

ULP = 2.0**-23
GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
GRID = np.concatenate([np.linspace(-100, 100, 100_001), np.linspace(-2, 2, 20_001)]).astype(np.float32)
# Logits that a float holds and whose exponentials it does not, and where the kernels change form.
EXTREME = np.float32(
    [3e38, 3.4e38, 1e30, 1e10, 1e5, 1e4, 800, 700, 104, 88.8, 87.3, 86, 21.49, 21.48, 16.7, 1e-20, 1e-40, 0]
)
EXTREME = np.concatenate([EXTREME, -EXTREME])


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, focal_math):
    if not focal_math.supported(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def relative_error(result, expected, floor=0.0):
    kept = np.abs(expected) > floor
    assert kept.any()
    return (np.abs(result.astype(np.float64) - expected)[kept] / np.abs(expected[kept])).max()


def sigmoid_power(z, gamma):
    """σ(z)^γ in float64, without forming 1 - σ."""
    return np.exp(-gamma * np.logaddexp(0, -z))


def softplus(z):
    return np.logaddexp(0, z)


def hard_terms(z, gamma, h=0.0):
    """Loss and the positive and negative parts of the gradient, α = 1: gradient = gain - loss_of_smoothing."""
    power, q, p = sigmoid_power(z, gamma), sigmoid_power(-z, 1), sigmoid_power(z, 1)
    loss = power * (softplus(z) - h * z)
    plus = power * (gamma * q * (softplus(z) + h * np.maximum(-z, 0)) + p)
    minus = power * (gamma * q * h * np.maximum(z, 0) + h)
    return loss, plus, minus


def rounding_bound(z, gamma):
    """t = z log2(e) carries two roundings, γ log2(p) one more; an error of the exponent is relative in 2^exponent.

    Each of the γ factors of the power repeats what σ's own roundings left, and 8 ulp cover the rest.
    """
    reach = np.where(z > 0, np.minimum(z, 22.0), -z)  # above z = 22 e^-z is below half an ulp of 1
    return (1.5 * (gamma + 1) * reach + 2 * gamma + 8) * ULP


def test_exp2_is_within_one_ulp(focal_math, isa):
    t = np.concatenate([np.linspace(-126, 127, 500_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    assert relative_error(focal_math.float32.exp2(t, isa), np.exp2(t.astype(np.float64))) <= ULP
    whole = np.arange(-126, 128).astype(np.float32)
    np.testing.assert_array_equal(focal_math.float32.exp2(whole, isa), np.exp2(whole.astype(np.float64)))


def test_exp2_below_the_normal_numbers_vanishes(focal_math, isa):
    t = np.float32([-126.75, -127, -127.5, -128, -150, -1000, -1e38, -np.inf])
    assert (focal_math.float32.exp2(t, isa) == 0).all()
    near = np.linspace(-126.49, -126.01, 49).astype(np.float32)
    assert (np.abs(focal_math.float32.exp2(near, isa) - np.exp2(near.astype(np.float64))) <= 2.0**-149).all()


def test_exp2_decay_is_within_two_ulp(focal_math, isa):
    m = np.concatenate([np.linspace(0, 126, 500_001), np.linspace(0, 2, 100_001)]).astype(np.float32)
    assert relative_error(focal_math.float32.exp2_decay(m, isa), np.exp2(-m.astype(np.float64))) <= 2 * ULP
    whole = np.arange(127).astype(np.float32)
    np.testing.assert_array_equal(focal_math.float32.exp2_decay(whole, isa), np.exp2(-whole.astype(np.float64)))


def test_exp2_decay_below_the_normal_numbers_vanishes(focal_math, isa):
    beyond = np.float32([127, 127.25, 128, 150, 1000, 1e38, np.inf, np.nan])
    assert (focal_math.float32.exp2_decay(beyond, isa) == 0).all()
    near = np.linspace(126, 127, 1001).astype(np.float32)
    values = focal_math.float32.exp2_decay(near, isa)
    assert values[0] == 2.0**-126
    assert (values >= 0).all()
    assert (np.diff(values) <= 0).all()


def test_log2_keeps_relative_precision_near_one(focal_math, isa):
    everywhere = np.exp2(np.linspace(-126, 127.9, 500_001))
    around_one = np.concatenate([1 + np.linspace(-0.4, 1.1, 300_001), 1 + np.linspace(-1e-5, 1e-5, 2001)])
    d = np.concatenate([everywhere, around_one]).astype(np.float32)
    assert relative_error(focal_math.float32.log2(d, isa), np.log2(d.astype(np.float64))) <= 2 * ULP
    assert focal_math.float32.log2(np.float32([1]), isa)[0] == 0


def test_log1p_of_the_unit_interval_keeps_its_digits_for_small_arguments(focal_math, isa):
    u = np.concatenate([np.exp2(np.linspace(-126, 0, 500_001)), np.linspace(0, 1, 100_001)]).astype(np.float32)
    # The polynomial's own error is 1.9e-7, 1.6 ulp; its evaluation adds the rounding of two products.
    assert relative_error(focal_math.float32.log1p_unit(u, isa), np.log1p(u.astype(np.float64))) <= 3 * ULP
    assert focal_math.float32.log1p_unit(np.float32([0]), isa)[0] == 0


@pytest.mark.parametrize(("degree", "bound"), [(6, 1.3e-6), (7, 1.95e-7)])
def test_both_polynomials_of_the_logarithm(focal_math, isa, degree, bound):
    """The device's and the host's; the stated bound and two roundings of a number near 1."""
    u = np.concatenate([np.exp2(np.linspace(-126, 0, 100_001)), np.linspace(0, 1, 500_001)[1:]]).astype(np.float32)
    expected = np.log1p(u.astype(np.float64)) / u
    ratio = getattr(focal_math, f"log1p_ratio_degree{degree}")(u, isa)
    assert relative_error(ratio, expected) <= bound + 2 * ULP


@pytest.mark.parametrize("gamma", GAMMAS)
def test_hard_loss_and_gradient(focal_math, isa, gamma):
    z = GRID.astype(np.float64)
    loss, gradient, _ = hard_terms(z, gamma)
    forms = [(focal_math.float32.hard_loss(GRID, gamma, isa), focal_math.float32.hard_gradient(GRID, gamma, isa))]
    if gamma == 2:
        forms.append((focal_math.float32.hard_loss_two(GRID, isa), focal_math.float32.hard_gradient_two(GRID, isa)))
    for form in forms:
        for result, expected in zip(form, (loss, gradient), strict=True):
            kept = np.abs(expected) >= 1e-30
            error = np.abs(result - expected)[kept] / np.abs(expected[kept])
            assert (error <= rounding_bound(z, gamma)[kept]).all()
            assert error.max() <= 2e-5  # the product's promise, 1.6 times what the bound comes to
            assert (np.abs(result[~kept]) <= 1.1e-30).all()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothed_loss_and_gradient(focal_math, isa, gamma, smoothing):
    z, h = GRID.astype(np.float64), float(np.float32(smoothing / 2))
    loss, plus, minus = hard_terms(z, gamma, h)
    kept = loss >= 1e-30  # the smoothed cross-entropy is positive everywhere
    error = np.abs(focal_math.float32.smoothed_loss(GRID, gamma, h, isa) - loss)[kept] / loss[kept]
    assert (error <= rounding_bound(z, gamma)[kept]).all()
    # The gradient is a difference that crosses zero: its error is relative to the sum of the two parts.
    kept = plus + minus >= 1e-30
    error = np.abs(focal_math.float32.smoothed_gradient(GRID, gamma, h, isa) - (plus - minus))
    assert (error[kept] <= (rounding_bound(z, gamma) * (plus + minus))[kept]).all()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_soft_loss_and_gradient(focal_math, isa, gamma, target):
    x, t = GRID.astype(np.float64), float(np.float32(target))
    p, q = sigmoid_power(x, 1), sigmoid_power(-x, 1)
    miss, cross_entropy, a = (
        p * (1 - t) + q * t,
        (1 - t) * softplus(x) + t * softplus(-x),
        0.25 * t + 0.75 * (1 - t),
    )
    loss = a * miss**gamma * cross_entropy
    slope = a * gamma * miss**gamma * (p * q / miss) * (1 - 2 * t) * cross_entropy
    plus, minus = a * miss**gamma * p * (1 - t), a * miss**gamma * q * t
    size = np.abs(slope) + plus + minus  # what the gradient, a sum that crosses zero, is rounded relative to
    for two in {False, gamma == 2}:
        result = focal_math.float32.soft_loss(GRID, target, gamma, 0.25, 0.75, two, isa)
        kept = loss >= 1e-30
        assert (np.abs(result - loss)[kept] <= (rounding_bound(-np.abs(x), gamma) * loss)[kept]).all()
        result = focal_math.float32.soft_gradient(GRID, target, gamma, 0.25, 0.75, two, isa)
        kept = size >= 1e-30
        error = np.abs(result - (slope + plus - minus))[kept]
        assert (error <= (rounding_bound(-np.abs(x), gamma) * size)[kept]).all()


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 50.0])
def test_every_finite_logit_gives_finite_and_right_numbers(focal_math, isa, gamma):
    z = EXTREME.astype(np.float64)
    with np.errstate(under="ignore"):
        for h in (0.0, 0.0625, 0.5):
            loss, plus, minus = hard_terms(z, gamma, h)
            if h:
                results = [
                    f(EXTREME, gamma, h, isa)
                    for f in (focal_math.float32.smoothed_loss, focal_math.float32.smoothed_gradient)
                ]
            else:
                results = [
                    f(EXTREME, gamma, isa) for f in (focal_math.float32.hard_loss, focal_math.float32.hard_gradient)
                ]
            # Where γ z is below -100, the power is below 1e-43 and what the float has of it, 0 or nearly, is right.
            bound = (4 * np.minimum(gamma * np.abs(z), 100) + 200) * ULP
            assert (np.abs(results[0] - loss) <= bound * loss + 1e-30).all()
            assert (np.abs(results[1] - (plus - minus)) <= bound * (plus + minus) + 1e-30).all()
        for target in (0.0, 0.4, 1.0):
            for two in {False, gamma == 2}:
                assert np.isfinite(focal_math.float32.soft_loss(EXTREME, target, gamma, 1, 1, two, isa)).all()
                assert np.isfinite(focal_math.float32.soft_gradient(EXTREME, target, gamma, 1, 1, two, isa)).all()


def test_nan_stays_nan_and_masks_are_zero(focal_math, isa):
    nan, mask = np.float32([math.nan]), np.float32([-math.inf])
    for gamma in GAMMAS:
        for f in (focal_math.float32.hard_loss, focal_math.float32.hard_gradient):
            assert np.isnan(f(nan, gamma, isa)).all()
            assert f(mask, gamma, isa)[0] == 0
        for f in (focal_math.float32.smoothed_loss, focal_math.float32.smoothed_gradient):
            assert np.isnan(f(nan, gamma, 0.05, isa)).all()
        for f in (focal_math.float32.soft_loss, focal_math.float32.soft_gradient):
            assert np.isnan(f(nan, 0.5, gamma, 1, 1, False, isa)).all()
            assert np.isnan(f(np.float32([1]), math.nan, gamma, 1, 1, False, isa)).all()
    for f in (focal_math.float32.hard_loss_two, focal_math.float32.hard_gradient_two):
        assert np.isnan(f(nan, isa)).all()
        assert f(mask, isa)[0] == 0


LOGITS = [-690.5, -100, -37.7, -9.25, -1, -0.003, 0, 1e-8, 0.3, 1, 5.5, 21.4, 36.9, 100, 690.5]


def exact_hard(z, gamma, h=0.0):
    """The loss of background at logit ``z``, α = 1, and its derivative, in 60 digits."""
    with mpmath.workdps(60):
        z, gamma, h = mpmath.mpf(z), mpmath.mpf(gamma), mpmath.mpf(h)
        p, q = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
        cross_entropy = mpmath.log1p(mpmath.exp(z)) - h * z
        return p**gamma * cross_entropy, p**gamma * (gamma * q * cross_entropy + p - h)


def exact_soft(x, target, gamma, alpha):
    with mpmath.workdps(60):
        x, t, gamma, alpha = map(mpmath.mpf, (x, target, gamma, alpha))
        p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
        m, a = p * (1 - t) + q * t, alpha * t + (1 - alpha) * (1 - t)
        cross_entropy = -(1 - t) * mpmath.log(q) - t * mpmath.log(p)
        gradient = gamma * m ** (gamma - 1) * p * q * (1 - 2 * t) * cross_entropy + m**gamma * (p * (1 - t) - q * t)
        return a * m**gamma * cross_entropy, a * gradient


def assert_digits(result, expected, z, gamma):
    """float64: the same count of roundings as in ``rounding_bound``, and a few more for the C library's functions."""
    bound = (2 * (gamma + 1) * abs(z) + 32) * 2.0**-52
    assert abs(mpmath.mpf(float(result)) - expected) <= bound * abs(expected) + mpmath.mpf("1e-300"), (
        z,
        gamma,
    )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_float64_forms_against_mpmath(focal_math, gamma):
    double, z = focal_math.float64, np.float64(LOGITS)
    for h in (0.0, 0.125):
        if h:
            losses = double.smoothed_loss(z, gamma, h, "baseline")
            gradients = double.smoothed_gradient(z, gamma, h, "baseline")
        else:
            losses, gradients = (
                double.hard_loss(z, gamma, "baseline"),
                double.hard_gradient(z, gamma, "baseline"),
            )
        for logit, loss, gradient in zip(LOGITS, losses, gradients, strict=True):
            exact_loss, exact_gradient = exact_hard(logit, gamma, h)
            assert_digits(loss, exact_loss, logit, gamma)
            assert_digits(gradient, exact_gradient, logit, gamma)
    for target in (0.0, 0.25, 1.0):
        losses = double.soft_loss(z, target, gamma, 0.25, 0.75, False, "baseline")
        gradients = double.soft_gradient(z, target, gamma, 0.25, 0.75, False, "baseline")
        for logit, loss, gradient in zip(LOGITS, losses, gradients, strict=True):
            exact_loss, exact_gradient = exact_soft(logit, target, gamma, 0.25)
            assert_digits(loss, exact_loss, logit, gamma)
            assert_digits(gradient, exact_gradient, logit, gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_float64_reference_against_mpmath(gamma):
    """The oracle of the operator tests has an oracle too; there within 1e-12, a hundredth of what they need."""

    def reference_of(target, **options):
        logits = torch.tensor(LOGITS, dtype=torch.float64).unsqueeze(1).requires_grad_()
        loss = reference.sigmoid_focal_loss(logits, target, gamma=gamma, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return zip(LOGITS, loss.flatten().tolist(), gradient.flatten().tolist(), strict=True)

    def close(result, expected):
        return abs(mpmath.mpf(result) - expected) <= 1e-12 * abs(expected) + mpmath.mpf("1e-300")

    background = torch.full((len(LOGITS),), -1)
    for smoothing in (0.0, 0.25):
        for logit, loss, gradient in reference_of(background, alpha=-1, label_smoothing=smoothing):
            exact_loss, exact_gradient = exact_hard(logit, gamma, smoothing / 2)
            assert close(loss, exact_loss)
            assert close(gradient, exact_gradient)
        for logit, loss, gradient in reference_of(torch.zeros_like(background), alpha=-1, label_smoothing=smoothing):
            exact_loss, exact_gradient = exact_hard(-logit, gamma, smoothing / 2)
            assert close(loss, exact_loss)
            assert close(gradient, -exact_gradient)
    for target in (0.0, 0.25, 1.0):
        soft = torch.full((len(LOGITS), 1), target, dtype=torch.float64)
        for logit, loss, gradient in reference_of(soft, alpha=0.25):
            exact_loss, exact_gradient = exact_soft(logit, target, gamma, 0.25)
            assert close(loss, exact_loss), (logit, target)
            assert close(gradient, exact_gradient), (logit, target)


HALVES = np.arange(2**16, dtype=np.uint16)


def test_every_float16_becomes_its_float(focal_math, isa):
    result = focal_math.float16_to_float(HALVES, isa)
    expected = HALVES.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(result.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(result[nan]).all()


def test_every_bfloat16_becomes_its_float(focal_math, isa):
    result = focal_math.bfloat16_to_float(HALVES, isa)
    np.testing.assert_array_equal(result.view(np.uint32), HALVES.astype(np.uint32) << 16)


def hard_cases(bits_to_float):
    """Every half, every midpoint between neighbours, the floats next to both, and floats of any bits."""
    values = np.sort(bits_to_float[np.isfinite(bits_to_float)].astype(np.float64))
    with np.errstate(over="ignore"):
        middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    exact = values.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        sides = [np.nextafter(base, np.float32(to)) for base in (exact, middles) for to in (-np.inf, np.inf)]
    any_bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    special = np.float32([0.0, -0.0, 65504, 65519.996, 65520, -65520, 3.4e38, np.inf, -np.inf, np.nan, 2.0**-25])
    quiet_and_signalling = np.uint32([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000]).view(np.float32)
    return np.concatenate([exact, middles, *sides, any_bits, special, quiet_and_signalling])


def test_rounding_to_float16(focal_math, isa):
    values = hard_cases(HALVES.view(np.float16).astype(np.float32))
    result = focal_math.float_to_float16(values, isa)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(result[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(result.view(np.float16)[nan]).all()


def test_rounding_to_bfloat16(focal_math, isa):
    values = hard_cases((HALVES.astype(np.uint32) << 16).view(np.float32))
    result = focal_math.float_to_bfloat16(values, isa)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(result[~nan], expected[~nan])
    assert np.isnan((result[nan].astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_streamed_copies_are_whole_and_write_nothing_beside(focal_math, isa, size):
    """Copies of all lengths up to three cache lines and more, to all places in a line."""
    source = np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8)
    for start in range(0, 64, size):
        for count in range(264 // size):
            result = focal_math.streamed(source, size, start, count, isa)
            expected = np.full(len(result), 0xA5, np.uint8)
            expected[start : start + size * count] = source[: size * count]
            np.testing.assert_array_equal(result, expected)
