"""When a training step may compute a loss and its gradient in one pass over the logits.

The plain path computes the loss in the forward pass and recomputes from the logits in the backward pass. Where nobody
can see the difference, the forward pass computes the gradient as well, for the upstream gradient of 1 that a plain
``loss.backward()`` brings, and the backward pass hands it over. It looks at the upstream gradient first, on the device,
and recomputes when that is not 1: both paths give the same bits in every case. (What can be seen is memory: the
gradient exists from the forward pass on.)

An upstream gradient that is not 1 (a loss divided after the sum, a loss scale) makes the one pass a waste. So each
backward pass leaves in host memory whether it was 1, and the next forward pass goes by that. On CUDA the answer may
still be on its way: it decides about speed only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Not float64, where nobody is in a hurry, and not float16, which is trained under a loss scale.
DTYPES = (torch.float32, torch.bfloat16)

_flags: dict[tuple[str, torch.device], Tensor] = {}


def was_one(operator: str, device: torch.device) -> Tensor | None:
    """int32 [1] in host memory: whether the last upstream gradient was 1. Begins as 1.

    None where it does not exist yet and cannot be made: pinned memory is not allocated during a graph capture.
    """
    key = operator, device
    if key not in _flags:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _flags[key] = torch.ones(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    return _flags[key]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors in eager mode: nothing traces, transforms or imitates them."""
    return (
        all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and not any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors if tensor is not None)
    )


def is_allowed(logits: list[Tensor], *others: Tensor | None) -> bool:
    """Whether the loss of `logits` takes the path whose backward pass may find its gradient ready.

    Hooks on saved tensors (checkpointing, offloading) promise that nothing else keeps memory between the passes.
    """
    return (
        torch.is_grad_enabled()
        and logits[0].dtype in DTYPES
        and any(level.requires_grad for level in logits)
        and is_plain(*logits, *others)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and torch.autograd.forward_ad._current_level < 0
    )
