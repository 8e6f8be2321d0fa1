"""The box coder, boxes as deltas from anchors and back: public wrappers, autograd, fake kernels and vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _load  # noqa: F401 - registers the operators
from ..reference.anchor_match import DELTA_CLIP
from .batching import is_plain_call, leading_dimension
from .box_checks import check_device, check_floating, check_weights


class _Coder(NamedTuple):
    """One of the two directions."""

    name: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def of_name(name: str) -> _Coder:
        operators = torch.ops.retinanet_ext
        return _Coder(name, getattr(operators, name).default, getattr(operators, name + "_backward").default)


_ENCODE, _DECODE = _Coder.of_name("encode_boxes"), _Coder.of_name("decode_boxes")


def _fake_forward(values, anchors, *_options):
    shape = torch.broadcast_shapes(values.shape, anchors.shape)
    return values.new_empty(shape, dtype=torch.promote_types(values.dtype, anchors.dtype))


def _fake_backward(grad, values, anchors, *options):
    compute = torch.promote_types(grad.dtype, torch.float32)

    def gradient(argument, wanted):
        if not wanted:
            return argument.new_empty((0,))
        return argument.new_empty(grad.shape, dtype=argument.dtype if argument.shape == grad.shape else compute)

    return gradient(values, options[-2]), gradient(anchors, options[-1])


def _summed(gradients: Sequence[Tensor], arguments: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the arguments from those of the broadcast shape; None where nobody asks."""
    return [
        gradient.sum_to_size(argument.shape).to(argument.dtype) if is_wanted else None
        for gradient, argument, is_wanted in zip(gradients, arguments, wanted, strict=True)
    ]


def _register(coder: _Coder) -> None:
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    def backward(ctx, grad):
        arguments = ctx.saved_tensors  # once: checkpointing refuses to unpack them again
        wanted = ctx.needs_input_grad[:2]
        gradients = coder.backward(grad, *arguments, *ctx.options, *wanted)
        return *_summed(gradients, arguments, wanted), *(None,) * len(ctx.options)

    def no_double_backward(ctx, *grads):
        raise RuntimeError(_double_backward_message(coder))

    name = "retinanet_ext::" + coder.name
    torch.library.register_fake(name, _fake_forward)
    torch.library.register_fake(name + "_backward", _fake_backward)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_autograd(name + "_backward", no_double_backward)


def _double_backward_message(coder: _Coder) -> str:
    return (
        f"{coder.name}: second derivatives are not implemented. "
        f"retinanet_ext.reference.{coder.name}, in plain PyTorch, has them."
    )


_register(_ENCODE)
_register(_DECODE)


class _CodeBackward(torch.autograd.Function):
    """The gradients as a Function of its own, so that asking for a second derivative fails loudly."""

    @staticmethod
    def forward(coder, grad, values, anchors, options):
        return coder.backward(grad, values, anchors, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.coder = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(_double_backward_message(ctx.coder))

    @staticmethod
    def vmap(info, in_dims, coder, grad, values, anchors, options):
        # repeated, because the upstream gradient has to have the shape that both others broadcast to
        tensors = leading_dimension((grad, values, anchors), in_dims[1:4], repeat=info.batch_size)
        gradients = _CodeBackward.apply(coder, *tensors, options)
        return gradients, tuple(0 if wanted else None for wanted in options[-2:])


class _Code(torch.autograd.Function):
    @staticmethod
    def forward(coder, values, anchors, options):
        return coder.forward(values, anchors, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.coder, values, anchors, ctx.options = inputs
        ctx.save_for_backward(values, anchors)

    @staticmethod
    def backward(ctx, grad):
        arguments = ctx.saved_tensors  # once: checkpointing refuses to unpack them again
        wanted = ctx.needs_input_grad[1:3]
        gradients = _CodeBackward.apply(ctx.coder, grad, *arguments, (*ctx.options, *wanted))
        return None, *_summed(gradients, arguments, wanted), None

    @staticmethod
    def vmap(info, in_dims, coder, values, anchors, options):
        return _Code.apply(coder, *leading_dimension((values, anchors), in_dims[1:3]), options), 0


def _code(coder: _Coder, values: Tensor, anchors: Tensor, *options: float) -> Tensor:
    if torch.compiler.is_compiling() or is_plain_call(values, anchors):
        return coder.forward(values, anchors, *options)
    return _Code.apply(coder, values, anchors, options)


def encode_boxes(gt_boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes as deltas from anchors (Girshick et al., 2014, appendix C): what the box subnet is trained on.

    ``dx = wx (cx - cx_a) / w_a``, ``dy`` likewise, ``dw = ww log(w / w_a)``, ``dh`` likewise. Differentiable.

    Args:
        gt_boxes: ``[..., 4]``, floating.
        anchors: ``[..., 4]``, floating; leading dimensions broadcast with those of ``gt_boxes``.
        weights: ``(wx, wy, ww, wh)``, positive.

    Returns:
        ``[..., 4]``, (dx, dy, dw, dh), in the wider of the two types; halves are computed in float32.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, weights that are not
            positive.
    """
    _check_coder("encode_boxes", "gt_boxes", gt_boxes, anchors, weights)
    return _code(_ENCODE, gt_boxes, anchors, *map(float, weights))


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = DELTA_CLIP,
) -> Tensor:
    """Boxes from deltas and anchors, the inverse of `encode_boxes`. Differentiable.

    Args:
        deltas: (dx, dy, dw, dh) ``[..., 4]``, floating.
        anchors: ``[..., 4]``, floating; leading dimensions broadcast with those of ``deltas``.
        weights: ``(wx, wy, ww, wh)``, positive.
        clip: dw and dh, after division by their weight, are at most this: no box is more than e^clip times
            its anchor. log(1000 / 16) in every RetinaNet.

    Returns:
        ``[..., 4]`` in the wider of the two types; halves are computed in float32.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, weights that are not
            positive.
    """
    _check_coder("decode_boxes", "deltas", deltas, anchors, weights)
    return _code(_DECODE, deltas, anchors, *map(float, weights), float(clip))


def _check_coder(op: str, name: str, values: Tensor, anchors: Tensor, weights: Sequence[float]) -> None:
    for argument, tensor in ((name, values), ("anchors", anchors)):
        check_floating(op, argument, tensor)
        if tensor.dim() < 1 or tensor.shape[-1] != 4:
            raise ValueError(f"{op}: {argument}: expected shape [..., 4], got {list(tensor.shape)}")
    check_device(op, "anchors", anchors, values.device)
    try:
        torch.broadcast_shapes(values.shape, anchors.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: anchors: expected a shape that broadcasts with {list(values.shape)}, got {list(anchors.shape)}"
        ) from None
    check_weights(op, weights)
