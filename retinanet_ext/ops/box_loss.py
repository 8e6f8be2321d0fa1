"""The box regression loss over foreground anchors: public wrapper, autograd and fake kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _load  # noqa: F401 - registers the operators
from ..reference.focal_loss import compute_dtype
from .box_checks import (
    Boxes,
    check_anchors,
    check_device,
    check_floating,
    check_gt_boxes,
    check_no_vmap,
    check_weights,
    no_vmap_message,
)

LOSSES = ("l1", "smooth_l1", "giou")  # in the order of their numbers in the schema

_forward = torch.ops.retinanet_ext.box_regression_loss.default
_backward = torch.ops.retinanet_ext.box_regression_loss_backward.default


class Options(NamedTuple):
    """The operator's arguments behind its tensors, in schema order."""

    loss: int
    beta: float
    wx: float
    wy: float
    ww: float
    wh: float
    scale: float  # factor of the loss: 1 / normalizer where that is a number


@torch.library.register_fake("retinanet_ext::box_regression_loss")
def _fake_forward(deltas, anchors, gt_boxes, gt_offsets, matched, normalizer, *options):
    return matched.new_empty((), dtype=compute_dtype(deltas[0].dtype))


@torch.library.register_fake("retinanet_ext::box_regression_loss_backward")
def _fake_backward(grad, deltas, anchors, gt_boxes, gt_offsets, matched, normalizer, *options):
    """Laid out as the levels that are channels_last, contiguous otherwise."""
    return [
        torch.empty_like(level)
        if level.dim() == 4 and level.numel() > 0 and level.is_contiguous(memory_format=torch.channels_last)
        else level.new_empty(level.shape)
        for level in deltas
    ]


class Problem(NamedTuple):
    """The operator's tensors in schema order."""

    deltas: Sequence[Tensor]
    anchors: Tensor
    gt_boxes: Sequence[Tensor]
    gt_offsets: Tensor | None
    matched: Tensor
    normalizer: Tensor | None

    def flat(self) -> tuple[Tensor | None, ...]:
        """Every tensor side by side, as autograd tracks and saves them."""
        return self.anchors, self.gt_offsets, self.matched, self.normalizer, *self.deltas, *self.gt_boxes

    @staticmethod
    def of_flat(num_levels: int, flat: Sequence[Tensor | None]) -> Problem:
        anchors, gt_offsets, matched, normalizer, *lists = flat
        return Problem(lists[:num_levels], anchors, lists[num_levels:], gt_offsets, matched, normalizer)


def _raw_setup_context(ctx, inputs, output):
    problem = Problem(*inputs[:6])
    ctx.save_for_backward(*problem.flat())
    ctx.num_levels, ctx.options = len(problem.deltas), inputs[6:]


def _raw_backward(ctx, grad):
    for name, index in (("anchors", 1), ("gt_boxes", 2), ("normalizer", 5)):
        needed = ctx.needs_input_grad[index]
        if any(needed) if isinstance(needed, Sequence) else needed:
            raise RuntimeError(f"box_regression_loss: the operator has no gradient for {name}; detach it")
    problem = Problem.of_flat(ctx.num_levels, ctx.saved_tensors)
    grads = torch.ops.retinanet_ext.box_regression_loss_backward(grad, *problem, *ctx.options)
    return grads, None, [None] * len(problem.gt_boxes), *(None,) * (3 + len(ctx.options))


NO_VMAP = no_vmap_message("box_regression_loss")
DOUBLE_BACKWARD = (
    "box_regression_loss: second derivatives are not implemented. "
    "retinanet_ext.reference.box_regression_loss, in plain PyTorch, has them."
)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(DOUBLE_BACKWARD)


torch.library.register_autograd("retinanet_ext::box_regression_loss", _raw_backward, setup_context=_raw_setup_context)
torch.library.register_autograd("retinanet_ext::box_regression_loss_backward", _no_double_backward)


class _BoxLossBackward(torch.autograd.Function):
    """The gradients as a Function of its own, so that asking for a second derivative fails loudly."""

    @staticmethod
    def forward(grad, options, num_levels, *flat):
        return tuple(_backward(grad, *Problem.of_flat(num_levels, flat), *options))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        if any(dim is not None for dim in in_dims[1:] if not isinstance(dim, tuple)):
            raise RuntimeError(NO_VMAP)
        grad, *rest = arguments
        entries = [_BoxLossBackward.apply(grad.select(in_dims[0], entry), *rest) for entry in range(info.batch_size)]
        return tuple(torch.stack(level) for level in zip(*entries, strict=True)), (0,) * len(entries[0])


def _gradients(grad: Tensor, options: Options, num_levels: int, flat: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    if not torch._C._functorch.is_legacy_batchedtensor(grad):
        return _BoxLossBackward.apply(grad, options, num_levels, *flat)
    # torch.autograd.grad(is_grads_batched=True) has no rule for an operator that returns a list.
    problem = Problem.of_flat(num_levels, flat)
    one = torch.ones((), dtype=grad.dtype, device=grad.device)
    wide = problem._replace(deltas=[level.to(grad.dtype) for level in problem.deltas])
    unscaled = _BoxLossBackward.apply(one, options, num_levels, *wide.flat())
    return tuple((gradient * grad).to(level.dtype) for gradient, level in zip(unscaled, problem.deltas, strict=True))


class _BoxLoss(torch.autograd.Function):
    @staticmethod
    def forward(options, num_levels, *flat):
        return _forward(*Problem.of_flat(num_levels, flat), *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.num_levels, *flat = inputs
        ctx.save_for_backward(*flat)

    @staticmethod
    def backward(ctx, grad):
        flat = ctx.saved_tensors
        grads = _gradients(grad, ctx.options, ctx.num_levels, flat)
        return *(None,) * 6, *grads, *(None,) * (len(flat) - 4 - ctx.num_levels)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        raise RuntimeError(NO_VMAP)


def box_regression_loss(
    deltas: Sequence[Tensor] | Tensor,
    anchors: Tensor,
    gt_boxes: Boxes,
    matched: Tensor,
    loss: str = "l1",
    beta: float = 1.0 / 9.0,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    normalizer: Tensor | float | None = None,
    gt_offsets: Tensor | None = None,
) -> Tensor:
    """The loss of the box subnet: ``sum_b loss_b / normalizer_b``, over foreground anchors alone.

    What other anchors predict is never read: their gradient is exactly zero even where the prediction is not
    finite. torchvision's loss has ``normalizer_b = B * max(1, foreground anchors of image b)``.

    Args:
        deltas: a level at a time as the convolution leaves it, ``[B, 4 * A, H, W]`` (channel ``4 * a + c``,
            any memory format) or ``[B, H * W * A, 4]``; or all levels as ``[B, N, 4]``. Floating.
        anchors: ``[N, 4]`` or ``[B, N, 4]``, in the order level, row, column, anchor of the cell.
        gt_boxes: ``[M_i, 4]`` for each image; or packed ``[capacity, 4]`` with ``gt_offsets``.
        matched: int32 or int64 ``[B, N]``, as `match_anchors` returns it; negative is not foreground. A number
            that is no row of the image's boxes is an error on the CPU; on CUDA, where the host would have to
            wait to know, it counts as background. No box is read for it.
        loss: "l1" and "smooth_l1" compare deltas with those of the matched box, the sum of the four
            differences; "giou" is 1 - GIoU of the decoded box (Rezatofighi et al., 2019), with torchvision's
            eps of 1e-7.
        beta: where "smooth_l1" goes over from ``d**2 / (2 beta)`` to ``d - beta / 2``; 0 is "l1". (1/9 in the
            RetinaNet paper's code and in mmdet, 0.1 in detectron2, 1 in PyTorch.)
        weights: ``(wx, wy, ww, wh)`` of the box coder, positive.
        normalizer: a number, a scalar tensor or ``[B]``, positive (of 0 the loss is inf or NaN); 1 if None.
        gt_offsets: int32 ``[B + 1]``, see `match_anchors`.

    Returns:
        A scalar, float32 (float64 if the deltas are), also under autocast. Halves are computed in float32. The
        gradient flows into ``deltas`` alone: anchors, boxes and normalizer get none.

    Raises:
        TypeError, ValueError: an argument of another type or shape, mixed devices, an unknown ``loss``, a
            negative ``beta``, weights that are not positive.
        RuntimeError: on the CPU, matches or ``gt_offsets`` that point outside ``gt_boxes``; called under vmap; a
            second derivative, which `retinanet_ext.reference.box_regression_loss` has.
    """
    levels = _check(deltas, anchors, gt_boxes, matched, loss, beta, weights, normalizer, gt_offsets)
    divisor, scale = _split_normalizer(normalizer, levels[0])
    problem = Problem(
        levels,
        _detached(anchors),
        [_detached(boxes) for boxes in ([gt_boxes] if isinstance(gt_boxes, Tensor) else gt_boxes)],
        gt_offsets,
        matched,
        divisor,
    )
    options = Options(LOSSES.index(loss), float(beta), *map(float, weights), scale)
    if torch.compiler.is_compiling():
        return _forward(*problem, *options)
    return _BoxLoss.apply(options, len(levels), *problem.flat())


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _split_normalizer(normalizer: Tensor | float | None, level: Tensor) -> tuple[Tensor | None, float]:
    """A tensor on the device, or what a number comes to as a factor of the loss."""
    if isinstance(normalizer, Tensor) and normalizer.device != level.device and not torch.compiler.is_compiling():
        normalizer = normalizer.item()  # a scalar in host memory: nothing has to be waited for
    if isinstance(normalizer, Tensor):
        return _detached(normalizer).to(level.device, compute_dtype(level.dtype), non_blocking=True), 1.0
    if normalizer is None:
        return None, 1.0
    return None, float(1.0 / normalizer if normalizer else math.copysign(math.inf, normalizer))


def _check(deltas, anchors, gt_boxes, matched, loss, beta, weights, normalizer, gt_offsets) -> list[Tensor]:
    """The levels of ``deltas``; an error that names the argument, what was expected and what came."""
    op = "box_regression_loss"
    check_no_vmap(op, deltas, anchors, gt_boxes, matched, normalizer, gt_offsets)
    batch, num_anchors, device = _check_deltas(op, deltas)
    check_anchors(op, anchors, batch)
    if anchors.shape[-2] != num_anchors:
        raise ValueError(f"{op}: anchors: expected {num_anchors}, as many as deltas, got {anchors.shape[-2]}")
    check_device(op, "anchors", anchors, device)
    num_images = check_gt_boxes(op, gt_boxes, gt_offsets, device)
    if num_images != batch:
        raise ValueError(f"{op}: gt_boxes: expected those of {batch} images, as deltas have, got {num_images}")
    if not isinstance(matched, Tensor) or matched.dtype not in (torch.int32, torch.int64):
        got = matched.dtype if isinstance(matched, Tensor) else type(matched).__name__
        raise TypeError(f"{op}: matched: expected a tensor of int32 or int64, got {got}")
    if matched.shape != (batch, num_anchors):
        raise ValueError(f"{op}: matched: expected shape [{batch}, {num_anchors}], got {list(matched.shape)}")
    check_device(op, "matched", matched, device)
    if loss not in LOSSES:
        raise ValueError(f"{op}: loss: expected one of {LOSSES}, got {loss!r}")
    if not beta >= 0:
        raise ValueError(f"{op}: beta: expected a number of at least 0, got {beta}")
    check_weights(op, weights)
    if isinstance(normalizer, Tensor):
        if normalizer.dim() > 0 and normalizer.shape != (batch,):
            raise ValueError(f"{op}: normalizer: expected a scalar or shape [{batch}], got {list(normalizer.shape)}")
        if normalizer.dim() > 0 or normalizer.device.type != "cpu":
            check_device(op, "normalizer", normalizer, device)
    return [deltas] if isinstance(deltas, Tensor) else list(deltas)


def _check_deltas(op: str, deltas: Sequence[Tensor] | Tensor) -> tuple[int, int, torch.device]:
    """Every level ``[B, 4 * A, H, W]`` or ``[B, n, 4]``. Returns ``B``, ``N`` and the device."""
    levels = [("deltas", deltas)] if isinstance(deltas, Tensor) else _named_levels(op, "deltas", deltas)
    num_anchors = 0
    for name, level in levels:
        check_floating(op, name, level)
        if level.dim() == 4 and level.shape[1] % 4 == 0:
            num_anchors += level.shape[1] // 4 * level.shape[2] * level.shape[3]
        elif level.dim() == 3 and level.shape[2] == 4:
            num_anchors += level.shape[1]
        else:
            raise ValueError(f"{op}: {name}: expected [B, 4 * A, H, W] or [B, n, 4], got {list(level.shape)}")
    first = levels[0][1]
    batch = first.shape[0]
    for name, level in levels[1:]:
        if level.shape[0] != batch:  # by shape, not len(): torch.export would take a dynamic size for a constant
            raise ValueError(f"{op}: {name}: expected a batch of {batch}, as the first level, got {level.shape[0]}")
        if level.dtype != first.dtype:
            raise TypeError(f"{op}: {name}: expected {first.dtype}, as the first level, got {level.dtype}")
        check_device(op, name, level, first.device)
    return batch, num_anchors, first.device


def _named_levels(op: str, name: str, levels: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    if not isinstance(levels, Sequence):
        raise TypeError(f"{op}: {name}: expected a tensor or a list of tensors, got {type(levels).__name__}")
    if len(levels) == 0:
        raise ValueError(f"{op}: {name}: expected at least one level, got an empty list")
    return [(f"{name}[{index}]", level) for index, level in enumerate(levels)]
