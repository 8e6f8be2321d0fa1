"""Functions of test files in processes that are started anew, which cannot import a test file by its name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import retinanet_ext

# What the CPU operators are compiled for. One that the processor lacks gives the best that it has.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def place_of(function: Callable) -> tuple[str, str, str]:
    """Where another process finds a function of a module."""
    return function.__module__, function.__code__.co_filename, function.__name__


def load(module_name: str, file: str, name: str) -> Callable:
    """The function of such a place."""
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, name)


# The instruction set is chosen once, at the first call: so a process forks for each, everything imported.
_PROGRAM = """
import os, sys, torch, traceback
from started_anew import load
folder, *place = sys.argv[1:5]
function = load(*place)
for isa in sys.argv[5:]:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ["RETINANET_EXT_CPU_ISA"] = isa
            torch.manual_seed(0)
            torch.save(function(), f"{folder}/{isa}.pt")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, isa
"""


def on_instruction_sets(function: Callable[[], Any], folder: Path, names=INSTRUCTION_SETS) -> dict[str, Any]:
    """What ``function()``, of a test file, returns on each: tensors in lists, tuples, dictionaries.

    Args:
        folder: an empty one, outside the checkout, whose package is not built.
        names: values of RETINANET_EXT_CPU_ISA.
    """
    paths = (Path(retinanet_ext.__file__).parents[1], Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PROGRAM, str(folder), *place_of(function), *names]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: torch.load(folder / f"{name}.pt") for name in names}
