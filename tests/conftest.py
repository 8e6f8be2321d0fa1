"""What many tests share: the skip of `cuda` tests without a GPU, fixtures, and the build of the C++ test modules."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Shared machines are slow now and then; what a test costs is the benchmarks' business.
settings.register_profile("retinanet_ext", deadline=None, print_blob=True)
settings.load_profile("retinanet_ext")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or with others."""
    torch.manual_seed(0)


@pytest.fixture
def num_threads():
    """``torch.set_num_threads``, put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@contextlib.contextmanager
def pictures_left_out():
    from retinanet_ext.engine import recorder, run_folder

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((run_folder, "draw_evaluation"), (recorder, "plot_labels"), (recorder, "plot_results")):
            patch.setattr(module, name, lambda *_: None)
        patch.setattr(recorder, "with_pictures", lambda batches, *_: batches)
        yield


@pytest.fixture(scope="module")
def without_pictures():
    """The runs of a file write everything but their pictures, which take longer than the training of a test."""
    with pictures_left_out():
        yield


@pytest.fixture
def without_pictures_here():
    """The same for one test."""
    with pictures_left_out():
        yield


def find_tool(name: str) -> str:
    """A program of this Python's environment, before one of the same name elsewhere on the PATH."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    path = shutil.which(name, path=folders)
    if path is None:
        pytest.skip(f"{name} builds the C++ test modules and was not found: pip install 'retinanet_ext[test]'")
    return path


def compiler() -> str:
    path = shutil.which(os.environ.get("CXX", "c++"))
    if path is None:
        pytest.skip("a C++ compiler builds the C++ test modules and was not found")
    return path


def source_hash(sources: list[Path], *also: str) -> str:
    digest = hashlib.sha256("\0".join(also).encode())
    for source in sorted(sources):
        digest.update(source.relative_to(ROOT).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def build_test_module(target: str):
    """Builds a pybind11 target of CMakeLists.txt, or takes it from the cache, and imports it.

    The cache, outside the source tree, is keyed by what goes into the build, so that a changed header builds anew and
    an unchanged one costs nothing.
    """
    sources = [ROOT / "CMakeLists.txt"]
    for folder in ("csrc", "tests/math", "tests/emulator"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cuh", ".cpp")]
    sanitize = os.environ.get("RETINANET_EXT_SANITIZE", "0")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 binds the C++ test modules")
    cxx = compiler()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    key = source_hash(sources, version, sanitize, pybind11.__version__, sysconfig.get_config_var("EXT_SUFFIX"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinanet_ext" / "tests"
    library = cache / f"{target}-{key}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as build_folder:
            configure = [
                find_tool("cmake"),
                f"-S{ROOT}",
                f"-B{build_folder}",
                "-GNinja",
                f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
                f"-DCMAKE_CXX_COMPILER={cxx}",
                "-DCMAKE_BUILD_TYPE=Release",
                "-DRETINANET_EXT_TESTS=ON",
                f"-DRETINANET_EXT_SANITIZE={sanitize}",
                f"-DRETINANET_EXT_PYTHON_INCLUDE={sysconfig.get_path('include')}",
                f"-DRETINANET_EXT_PYBIND11_INCLUDE={pybind11.get_include()}",
            ]
            for command in (configure, [configure[0], "--build", build_folder, "--target", target]):
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode != 0:
                    pytest.fail(f"{' '.join(command)}\n{done.stdout}", pytrace=False)
            # A rename is atomic: test processes that build side by side do not see half a file.
            os.replace(Path(build_folder) / f"{target}.so", library)
    spec = importlib.util.spec_from_file_location(target, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def test_module():
    """Builds a C++ test module by its CMake target and imports it."""
    return build_test_module


@pytest.fixture(scope="session")
def focal_math(test_module):
    """csrc/common/{fast_math,focal_math,half_convert}.h over NumPy arrays."""
    return test_module("_focal_math")
