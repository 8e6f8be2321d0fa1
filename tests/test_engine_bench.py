"""`retinanet-ext bench`: its cases in small, that both sides agree, and what it prints and returns."""

import math

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


@pytest.mark.parametrize("number", [5, 7], ids=["post-processing", "inference"])
def test_cases_that_detect_compare_scores_boxes_and_labels(number):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    case = make_cases(CPU, image=(128, 160))[number]()
    ours, theirs = case.ours(), case.theirs()
    case.agree(ours, theirs)
    assert all(len(image["scores"]) > 20 and len(image["labels"].unique()) > 10 for image in theirs)
    # One label, box or score that differs; a detection less; nothing at all.
    for name, change in (("labels", 1), ("boxes", 5.0), ("scores", 0.01)):
        others = [dict(image) for image in theirs]
        others[-1][name] = others[-1][name].clone()
        others[-1][name][10] += change
        with pytest.raises(AssertionError):
            case.agree(ours, others)
    for count, said in ((-1, "detections"), (0, "nothing was found")):
        with pytest.raises(AssertionError, match=said):
            case.agree(ours, [{name: value[:count] for name, value in image.items()} for image in theirs])


def wrong():
    def agree(mine, other):
        torch.testing.assert_close(mine, other)

    return Case("a case", lambda: torch.zeros(1), lambda: torch.ones(1), agree)


def test_results_that_differ_are_a_failure(capsys):
    assert run_bench(CPU, seconds=1e-3, cases=[wrong]) == 1
    captured = capsys.readouterr()
    assert "retinanet-ext bench: a case: results differ" in captured.err
    assert "a case" in captured.out


class Clock:
    """`time` of a machine where work takes as long as it says."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, seconds, calls=None, name=None):
        def call():
            self.now += seconds
            if calls is not None:
                calls.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    return clock


def test_sides_take_turns_and_a_slow_case_ends(clock):
    calls = []
    case = Case("x", clock.work(0.25, calls, "ours"), clock.work(0.5, calls, "theirs"), lambda *_: None)
    cold = [900.0, 900.0]
    assert measure(case, CPU, 2.0, cold, math.inf) == (250.0, 500.0)
    assert calls == ["ours", "theirs"] * 3  # 2.25 s: the least number of rounds
    calls.clear()
    assert measure(case, CPU, 0.5, cold, math.inf) == (250.0, 500.0)
    assert calls == ["ours", "theirs"] * 2  # three times its time are up
    calls.clear()
    alone = Case("x", clock.work(1.0, calls, "ours"), None, lambda *_: None)
    assert measure(alone, CPU, 5.0, cold[:1], math.inf) == (1000.0, None)
    assert calls == ["ours"] * 5
    # A round that would end too late is not begun; without any, the first calls are the figures.
    calls.clear()
    assert measure(alone, CPU, 5.0, cold[:1], clock.now + 2.5) == (1000.0, None)
    assert calls == ["ours"] * 2
    assert measure(case, CPU, 5.0, cold, clock.now + 1.5) == (900.0, 900.0)
    assert calls == ["ours"] * 2


@pytest.mark.parametrize(
    ("made", "called", "lines"),
    [
        (0.5, 0.01, 8),  # a quick machine: eight times three seconds, and what comes before
        (2.0, 1.0, 8),
        (5.0, 2.5, 6),
        (9.0, 7.0, 3),  # the third, ready after 97 s, has its first calls for figures
        (30.0, 1.0, 3),  # slow before the first call
        (1.0, 24.0, 1),
    ],
)
def test_the_whole_takes_less_than_two_minutes_and_says_what_it_left_out(made, called, lines, clock, capsys):
    def make():
        clock.now += made
        return Case("a case", clock.work(called), clock.work(called), lambda *_: None)

    assert run_bench(CPU, cases=[make] * 8) == 0
    assert clock.now < 120.0
    out = capsys.readouterr().out
    assert out.count("a case ") == lines
    assert ("left out" in out) == (lines < 8)
    if lines < 8:
        assert f"\n{8 - lines} of 8 cases left out: they would take more than two minutes" in out


def test_who_asks_for_longer_gets_longer(clock, capsys):
    case = lambda: Case("a case", clock.work(1.0), clock.work(1.0), lambda *_: None)  # noqa: E731
    assert run_bench(CPU, seconds=30.0, cases=[case] * 8) == 0
    assert clock.now == pytest.approx(8 * 32.0)
    assert "left out" not in capsys.readouterr().out


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(bench, "make_cases", lambda device: [wrong])
    assert main(["bench", "--device", "cpu", "--seconds", "0.001"]) == 1
    assert "results differ" in capsys.readouterr().err
