"""Which tensors our operators and a peer's functions have the same answer for: the ordinary ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .._load import CUDA_MISSING

HALVES = (torch.float16, torch.bfloat16)
FLOATING = (*HALVES, torch.float32, torch.float64)


def are_ordinary(*tensors: object, annotated: tuple[type, ...] = ()) -> bool:
    """Floating tensors on one device that our operators run on, and nothing that transforms or traces them.

    ``annotated``: subclasses of Tensor that are nothing but tensors with a note; others (DTensor ...) bring rules of
    their own for what is done with them.
    """
    first = tensors[0]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING or tensor.device != first.device:
            return False
        if type(tensor) not in (Tensor, torch.nn.Parameter) and not isinstance(tensor, annotated):
            return False
    if first.device.type != "meta" and not _has_operators(first):
        return False
    return torch.compiler.is_compiling() or not _is_traced()


def is_eager(tensor: Tensor | None) -> bool:
    """A device that our operators run on, and no tracer, which would record other operators than the peer's."""
    return (
        isinstance(tensor, Tensor) and _has_operators(tensor) and not torch.compiler.is_exporting() and not _is_traced()
    )


def _has_operators(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and CUDA_MISSING is None)


def _is_traced() -> bool:
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
