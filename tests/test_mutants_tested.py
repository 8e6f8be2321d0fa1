"""The processes in which the mutation proof runs tests: what they report of each, and how tests can end.

The proof itself is `python tests/mutate_kernels.py` (docs/testing.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import mutate_kernels as mutate
import pytest
from kernel_mutants import find_mutants
from mutant_switches import write_switches

ROOT = Path(__file__).resolve().parents[1]

CONFTEST = """\
import pytest
def build_test_module(target):
    raise AssertionError("built anew")
@pytest.fixture(scope="session")
def test_module():
    return build_test_module
"""

REACHED = """\
extern "C" __attribute__((visibility("default"))) int act(int n) {
  if (n > 3) return n == 5 || n == 6;
  return 0;
}
"""

MODULE_OF_REACHED = """\
import ctypes
__file__ = __file__[:-3] + ".so"
act = ctypes.CDLL(__file__).act
"""

TEST_OF_REACHED = """\
import pytest
@pytest.fixture(scope="module")
def module(test_module):
    module = test_module("_it")
    assert module.act(0) == 0
    return module
def test_five(module):
    assert module.act(5) == 1
def test_nothing(module):
    pass
def test_seven(module):
    assert module.act(7) == 0
"""


def test_each_test_reports_the_mutants_it_reaches(tmp_path):
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        pytest.skip("a C++ compiler builds the mutants and was not found")
    mutants = find_mutants("f.cuh", REACHED)[0]
    numbers = {mutant: number for number, mutant in enumerate(mutants, 1)}
    assert list(numbers.values()) == [1, 2, 3, 4, 5, 6]
    (tmp_path / "it.cpp").write_text(write_switches(REACHED, numbers))
    header = ["-include", str(ROOT / "tests/emulator/mutants.h"), "-DRETINANET_EXT_MUTANTS=6"]
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", *header]
    subprocess.run([cxx, *flags, str(tmp_path / "it.cpp"), "-o", str(tmp_path / "it.so")], check=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST_OF_REACHED)
    # The library stands for the module that is loaded from it.
    (tmp_path / "it.py").write_text(MODULE_OF_REACHED)
    server = mutate.Server("plain", tmp_path)
    request = {"tree": str(tmp_path), "tests": ["test_it.py"], "seconds": {}, "silence": 20.0}
    libraries = {"_it": str(tmp_path / "it.py")}
    all_tests = server.run(**request, part="all", libraries=libraries, mutants=6)
    one_test = server.run(**request, part="quick", libraries=libraries, only=["test_it.py::test_seven"])
    server.close()
    assert all_tests["reached"] == {
        "test_it.py": [1, 2],
        "test_it.py::test_five": [1, 2, 3, 4],
        "test_it.py::test_seven": [1, 2, 3, 4, 5, 6],
    }
    assert list(one_test["seconds"]) == ["test_it.py::test_seven"]


def test_the_test_process_tells_failures_crashes_and_hangs_apart(tmp_path):
    """Real tests of a made-up module, in the forks that judge mutants."""
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(
        "def test_slow(test_module):\n    test_module('_it').act()\n"
        "def test_quick(test_module):\n    assert test_module('_it').answer == 42, 'the answer is wrong'\n"
    )
    server = mutate.Server("plain", tmp_path)
    replies = {}
    for name, act in {
        "passed": "answer = 42\ndef act(): pass",
        "failed": "answer = 43\ndef act(): pass",
        "crashed": "import os\nanswer = 42\ndef act(): os.abort()",
        "hung": "import time\nanswer = 42\ndef act(): time.sleep(600)",
    }.items():
        library = tmp_path / f"{name}.py"
        library.write_text(act)
        replies[name] = server.run(
            tree=str(tmp_path),
            tests=["test_it.py"],
            part="all",
            libraries={"_it": str(library)},
            seconds={"test_it.py::test_slow": 1.0, "test_it.py::test_quick": 0.1},
            silence=10.0 if name != "hung" else 2.0,
        )
    parts = {
        part: server.run(
            tree=str(tmp_path),
            tests=["test_it.py"],
            part=part,
            libraries={"_it": str(tmp_path / "passed.py")},
            seconds={"test_it.py::test_slow": 1.0, "test_it.py::test_quick": 0.1},
            silence=10.0,
        )
        for part in ("quick", "rest")
    }
    server.close()
    assert {part: list(reply["seconds"]) for part, reply in parts.items()} == {
        "quick": ["test_it.py::test_quick"],
        "rest": ["test_it.py::test_slow"],
    }
    assert all(reply["outcome"] == "passed" for reply in parts.values())
    assert {name: reply["outcome"] for name, reply in replies.items()} == {name: name for name in replies}
    assert list(replies["passed"]["seconds"]) == ["test_it.py::test_quick", "test_it.py::test_slow"]
    assert replies["passed"]["loaded"] == ["_it", "_it"]
    assert replies["failed"]["test"] == "test_it.py::test_quick"
    assert "the answer is wrong" in replies["failed"]["why"]
    assert replies["crashed"]["test"] == replies["hung"]["test"] == "test_it.py::test_slow"
    assert replies["crashed"]["why"] == "SIGABRT"
    assert server.process.returncode == 0
    assert os.path.getsize(tmp_path / "plain.log") > 0
