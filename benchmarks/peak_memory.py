"""The most memory that a call holds at a time, beyond what was held before it; and whether it ran out of memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes, with what the call returns: on CUDA those of PyTorch's allocator, on the CPU the pages of this process,
    of which a few hundred kilobytes may belong to something else. None where the system does not count them (only
    Linux does).

    What the call frees first, such as the gradients of the call before, is not counted again when it is allocated anew.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that were freed and kept would not count as new ones
        CLEAR_REFS.write_text("5")  # the peak begins anew
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def out_of_memory(error: BaseException) -> bool:
    """Whether a call failed because there was no more memory: on the CPU PyTorch says so by a RuntimeError."""
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)
    )


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024
