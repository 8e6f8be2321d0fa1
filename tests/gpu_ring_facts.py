"""The first stage of gpu_ring.py, in a process of its own: what this machine is, and whether a built library loads.

    python tests/gpu_ring_facts.py FILE DIR

writes the facts to FILE as JSON, and tries the retinanet_ext package folder DIR. A program apart, since torch, the
driver or the library may hang or crash.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pytest", "pytest-benchmark", "hypothesis", "expecttest", "mpmath", "numpy", "torchvision", "triton")
TRAIN_PACKAGES = ("pillow", "faster-coco-eval", "matplotlib", "tqdm")
BUILD_PACKAGES = ("setuptools", "cmake", "ninja")


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(*command: str, containing: str = "") -> str | None:
    """The first line with a given word that a command prints; None where there is no such command or line."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = run.stdout.splitlines() if run.returncode == 0 else []
    return next((line.strip() for line in lines if line.strip() and containing in line), None)


def find_sanitizer() -> str | None:
    places = [os.environ.get("PATH", os.defpath)]
    places += [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))


def driver_version() -> str | None:
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver is None:
        with contextlib.suppress(OSError):
            text = Path("/proc/driver/nvidia/version").read_text()
            driver = next(iter(re.findall(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)), None)
    return driver


def machine_facts() -> dict[str, object]:
    git = ("git", "-C", str(ROOT))
    commit = output_of(*git, "rev-parse", "HEAD")
    sanitizer = find_sanitizer()
    return {
        "python": platform.python_version(),
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver())}",
        "processors": os.cpu_count(),
        "packages": {name: package_version(name) for name in (*PACKAGES, *TRAIN_PACKAGES, *BUILD_PACKAGES)},
        "nvcc": output_of("nvcc", "--version", containing="release"),
        "compute_sanitizer": sanitizer,
        "compute_sanitizer_version": output_of(sanitizer, "--version", containing="ersion ") if sanitizer else None,
        "driver": driver_version(),
        "commit": commit,
        "uncommitted_changes": output_of(*git, "status", "--porcelain") is not None if commit else None,
    }


def gpu_facts(driver: object) -> dict[str, object]:
    """torch and the first GPU; `no_gpu` says why there is none."""
    facts: dict[str, object] = {"torch": None, "torch_cuda": None, "gpu": None}
    try:
        import torch
    except Exception as error:
        return facts | {"no_gpu": f"torch does not import: {error}"}
    facts |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if torch.version.cuda is None:
        return facts | {"no_gpu": f"torch {torch.__version__} is a CPU build"}
    if not torch.cuda.is_available():
        return facts | {"no_gpu": f"torch {torch.__version__} sees none (NVIDIA driver: {driver or 'none'})"}
    torch.ones(8, device="cuda").sum().item()  # a GPU that is listed and does not work fails here
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def library_facts(library: Path) -> dict[str, object]:
    """Whether the package in that folder loads with its CUDA operators, or why not."""
    sys.path.insert(0, str(library.parent))
    try:
        import retinanet_ext
    except Exception as error:
        return {"library_loads": False, "library_error": f"{type(error).__name__}: {error}"}
    info = retinanet_ext.build_info()
    error = info["cuda_missing"]
    if Path(retinanet_ext.__file__).resolve().parent != library:
        error = f"there is no package in {library}; {retinanet_ext.__file__} was imported instead"
    return {"library_loads": error is None, "library_error": error, "library_info": info}


def write(path: Path, facts: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(partial, path)


def main(file: str, folder: str) -> None:
    library = Path(folder).resolve()
    facts = machine_facts()
    facts |= gpu_facts(facts["driver"])
    facts["library"] = str(library)
    write(Path(file), facts)  # before the library, whose loading may end this process
    if facts["torch"]:
        write(Path(file), facts | library_facts(library))
    else:
        write(Path(file), facts | {"library_loads": False, "library_error": facts["no_gpu"]})


if __name__ == "__main__":
    main(*sys.argv[1:])
