"""What every results file says of itself: when, on which machine, with which versions, of which commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import retinanet_ext
from retinanet_ext.diagnostics import processor

HERE = Path(__file__).resolve().parent
PEERS = ("torchvision", "mmcv", "apex", "fvcore", "detectron2", "pycocotools", "faster-coco-eval")


def git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def machine() -> dict[str, object]:
    facts: dict[str, object] = {
        "processor": processor(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "retinanet_ext": retinanet_ext.build_info(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }
    for peer in PEERS:
        if importlib.util.find_spec(peer.replace("-", "_")):
            facts[peer] = importlib.metadata.version(peer)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    return facts


def origin() -> dict[str, object]:
    """Date (UTC, ISO 8601) and machine. Asked for at the start of a run: the commit may be another at its end."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def write_results(path: Path, report: dict[str, object]) -> None:
    """Writes the json whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
