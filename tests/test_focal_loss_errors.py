"""Every mistake in a call of sigmoid_focal_loss, and the sentence that tells of it."""

import math
import re

import numpy as np
import pytest
import torch

from retinanet_ext import sigmoid_focal_loss

FORWARD = torch.ops.retinanet_ext.sigmoid_focal_loss
BACKWARD = torch.ops.retinanet_ext.sigmoid_focal_loss_backward


def indices(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


X = torch.zeros(6, 4)
T = indices(6)

MISTAKES = {
    "alpha above 1": ((X, T, 1.5), {}, "alpha must be in [0, 1], or -1 for no balancing, and is 1.5"),
    "alpha below 0": ((X, T, -0.5), {}, "alpha must be in [0, 1], or -1 for no balancing, and is -0.5"),
    "alpha NaN": ((X, T, math.nan), {}, "alpha must be in [0, 1], or -1 for no balancing, and is nan"),
    "alpha of another length": (
        (X, T, torch.ones(5)),
        {},
        "alpha must be a tensor of shape (4,), one value a class, and is shape (5,)",
    ),
    "alpha of no dimension": (
        (X, T, torch.tensor(0.25)),
        {},
        "alpha must be a tensor of shape (4,), one value a class, and is shape ()",
    ),
    "gamma negative": ((X, T, 0.25, -1.0), {}, "gamma must be finite and >= 0, and is -1.0"),
    "gamma infinite": ((X, T, 0.25, math.inf), {}, "gamma must be finite and >= 0, and is inf"),
    "gamma NaN": ((X, T, 0.25, math.nan), {}, "gamma must be finite and >= 0, and is nan"),
    "reduction": ((X, T, 0.25, 2, "avg"), {}, "reduction must be 'none', 'mean' or 'sum', and is 'avg'"),
    "reduction None": ((X, T, 0.25, 2, None), {}, "reduction must be 'none', 'mean' or 'sum', and is None"),
    "smoothing above 1": ((X, T), {"label_smoothing": 1.5}, "label_smoothing must be in [0, 1], and is 1.5"),
    "smoothing below 0": (
        (X, T),
        {"label_smoothing": -0.1},
        "label_smoothing must be in [0, 1], and is -0.1",
    ),
    "smoothing NaN": ((X, T), {"label_smoothing": math.nan}, "label_smoothing must be in [0, 1], and is nan"),
    "smoothing of soft targets": (
        (X, X),
        {"label_smoothing": 0.1},
        "label_smoothing needs integer targets, and targets are floating",
    ),
    "weight of soft targets": (
        (X, X),
        {"weight": torch.ones(4)},
        "weight needs integer targets, and targets are floating",
    ),
    "weight of another length": (
        (X, T),
        {"weight": torch.ones(5)},
        "weight must be a tensor of shape (4,), one value a class, and is shape (5,)",
    ),
    "weight of two dimensions": (
        (X, T),
        {"weight": torch.ones(6, 4)},
        "weight must be a tensor of shape (4,), one value a class, and is shape (6, 4)",
    ),
    "weight a list": (
        (X, T),
        {"weight": [1.0] * 4},
        "weight must be a tensor of shape (4,), one value a class, and is list",
    ),
    "integer inputs": (
        (indices(6, 4), T),
        {},
        "inputs must be float64, float32, float16 or bfloat16, and are torch.int64",
    ),
    "complex inputs": (
        (X.to(torch.complex64), T),
        {},
        "inputs must be float64, float32, float16 or bfloat16, and are torch.complex64",
    ),
    "float8 inputs": (
        (X.to(torch.float8_e4m3fn), T),
        {},
        "inputs must be float64, float32, float16 or bfloat16, and are torch.float8_e4m3fn",
    ),
    "boolean targets": (
        (X, T.bool()),
        {},
        "targets must be floating, or integer class indices, and are torch.bool",
    ),
    "complex targets": (
        (X, X.to(torch.complex64)),
        {},
        "targets must be floating, or integer class indices, and are torch.complex64",
    ),
    "integer targets of the inputs' shape": (
        (X, indices(6, 4)),
        {},
        "integer targets must have the shape of inputs without its last dimension, (6,), and have shape (6, 4) "
        "(for 0/1 targets of that shape use targets.float())",
    ),
    "integer targets too short": (
        (X, indices(5)),
        {},
        "integer targets must have the shape of inputs without its last dimension, (6,), and have shape (5,)",
    ),
    "integer targets as a column": (
        (X, indices(6, 1)),
        {},
        "integer targets must have the shape of inputs without its last dimension, (6,), and have shape (6, 1)",
    ),
    "integer targets of a scalar": (
        (torch.tensor(0.0), torch.tensor(0)),
        {},
        "integer targets must have the shape of inputs without its last dimension",
    ),
    "soft targets to broadcast": (
        (X, torch.zeros(6, 1)),
        {},
        "floating targets must have the shape of inputs, (6, 4), and have shape (6, 1)",
    ),
    "soft targets without the classes": (
        (X, torch.zeros(6)),
        {},
        "floating targets must have the shape of inputs, (6, 4), and have shape (6,)",
    ),
    "targets elsewhere": (
        (X, T.to("meta")),
        {},
        "targets must be on the device of inputs, cpu, and are on meta",
    ),
    "weight elsewhere": (
        (X, T),
        {"weight": torch.ones(4, device="meta")},
        "weight must be on the device of inputs, cpu, and is on meta",
    ),
    "alpha elsewhere": (
        (X, T, torch.ones(4, device="meta")),
        {},
        "alpha must be on the device of inputs, cpu, and is on meta",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_value_error_that_names_it(name):
    arguments, options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(f"sigmoid_focal_loss: {message}")):
        sigmoid_focal_loss(*arguments, **options)


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match="sigmoid_focal_loss: inputs must be a tensor, and is ndarray"):
        sigmoid_focal_loss(np.zeros((6, 4)), T)
    with pytest.raises(TypeError, match="sigmoid_focal_loss: targets must be a tensor, and is list"):
        sigmoid_focal_loss(X, [0] * 6)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        sigmoid_focal_loss(X, T, 0.25, 2.0, "sum", torch.ones(4))


def test_every_value_at_the_edge_of_what_is_allowed():
    for alpha in (0, 1, -1, 0.0, -1.0, np.float32(0.25), True):
        sigmoid_focal_loss(X, T, alpha)
    for gamma in (0, 1e-300, 1e30, np.float64(2)):
        assert torch.isfinite(sigmoid_focal_loss(X, T, 0.25, gamma)).all()
    for smoothing in (0, 1):
        sigmoid_focal_loss(X, T, label_smoothing=smoothing)
    sigmoid_focal_loss(X[:0], T[:0])
    sigmoid_focal_loss(X[0], T[0])  # one row: targets of no dimension
    sigmoid_focal_loss(X[0, 0], X[0, 0])


def raw(inputs=X, targets=T, weight=None, class_alpha=None, alpha=0.25, gamma=2.0, smoothing=0.0, reduction=0):
    return FORWARD(inputs, targets, weight, class_alpha, alpha, gamma, smoothing, -2, reduction, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": indices(6, 4)}, "inputs must be float64, float32, float16 or bfloat16, and are int64"),
        (
            {"targets": indices(6, 4)},
            "integer targets must have the shape of inputs without its last dimension",
        ),
        (
            {"targets": torch.zeros(6)},
            "floating targets must have the shape of inputs, [6, 4], and have shape [6]",
        ),
        ({"targets": T.short()}, "class targets must be int64 or int32"),
        ({"targets": X.half()}, "floating targets of float32 inputs must be of the same dtype or float32"),
        ({"targets": X.double()}, "floating targets of float32 inputs must be of the same dtype or float32"),
        ({"targets": X, "weight": torch.ones(4)}, "weight and label_smoothing need integer targets"),
        ({"weight": torch.ones(3)}, "weight must have shape [4], one value a class, and has shape [3]"),
        (
            {"class_alpha": torch.ones(3)},
            "class_alpha must have shape [4], one value a class, and has shape [3]",
        ),
        ({"alpha": 2.0}, "alpha must be in [0, 1], or negative for none, and is 2"),
        ({"alpha": math.nan}, "alpha must be in [0, 1], or negative for none, and is nan"),
        ({"gamma": -1.0}, "gamma must be finite and >= 0, and is -1"),
        ({"gamma": math.inf}, "gamma must be finite and >= 0, and is inf"),
        ({"smoothing": 2.0}, "label_smoothing must be in [0, 1], and is 2"),
        ({"reduction": 3}, "reduction must be 0 (none), 1 (mean) or 2 (sum), and is 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_raw_operator_checks_too(arguments, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        raw(**arguments)


@pytest.mark.parametrize(
    ("grad", "reduction", "message"),
    [
        (torch.ones(6), 0, "grad must have the shape of the loss, and has shape [6]"),
        (torch.ones(4, 6), 0, "grad must have the shape of the loss"),
        (torch.ones(6, 4), 2, "grad must have the shape of the loss"),
        (
            torch.ones(6, 4).half(),
            0,
            "grad of float32 inputs must be of the same dtype or float32, and is float16",
        ),
        (torch.ones(6, 4).double(), 0, "grad of float32 inputs must be of the same dtype or float32"),
    ],
    ids=str,
)
def test_the_raw_backward_checks_its_gradient(grad, reduction, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        BACKWARD(grad, X, T, None, None, 0.25, 2.0, 0.0, -2, reduction)


def test_errors_under_compile_keep_their_words():
    compiled = torch.compile(lambda x, t: sigmoid_focal_loss(x, t, gamma=-1), backend="aot_eager")
    with pytest.raises(ValueError, match="gamma must be finite and >= 0, and is -1"):
        compiled(X, T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": None}, "alpha must be a number, and is NoneType"),
        ({"gamma": "2"}, "gamma must be a number, and is str"),
        ({"label_smoothing": None}, "label_smoothing must be a number, and is NoneType"),
        ({"ignore_index": 1.5}, "ignore_index must be an integer, and is float"),
        ({"ignore_index": None}, "ignore_index must be an integer, and is NoneType"),
    ],
    ids=str,
)
def test_options_that_are_no_numbers(options, message):
    with pytest.raises(TypeError, match=message):
        sigmoid_focal_loss(X, T, **options)


@pytest.mark.parametrize("name", ["inputs", "targets", "weight", "alpha"])
def test_sparse_tensors(name):
    tensors = {"inputs": X, "targets": torch.zeros_like(X)}
    if name in ("weight", "alpha"):
        tensors = {"inputs": X, "targets": T, name: torch.ones(X.shape[-1])}
    tensors[name] = tensors[name].to_sparse()
    with pytest.raises(ValueError, match=f"{name} must be a dense tensor, and is torch.sparse_coo"):
        sigmoid_focal_loss(**tensors)


def test_nested_tensors():
    nested = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=torch.jagged)
    with pytest.raises(ValueError, match="inputs must be a dense tensor, and is nested"):
        sigmoid_focal_loss(nested, nested)
    for name in ("weight", "alpha"):
        by_class = torch.nested.nested_tensor([torch.ones(2), torch.ones(2)])
        with pytest.raises(ValueError, match=f"{name} must be a dense tensor, and is nested"):
            sigmoid_focal_loss(X, T, **{name: by_class})


@pytest.mark.parametrize("name", ["weight", "alpha"])
def test_complex_numbers_by_class(name):
    values = torch.ones(X.shape[-1], dtype=torch.complex64)
    with pytest.raises(ValueError, match=f"{name} must be a tensor of real numbers, and is torch.complex64"):
        sigmoid_focal_loss(X, T, **{name: values})


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_ignore_index_beyond_int64(value):
    with pytest.raises(ValueError, match=f"ignore_index must be in the range of int64, and is {value}"):
        sigmoid_focal_loss(X, T, ignore_index=value)


def test_reduction_that_is_no_string():
    with pytest.raises(ValueError, match=r"reduction must be 'none', 'mean' or 'sum', and is \['sum'\]"):
        sigmoid_focal_loss(X, T, reduction=["sum"])
