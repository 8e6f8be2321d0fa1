"""The most memory that a call holds at a time, beyond what was held before it; whether it ran out of memory; how much
there is."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


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
        before = _bytes_of(STATUS, "VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
    result = call()
    peak = _bytes_of(STATUS, "VmHWM")
    del result
    return max(0, peak - before)


def out_of_memory(error: BaseException) -> bool:
    """Whether a call failed because there was no more memory: on the CPU PyTorch says so by a RuntimeError."""
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)
    )


def system_memory() -> tuple[int, int] | None:
    """Bytes that a process may still take, and all that the machine, or its container, has; None where the system does
    not say (only Linux does)."""
    try:
        free, total = _bytes_of(MEMORY, "MemAvailable"), _bytes_of(MEMORY, "MemTotal")
    except (OSError, TypeError):
        return None
    try:
        most, taken = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return free, total
    return min(free, most - taken), min(total, most)


def _bytes_of(path: Path, field: str) -> int:
    """Of a line "field: N kB"."""
    return int(re.search(rf"{field}:\s+(\d+) kB", path.read_text())[1]) * 1024
