"""Intersection over union of every pair of boxes: public wrapper, autograd, fake kernel and vmap.

The forward pass is compiled, and on the CPU the gradient, too, where nothing differentiates it in turn. Elsewhere the
gradient, which few need, is PyTorch operations on the [..., N, M] matrix, computed anew from the boxes: nothing of that
size is kept from the forward pass, and second derivatives come with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _load, reference  # noqa: F401 - _load registers the operators
from .batching import is_plain_call, leading_dimension
from .box_checks import check_device, describe

BOX_FORMATS = ("xyxy", "xywh", "cxcywh")  # in the order of their numbers in the schema

_forward = torch.ops.retinanet_ext.box_iou.default
_gradient_kernel = torch.ops.retinanet_ext.box_iou_backward.default


@torch.library.register_fake("retinanet_ext::box_iou")
def _fake_forward(boxes1, boxes2, fmt):
    batch = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    dtype = torch.promote_types(boxes1.dtype, torch.float32)
    return boxes1.new_empty((*batch, boxes1.shape[-2], boxes2.shape[-2]), dtype=dtype)


@torch.library.register_fake("retinanet_ext::box_iou_backward")
def _fake_backward(grad, boxes1, boxes2, fmt):
    batch = grad.shape[:-2]
    return grad.new_empty((*batch, boxes1.shape[-2], 4)), grad.new_empty((*batch, boxes2.shape[-2], 4))


def _corners_and_sizes(boxes: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """[..., n, 2] each: the lower and the upper corner, and the size."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if fmt == "xyxy":
        return first, second, second - first
    if fmt == "xywh":
        return first, first + second, second
    return first - second / 2, first + second / 2, second


def _boxes_gradient(low: Tensor, high: Tensor, size: Tensor, fmt: str) -> Tensor:
    """[..., n, 4] from the gradients of what `_corners_and_sizes` returns."""
    if fmt == "xyxy":
        return torch.cat((low - size, high + size), dim=-1)
    if fmt == "xywh":
        return torch.cat((low + high, high + size), dim=-1)
    return torch.cat((low + high, (high - low) / 2 + size), dim=-1)


def _split(gradient: Tensor, first: Tensor, second: Tensor, first_wins: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a minimum or maximum as that of its two arguments: half to each where they are equal."""
    share = torch.where(first == second, 0.5, first_wins.to(gradient.dtype))
    to_first = gradient * share
    return to_first, gradient - to_first


def _gradients(grad: Tensor, boxes1: Tensor, boxes2: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """The gradients of both boxes; differentiable."""
    low1, high1, size1 = _corners_and_sizes(boxes1.to(grad.dtype), fmt)
    low2, high2, size2 = _corners_and_sizes(boxes2.to(grad.dtype), fmt)
    # each first box beside each second one: [..., N, M, 2]
    first_low, first_high = low1[..., None, :], high1[..., None, :]
    second_low, second_high = low2[..., None, :, :], high2[..., None, :, :]
    overlap = torch.minimum(first_high, second_high) - torch.maximum(first_low, second_low)
    sides = reference.anchor_match.at_least(overlap, 0)
    intersection = sides[..., 0] * sides[..., 1]
    area1, area2 = size1[..., 0] * size1[..., 1], size2[..., 0] * size2[..., 1]
    union = area1[..., None] + area2[..., None, :] - intersection

    per_union = grad / union
    by_area = -per_union * intersection / union  # the union's gradient: with + of both areas, - of the intersection
    by_intersection = per_union - by_area
    by_overlap = torch.where(overlap >= 0, by_intersection[..., None] * sides.flip(-1), 0.0)
    by_highs = _split(by_overlap, first_high, second_high, first_high < second_high)
    by_lows = _split(-by_overlap, first_low, second_low, first_low > second_low)

    result = []
    for boxes, size, own, others in ((boxes1, size1, 0, -2), (boxes2, size2, 1, -3)):
        by_size = by_area.sum(dim=others + 1)[..., None] * size.flip(-1)
        gradient = _boxes_gradient(by_lows[own].sum(dim=others), by_highs[own].sum(dim=others), by_size, fmt)
        result.append(gradient.sum_to_size(boxes.shape).to(boxes.dtype))
    return result[0], result[1]


def _setup_context(ctx, inputs, output):
    boxes1, boxes2, ctx.fmt = inputs
    ctx.save_for_backward(boxes1, boxes2)


def _backward(ctx, grad):
    boxes1, boxes2 = ctx.saved_tensors
    if grad.device.type != "cpu" or not is_plain_call(grad, boxes1, boxes2):
        return *_gradients(grad, boxes1, boxes2, BOX_FORMATS[ctx.fmt]), None
    gradients = _gradient_kernel(grad.contiguous(), boxes1, boxes2, ctx.fmt)
    first, second = (
        gradient.sum_to_size(boxes.shape).to(boxes.dtype)
        for gradient, boxes in zip(gradients, (boxes1, boxes2), strict=True)
    )
    return first, second, None


torch.library.register_autograd("retinanet_ext::box_iou", _backward, setup_context=_setup_context)


class _BoxIou(torch.autograd.Function):
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info, in_dims, boxes1, boxes2, fmt):
        return _BoxIou.apply(*leading_dimension((boxes1, boxes2), in_dims[:2]), fmt), 0


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """Intersection over union of every pair of boxes: a drop-in for ``torchvision.ops.box_iou``.

    In float32 and float64 the result is torchvision's to the bit: ``area = (x2 - x1) * (y2 - y1)``,
    ``union = (area1 + area2) - intersection``, every operation rounded on its own. Halves are computed in
    float32, from the first subtraction on. Two boxes without area have an IoU of NaN (0 / 0).

    Differentiable, more than once. The forward pass takes memory for its result alone, the backward pass on the CPU for
    the boxes' gradients alone; on CUDA, and where it is differentiated in turn, for several ``[..., N, M]`` matrices.
    There is no forward-mode derivative. Integers, and float64 beside another type, are computed by PyTorch
    operations, as in torchvision.

    Args:
        boxes1: ``[..., N, 4]``.
        boxes2: ``[..., M, 4]``.
        fmt: "xyxy", corners; "xywh", corner and size; "cxcywh", centre and size.

    Returns:
        ``[..., N, M]``; float32, or float64 if a box is.

    Raises:
        TypeError: something that is no tensor of real numbers.
        ValueError: a last dimension other than 4, leading dimensions that do not broadcast, mixed devices, an
            unknown ``fmt``.
    """
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype == torch.bool:
            raise TypeError(f"box_iou: {name}: expected a tensor of real numbers, got {describe(boxes)}")
        if boxes.dim() < 2 or boxes.shape[-1] != 4:
            raise ValueError(f"box_iou: {name}: expected shape [..., n, 4], got {list(boxes.shape)}")
    check_device("box_iou", "boxes2", boxes2, boxes1.device)
    if fmt not in BOX_FORMATS:
        raise ValueError(f"box_iou: fmt: expected one of {BOX_FORMATS}, got {fmt!r}")
    _check_batch(boxes1, boxes2)
    if not _has_kernel(boxes1, boxes2):
        return reference.box_iou(boxes1, boxes2, fmt)
    code = BOX_FORMATS.index(fmt)
    if torch.compiler.is_compiling() or is_plain_call(boxes1, boxes2):
        return _forward(boxes1, boxes2, code)
    return _BoxIou.apply(boxes1, boxes2, code)


def _check_batch(boxes1: Tensor, boxes2: Tensor) -> None:
    if boxes1.dim() == 2 or boxes2.dim() == 2 or boxes1.shape[:-2] == boxes2.shape[:-2]:
        return
    try:
        torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"box_iou: boxes2: expected leading dimensions that broadcast with those of {list(boxes1.shape)}, "
            f"got {list(boxes2.shape)}"
        ) from None


def _has_kernel(boxes1: Tensor, boxes2: Tensor) -> bool:
    """Floating boxes of one compute type. PyTorch takes the others, as torchvision does: integers, whose areas are
    integers and exact, and float64 beside another type, which stays in its own until both meet."""
    if not boxes1.is_floating_point() or not boxes2.is_floating_point():
        return False
    return (boxes1.dtype == torch.float64) == (boxes2.dtype == torch.float64)
