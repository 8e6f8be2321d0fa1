"""Focal loss over the levels of a feature pyramid: public wrapper, autograd, fake kernels and vmap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _load  # noqa: F401 - registers the operators
from ..reference.focal_loss import compute_dtype, infer_num_classes
from . import one_pass
from .focal_checks import FLOATING, INDICES, NUMBERS, check_alpha, check_dense, check_gamma, check_real

_forward = torch.ops.retinanet_ext.multilevel_focal_loss.default
_backward = torch.ops.retinanet_ext.multilevel_focal_loss_backward.default
_with_grad = torch.ops.retinanet_ext.multilevel_focal_loss_with_grad.default
_refresh_grad = torch.ops.retinanet_ext.multilevel_focal_loss_refresh_grad.default


class Options(NamedTuple):
    """The operator's arguments behind its tensors, in schema order."""

    num_classes: int
    alpha: float
    gamma: float
    scale: float  # factor of the loss: 1 / normalizer where that is a number


def _empty_gradients(logits: Sequence[Tensor]) -> list[Tensor]:
    """Laid out as the levels that are channels_last, contiguous otherwise."""
    return [
        torch.empty_like(level)
        if level.dim() == 4 and level.numel() > 0 and level.is_contiguous(memory_format=torch.channels_last)
        else level.new_empty(level.shape)
        for level in logits
    ]


@torch.library.register_fake("retinanet_ext::multilevel_focal_loss")
def _fake_forward(logits, targets, normalizer, num_classes, alpha, gamma, scale):
    return targets.new_empty((), dtype=torch.float32)


@torch.library.register_fake("retinanet_ext::multilevel_focal_loss_backward")
def _fake_backward(grad, logits, targets, normalizer, num_classes, alpha, gamma, scale):
    return _empty_gradients(logits)


@torch.library.register_fake("retinanet_ext::multilevel_focal_loss_with_grad")
def _fake_with_grad(logits, targets, normalizer, num_classes, alpha, gamma, scale):
    return targets.new_empty((), dtype=torch.float32), _empty_gradients(logits)


@torch.library.register_fake("retinanet_ext::multilevel_focal_loss_refresh_grad")
def _fake_refresh_grad(*_arguments):
    pass


def _raw_setup_context(ctx, inputs, output):
    logits, targets, normalizer = inputs[:3]
    ctx.save_for_backward(targets, normalizer, *logits)
    ctx.options = inputs[3:]


def _raw_backward(ctx, grad):
    if ctx.needs_input_grad[2]:
        raise RuntimeError("multilevel_focal_loss: the operator has no gradient for normalizer; detach it")
    targets, normalizer, *logits = ctx.saved_tensors
    grads = torch.ops.retinanet_ext.multilevel_focal_loss_backward(grad, logits, targets, normalizer, *ctx.options)
    return (grads, *(None,) * 6)


DOUBLE_BACKWARD = (
    "multilevel_focal_loss: second derivatives are not implemented. "
    "retinanet_ext.reference.multilevel_focal_loss, in plain PyTorch, has them."
)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(DOUBLE_BACKWARD)


def _not_differentiable(ctx, *grads):
    raise RuntimeError(
        "multilevel_focal_loss_with_grad returns the gradients; to differentiate, use multilevel_focal_loss"
    )


torch.library.register_autograd("retinanet_ext::multilevel_focal_loss", _raw_backward, setup_context=_raw_setup_context)
torch.library.register_autograd("retinanet_ext::multilevel_focal_loss_backward", _no_double_backward)
torch.library.register_autograd("retinanet_ext::multilevel_focal_loss_with_grad", _not_differentiable)


def _by_entry(function, info, in_dims, arguments):
    """`function` of each entry of the vmapped dimension of the tensors in `arguments`."""
    return [
        function(
            *(
                argument.select(dim, entry) if isinstance(dim, int) else argument
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for entry in range(info.batch_size)
    ]


class _MultilevelBackward(torch.autograd.Function):
    """The gradients as a Function of its own, so that asking for a second derivative fails loudly."""

    @staticmethod
    def forward(grad, targets, normalizer, options, *logits):
        return tuple(_backward(grad, logits, targets, normalizer, *options))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        entries = _by_entry(_MultilevelBackward.apply, info, in_dims, arguments)
        return tuple(torch.stack(level) for level in zip(*entries, strict=True)), (0,) * len(entries[0])


def _gradients(grad, targets, normalizer, options, logits) -> tuple[Tensor, ...]:
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        # torch.autograd.grad(is_grads_batched=True) has no rule for an operator that returns a list.
        one = torch.ones((), dtype=torch.float32, device=targets.device)
        wide = [level if level.dtype == torch.float64 else level.float() for level in logits]
        if normalizer is not None:
            normalizer = normalizer.to(wide[0].dtype)
        unscaled = _MultilevelBackward.apply(one, targets, normalizer, options, *wide)
        return tuple((gradient * grad).to(logits[0].dtype) for gradient in unscaled)
    return _MultilevelBackward.apply(grad, targets, normalizer, options, *logits)


class _Multilevel(torch.autograd.Function):
    @staticmethod
    def forward(targets, normalizer, options, *logits):
        return _forward(logits, targets, normalizer, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        targets, normalizer, ctx.options, *logits = inputs
        ctx.save_for_backward(targets, normalizer, *logits)

    @staticmethod
    def backward(ctx, grad):
        targets, normalizer, *logits = ctx.saved_tensors
        return None, None, None, *_gradients(grad, targets, normalizer, ctx.options, logits)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return torch.stack(_by_entry(_Multilevel.apply, info, in_dims, arguments)), 0


class _TrainingMultilevel(torch.autograd.Function):
    """Eager training: the backward pass may find its gradients ready, see `one_pass`."""

    @staticmethod
    def forward(ctx, targets, normalizer, options, was_one, *logits):
        ctx.options, ctx.was_one = options, was_one
        ctx.save_for_backward(targets, normalizer, *logits)
        if was_one.item():
            loss, ctx.grad_logits = _with_grad(logits, targets, normalizer, *options)
        else:
            loss, ctx.grad_logits = _forward(logits, targets, normalizer, *options), None
        return loss

    @staticmethod
    def backward(ctx, grad):
        targets, normalizer, *logits = ctx.saved_tensors
        # Handed over once: whoever gets them may write to them, and a second backward pass recomputes.
        grad_logits, ctx.grad_logits = ctx.grad_logits, None
        if torch.is_grad_enabled() or not one_pass.is_plain(grad):
            return *(None,) * 4, *_gradients(grad, targets, normalizer, ctx.options, logits)
        filled = grad_logits is not None
        if not filled:
            grad_logits = _empty_gradients(logits)
        _refresh_grad(grad_logits, ctx.was_one, grad, logits, targets, normalizer, *ctx.options, filled)
        return *(None,) * 4, *grad_logits


def multilevel_focal_loss(
    logits: Sequence[Tensor],
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Focal loss over all pyramid levels of a dense detector, from the heads' outputs as they are.

    Args:
        logits: one tensor a level, either [B, A*K, H, W] as the convolution leaves it (channel ``a*K + k``; contiguous
            or channels_last) or [B, H*W*A, K]. One floating dtype, one device.
        targets: [B, N] integer class of each anchor, N over all levels in the order level, row y, column x, anchor a.
            [0, K) is the positive class, -1 background, -2 ignored; any other value is background.
        alpha: weight of positive elements in [0, 1], or -1 for no balancing.
        gamma: focusing exponent, >= 0.
        normalizer: what each image's loss is divided by: a number, or a scalar or [B] tensor; no gradient flows into
            it; positive (of 0 the loss is inf or NaN). Default 1. torchvision's RetinaNet loss is
            ``normalizer = B * max(1, foreground of the image)``.

    Returns:
        float32 scalar: the sum over images of loss_b / normalizer_b.

    Raises:
        ValueError: shapes that do not fit together, or an option outside its range.
        TypeError: ``logits`` is no list of tensors, ``targets`` no tensor, or an option no number.

    Source: arXiv 1708.02002, equation 5.
    """
    num_classes = _check_multilevel(logits, targets, alpha, gamma, normalizer)
    if num_classes == 0:
        return torch.stack([level.float().sum() for level in logits]).sum()  # of no elements
    if targets.dtype != torch.int64 and targets.dtype != torch.int32:
        targets = targets.long()
    scale = 1.0
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().to(compute_dtype(logits[0].dtype))
    elif normalizer is not None:
        scale = 1.0 / normalizer if normalizer else math.copysign(math.inf, normalizer)
        normalizer = None
    options = Options(num_classes, float(alpha), float(gamma), float(scale))
    if torch.compiler.is_compiling():
        return _forward(list(logits), targets, normalizer, *options)
    if one_pass.is_allowed(logits, targets, normalizer):
        was_one = one_pass.was_one("multilevel_focal_loss", targets.device)
        if was_one is not None:
            return _TrainingMultilevel.apply(targets, normalizer, options, was_one, *logits)
    return _Multilevel.apply(targets, normalizer, options, *logits)


def _check_multilevel(logits, targets, alpha, gamma, normalizer) -> int:
    """The number of classes; a ValueError or TypeError that names the argument, what was expected and what came."""
    name = "multilevel_focal_loss"
    if isinstance(logits, Tensor) or not isinstance(logits, Sequence):
        raise TypeError(f"{name}: logits must be a list of tensors, one a level, and is {type(logits).__name__}")
    if len(logits) == 0:
        raise ValueError(f"{name}: logits must be a list of one tensor at least, and is empty")
    for argument, value in (
        ("targets", targets),
        *((f"logits[{i}]", level) for i, level in enumerate(logits)),
    ):
        check_dense(name, argument, value)
    if targets.dim() != 2 or targets.dtype not in INDICES:
        raise ValueError(
            f"{name}: targets must be integers of shape [B, N], and are {targets.dtype} of shape {tuple(targets.shape)}"
        )
    batch, num_anchors = targets.shape
    for i, level in enumerate(logits):
        if level.dim() not in (3, 4) or level.shape[0] != batch:
            raise ValueError(
                f"{name}: logits[{i}] must be [{batch}, A*K, H, W] or [{batch}, n, K], and has shape "
                f"{tuple(level.shape)}"
            )
        if level.dtype not in FLOATING or level.dtype != logits[0].dtype:
            raise ValueError(f"{name}: logits must share one floating dtype, and logits[{i}] is {level.dtype}")
        if level.device != targets.device:
            raise ValueError(
                f"{name}: logits and targets must be on one device; logits[{i}] is on {level.device}, "
                f"targets on {targets.device}"
            )
    num_classes = infer_num_classes(logits, num_anchors)
    per_image = sum(level.numel() for level in logits)
    if per_image != batch * num_anchors * num_classes:
        raise ValueError(
            f"{name}: targets name {num_anchors} anchors an image, and logits of shapes "
            f"{[tuple(level.shape) for level in logits]} are not {num_anchors} times a whole number of classes"
        )
    for i, level in enumerate(logits):
        channels = level.shape[1] if level.dim() == 4 else level.shape[2]
        if (num_classes and channels % num_classes) or (level.dim() == 3 and channels != num_classes):
            raise ValueError(
                f"{name}: logits[{i}] has {channels} channels, which do not hold whole anchors of {num_classes} classes"
            )
    check_alpha(name, alpha)
    check_gamma(name, gamma)
    if isinstance(normalizer, Tensor):
        check_real(name, "normalizer", normalizer)
        if normalizer.numel() != 1 and tuple(normalizer.shape) != (batch,):
            raise ValueError(
                f"{name}: normalizer must be a number, or a scalar or [{batch}] tensor, and has shape "
                f"{tuple(normalizer.shape)}"
            )
        if normalizer.device != targets.device:
            raise ValueError(
                f"{name}: normalizer must be on the device of logits, {targets.device}, and is on {normalizer.device}"
            )
    elif normalizer is not None and not isinstance(normalizer, NUMBERS):
        raise TypeError(f"{name}: normalizer must be a number or a tensor, and is {type(normalizer).__name__}")
    return num_classes
