"""How the mutation proof judges a mutant: where it is compiled, which tests it meets, what is reported.

Compiler and tests are stand-ins here; the proof itself is `python tests/mutate_kernels.py` (docs/testing.md).
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import mutate_kernels as mutate
import pytest
from mutant_builds import SwitchedTree, kernel_files

MODULE = """\
#include "cuda_emulator.h"
#include "x/NAME_kernel.cuh"
PYBIND11_MODULE(_NAME_emulator, m) {}
"""


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


def test_modules_and_tests_of_a_kernel_are_derived(tree):
    modules = mutate.find_modules(tree)
    assert [(m.target, m.tests) for m in modules] == [
        ("_a_emulator", ("tests/test_a_kernel.py", "tests/test_a_kernel_bounds.py")),
        ("_b_emulator", ("tests/test_b_kernel.py",)),
    ]
    assert kernel_files(tree, modules) == [
        f"csrc/x/{name}.cuh" for name in ("a_kernel", "b_kernel", "both", "c_kernel")
    ]
    of = {
        name: [m.target for m in mutate.modules_of(f"csrc/x/{name}.cuh", modules)]
        for name in ("b_kernel", "both", "c_kernel")
    }
    assert of == {"b_kernel": ["_b_emulator"], "both": ["_a_emulator", "_b_emulator"], "c_kernel": []}


class Workshop:
    """Stands for the compiler and the tests: `verdicts` are replies by mode, or compiler errors."""

    def __init__(self, tree, numbers=None, killers=(), only=None, **verdicts):
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
def test_judging_alone_applies_the_mutant_and_restores_the_file(tree, monkeypatch, verdicts, outcome, mode, steps):
    workshop = Workshop(tree, **verdicts)
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
def test_a_mutant_among_all_is_chosen_by_its_number(tree, monkeypatch, verdicts, killers, parts):
    """Compiled by nobody; first it meets the tests that others died of."""
    mutant = mutate.find_all(tree, mutate.find_modules(tree))[0][0]
    workshop = Workshop(tree, numbers={mutant: 7}, killers=killers, **verdicts)
    monkeypatch.setattr(mutate, "Server", workshop.server)
    result = mutate.Worker(workshop, "worker").judge(mutant)
    assert not workshop.compiled
    assert all(request["mutant"] == 7 and request["killers"] == killers for _, request in workshop.requests)
    assert all(request["libraries"]["_a_emulator"] == "all" for _, request in workshop.requests)
    done = [f"{mode} {request['part']} {request['tests'][0][11]}" for mode, request in workshop.requests]
    assert done == parts
    assert workshop.kills == ([(mutant, "t")] if verdicts else [])
    assert (result.outcome == "killed") == bool(verdicts)


def test_a_mutant_meets_the_tests_that_reach_it(tree, monkeypatch):
    """A module none of whose tests does is passed over; a mutant that no test reaches survives at once."""
    mutant = mutate.find_all(tree, mutate.find_modules(tree))[0][0]
    for only in (["tests/test_b_kernel.py::t"], []):
        workshop = Workshop(tree, numbers={mutant: 7}, only=only)
        monkeypatch.setattr(mutate, "Server", workshop.server)
        result = mutate.Worker(workshop, "worker").judge(mutant)
        assert result.outcome == "survived"
        assert {request["tests"] for _, request in workshop.requests} == (
            {("tests/test_b_kernel.py",)} if only else set()
        )
        assert all(request["only"] == only for _, request in workshop.requests)
    assert result.why == "no test reaches it"


def test_what_reaches_a_mutant(tree):
    """The tests that did, and all those of a file of which a fixture did."""
    mutants = mutate.find_all(tree, mutate.find_modules(tree))[0]
    workshop = mutate.Workshop.__new__(mutate.Workshop)
    workshop.switched = SimpleNamespace(numbers={mutants[0]: 1})
    workshop.seconds = {"a.py::s": 1.0, "a.py::t": 1.0, "b.py::s": 1.0, "b.py::t": 1.0}
    workshop.reached = {"a.py::s": {2}, "a.py::t": {1, 2}, "b.py": {1}}
    assert workshop.tests_of(mutants[0]) == ["a.py::t", "b.py::s", "b.py::t"]
    assert workshop.tests_of(mutants[1]) is None


def test_killers_are_those_of_the_function_then_of_the_file_then_the_latest(tree):
    mutant = mutate.find_all(tree, mutate.find_modules(tree))[0][0]
    other_function = dataclasses.replace(mutant, function="g")
    elsewhere = dataclasses.replace(other_function, file="other")
    workshop = mutate.Workshop.__new__(mutate.Workshop)
    workshop.kills = [(mutant, "a"), (other_function, "b"), (mutant, "c"), (mutant, "c"), (elsewhere, "d")]
    assert workshop.killers(mutant) == ["c", "a", "b", "d"]
    workshop.kills = []
    assert workshop.killers(mutant) == []


def test_a_file_is_restored_after_an_error(tree, monkeypatch):
    workshop = Workshop(tree)
    original = (tree / "csrc/x/both.cuh").read_text()

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(workshop, "compile", fail)
    with pytest.raises(OSError, match="no space left"):
        mutate.Worker(workshop, "worker").judge(mutate.find_all(tree, workshop.modules)[0][0])
    assert (tree / "csrc/x/both.cuh").read_text() == original


def test_what_must_be_constant_is_compiled_alone(tree):
    """A mutant that the compiler refuses behind a number loses it, and the others keep theirs."""
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

    switched = SwitchedTree(Compiler(), tree / "copy", [mutants[0], other])
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
def test_report_and_exit_status(tree, monkeypatch, capsys, outcomes, excepted, arguments, status, text):
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


def test_only_chooses_by_file_and_text(tree):
    first, second = mutate.find_all(tree, mutate.find_modules(tree))[0]
    assert mutate.is_wanted(first, [])
    assert mutate.is_wanted(first, ["both.cuh"])
    assert mutate.is_wanted(first, ["a_kernel.cuh", "both.cuh:<= n"])
    assert not mutate.is_wanted(second, ["both.cuh:<= n"])
    assert not mutate.is_wanted(first, ["a_kernel.cuh"])
