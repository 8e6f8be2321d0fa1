"""The scripts beside the benchmarks: each runs once, small, and writes what `python -m benchmarks.report` reads."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.data import generate_shapes  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--batch-size", "2", "--min-size", "64", "--max-size", "64"]


@pytest.fixture(autouse=True)
def only_small(timed):
    if timed:
        pytest.skip("these are no timings")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return str(generate_shapes(tmp_path_factory.mktemp("data"), train_images=4, val_images=2, image_size=64))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, argument, ...): what the script writes; its name in the report is "some"."""

    def call(script: str, *arguments: str) -> dict:
        path = tmp_path / "some.json"
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments, "--output", str(path)])
        assert not importlib.import_module(script).main()
        return json.loads(path.read_text())

    return call


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.report")


def has_origin(written):
    return {"date", "machine"} <= set(written) and {"processor", "commit", "torch"} <= set(written["machine"])


def test_evaluation_speed(run, report, tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools, the peer, is not installed")
    written = run("evaluation_speed", "--images", "5")
    assert has_origin(written)
    assert written["detections"] == 500
    assert "| pycocotools" in report.evaluation("some", tmp_path)


def test_profile_step(run, report, tmp_path):
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    written = run("profile_step", "--smoke", "--profiler")
    assert has_origin(written)
    for task, last in (("training", "update"), ("inference", "anchors, post-processing")):
        for side in ("ours", "torchvision, accelerated", "torchvision"):
            parts, kinds = written[task][side], written["operators"][task][side]
            assert all(value > 0 for value in parts.values())
            assert list(parts)[-2:] == [last, "all"]
            assert parts["all"] == pytest.approx(sum(parts.values()) - parts["all"])
            # Whatever is in no part by the hooks is in none by the profiler.
            assert {"resize and batch", "convolutions", "ReLU", last} <= set(kinds)
            assert next(iter(kinds)).startswith("convolutions")
    backward = {"convolutions, backward", "BatchNorm, backward", "ReLU, backward", "backward of the losses"}
    assert backward <= set(written["operators"]["training"]["torchvision"])
    assert "| backward of the losses |" in report.profile("some", tmp_path)
    assert "| convolutions, backward |" in report.operators("some", tmp_path)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_train_vs_torchvision(run, report, tmp_path, shapes, arch):
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    written = run("train_vs_torchvision", "--data", shapes, "--steps", "2", "--arch", arch, *SMALL)
    assert has_origin(written)
    assert written["recipe"]["arch"] == arch
    for side in ("retinanet_ext", "torchvision"):
        assert written[side]["steps"] == 2
        weights = {"resnet18": 20, "resnet50": 34}[arch] * 1e6 * 4
        peak = written[side]["peak_bytes"]
        assert peak is None or peak > 3 * weights  # gradients and two moments
        assert {"AP", "AP50"} <= set(written["weights_in_the_other_model"][side])
    assert f"| 0 ({arch}, " in report.training("some", tmp_path)


def test_weights_are_scored_in_the_other_model(monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    script = importlib.import_module("train_vs_torchvision")
    torch, models = script.torch, [script.nn.Linear(1, 1), script.nn.Linear(1, 1)]
    first, second = (
        script.Contestant(name, model, None, None, None) for name, model in zip(("a", "b"), models, strict=True)
    )
    own = {one.name: one.model.weight.item() for one in (first, second)}
    assert own["a"] != own["b"]

    def weight_of(model, dataset, device):
        return script.Evaluation({"weight": model.weight.item(), "model": models.index(model)}, [], None)

    monkeypatch.setattr(script, "evaluate", weight_of)
    with torch.no_grad():
        metrics = script.evaluate_swapped([first, second], None)
    assert [metrics[name]["model"] for name in "ab"] == [1, 0]
    assert [metrics[name]["weight"] for name in "ab"] == [pytest.approx(own[name], abs=1e-4) for name in "ab"]


def test_lockstep(run, report, tmp_path, shapes):
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    written = run("train_vs_torchvision", "--data", shapes, "--lockstep", "1", "--float64", *SMALL)
    (step,) = written["lockstep"]
    assert step["relative_difference_of_the_losses"] < 1e-9
    for held in ("weights", "running_statistics"):
        assert step[f"difference_of_the_{held}_over_their_change"] < 1e-9
    assert "float64: running statistics |" in report.lockstep("some", tmp_path)


def test_twins(run, report, tmp_path, shapes):
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    written = run("train_vs_torchvision", "--data", shapes, "--steps", "1", "--twins", *SMALL)
    assert written["recipe"]["twins"]
    assert "| torchvision, last places changed |" in report.twins("some", tmp_path)


def test_at_the_same_weights(run, report, tmp_path, shapes):
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    written = run("train_vs_torchvision", "--data", shapes, "--same-weights", "2", "--float64", *SMALL)
    assert [row["step"] for row in written["at_the_same_weights"]] == [1, 2]
    for row in written["at_the_same_weights"]:
        assert max(row["relative_difference_of_the_losses"].values()) < 1e-5
        assert row["difference_of_the_gradients_over_their_norm"] < 1e-3
        assert row["difference_of_the_steps_over_their_size"] < 1e-2
        for side in ("retinanet_ext", "torchvision"):
            assert 0 < row["distance_to_the_gradient_in_float64"][side] < 1e-3
    table = report.gradients("some", tmp_path)
    assert "| `classification` |" in table
    assert "| step of AdamW, of its size |" in table
    assert "| gradient of torchvision to that in float64 |" in table


def test_at_the_same_weights_over_several_epochs(run, shapes):
    pytest.importorskip("torchvision", reason="torchvision, the peer, is not installed")
    written = run("train_vs_torchvision", "--data", shapes, "--same-weights", "9", "--every", "4", *SMALL)
    assert [row["step"] for row in written["at_the_same_weights"]] == [1, 5, 9]


def test_train_vs_reference(run, report, tmp_path, shapes):
    written = run("train_vs_reference", "--data", shapes, "--steps", "2", *SMALL)
    assert has_origin(written)
    steps = written["training"]
    assert steps["largest_relative_difference_of_a_loss"] < 1e-4
    for side in ("operators", "reference"):
        forward, backward, whole = (
            steps[f"{part}_seconds_median"][side] for part in ("loss_forward", "loss_backward", "step")
        )
        assert min(forward, backward) > 0
        assert forward + backward < whole
    assert "| a whole training step, median |" in report.reference("some", tmp_path)


def test_anchor_match_pairs(run, report, tmp_path, monkeypatch):
    pairs = importlib.import_module("anchor_match_pairs")
    cases = {"one": ((64, 96), 1, 5), "several": ((64, 96), 2, 5), "ragged": ((64, 96), 2, "ragged")}
    monkeypatch.setattr(pairs, "CASES", cases)
    written = run("anchor_match_pairs")
    assert has_origin(written)
    (counted,) = written["pairs"]
    shares = counted["shares"]
    assert 0 < shares["second pass"] <= shares["first pass"] <= shares["the box meets the tile"] <= 1
    assert f"| 64×96, {counted['anchors']:,} anchors | 5 | " in report.pairs("some", tmp_path)
