"""The C library's allocator, for work on the CPU."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Keeps what a step has freed for the next one, which otherwise gets every large tensor as new pages that the
    kernel must clear first. The process holds its peak until it ends, and a little more where sizes change.

    Returns:
        whether it was done: only with glibc, and not where the environment has settings of malloc (``MALLOC_...``,
        ``GLIBC_TUNABLES``). An allocator that was preloaded in malloc's place does not hear of it.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
