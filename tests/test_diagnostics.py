"""`retinanet-ext env`: a report that also works where the package does not."""

from __future__ import annotations

import json
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


def test_the_build_says_what_it_is_and_why():
    info = _load.build_info()
    assert isinstance(info["cuda"], bool)
    assert info["cuda"] == _load.CUDA_LIBRARY.is_file() == bool(info["cuda_version"]) == bool(info["cuda_archs"])
    assert "RETINANET_EXT_CUDA" in info["cuda_reason"] or "is built for CUDA" in info["cuda_reason"]
    assert info["cuda_loaded"] == (info["cuda_missing"] is None)
    assert not info["cuda_loaded"] or (info["cuda"] and torch.version.cuda is not None)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """An installation with this record, with a CUDA library or without, under a torch for CUDA 13.0."""

    def make(record, with_library):
        (tmp_path / "_build_info.json").write_text(json.dumps(record))
        if with_library:
            (tmp_path / "_C_cuda.so").touch()
        monkeypatch.setattr(_load, "BUILD_INFO_FILE", tmp_path / "_build_info.json")
        monkeypatch.setattr(_load, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return make


@pytest.mark.parametrize(
    ("record", "with_library", "missing"),
    [
        ({"cuda_reason": "as told"}, False, "retinanet_ext was built without CUDA (as told)"),
        ({}, False, "retinanet_ext was built without CUDA (no record of the build)"),
        ({"cuda_version": "12.8"}, True, "retinanet_ext was built for CUDA 12.8, and this torch is for CUDA 13.0"),
        ({"cuda_version": "13.2"}, True, None),  # of one major version: they are compatible
    ],
)
def test_why_there_are_no_cuda_operators(built, record, with_library, missing):
    built(record, with_library)
    assert _load._cuda_mismatch() == missing


def test_a_call_on_cuda_tensors_says_why_there_is_no_kernel(built, monkeypatch):
    built({"cuda_reason": "as told"}, False)
    fallbacks = {}

    class Fallbacks:
        @staticmethod
        def impl(name, function, key):
            fallbacks[name, key] = function

    monkeypatch.setattr(_load, "_FALLBACKS", Fallbacks)
    assert _load._load_cuda() == "retinanet_ext was built without CUDA (as told)"
    assert fallbacks.keys() == {(name, "CUDA") for name in _load.OPERATORS}
    assert len(fallbacks) > 10
    message = r"built without CUDA \(as told\), so it has no kernel for CUDA tensors.* RETINANET_EXT_CUDA=1 pip install"
    for function in fallbacks.values():
        with pytest.raises(RuntimeError, match=message):
            function(torch.zeros(1))


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
