"""`retinanet-ext env`: what a bug report needs to know about this environment, and what is wrong with it.

This module is also loaded by itself when the package does not import, so it imports nothing of it at its top.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
EXTRAS = {name: name.lower() for name in ("Pillow", "faster-coco-eval", "matplotlib", "tqdm", "PyYAML")}
PEERS = ("torchvision", "mmcv", "detectron2", "apex")


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(*command: str, containing: str = "") -> str | None:
    """The first line with a given word that a command prints, or None where there is no such command or line."""
    if shutil.which(command[0]) is None:
        return None
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (output.stdout or output.stderr).splitlines()
    return next((line.strip() for line in lines if line.strip() and containing in line), None)


def nvcc_release() -> str | None:
    """The line of `nvcc --version` that names the release."""
    return first_line("nvcc", "--version", containing="release")


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def torch_lines(problems: list[str]) -> list[tuple[str, str]]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        problems.append(f'torch does not import ({error}): pip install "torch>=2.10"')
        return [("torch", "does not import")]
    lines = [
        ("torch", f"{torch.__version__} at {Path(torch.__file__).parent}"),
        ("torch CUDA", str(torch.version.cuda or "none: a CPU build")),
        ("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
    ]
    if torch.version.cuda is None:
        return lines
    driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    lines.append(("NVIDIA driver", driver or "no nvidia-smi"))
    if not torch.cuda.is_available():
        lines.append(("GPUs", "none that torch can use"))
        if driver:
            problems.append("there is an NVIDIA driver, and torch.cuda.is_available() is False: is the driver too old?")
        return lines
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            (
                f"GPU {index}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB",
            )
        )
    return lines


def library_lines(problems: list[str]) -> list[tuple[str, str]]:
    """The compiled library: what was built, whether it loads, whether it computes."""
    try:
        info = json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError) as error:
        info = {}
        problems.append(f"the record of the build, _build_info.json, cannot be read: {error}")
    cuda = f"yes, CUDA {info.get('cuda_version')}" if info.get("cuda") else "no"
    lines = [
        ("retinanet_ext", f"{info.get('version') or version_of('retinanet_ext') or 'unknown'} at {PACKAGE}"),
        ("built against", f"torch {info.get('torch', 'unknown')}, {info.get('cxx', 'unknown compiler')}"),
        ("built for CUDA", f"{cuda} ({info.get('cuda_reason', 'no record of the build')})"),
    ]
    if info.get("cuda_archs"):
        lines.append(("GPU architectures", " ".join(info["cuda_archs"])))
    try:
        package = importlib.import_module("retinanet_ext")
    except Exception as error:
        problems.append(f"import retinanet_ext fails: {error}")
        lines.append(("compiled library", "does not load"))
        return lines
    import torch

    state = package.build_info()
    lines.append(("CUDA operators", "loaded" if state["cuda_loaded"] else f"not loaded: {state['cuda_missing']}"))
    if not state["cuda_loaded"] and torch.cuda.is_available():
        problems.append(f"there is a GPU, and the CUDA operators are not loaded: {state['cuda_missing']}")
    for device in ["cpu"] + (["cuda"] if state["cuda_loaded"] and torch.cuda.is_available() else []):
        lines.append((f"self-test on {device}", self_test(package, device, problems)))
    return lines


def self_test(package, device: str, problems: list[str]) -> str:
    """Runs the focal loss and compares it with the reference."""
    import torch

    logits = torch.linspace(-8, 8, 80, device=device).view(8, 10)
    targets = torch.arange(-2, 6, device=device)
    try:
        loss = package.sigmoid_focal_loss(logits, targets, reduction="sum").double()
        expected = package.reference.sigmoid_focal_loss(logits.double(), targets, reduction="sum")
    except Exception as error:
        problems.append(f"sigmoid_focal_loss fails on {device}: {error}")
        return "failed"
    if not torch.isclose(loss, expected, rtol=1e-5):
        problems.append(f"sigmoid_focal_loss on {device} gives {loss.item()}, and {expected.item()} was expected")
        return "failed"
    return "passed"


def environment_report() -> tuple[str, list[str]]:
    """The report as text, and what is wrong, one sentence each (empty where all is well)."""
    problems: list[str] = []
    lines = [
        ("Python", f"{platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.platform()}, {platform.machine()}"),
        ("processor", processor()),
        *torch_lines(problems),
        ("NumPy", version_of("numpy") or "not installed"),
        *library_lines(problems),
        ("C++ compiler", first_line("c++", "--version") or "none"),
        ("nvcc", nvcc_release() or "none on the PATH"),
    ]
    lines += [(name, version_of(package) or "not installed") for name, package in EXTRAS.items()]
    lines += [(name, version) for name in PEERS if (version := version_of(name))]
    settings = {name: value for name, value in os.environ.items() if name.startswith("RETINANET_EXT_")}
    lines += list(settings.items())
    missing = [name for name, package in EXTRAS.items() if version_of(package) is None]
    if missing:
        lines.append(("note", 'train, val, predict and demo need: pip install "retinanet_ext[train]"'))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines), problems


def print_report() -> int:
    """Prints the report; the exit status says whether something is wrong."""
    text, problems = environment_report()
    print(text)
    if not problems:
        print("\nNo problem was found.\nnext: retinanet-ext demo")
        return 0
    print("\nWhat is wrong:")
    for problem in problems:
        print(f"  - {problem}")
    print("next: retinanet-ext env; again, once these are mended: a bug report needs all of the above")
    return 1
