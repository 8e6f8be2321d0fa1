"""The focal loss's CUDA kernels, run by the emulator: the real kernel code, in several orders of its threads.

RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under AddressSanitizer and
UndefinedBehaviorSanitizer: see docs/testing.md.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import retinanet_ext
from retinanet_ext import reference

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# All legal on a GPU; a result that differs between two of them depends on the order of threads.
SCHEDULES = [
    {"order": "forward"},
    {"order": "backward", "live_blocks": 2},
    {"order": "random", "seed": 1, "live_blocks": 3},
    {"order": "random", "seed": 2},
]
SANITIZED = pytest.mark.skipif(
    os.environ.get("RETINANET_EXT_SANITIZE") != "1", reason="needs RETINANET_EXT_SANITIZE=1 (docs/testing.md)"
)


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_focal_loss_emulator")


def storage(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory: halves as their bit patterns, which NumPy can hold."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def restore(array: np.ndarray, dtype: torch.dtype, shape) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return (tensor.view(dtype) if tensor.dtype == torch.uint16 else tensor).view(shape)


def case(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and class indices with every kind of row: background, positive, ignored, out of range."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 4 - 1).to(dtype)
    targets = torch.full((rows,), -1)
    targets[::19] = torch.randint(0, classes, (len(targets[::19]),), generator=generator)
    targets[7::53] = -2
    targets[11::61] = classes + 3
    return logits, targets


def run_all(emulator, logits, targets, *, soft=False, schedule=None, **options) -> tuple:
    """Everything the task makes."""
    name = next(name for name, dtype in DTYPES.items() if dtype == logits.dtype)
    return emulator.focal_loss(
        name, storage(logits), storage(targets), logits.shape[-1], soft=soft, **(schedule or {}), **options
    )


def run(emulator, logits, targets, **options) -> np.ndarray:
    """The one array that the task makes."""
    (result,) = run_all(emulator, logits, targets, **options)
    return result


def assert_same_in_every_order(emulator, *args, **options) -> np.ndarray:
    first, *others = (run(emulator, *args, schedule=schedule, **options) for schedule in SCHEDULES)
    for schedule, other in zip(SCHEDULES[1:], others, strict=True):
        np.testing.assert_array_equal(first.view(np.uint8), other.view(np.uint8), err_msg=str(schedule))
    return first


def float64_gradient(logits, targets, **options) -> torch.Tensor:
    x = logits.detach().clone().double().requires_grad_()
    reference.sigmoid_focal_loss(x, targets, reduction="sum", **options).backward()
    return x.grad


def relative_error(dtype: torch.dtype) -> float:
    """The operator's, and for halves half a unit in the last place on top."""
    return {64: 1e-12, 32: 2e-5, 16: 2e-5 + torch.finfo(dtype).eps / 2}[torch.finfo(dtype).bits]


def sum_error(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 2e-6


def computed(dtype: torch.dtype) -> torch.dtype:
    """What elements of a dtype are computed in, and the widest that an upstream gradient or a soft target may be."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ones(logits: torch.Tensor) -> np.ndarray:
    """The upstream gradient 1."""
    return storage(torch.ones(1, dtype=computed(logits.dtype)))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # Below the smallest normal number of a half, its steps are of fixed size.
    absolute = max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, 1e-30)
    torch.testing.assert_close(actual.double(), expected, rtol=relative_error(dtype), atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize(("rows", "classes"), [(203, 80), (64, 81), (1000, 3), (3, 5000), (1, 1), (4097, 1)])
def test_sum_and_mean(emulator, dtype, gamma, rows, classes):
    logits, targets = case(rows, classes, dtype)
    for task in ("sum", "mean"):
        actual = assert_same_in_every_order(emulator, logits, targets, task=task, gamma=gamma)
        expected = reference.sigmoid_focal_loss(logits.double(), targets, gamma=gamma, reduction=task)
        np.testing.assert_allclose(actual[0], expected.item(), rtol=sum_error(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(203, 80), (37, 7), (3, 5000)])
def test_elementwise_loss(emulator, dtype, rows, classes):
    logits, targets = case(rows, classes, dtype)
    expected = reference.sigmoid_focal_loss(logits.double(), targets)
    actual = assert_same_in_every_order(emulator, logits, targets, task="loss")
    assert_close(restore(actual, dtype, logits.shape), expected, dtype)
    wide = restore(run(emulator, logits, targets, task="loss", wide_result=True), dtype, logits.shape)
    assert wide.dtype == computed(dtype)
    assert_close(wide, expected, computed(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gamma", [2.0, 0.5])
@pytest.mark.parametrize(("rows", "classes"), [(203, 80), (37, 7)])
def test_gradient(emulator, dtype, gamma, rows, classes):
    logits, targets = case(rows, classes, dtype)
    expected = float64_gradient(logits, targets, gamma=gamma)
    actual = assert_same_in_every_order(emulator, logits, targets, task="gradient", gamma=gamma, grad=ones(logits))
    assert_close(restore(actual, dtype, logits.shape), expected, dtype)

    upstream = torch.randn(rows, classes).to(dtype)
    actual = run(emulator, logits, targets, task="gradient", gamma=gamma, grad=storage(upstream))
    assert_close(restore(actual, dtype, logits.shape), expected * upstream.double(), dtype)

    upstream = torch.randn(rows, classes, dtype=computed(dtype))
    actual = run(emulator, logits, targets, task="gradient", gamma=gamma, grad=storage(upstream))
    assert_close(restore(actual, dtype, logits.shape), expected * upstream.double(), dtype)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_gradient_of_a_mean_counts_what_is_not_ignored(emulator, index_dtype):
    logits, targets = case(301, 9, torch.float32)
    kept = (targets != -2).sum().item() * 9
    actual = assert_same_in_every_order(
        emulator,
        logits,
        targets.to(index_dtype),
        task="gradient",
        mean=True,
        grad=np.array([3.0], np.float32),
    )
    assert_close(
        restore(actual, torch.float32, logits.shape),
        float64_gradient(logits, targets) * 3 / kept,
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_options_by_class(emulator, dtype):
    logits, targets = case(150, 21, dtype)
    class_alpha, weight = torch.rand(21), torch.rand(21) + 0.5
    class_alpha[3] = -1
    options = {"gamma": 1.7, "label_smoothing": 0.1}
    expected = reference.sigmoid_focal_loss(
        logits.double(), targets, class_alpha.double(), weight=weight.double(), reduction="sum", **options
    )
    by_class = {"class_alpha": class_alpha.numpy(), "weight": weight.numpy(), **options}
    actual = assert_same_in_every_order(emulator, logits, targets, task="sum", **by_class)
    np.testing.assert_allclose(actual[0], expected.item(), rtol=sum_error(dtype))

    actual = run(emulator, logits, targets, task="gradient", grad=ones(logits), **by_class)
    expected = float64_gradient(logits, targets, alpha=class_alpha.double(), weight=weight.double(), **options)
    scale = expected.abs().max().item()  # the smoothed gradient has zero crossings
    torch.testing.assert_close(
        restore(actual, dtype, logits.shape).double(),
        expected,
        rtol=relative_error(dtype),
        atol=sum_error(dtype) * scale,
    )


@pytest.mark.parametrize("ignore_index", [-2, 4, -100])
def test_ignored_rows_are_zero(emulator, ignore_index):
    logits, targets = case(100, 9, torch.float32)
    targets[::5] = ignore_index
    logits[::5] = float("nan")
    for task, options in {"loss": {}, "gradient": {"grad": np.ones(1, np.float32)}}.items():
        values = restore(
            run(emulator, logits, targets, task=task, ignore_index=ignore_index, **options),
            torch.float32,
            logits.shape,
        )
        assert (values[::5] == 0).all()
        assert not values.isnan().any()


@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
def test_ignored_rows_have_no_gradient_whatever_comes_from_above(emulator, upstream):
    """An overflow under a loss scale, or the mean of an image in which every row is ignored."""
    logits, targets = case(100, 9, torch.float32)
    ignored = targets == -2
    for grad in (np.array([upstream], np.float32), np.full((100, 9), upstream, np.float32)):
        values = restore(run(emulator, logits, targets, task="gradient", grad=grad), torch.float32, logits.shape)
        assert (values[ignored] == 0).all()
        assert not values[~ignored].isfinite().any()
    all_ignored = torch.full((100,), -2)
    values = run(emulator, logits, all_ignored, task="gradient", mean=True, grad=np.ones(1, np.float32))
    assert (values == 0).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_soft_targets(emulator, dtype, gamma):
    logits, _ = case(203, 13, dtype)
    targets = torch.rand(203, 13, dtype=torch.float64).to(dtype)
    targets[::2] = targets[::2].round()
    for form in {dtype, computed(dtype)}:
        t = targets.to(form)
        expected = reference.sigmoid_focal_loss(logits.double(), t.double(), gamma=gamma, reduction="sum")
        actual = assert_same_in_every_order(emulator, logits, t, soft=True, task="sum", gamma=gamma)
        np.testing.assert_allclose(actual[0], expected.item(), rtol=sum_error(dtype))
        actual = run(emulator, logits, t, soft=True, gamma=gamma, task="gradient", grad=ones(logits))
        expected = float64_gradient(logits, t.double(), gamma=gamma)
        torch.testing.assert_close(
            restore(actual, dtype, logits.shape).double(),
            expected,
            rtol=relative_error(dtype),
            atol=1e-6 if dtype != torch.float64 else 1e-12,
        )


def test_nan_stays_where_it_is(emulator):
    """Four elements share one reciprocal; a NaN among them must not reach the other three."""
    logits, _ = case(64, 16, torch.float32)
    targets = torch.full((64,), -1)
    logits[3, 5] = float("nan")
    for task, options in {"loss": {}, "gradient": {"grad": np.ones(1, np.float32)}}.items():
        values = restore(run(emulator, logits, targets, task=task, **options), torch.float32, logits.shape)
        expected = torch.zeros(64, 16, dtype=torch.bool)
        expected[3, 5] = True
        torch.testing.assert_close(values.isnan(), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_are_finite(emulator, gamma):
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[-largest, -200.0, -0.0, 200.0], [largest, 88.7, 1e30, -1e30]])
    targets = torch.full((2,), -1)
    expected = reference.sigmoid_focal_loss(logits.double(), targets, gamma=gamma)
    actual = restore(run(emulator, logits, targets, task="loss", gamma=gamma), torch.float32, logits.shape)
    assert_close(actual, expected, torch.float32)
    gradient = run(emulator, logits, targets, task="gradient", gamma=gamma, grad=np.ones(1, np.float32))
    assert_close(
        restore(gradient, torch.float32, logits.shape),
        float64_gradient(logits, targets, gamma=gamma),
        torch.float32,
    )


def test_number_of_blocks_changes_nothing_elementwise(emulator):
    logits, targets = case(500, 80, torch.bfloat16)
    one, three = (run(emulator, logits, targets, task="loss", blocks=blocks) for blocks in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_agrees_with_the_cpu_operator(emulator):
    logits, targets = case(300, 80, torch.float32)
    actual = restore(run(emulator, logits, targets, task="loss"), torch.float32, logits.shape)
    torch.testing.assert_close(actual, retinanet_ext.sigmoid_focal_loss(logits, targets), rtol=2e-6, atol=1e-30)


@SANITIZED
@pytest.mark.parametrize(("source", "target"), [(0, 16), (4, 16), (0, 20), (8, 8), (32, 32)])
def test_the_sanitizer_sees_a_vector_that_begins_anywhere(emulator, source, target):
    """It ends the process, as a GPU ends the kernel."""
    memory = np.zeros(24, np.float32)
    first = (memory.ctypes.data + 15) // 16 * 16
    child = os.fork()
    if child == 0:
        emulator.copy_vector(first + source, first + target)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    assert ended == bool(source % 16 or target % 16)


@SANITIZED
def test_the_sanitizer_is_at_work():
    assert "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"gamma": 1.5}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(203, 80), (37, 7)])
def test_one_pass_has_the_bits_of_two(emulator, dtype, reduction, options, rows, classes):
    logits, targets = case(rows, classes, dtype)
    for schedule in SCHEDULES:
        total, gradient = run_all(emulator, logits, targets, task=f"{reduction}+gradient", schedule=schedule, **options)
        np.testing.assert_array_equal(total, run(emulator, logits, targets, task=reduction, **options))
        how = {"mean": reduction == "mean", "grad": ones(logits), **options}
        expected = run(emulator, logits, targets, task="gradient", **how)
        np.testing.assert_array_equal(gradient.view(np.uint8), expected.view(np.uint8))


def test_a_gradient_that_is_there_is_left_alone_when_one_comes_from_above(emulator):
    logits, targets = case(203, 7, torch.float32)
    filled = np.arange(logits.numel(), dtype=np.float32)
    one, two = storage(torch.ones(1)), storage(torch.full((1,), 2.0))
    options = {"task": "gradient"}
    for schedule in SCHEDULES:
        left, was_one = run_all(emulator, logits, targets, grad=one, filled=filled, schedule=schedule, **options)
        assert was_one == 1
        np.testing.assert_array_equal(left, filled)
        anew, was_one = run_all(emulator, logits, targets, grad=two, filled=filled, schedule=schedule, **options)
        assert was_one == 0
        np.testing.assert_array_equal(anew, run(emulator, logits, targets, grad=two, **options))
