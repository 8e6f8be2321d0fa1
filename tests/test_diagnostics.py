"""`retinanet-ext env`: a report that also works where the package does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import retinanet_ext
from retinanet_ext import _load, diagnostics

PACKAGE = Path(retinanet_ext.__file__).parent


def test_report_names_versions_build_and_self_test():
    text, problems = diagnostics.environment_report()
    assert problems == []
    for part in ("Python", "torch", "built against", "built for CUDA", "self-test on cpu"):
        assert part in text
    assert "self-test on cpu" in text
    assert text.split("self-test on cpu")[1].split("\n")[0].strip() == "passed"


def test_wrong_result_is_a_problem(monkeypatch):
    monkeypatch.setattr(retinanet_ext, "sigmoid_focal_loss", lambda logits, *_, **__: logits.sum())
    text, problems = diagnostics.environment_report()
    assert any("sigmoid_focal_loss on cpu gives" in problem for problem in problems)
    assert "failed" in text


def run_without_library(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command on a copy of the package that has lost its compiled library."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "retinanet_ext", ignore=ignore, dirs_exist_ok=True)
    launcher = Path(sys.modules["_retinanet_ext_launcher"].__file__)
    shutil.copy(launcher, tmp_path)
    return subprocess.run(
        [sys.executable, str(tmp_path / launcher.name), *arguments],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_env_reports_a_package_that_does_not_import(tmp_path):
    import _retinanet_ext_launcher  # noqa: F401 - found through sys.modules

    result = run_without_library(tmp_path, "env")
    assert result.returncode == 1
    assert "does not load" in result.stdout
    assert "What is wrong:" in result.stdout
    assert "pip install -e ." in result.stdout
    assert "Traceback" not in result.stderr


def test_env_reports_a_library_that_is_damaged(tmp_path):
    import _retinanet_ext_launcher  # noqa: F401 - found through sys.modules

    package = tmp_path / "retinanet_ext"
    package.mkdir()
    (package / "_C.abi3.so").write_bytes(b"not a library")
    result = run_without_library(tmp_path, "env")
    assert result.returncode == 1
    assert "the compiled library of retinanet_ext does not load" in result.stdout
    assert "pip install --force-reinstall" in result.stdout
    assert "Traceback" not in result.stderr


def test_damaged_cuda_library_is_an_import_error(tmp_path, monkeypatch):
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(_load, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    monkeypatch.setattr(_load, "_cuda_mismatch", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ImportError, match="the CUDA library of retinanet_ext does not load"):
        _load._load_cuda()


def test_damaged_record_of_the_build_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "_build_info.json").write_text("{")
    monkeypatch.setattr(diagnostics, "PACKAGE", tmp_path)
    text, problems = diagnostics.environment_report()
    assert any("_build_info.json, cannot be read" in problem for problem in problems)
    assert "self-test on cpu" in text


def test_other_commands_say_so_in_a_sentence(tmp_path):
    import _retinanet_ext_launcher  # noqa: F401 - found through sys.modules

    result = run_without_library(tmp_path, "demo")
    assert result.returncode == 1
    assert "is not compiled in" in result.stderr
    assert "retinanet-ext env" in result.stderr
    assert "Traceback" not in result.stderr
