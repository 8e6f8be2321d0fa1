"""The examples run as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, folder, *options):
    """In another folder: there the installed package is found, not the sources."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_accelerated_torchvision(tmp_path):
    pytest.importorskip("torchvision", reason="the example accelerates torchvision's RetinaNet")
    lines = run("accelerated_torchvision.py", tmp_path, "--size", "64", "--steps", "1").splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["RetinaNet", "AcceleratedRetinaNet"]
    assert float(re.search(r"losses: (\S+) in the first step", lines[2])[1]) < 2e-6
    assert re.fullmatch(r"[1-9]\d* detections, labels the same", lines[3])
