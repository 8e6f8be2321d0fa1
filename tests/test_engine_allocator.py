"""Freed memory stays with a process that works on the CPU."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import retinanet_ext

FILE = Path(retinanet_ext.__file__).parent / "engine" / "allocator.py"
# Megabytes that the process still holds after it has freed 200; without PyTorch, whose import would take seconds.
PROGRAM = """
import ctypes, re, runpy, sys
namespace = runpy.run_path(sys.argv[1])
done = namespace["keep_freed_memory"]() if sys.argv[2] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

before = resident()
block = libc.malloc(200 << 20)
libc.memset(block, 1, 200 << 20)
libc.free(block)
print(done, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("what", "setting", "expected"),
    [
        ("keep", {}, "True"),
        ("leave", {}, "None"),
        ("keep", {"MALLOC_MMAP_MAX_": "9"}, "False"),
        ("keep", {"MALLOC_TOP_PAD_": "0"}, "False"),
        ("keep", {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"}, "False"),
    ],
)
def test_freed_memory_is_kept(what, setting, expected, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment.update(setting)
    command = [sys.executable, "-c", PROGRAM, str(FILE), what]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    done, kept = run.stdout.split()
    assert done == expected
    assert int(kept) > 190 if expected == "True" else int(kept) < 10
