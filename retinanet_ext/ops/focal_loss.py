"""Sigmoid focal loss: public wrappers, autograd, fake kernels and vmap around the compiled operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import (
    _load,  # noqa: F401 - registers the operators
    reference,
)
from ..reference.focal_loss import autocast_enabled
from . import one_pass
from .focal_checks import (
    FLOATING,
    INDICES,
    INTEGERS,
    check_alpha,
    check_dense,
    check_gamma,
    check_number,
    check_real,
)

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

_forward = torch.ops.retinanet_ext.sigmoid_focal_loss.default
_backward = torch.ops.retinanet_ext.sigmoid_focal_loss_backward.default
_with_grad = torch.ops.retinanet_ext.sigmoid_focal_loss_with_grad.default
_refresh_grad = torch.ops.retinanet_ext.sigmoid_focal_loss_refresh_grad.default


class Options(NamedTuple):
    """The operator's arguments behind its tensors, in schema order."""

    alpha: float
    gamma: float
    label_smoothing: float
    ignore_index: int
    reduction: int


def loss_dtype(inputs: Tensor, reduction: int, float32_loss: bool) -> torch.dtype:
    """Halves keep their dtype elementwise unless asked otherwise, and are reduced in float32."""
    if inputs.dtype == torch.float64 or (reduction == 0 and not float32_loss):
        return inputs.dtype
    return torch.float32


@torch.library.register_fake("retinanet_ext::sigmoid_focal_loss")
def _fake_forward(
    inputs,
    targets,
    weight,
    class_alpha,
    alpha,
    gamma,
    label_smoothing,
    ignore_index,
    reduction,
    float32_loss,
):
    dtype = loss_dtype(inputs, reduction, float32_loss)
    if reduction != 0:
        return inputs.new_empty((), dtype=dtype)
    if _keeps_layout(inputs, targets, class_alpha) and dtype == inputs.dtype:
        return torch.empty_like(inputs)
    return inputs.new_empty(inputs.shape, dtype=dtype)


@torch.library.register_fake("retinanet_ext::sigmoid_focal_loss_backward")
def _fake_backward(
    grad,
    inputs,
    targets,
    weight,
    class_alpha,
    alpha,
    gamma,
    label_smoothing,
    ignore_index,
    reduction,
):
    scalar = reduction != 0 or all(
        stride == 0 or size == 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )
    if _keeps_layout(inputs, targets, class_alpha) and (scalar or _same_strides(inputs, grad)):
        return torch.empty_like(inputs)
    return inputs.new_empty(inputs.shape)


@torch.library.register_fake("retinanet_ext::sigmoid_focal_loss_with_grad")
def _fake_with_grad(inputs, targets, weight, class_alpha, alpha, gamma, label_smoothing, ignore_index, reduction):
    return inputs.new_empty((), dtype=loss_dtype(inputs, reduction, False)), inputs.new_empty(inputs.shape)


@torch.library.register_fake("retinanet_ext::sigmoid_focal_loss_refresh_grad")
def _fake_refresh_grad(grad_inputs, was_one, grad, *_arguments):
    pass


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(size == 1 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _keeps_layout(inputs: Tensor, targets: Tensor, class_alpha: Tensor | None) -> bool:
    """Whether the operator walks memory as it lies: soft targets that share a dense layout with ``inputs``."""
    if not targets.is_floating_point() or class_alpha is not None or not _same_strides(inputs, targets):
        return False
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(inputs.shape, inputs.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _raw_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = Options(*inputs[4:9])


def _raw_backward(ctx, grad):
    for position, name in ((1, "targets"), (2, "weight"), (3, "class_alpha")):
        if ctx.needs_input_grad[position]:
            raise RuntimeError(
                f"sigmoid_focal_loss: the operator has no gradient for {name}; "
                "retinanet_ext.sigmoid_focal_loss and retinanet_ext.reference have it"
            )
    logits, targets, weight, class_alpha = ctx.saved_tensors
    grad_inputs = torch.ops.retinanet_ext.sigmoid_focal_loss_backward(
        grad, logits, targets, weight, class_alpha, *ctx.options
    )
    return (grad_inputs, *(None,) * 9)


def _no_double_backward(ctx, grad):
    raise RuntimeError(DOUBLE_BACKWARD)


def _not_differentiable(ctx, *grads):
    raise RuntimeError("sigmoid_focal_loss_with_grad returns the gradient; to differentiate, use sigmoid_focal_loss")


DOUBLE_BACKWARD = (
    "sigmoid_focal_loss: second derivatives are not implemented. "
    "retinanet_ext.reference.sigmoid_focal_loss, in plain PyTorch, has them."
)

torch.library.register_autograd("retinanet_ext::sigmoid_focal_loss", _raw_backward, setup_context=_raw_setup_context)
torch.library.register_autograd("retinanet_ext::sigmoid_focal_loss_backward", _no_double_backward)
torch.library.register_autograd("retinanet_ext::sigmoid_focal_loss_with_grad", _not_differentiable)


class _FocalLossBackward(torch.autograd.Function):
    """The gradient as a Function of its own, so that asking for a second derivative fails loudly."""

    @staticmethod
    def forward(grad, inputs, targets, weight, class_alpha, options):
        return _backward(grad, inputs, targets, weight, class_alpha, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info, in_dims, grad, inputs, targets, weight, class_alpha, options):
        size = info.batch_size
        _reject_batched(in_dims, weight=3, class_alpha=4)
        inputs, targets = _batch_first(inputs, in_dims[1], size), _batch_first(targets, in_dims[2], size)
        grad = _batch_first(grad, in_dims[0], size)
        if options.reduction == REDUCTIONS["mean"]:
            grad = grad / _mean_divisor(inputs, targets, options)
        if options.reduction != REDUCTIONS["none"]:
            grad = grad.view(size, *(1,) * (inputs.dim() - 1)).expand(inputs.shape)
        elementwise = options._replace(reduction=REDUCTIONS["none"])
        return _FocalLossBackward.apply(grad, inputs, targets, weight, class_alpha, elementwise), 0


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(inputs, targets, weight, class_alpha, options, float32_loss):
        return _forward(inputs, targets, weight, class_alpha, *options, float32_loss)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, targets, weight, class_alpha, ctx.options, _ = inputs
        ctx.save_for_backward(logits, targets, weight, class_alpha)

    @staticmethod
    def backward(ctx, grad):
        logits, targets, weight, class_alpha = ctx.saved_tensors
        grad_inputs = _FocalLossBackward.apply(grad, logits, targets, weight, class_alpha, ctx.options)
        return grad_inputs, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, inputs, targets, weight, class_alpha, options, float32_loss):
        size = info.batch_size
        _reject_batched(in_dims, weight=2, class_alpha=3)
        inputs, targets = _batch_first(inputs, in_dims[0], size), _batch_first(targets, in_dims[1], size)
        elementwise = options._replace(reduction=REDUCTIONS["none"])
        if options.reduction == REDUCTIONS["none"]:
            return _FocalLoss.apply(inputs, targets, weight, class_alpha, elementwise, float32_loss), 0
        loss = _FocalLoss.apply(inputs, targets, weight, class_alpha, elementwise, True)
        loss = loss.reshape(size, inputs.shape[1:].numel()).sum(1)
        if options.reduction == REDUCTIONS["mean"]:
            loss = loss / _mean_divisor(inputs, targets, options)
        return loss, 0


class _TrainingFocalLoss(torch.autograd.Function):
    """Sum or mean over class indices in eager training: the backward pass may find its gradient ready, see `one_pass`.

    Not over soft targets: there a compiler may round the loss otherwise where it computes the gradient too.
    """

    @staticmethod
    def forward(ctx, inputs, targets, weight, class_alpha, options, was_one):
        ctx.options, ctx.was_one = options, was_one
        ctx.save_for_backward(inputs, targets, weight, class_alpha)
        if was_one.item():
            loss, ctx.grad_inputs = _with_grad(inputs, targets, weight, class_alpha, *options)
        else:
            loss, ctx.grad_inputs = _forward(inputs, targets, weight, class_alpha, *options, False), None
        return loss

    @staticmethod
    def backward(ctx, grad):
        logits, targets, weight, class_alpha = ctx.saved_tensors
        # Handed over once: whoever gets it may write to it, and a second backward pass recomputes.
        grad_inputs, ctx.grad_inputs = ctx.grad_inputs, None
        if torch.is_grad_enabled() or not one_pass.is_plain(grad):
            grad_inputs = _FocalLossBackward.apply(grad, logits, targets, weight, class_alpha, ctx.options)
            return grad_inputs, *(None,) * 5
        filled = grad_inputs is not None
        if not filled:
            grad_inputs = logits.new_empty(logits.shape)
        _refresh_grad(grad_inputs, ctx.was_one, grad, logits, targets, weight, class_alpha, *ctx.options, filled)
        return grad_inputs, *(None,) * 5


def _reject_batched(in_dims, **positions: int) -> None:
    for name, position in positions.items():
        if in_dims[position] is not None:
            raise RuntimeError(f"sigmoid_focal_loss: {name} must not be batched by vmap")


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    if dim is None:
        return tensor.unsqueeze(0).expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _mean_divisor(inputs: Tensor, targets: Tensor, options: Options) -> Tensor:
    """Elements that are not ignored, for each entry of the leading vmap dimension."""
    size = inputs.shape[0]
    if targets.is_floating_point():
        return inputs.new_full((size,), inputs.shape[1:].numel(), dtype=loss_dtype(inputs, options.reduction, True))
    kept = (targets != options.ignore_index).reshape(size, targets.shape[1:].numel()).sum(1)
    return (kept * inputs.shape[-1]).to(loss_dtype(inputs, options.reduction, True))


def _check(inputs, targets, alpha, gamma, reduction, weight, label_smoothing, ignore_index) -> None:
    """Raises a ValueError or TypeError that names the argument, what was expected and what came."""
    op = "sigmoid_focal_loss"
    for name, value in (("inputs", inputs), ("targets", targets)):
        check_dense(op, name, value)
    if inputs.dtype not in FLOATING:
        raise ValueError(f"{op}: inputs must be float64, float32, float16 or bfloat16, and are {inputs.dtype}")
    if inputs.device != targets.device:
        raise ValueError(f"{op}: targets must be on the device of inputs, {inputs.device}, and are on {targets.device}")
    if targets.is_floating_point():
        if targets.shape != inputs.shape:
            raise ValueError(
                f"{op}: floating targets must have the shape of inputs, {tuple(inputs.shape)}, "
                f"and have shape {tuple(targets.shape)}"
            )
        if weight is not None:
            raise ValueError(f"{op}: weight needs integer targets, and targets are floating")
        if label_smoothing:
            raise ValueError(f"{op}: label_smoothing needs integer targets, and targets are floating")
    elif targets.dtype not in INDICES:
        raise ValueError(f"{op}: targets must be floating, or integer class indices, and are {targets.dtype}")
    elif targets.shape != inputs.shape[:-1] or inputs.dim() == 0:
        hint = " (for 0/1 targets of that shape use targets.float())" if targets.shape == inputs.shape else ""
        raise ValueError(
            f"{op}: integer targets must have the shape of inputs without its last dimension, "
            f"{tuple(inputs.shape[:-1])}, and have shape {tuple(targets.shape)}{hint}"
        )
    if not isinstance(alpha, Tensor):
        check_alpha(op, alpha)
    check_gamma(op, gamma)
    check_number(op, "label_smoothing", label_smoothing)
    if not isinstance(ignore_index, INTEGERS):
        raise TypeError(f"{op}: ignore_index must be an integer, and is {type(ignore_index).__name__}")
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must be in the range of int64, and is {ignore_index}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], and is {label_smoothing}")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', and is {reduction!r}")


def _check_per_class(name: str, values: Tensor, inputs: Tensor) -> None:
    op = "sigmoid_focal_loss"
    num_classes = inputs.shape[-1] if inputs.dim() else 1
    if isinstance(values, Tensor):
        check_real(op, name, values)
    if not isinstance(values, Tensor) or tuple(values.shape) != (num_classes,):
        came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{op}: {name} must be a tensor of shape ({num_classes},), one value a class, and is {came}")
    if values.device != inputs.device:
        raise ValueError(f"{op}: {name} must be on the device of inputs, {inputs.device}, and is on {values.device}")


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -2,
) -> Tensor:
    r"""Focal loss of independent sigmoid classifiers, fused; a drop-in for ``torchvision.ops.sigmoid_focal_loss``.

    .. math:: \mathrm{loss} = \alpha_t\,(1 - p_t)^\gamma\,\mathrm{CE}(p, t)

    ``gamma=0, alpha=-1`` is the binary cross-entropy, ``gamma=0`` the balanced one, ``alpha=-1`` the plain focal loss.

    Args:
        inputs: [..., K] logits; float64, float32, float16 or bfloat16; any strides; CPU or CUDA.
        targets: one of two forms.
            Floating, [..., K] like ``inputs``: each element's target in [0, 1] (0 and 1, or soft). torchvision's.
            Integer, [...] (``inputs.shape[:-1]``): the class of each row. [0, K) is the positive class;
            ``ignore_index`` rows give zero loss and zero gradient; every other value (-1, K, ...) is background.
        alpha: weight of positive elements, ``1 - alpha`` of negative ones; in [0, 1], or -1 for no balancing. Or a
            [K] tensor, by class (column); an element below 0 turns balancing off for its class. A tensor's values
            are not checked: on a GPU the host would have to wait for them.
        gamma: focusing exponent, >= 0.
        reduction: ``"none"`` (a loss of the shape of ``inputs``), ``"sum"``, or ``"mean"`` over the elements that are
            not ignored (NaN when there are none).
        weight: [K], a factor for the rows of each target class; background rows have 1. Integer targets only.
        label_smoothing: s in [0, 1]; the cross-entropy takes s/2 and 1 - s/2 for 0 and 1, while the modulation and
            ``alpha`` keep the hard label. Integer targets only.
        ignore_index: the value of integer ``targets`` whose rows are left out; floating targets have no such rows.

    Returns:
        ``"none"``: the dtype of ``inputs`` (float32 under autocast). ``"sum"``, ``"mean"``: a scalar, float32 for half
        inputs, which are accumulated in float32; otherwise the dtype of ``inputs``.

    Raises:
        ValueError: an argument outside what stands above; the message names it, what was expected and what came.
        TypeError: ``inputs`` or ``targets`` is not a tensor, an option is not a number, or ``ignore_index`` no integer.
        RuntimeError: a second derivative was asked for.

    Works under autocast, ``torch.compile(fullgraph=True)``, ``torch.export`` and ``torch.func`` (grad, vmap). The
    result has the same bits on every run and for any number of threads. Where ``targets``, ``weight`` or ``alpha``
    require a gradient, the loss is computed by ``retinanet_ext.reference``.

    Source: Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, equation 5; soft targets as
    torchvision, ``weight`` as mmcv, ``label_smoothing`` as NVIDIA apex.
    """
    _check(inputs, targets, alpha, gamma, reduction, weight, label_smoothing, ignore_index)
    class_alpha = alpha if isinstance(alpha, Tensor) else None
    if class_alpha is not None:
        _check_per_class("alpha", class_alpha, inputs)
    if weight is not None:
        _check_per_class("weight", weight, inputs)

    soft = targets.is_floating_point()
    if torch.is_grad_enabled() and (
        (soft and targets.requires_grad)
        or (weight is not None and weight.requires_grad)
        or (class_alpha is not None and class_alpha.requires_grad)
    ):
        return reference.sigmoid_focal_loss(
            inputs,
            targets,
            alpha,
            gamma,
            reduction,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    if soft:
        if targets.dtype != inputs.dtype:
            targets = targets.to(torch.float64 if inputs.dtype == torch.float64 else torch.float32)
    elif targets.dtype != torch.int64 and targets.dtype != torch.int32:
        targets = targets.long()

    options = Options(
        1.0 if class_alpha is not None else float(alpha),
        float(gamma),
        float(label_smoothing),
        int(ignore_index),
        REDUCTIONS[reduction],
    )
    float32_loss = autocast_enabled(inputs)
    if torch.compiler.is_compiling():
        return _forward(inputs, targets, weight, class_alpha, *options, float32_loss)
    if not soft and reduction != "none" and one_pass.is_allowed([inputs], targets, weight, class_alpha):
        was_one = one_pass.was_one("sigmoid_focal_loss", inputs.device)
        if was_one is not None:
            return _TrainingFocalLoss.apply(inputs, targets, weight, class_alpha, options, was_one)
    return _FocalLoss.apply(inputs, targets, weight, class_alpha, options, float32_loss)
