"""Loads the compiled operators, once, and says plainly what is wrong where it can't."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
BUILD_INFO_FILE = PACKAGE / "_build_info.json"
CUDA_LIBRARY = PACKAGE / "_C_cuda.so"

REINSTALL = "pip install --force-reinstall --no-deps ."


def _read_build_info() -> dict[str, object]:
    try:
        return json.loads(BUILD_INFO_FILE.read_text())
    except (OSError, ValueError):
        return {}  # a missing or damaged record must not keep the operators from loading


def _load_cpu() -> None:
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < (2, 10):
        raise ImportError(
            f"retinanet_ext needs torch 2.10 or newer, and torch {torch.__version__} is installed: "
            'pip install -U "torch>=2.10"'
        )
    if not (PACKAGE / "_C.abi3.so").is_file():
        raise ImportError(
            f"retinanet_ext is not compiled in {PACKAGE}. In a checkout run `pip install -e .`, or start Python in "
            "another folder to use the installed package."
        )
    try:
        import_module("retinanet_ext._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled library of retinanet_ext does not load with torch {torch.__version__}: {error}. "
            f"Rebuild it for this environment, in the folder of its sources: {REINSTALL}"
        ) from error


def _cuda_mismatch() -> str | None:
    """Why CUDA operators are unavailable, as a sentence for the user; None where they are to be loaded."""
    info = _read_build_info()
    if not CUDA_LIBRARY.is_file():
        return f"retinanet_ext was built without CUDA ({info.get('cuda_reason', 'no record of the build')})"
    built = str(info.get("cuda_version") or "")
    ours, theirs = built.split(".")[0], str(torch.version.cuda).split(".")[0]
    if built and ours != theirs:
        return f"retinanet_ext was built for CUDA {built}, and this torch is for CUDA {torch.version.cuda}"
    return None


def _load_cuda() -> str | None:
    """Loads the CUDA operators where torch has CUDA. Returns why they are missing, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    missing = _cuda_mismatch()
    if missing is None:
        try:
            torch.ops.load_library(str(CUDA_LIBRARY))
        except OSError as error:
            raise ImportError(
                f"the CUDA library of retinanet_ext does not load with torch {torch.__version__}: {error}. "
                f"Rebuild it for this environment, in the folder of its sources: {REINSTALL}"
            ) from error
        return None
    message = (
        f"{missing}, so it has no kernel for CUDA tensors. Build it with CUDA, in the folder of its sources: "
        f"RETINANET_EXT_CUDA=1 {REINSTALL}"
    )

    def explain(*_args, **_kwargs):
        raise RuntimeError(message)

    for name in OPERATORS:
        _FALLBACKS.impl(name, explain, "CUDA")
    return missing


_load_cpu()
OPERATORS = [
    name.removeprefix("retinanet_ext::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("retinanet_ext::")
]
_FALLBACKS = torch.library.Library("retinanet_ext", "IMPL")
CUDA_MISSING = _load_cuda()


def build_info() -> dict[str, object]:
    """What was built, against what, and what of it is loaded.

    Returns:
        ``version``; ``torch`` whose headers were used; ``cuda``, whether the CUDA part was built, and ``cuda_reason``,
        why or why not; ``cuda_version`` of its compiler and ``cuda_archs``; ``cxx``; ``cuda_loaded`` and, where that
        is False, ``cuda_missing`` with the reason.
    """
    return {**_read_build_info(), "cuda_loaded": CUDA_MISSING is None, "cuda_missing": CUDA_MISSING}
