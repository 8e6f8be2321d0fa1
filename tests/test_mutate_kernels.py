"""The mutation proof's own parts: what it finds in a kernel, how it changes and restores a file, what it reports.

No kernel here; the proof itself is `python tests/mutate_kernels.py` (docs/testing.md).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]

KERNEL = """\
#include "cuda/vec.cuh"  // a < b
#define BLOCKS(n) ((n) < 1 ? 1 : (n))
constexpr int kSmall = sizeof(T) < 4 ? 1 : 2;
static_assert(kSmall <= 2);
/* __syncthreads(); i < n */
struct Args {
  T gamma;
  int rows;
  bool is_last(int row) const {
    return row + 1 == rows;
  }
};
template <typename T, int kWidth = kVectorWidth<T>>
__device__ T total(const Args<T>& args, const T* values, int n) {
  RNX_SHARED(double, shared, kWarps);
  T sum = T(0);
  for (int i = threadIdx.x; i < n; ++i) {
    const T value = values[i];
    if (value < T(0) || args.gamma > 0.5f || n > args.rows) sum += value;
  }
  const int vectors = (n + kWidth<T> - 1) / kWidth<T>;
  const int rest = n < kWidth ? n : kWidth;
  static_assert(kWidth >= 1);
  if constexpr (kWidth > 4) sum += values[vectors];
  if (kTask == Task::kSum || values != nullptr || (n & 1) != 0) sum += static_cast<T>(rest);
  __syncthreads();  // every sum is there
  const bool any = __syncthreads_or(sum != T(0)) != 0;
  const int blocks = std::min(rest, 8);
  return any ? sum - T(1) : "a < b"[blocks];
}
inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}
"""
FILE = "csrc/sample/sample_kernel.cuh"
MODULE = """\
#include "cuda_emulator.h"
#include "x/NAME_kernel.cuh"
PYBIND11_MODULE(_NAME_emulator, m) {}
"""


@pytest.fixture(scope="module")
def tools():
    """The modules kernel_mutants and mutate_kernels, which lie beside the tests."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        yield importlib.import_module("kernel_mutants"), importlib.import_module("mutate_kernels")
    finally:
        sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def found(tools):
    return tools[0].find_mutants(FILE, KERNEL, called_names=set())


def test_every_barrier_and_bound_is_found(found):
    changes = [(m.kind, m.function, m.line, m.becomes) for m in found[0]]
    loop = "for (int i = threadIdx.x; i < n; ++i) {"
    predicate = "if (value < T(0) || args.gamma > 0.5f || n > args.rows) sum += value;"
    vectors = "const int vectors = (n + kWidth<T> - 1) / kWidth<T>;"
    rest = "const int rest = n < kWidth ? n : kWidth;"
    vote = "const bool any = __syncthreads_or(sum != T(0)) != 0;"
    size = "RNX_SHARED(double, shared, kWarps);"
    blocks = "const int blocks = std::min(rest, 8);"
    assert changes == [
        ("size", "total", size, size.replace("kWarps", "-1 + kWarps")),
        ("start", "total", loop, loop.replace("= threadIdx.x", "= 1 + threadIdx.x")),
        ("start", "total", loop, loop.replace("= threadIdx.x", "= -1 + threadIdx.x")),
        ("comparison", "total", loop, loop.replace("i < n", "i <= n")),
        ("comparison", "total", loop, loop.replace("i < n", "i < -1 + n")),
        ("comparison", "total", predicate, predicate.replace("n > args", "n >= args")),
        ("comparison", "total", predicate, predicate.replace("n > args", "n > 1 + args")),
        ("literal", "total", vectors, vectors.replace("- 1", "- 2")),
        ("literal", "total", vectors, vectors.replace("- 1", "- 0")),
        ("comparison", "total", rest, rest.replace("n < kWidth", "n < -1 + kWidth")),
        ("barrier", "total", "__syncthreads();", ";"),
        ("barrier", "total", vote, "const bool any = int((sum != T(0)) != 0) != 0;"),
        ("minmax", "total", blocks, "const int blocks = (1 + std::min(rest, 8));"),
        ("minmax", "total", blocks, "const int blocks = (-1 + std::min(rest, 8));"),
    ]


def test_what_is_left_out_is_listed_with_its_reason(found):
    assert [(e.line_number, e.sign, e.reason.split(":")[0]) for e in found[1]] == [
        (3, "<", "not in a function"),
        (4, "<=", "not in a function"),
        (10, "==", "is_last is host code that no kernel and no emulator module calls"),
        (19, "<", "floating point"),
        (19, ">", "floating point"),
        (22, "<", "minimum or maximum"),
        (23, ">=", "decided at compile time"),
        (24, ">", "decided at compile time"),
        (25, "==", "an enumerator"),
        (25, "!=", "asks whether, not how far"),
        (25, "!=", "asks whether, not how far"),
        (27, "!=", "floating point"),
        (27, "!=", "asks whether, not how far"),
        (32, "==", "is_aligned is host code that no kernel and no emulator module calls"),
    ]


def test_host_code_that_is_called_is_mutated(tools):
    mutants, _ = tools[0].find_mutants(FILE, KERNEL, called_names={"is_last"})
    assert [m.becomes for m in mutants if m.function == "is_last"] == [
        "return row + 1 == 1 + rows;",
        "return row + 1 == -1 + rows;",
    ]


def test_a_mutant_changes_its_own_place_alone(found):
    for mutant in found[0]:
        before, after = KERNEL.splitlines(), mutant.apply(KERNEL).splitlines()
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert changed == [mutant.line_number - 1]
        assert " ".join(after[changed[0]].split("//")[0].split()) == mutant.becomes


def test_a_mutants_name_survives_other_changes_of_the_file(tools, found):
    moved = KERNEL.replace("  T sum", "  const int extra = 0;\n  T sum").replace("// every sum is there", "// all")
    assert [m.key for m in tools[0].find_mutants(FILE, moved, set())[0]] == [m.key for m in found[0]]
    assert len({m.key for m in found[0]}) == len(found[0])
    twice = KERNEL.replace("  __syncthreads();  // every sum is there\n", "  __syncthreads();\n" * 2)
    barriers = [m for m in tools[0].find_mutants(FILE, twice, set())[0] if m.line == "__syncthreads();"]
    assert [m.occurrence for m in barriers] == [1, 2]


@pytest.mark.parametrize("layout", ["i<n", "i <n", "i< n", "i\n < n"])
def test_a_comparison_in_another_layout_is_not_mistaken_for_a_template(tools, layout):
    source = f"__device__ int f(int i, int n) {{ return g<int, 4>(i) && {layout} && h<S<int>>(n); }}"
    assert len(tools[0].find_mutants(FILE, source)[0]) == 2


def test_a_product_is_not_mistaken_for_a_pointer_to_a_floating_type(tools):
    source = "__device__ bool f(int half, int lanes, int i) { g(half * lanes); return i < lanes; }"
    assert len(tools[0].find_mutants(FILE, source)[0]) == 2


def test_unbalanced_text_is_refused(tools):
    with pytest.raises(ValueError, match=r"sample_kernel.cuh:2: '\)' closes nothing"):
        tools[0].find_mutants(FILE, "void f() {\n)\n}")


@pytest.fixture
def tree(tmp_path):
    """A tree with two kernels, a header they share and one they do not, two modules and three test files."""
    files = {
        "csrc/x/a_kernel.cuh": '#include "x/both.cuh"\n',
        "csrc/x/b_kernel.cuh": '#include "both.cuh"\n',
        "csrc/x/c_kernel.cuh": "",
        "csrc/x/both.cuh": "__device__ bool f(int i, int n) {\n  return i < n;\n}\n",
        "csrc/x/launch.cuh": "",
        "tests/emulator/cuda_emulator.h": "",
        "tests/emulator/a_module.cpp": MODULE.replace("NAME", "a"),
        "tests/emulator/b_module.cpp": MODULE.replace("NAME", "b"),
        "tests/test_a_kernel.py": 'test_module("_a_emulator")',
        "tests/test_a_kernel_bounds.py": 'test_module("_a_emulator")',
        "tests/test_b_kernel.py": 'test_module("_b_emulator")',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_modules_and_tests_of_a_kernel_are_derived(tools, tree):
    mutate = tools[1]
    modules = mutate.find_modules(tree)
    assert [(m.target, m.tests) for m in modules] == [
        ("_a_emulator", ("tests/test_a_kernel.py", "tests/test_a_kernel_bounds.py")),
        ("_b_emulator", ("tests/test_b_kernel.py",)),
    ]
    assert importlib.import_module("mutant_builds").kernel_files(tree, modules) == [
        f"csrc/x/{name}.cuh" for name in ("a_kernel", "b_kernel", "both", "c_kernel")
    ]
    of = {
        name: [m.target for m in mutate.modules_of(f"csrc/x/{name}.cuh", modules)]
        for name in ("b_kernel", "both", "c_kernel")
    }
    assert of == {"b_kernel": ["_b_emulator"], "both": ["_a_emulator", "_b_emulator"], "c_kernel": []}


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests")
def test_every_kernel_of_the_project_is_read(tools):
    mutate = tools[1]
    modules = mutate.find_modules(ROOT)
    mutants, _ = mutate.find_all(ROOT, modules)
    for path in ROOT.glob("csrc/*/*_kernel.cuh"):
        file = path.relative_to(ROOT).as_posix()
        assert any(m.file == file for m in mutants)
        assert mutate.modules_of(file, modules), f"no emulator module includes {file}"
    assert all(module.tests for module in modules)
    barriers = sum(
        path.read_text().count(name)
        for path in {ROOT / m.file for m in mutants}
        for name in ("__syncthreads();", "__syncwarp(", "__syncthreads_or(")
    )
    assert sum(m.kind == "barrier" for m in mutants) == barriers
    assert len({m.key for m in mutants}) == len(mutants)


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests")
def test_every_exception_names_a_mutant_and_its_reason(tools):
    mutate = tools[1]
    mutants, _ = mutate.find_all(ROOT, mutate.find_modules(ROOT))
    exceptions = mutate.read_exceptions()
    assert set(exceptions) <= {m.key for m in mutants}
    assert all(len(reason) > 20 for reason in exceptions.values())


class Workshop:
    """Stands for the compiler and the tests: `verdicts` are replies by mode, or compiler errors."""

    def __init__(self, mutate, tree, numbers=None, killers=(), only=None, **verdicts):
        self.modules = mutate.find_modules(tree)
        self.tree = tree
        self.verdicts = verdicts
        self.seconds = {}
        self.kills = []
        self.compiled = []
        self.requests = []
        self.compiler = self
        self.switched = SimpleNamespace(numbers=numbers or {})
        self.killers = lambda mutant: list(killers)
        self.tests_of = lambda mutant: only

    def copy(self, name):
        return self.tree

    def prove(self, mode):
        return {"_a_emulator": "all", "_b_emulator": "all"}

    def compile(self, tree, module, mode):
        self.compiled.append((module.target, mode, (tree / "csrc/x/both.cuh").read_text()))
        return "alone", self.verdicts.get("error", "")

    def server(self, mode, folder):
        passed = {"outcome": "passed", "test": "", "why": ""}

        def run(**request):
            self.requests.append((mode, request))
            return self.verdicts.get(mode, passed)

        return SimpleNamespace(run=run, close=lambda: None)


@pytest.mark.parametrize(
    ("verdicts", "outcome", "mode", "steps"),
    [
        ({"plain": {"outcome": "failed", "test": "t", "why": "w"}}, "killed", "plain", 1),
        ({"sanitized": {"outcome": "crashed", "test": "t", "why": "w"}}, "killed", "sanitized", 3),
        ({"sanitized": {"outcome": "hung", "test": "t", "why": "w"}}, "killed", "sanitized", 3),
        ({}, "survived", "", 4),
        ({"error": "x.cuh:2:1: error: expected ;"}, "does not compile", "plain", 1),
    ],
)
def test_judging_alone_applies_the_mutant_and_restores_the_file(
    tools, tree, monkeypatch, verdicts, outcome, mode, steps
):
    mutate = tools[1]
    workshop = Workshop(mutate, tree, **verdicts)
    monkeypatch.setattr(mutate, "Server", workshop.server)
    original = (tree / "csrc/x/both.cuh").read_text()
    mutant = mutate.find_all(tree, workshop.modules)[0][0]
    result = mutate.Worker(workshop, "worker").judge(mutant)
    assert (result.outcome, result.mode) == (outcome, mode)
    # Plain before sanitized, and in each every module that includes the file.
    plan = [(target, mode) for mode in ("plain", "sanitized") for target in ("_a_emulator", "_b_emulator")]
    assert [step[:2] for step in workshop.compiled] == plan[:steps]
    assert all("i <= n" in step[2] for step in workshop.compiled)
    assert all(request["mutant"] == 0 for _, request in workshop.requests)
    assert (tree / "csrc/x/both.cuh").read_text() == original


@pytest.mark.parametrize(
    ("verdicts", "killers", "parts"),
    [
        ({"plain": {"outcome": "failed", "test": "t", "why": "w"}}, [], ["plain quick a"]),
        ({"plain": {"outcome": "failed", "test": "t", "why": "w"}}, ["tests/test_b_kernel.py::t"], ["plain killers b"]),
        (
            {"sanitized": {"outcome": "failed", "test": "t", "why": "w"}},
            ["tests/test_b_kernel.py::t"],
            ["plain killers b", "sanitized killers b"],
        ),
        (
            {},
            ["tests/test_a_kernel_bounds.py::t"],
            ["plain killers a", "sanitized killers a", "plain quick a", "plain quick b", "sanitized quick a",
             "sanitized quick b", "plain rest a", "plain rest b", "sanitized rest a", "sanitized rest b"],
        ),
    ],
)  # fmt: skip
def test_a_mutant_among_all_is_chosen_by_its_number(tools, tree, monkeypatch, verdicts, killers, parts):
    """Compiled by nobody; first it meets the tests that others died of."""
    mutate = tools[1]
    mutant = mutate.find_all(tree, mutate.find_modules(tree))[0][0]
    workshop = Workshop(mutate, tree, numbers={mutant: 7}, killers=killers, **verdicts)
    monkeypatch.setattr(mutate, "Server", workshop.server)
    result = mutate.Worker(workshop, "worker").judge(mutant)
    assert not workshop.compiled
    assert all(request["mutant"] == 7 and request["killers"] == killers for _, request in workshop.requests)
    assert all(request["libraries"]["_a_emulator"] == "all" for _, request in workshop.requests)
    done = [f"{mode} {request['part']} {request['tests'][0][11]}" for mode, request in workshop.requests]
    assert done == parts
    assert workshop.kills == ([(mutant, "t")] if verdicts else [])
    assert (result.outcome == "killed") == bool(verdicts)


def test_a_mutant_meets_the_tests_that_reach_it(tools, tree, monkeypatch):
    """A module none of whose tests does is passed over; a mutant that no test reaches survives at once."""
    mutate = tools[1]
    mutant = mutate.find_all(tree, mutate.find_modules(tree))[0][0]
    for only in (["tests/test_b_kernel.py::t"], []):
        workshop = Workshop(mutate, tree, numbers={mutant: 7}, only=only)
        monkeypatch.setattr(mutate, "Server", workshop.server)
        result = mutate.Worker(workshop, "worker").judge(mutant)
        assert result.outcome == "survived"
        assert {request["tests"] for _, request in workshop.requests} == (
            {("tests/test_b_kernel.py",)} if only else set()
        )
        assert all(request["only"] == only for _, request in workshop.requests)
    assert result.why == "no test reaches it"


def test_what_reaches_a_mutant(tools, tree):
    """The tests that did, and all those of a file of which a fixture did."""
    mutate = tools[1]
    mutants = mutate.find_all(tree, mutate.find_modules(tree))[0]
    workshop = mutate.Workshop.__new__(mutate.Workshop)
    workshop.switched = SimpleNamespace(numbers={mutants[0]: 1})
    workshop.seconds = {"a.py::s": 1.0, "a.py::t": 1.0, "b.py::s": 1.0, "b.py::t": 1.0}
    workshop.reached = {"a.py::s": {2}, "a.py::t": {1, 2}, "b.py": {1}}
    assert workshop.tests_of(mutants[0]) == ["a.py::t", "b.py::s", "b.py::t"]
    assert workshop.tests_of(mutants[1]) is None


def test_killers_are_those_of_the_function_then_of_the_file_then_the_latest(tools, tree):
    mutate = tools[1]
    mutant = mutate.find_all(tree, mutate.find_modules(tree))[0][0]
    other_function = dataclasses.replace(mutant, function="g")
    elsewhere = dataclasses.replace(other_function, file="other")
    workshop = mutate.Workshop.__new__(mutate.Workshop)
    workshop.kills = [(mutant, "a"), (other_function, "b"), (mutant, "c"), (mutant, "c"), (elsewhere, "d")]
    assert workshop.killers(mutant) == ["c", "a", "b", "d"]
    workshop.kills = []
    assert workshop.killers(mutant) == []


def test_a_file_is_restored_after_an_error(tools, tree, monkeypatch):
    mutate = tools[1]
    workshop = Workshop(mutate, tree)
    original = (tree / "csrc/x/both.cuh").read_text()

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(workshop, "compile", fail)
    with pytest.raises(OSError, match="no space left"):
        mutate.Worker(workshop, "worker").judge(mutate.find_all(tree, workshop.modules)[0][0])
    assert (tree / "csrc/x/both.cuh").read_text() == original


SWITCHED = r"""#include <algorithm>
#include <cstdio>
#include <cstdlib>
#define __syncthreads() std::printf("barrier ")
#define __syncthreads_or(vote) (std::printf("vote %d ", int(vote)), 1)
#define RNX_SHARED(type, name, count) const int name = count
void f(int n, unsigned m, long k) {
  RNX_SHARED(double, shared, n);
  for (int i = 1; i < n && i <= 3; ++i) std::printf("%d,", i);
  for (unsigned i = m; i > 2u; --i) std::printf("%u,", i);
  __syncthreads();
  const int vote = __syncthreads_or(n >= k) != 0;
  std::printf("%d %d %d %ld %d %u\n", shared, vote, n == 4, (k + 3u) / 2 - 1, k != n, m > 4 ? m : 4);
}
void g(long n) {
  std::printf("%ld %ld\n", std::min(n, 8L) + 1, n < 8 ? n : 8);
}
int main() {
  f(4, 4, 4);
  f(3, 5, 5);
  f(5, 2, 4);
  f(2, 3, 3);
  g(7);
  g(8);
  g(9);
}
"""


def test_a_chosen_mutant_does_what_it_does_alone(tools, tmp_path):
    """Compiled by itself and among all the others: what the program prints is the same, and another for each."""
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        pytest.skip("a C++ compiler builds the mutants and was not found")

    def build(name, text, *flags):
        (tmp_path / f"{name}.cpp").write_text(text)
        command = [cxx, "-std=c++17", "-w", *flags, str(tmp_path / f"{name}.cpp"), "-o", str(tmp_path / name)]
        subprocess.run(command, check=True)
        return lambda number: subprocess.check_output(
            [tmp_path / name], env={**os.environ, "RETINANET_EXT_MUTANT": str(number)}, text=True
        )

    mutants = tools[0].find_mutants("f.cuh", SWITCHED)[0]
    assert {m.kind for m in mutants} == {"barrier", "comparison", "minmax", "start", "literal", "size"}
    text = importlib.import_module("mutant_switches").write_switches(SWITCHED, {m: i for i, m in enumerate(mutants, 1)})
    assert text.count("\n") == SWITCHED.count("\n")
    header = ["-include", str(ROOT / "tests/emulator/mutants.h"), f"-DRETINANET_EXT_MUTANTS={len(mutants)}"]
    among_all = build("all", text, *header)
    unchanged = build("unchanged", SWITCHED)(0)
    assert among_all(0) == unchanged
    for number, mutant in enumerate(mutants, 1):
        alone = build("alone", mutant.apply(SWITCHED))(0)
        assert among_all(number) == alone, mutant
        assert alone != unchanged, mutant


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


def test_each_test_reports_the_mutants_it_reaches(tools, tmp_path, monkeypatch):
    kernel_mutants, mutate = tools
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        pytest.skip("a C++ compiler builds the mutants and was not found")
    mutants = kernel_mutants.find_mutants("f.cuh", REACHED)[0]
    numbers = {mutant: number for number, mutant in enumerate(mutants, 1)}
    assert list(numbers.values()) == [1, 2, 3, 4, 5, 6]
    (tmp_path / "it.cpp").write_text(importlib.import_module("mutant_switches").write_switches(REACHED, numbers))
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


def test_what_must_be_constant_is_compiled_alone(tools, tree):
    """A mutant that the compiler refuses behind a number loses it, and the others keep theirs."""
    mutate = tools[1]
    builds = importlib.import_module("mutant_builds")
    (tree / "tests/emulator/mutants.h").write_text("")
    for name in ("CMakeLists.txt", "pyproject.toml"):
        (tree / name).write_text("")
    mutants = mutate.find_all(tree, mutate.find_modules(tree))[0]
    other = dataclasses.replace(mutants[1], line_number=9)

    class Compiler:
        origin = tree
        complains = f"{tree}/copy/csrc/x/both.cuh:2:7: error: not a constant"

        def compile(self, folder, module, mode, *flags):
            return "library", self.complains if "mutants::at(1" in (folder / "csrc/x/both.cuh").read_text() else ""

    switched = builds.SwitchedTree(Compiler(), tree / "copy", [mutants[0], other])
    assert switched.build(mutate.find_modules(tree)[0], "plain") == "library"
    assert switched.numbers == {other: 2}
    assert "mutants::at(-1, 2)" in (tree / "copy/csrc/x/both.cuh").read_text()


@pytest.mark.parametrize(
    ("outcomes", "excepted", "arguments", "status", "text"),
    [
        (["killed", "killed"], [], [], 0, ""),
        (["killed", "survived"], [], [], 1, "SURVIVED: csrc/x/both.cuh:2 f: return i < n;  →  return i < -1 + n;"),
        (["killed", "does not compile"], [], [], 0, "DOES NOT COMPILE: csrc/x/both.cuh:2 f"),
        (["killed", "unused"], [1], [], 0, "1 of them known to be equivalent"),
        (["killed", "survived"], [1], ["--check-exceptions"], 0, ""),
        (["killed", "killed"], [1], ["--check-exceptions"], 1, "NOT EQUIVALENT: csrc/x/both.cuh:2 f"),
        (["killed", "killed"], [None], [], 1, "exception for nothing"),
    ],
)
def test_report_and_exit_status(tools, tree, monkeypatch, capsys, outcomes, excepted, arguments, status, text):
    mutate = tools[1]
    mutants = mutate.find_all(tree, mutate.find_modules(tree))[0]
    entries = [
        {"file": m.file, "function": m.function, "line": m.line, "becomes": m.becomes, "reason": "no matter"}
        if m
        else {"file": "gone", "function": "f", "line": "", "becomes": "", "reason": "no matter"}
        for m in (None if i is None else mutants[i] for i in excepted)
    ]
    (tree / "exceptions.json").write_text(json.dumps(entries))
    read = mutate.read_exceptions
    monkeypatch.setattr(mutate, "read_exceptions", lambda: read(tree / "exceptions.json"))
    monkeypatch.setattr(mutate, "ROOT", tree)
    monkeypatch.setattr(mutate, "Workshop", lambda *arguments: None)
    judged = dict(zip(mutants, outcomes, strict=True))
    monkeypatch.setattr(
        mutate, "judge_all", lambda workshop, wanted, jobs, show: [mutate.Result(m, judged[m]) for m in wanted]
    )
    monkeypatch.setattr(mutate.signal, "signal", lambda *arguments: None)
    assert mutate.main([*arguments, "--json", str(tree / "results.json")]) == status
    assert text in capsys.readouterr().out
    rows = json.loads((tree / "results.json").read_text())
    assert sorted(row["mutant"]["becomes"] for row in rows) == sorted(m.becomes for m in mutants)


def test_only_chooses_by_file_and_text(tools, tree):
    mutate = tools[1]
    first, second = mutate.find_all(tree, mutate.find_modules(tree))[0]
    assert mutate.is_wanted(first, [])
    assert mutate.is_wanted(first, ["both.cuh"])
    assert mutate.is_wanted(first, ["a_kernel.cuh", "both.cuh:<= n"])
    assert not mutate.is_wanted(second, ["both.cuh:<= n"])
    assert not mutate.is_wanted(first, ["a_kernel.cuh"])


def test_the_test_process_tells_failures_crashes_and_hangs_apart(tools, tmp_path):
    """Real tests of a made-up module, in the forks that judge mutants."""
    mutate = tools[1]
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
