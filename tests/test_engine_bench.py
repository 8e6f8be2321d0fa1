"""`retinanet-ext bench`: its cases in small, that both sides agree, and what it prints and returns."""

import pytest
import torch

from retinanet_ext.cli import main
from retinanet_ext.engine import bench
from retinanet_ext.engine.bench import measure, run_bench
from retinanet_ext.engine.bench_cases import Case, make_cases

CPU = torch.device("cpu")


def test_every_case_agrees_with_torchvision_and_has_a_line(capsys):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert run_bench(CPU, seconds=1e-3, cases=make_cases(CPU, image=(64, 96))) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 2 + 8 + 1
    assert "torchvision" in lines[0]
    for line in lines[2:10]:
        ours, theirs, ratio = line[44:].split()
        assert float(theirs) / float(ours) == pytest.approx(float(ratio.rstrip("x")), rel=0.6, abs=0.06), line


def test_without_torchvision_there_are_our_figures(monkeypatch, capsys):
    find_spec = bench.importlib.util.find_spec

    def without(name, *more):
        return None if name == "torchvision" else find_spec(name, *more)

    monkeypatch.setattr("importlib.util.find_spec", without)
    cases = make_cases(CPU, image=(64, 64))
    assert run_bench(CPU, seconds=1e-3, cases=[cases[0], cases[6]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines[2:4]] == [["-", "-"], ["-", "-"]]
    assert lines[4].startswith("torchvision is not installed")


def wrong():
    def agree(mine, other):
        torch.testing.assert_close(mine, other)

    return Case("a case", lambda: torch.zeros(1), lambda: torch.ones(1), agree)


def test_results_that_differ_are_a_failure(capsys):
    assert run_bench(CPU, seconds=1e-3, cases=[wrong]) == 1
    captured = capsys.readouterr()
    assert "retinanet-ext bench: a case: results differ" in captured.err
    assert "a case" in captured.out


def test_sides_take_turns_and_a_slow_case_ends(monkeypatch):
    clock, calls = [0.0], []

    def side(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds

        return call

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    case = Case("x", side("ours", 0.25), side("theirs", 0.5), lambda *_: None)
    assert measure(case, CPU, 2.0) == (250.0, 500.0)
    assert calls == ["ours", "theirs"] * 3  # 2.25 s: the least number of rounds
    calls.clear()
    assert measure(case, CPU, 0.5) == (250.0, 500.0)
    assert calls == ["ours", "theirs"] * 2  # three times its time are up
    calls.clear()
    assert measure(Case("x", side("ours", 1.0), None, lambda *_: None), CPU, 5.0) == (1000.0, None)
    assert calls == ["ours"] * 5


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(bench, "make_cases", lambda device: [wrong])
    assert main(["bench", "--device", "cpu", "--seconds", "0.001"]) == 1
    assert "results differ" in capsys.readouterr().err
