"""The benchmarks' own checks and records: that wrong sides do not agree, and what is said of a peer that is missing."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agreement import same_detections, unmatched
from peak_memory import out_of_memory

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def found():
    """An image's detections, as torchvision returns them."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(50, 2, generator=generator) * 400
    boxes = torch.cat([corner, corner + 20 + torch.rand(50, 2, generator=generator) * 100], dim=1)
    scores = torch.linspace(0.9, 0.1, 50)
    return {"boxes": boxes, "scores": scores, "labels": torch.arange(50) % 7}


def changed(found, name, change):
    return {**found, name: change(found[name].clone())}


def test_detections_of_equal_scores_in_another_order_are_the_same(found):
    tied = changed(found, "scores", lambda scores: scores.index_fill_(0, torch.arange(10, 13), scores[10]))
    order = torch.arange(50)
    order[10:13] = torch.tensor([12, 10, 11])
    same_detections({name: value[order] for name, value in tied.items()}, tied)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("boxes", lambda boxes: boxes + 0.5),
        ("boxes", lambda boxes: boxes[:, [1, 0, 3, 2]]),
        ("labels", lambda labels: labels + 1),
        ("scores", lambda scores: scores * 1.001),
        ("scores", lambda scores: scores.mul_(float("nan"))),
        ("boxes", lambda boxes: boxes[:1].expand(50, 4)),
    ],
    ids=["shifted", "transposed", "next class", "other scores", "not a number", "one box for all"],
)
def test_other_detections_are_not_the_same(found, name, change):
    with pytest.raises(AssertionError, match="detections are not among the other side's"):
        same_detections(changed(found, name, change), found, open_share=0.5)


def test_one_wrong_detection_is_too_many_unless_some_are_open(found):
    wrong = changed(found, "labels", lambda labels: labels.index_fill_(0, torch.tensor([3]), 9))
    assert unmatched(wrong, found, rtol=1e-5, pixels=0.01) == 1
    same_detections(wrong, found, open_share=0.02)
    with pytest.raises(AssertionError, match="1 of 50 detections"):
        same_detections(wrong, found)


def test_a_detection_is_nobodys_twice(found):
    doubled = {name: value[[0, 0, *range(2, 50)]] for name, value in found.items()}
    assert unmatched(doubled, found, rtol=1e-5, pixels=0.01) == 1


def test_fewer_detections_are_not_the_same(found):
    with pytest.raises(AssertionError, match="40 detections beside 50"):
        same_detections({name: value[:40] for name, value in found.items()}, found, open_share=0.1)


def test_torchvisions_post_processing_is_no_one_graph():
    """What bench_detect says of its absent peer."""
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    bench = importlib.import_module("bench_detect")
    case = bench.make_case(bench.SMOKE, -5.5, torch.float32, torch.device("cpu"))
    call = bench.torchvision_call(*case, bench.SMOKE[2])
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        torch.compile(call, fullgraph=True, backend="eager")()


def too_large():
    return torch.empty(1 << 60, dtype=torch.uint8)


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as of_the_allocator:
        too_large()
    for error in (of_the_allocator.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert out_of_memory(error)
    for error in (RuntimeError("shapes differ"), ValueError("not enough memory")):
        assert not out_of_memory(error)


OUT_OF_MEMORY = """
import pytest, torch
from bench_scaling import Curve, ended, measure

def agree(mine, other):
    assert mine == other == 1

def curve(where):
    def make(x, device):
        def call():
            if x >= 100 and where == "call":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 1

        def peer():
            if x >= 100 and where == "inputs":
                torch.empty(1 << 60, dtype=torch.uint8)
            if x > 100:
                raise AssertionError("the line has ended")
            return call

        return (lambda: 1), peer, agree, x, x

    def holds(x):
        return 1 << 60 if x >= 100 and where == "estimate" else 0

    return Curve("boxes N", (10, 100, 1000), make, holds)

@pytest.mark.parametrize("x", [10, 100, 1000])
@pytest.mark.parametrize("where", ["call", "inputs", "estimate"])
def test_growth(compare, device, ended, where, x):
    measure(compare, device, f"of the {where}", curve(where), x, ended)
"""


def measured(folder, planted):
    """The results of a benchmark planted in a folder, run there on the CPU."""
    (folder / "test_planted.py").write_text(planted)
    results = folder / "planted.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", folder]
    command += ["test_planted.py", "--benchmark", "--quick", "--device", "cpu", "--results", results]
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(results.read_text())["results"]


def test_a_peer_out_of_memory_ends_its_line_and_the_page_says_where(tmp_path, monkeypatch):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark, which times the cases, is not installed")
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    points = measured(tmp_path, OUT_OF_MEMORY)
    assert [list(point["peers"]) for point in points] == [["torchvision"], [], []] * 3
    reason = "out of memory at boxes N = 100"
    assert [point["skipped"] for point in points[:6]] == [{}, *[{"torchvision": reason}] * 2] * 2
    needed, *others = (point["skipped"]["torchvision"] for point in points[7:])
    assert others == [needed]
    # 2**60 bytes, in GiB.
    assert re.fullmatch(r"would hold 1073741824 GiB at boxes N = 100: of the machine's \d+ GiB \d+ are free", needed)
    monkeypatch.syspath_prepend(ROOT)
    text = importlib.import_module("benchmarks.report").scaling("planted", tmp_path)
    assert text.count(f"- torchvision: {reason}\n") == 2
    assert text.count(f"- torchvision: {needed}\n") == 1


MATRIX = """
from bench_scaling import Curve, iou_matrix, measure, pairs

def test_growth(compare, device):
    measure(compare, device, "box_iou", Curve("boxes N", (2000,), pairs), 2000, {})
    open("expected", "w").write(str(iou_matrix(2000, 2000)))
"""


def test_what_torchvisions_matrix_is_expected_to_hold(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark, which times the cases, is not installed")
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    (point,) = measured(tmp_path, MATRIX)
    expected = int((tmp_path / "expected").read_text())
    # Below the C library's limit for blocks of their own some freed memory stays with the process.
    assert 0.98 * expected < point["peak_bytes"]["torchvision"] < 1.2 * expected


SLOW = """
import time

def agree(mine, other):
    assert mine == other == 1

def test_slow(compare):
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.1)
        return 1

    compare("slow", lambda: 1, {"slow": slow, "fast": lambda: 1}, agree, elements=1, bytes=4, slow_ms=90)
    assert calls == ["slow", "slow"]
"""


def test_a_slow_peer_is_timed_once(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark, which times the cases, is not installed")
    (result,) = measured(tmp_path, SLOW)
    assert result["peers"]["slow"]["rounds"] == 1
    assert result["peers"]["slow"]["median"] >= 100
    assert result["ours"]["rounds"] == result["peers"]["fast"]["rounds"] > 1
    assert set(result["peak_bytes"]) == {"ours", "fast", "slow"}


TURNS = """
import time

def agree(mine, other):
    assert mine == other == 1

def test_turns(compare, request):
    calls = []

    def call(side, seconds):
        calls.append(side)
        time.sleep(seconds)
        return 1

    peers = {"short": lambda: call("s", 0), "long": lambda: call("l", 0.26)}
    compare("turns", lambda: call("o", 0), peers, agree, elements=1, bytes=4)
    open("calls", "w").write("".join(calls))
"""


def test_a_short_call_follows_one_of_its_own_side(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark, which times the cases, is not installed")
    measured(tmp_path, TURNS)
    # Seven rounds, after two for warming up.
    assert "sslo" + 8 * "osslo" + "o" in (tmp_path / "calls").read_text()
