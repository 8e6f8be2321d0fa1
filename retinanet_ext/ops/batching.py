"""Operators whose leading dimensions broadcast: vmap makes one more of them; and when none of this is about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def leading_dimension(
    tensors: Sequence[Tensor], in_dims: Sequence[int | None], repeat: int | None = None
) -> list[Tensor]:
    """The tensors with their vmapped dimension first, and so many dimensions of one behind it that they broadcast.

    `repeat`: those without a vmapped dimension get one of this size, too.
    """
    rank = max(tensor.dim() - (dim is not None) for tensor, dim in zip(tensors, in_dims, strict=True))
    aligned = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        if dim is None and repeat is None:
            aligned.append(tensor)
            continue
        tensor = tensor.expand(repeat, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        aligned.append(tensor[(slice(None), *(None,) * (rank + 1 - tensor.dim()))])
    return aligned


def is_plain_call(*tensors: Tensor) -> bool:
    """Nothing is differentiated or vmapped: the raw operator will do, in half the time of a small call."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors)
