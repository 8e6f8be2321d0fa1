"""Exported programs: the model's own detections, in a fresh process too, and errors before anything is written."""

import json
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from busy_checkpoint import CLASSES, model_config, save_busy_checkpoint
from full_disk import room_for

from retinanet_ext.cli import main
from retinanet_ext.engine import export_programs
from retinanet_ext.engine.checkpoint import build_model, load_model
from retinanet_ext.engine.export import FORMATS, export, image_size
from retinanet_ext.engine.export_modules import ExportedDetector
from retinanet_ext.engine.settings import SettingError

SIZE = (64, 96)
CONFIG = model_config(*SIZE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_busy_checkpoint(tmp_path_factory.mktemp("weights"), CONFIG)


@pytest.fixture(scope="module")
def model(weights):
    return load_model(weights)[0]


@pytest.fixture(scope="module")
def pt2(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "detector.pt2"
    return export(weights, "pt2", path)


@pytest.fixture(scope="module")
def program(pt2):
    return torch.export.load(pt2.path).module()


def random_images(batch, height=SIZE[0], width=SIZE[1]):
    return torch.rand(batch, 3, height, width)


@torch.no_grad()
def detections(model, images):
    """Of the model itself: boxes, scores, labels of each image."""
    found = [(result["boxes"], result["scores"], result["labels"]) for result in model(list(images))]
    assert any(len(boxes) for boxes, _, _ in found)
    return found


def assert_equal_to(outputs, expected):
    boxes, scores, labels, counts = outputs
    assert counts.tolist() == [len(found[0]) for found in expected]
    for image, (count, found) in enumerate(zip(counts.tolist(), expected, strict=True)):
        for padded, own in zip((boxes, scores, labels), found, strict=True):
            assert torch.equal(padded[image, :count], own)
        assert (labels[image, count:] == -1).all()
        assert (boxes[image, count:] == 0).all()
        assert (scores[image, count:] == 0).all()


def run_fresh(tmp_path, *lines, **environment):
    """Runs the lines of a report in another process. Returns the outputs and their images."""
    path = str(tmp_path / "outputs.pt")
    code = "\n".join(
        [
            *lines,
            "torch.manual_seed(7)",
            "images = torch.rand(2, 3, 64, 96)",
            f"torch.save([[boxes, scores, labels, counts], images], {path!r})",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd=tmp_path,  # not in a checkout, whose package is not built
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_pt2_gives_the_detections_of_the_model(program, model, batch):
    images = random_images(batch)
    outputs = program(images)
    assert_equal_to(outputs, detections(model, images))
    assert outputs[0].shape == (batch, 50, 4)


def test_pt2_carries_classes_and_configuration(pt2):
    extra_files = {"retinanet_ext.json": ""}
    torch.export.load(pt2.path, extra_files=extra_files)
    metadata = json.loads(extra_files["retinanet_ext.json"])
    assert metadata["class_names"] == CLASSES
    assert metadata["model_config"] == CONFIG
    assert metadata["input"] == {"size": list(SIZE), "size_divisible": 32, "batch_size": None, "device": "cpu"}


@pytest.mark.parametrize("part", [0.0, 0.9])
def test_pt2_on_a_full_disk(pt2, weights, tmp_path, monkeypatch, part):
    """torch.export's own archive would end the process where its last bytes do not fit."""
    monkeypatch.setattr(export_programs, "trace_detector", lambda *_: torch.export.load(pt2.path))
    path = tmp_path / "full.pt2"
    with room_for(int(pt2.path.stat().st_size * part)), pytest.raises(OSError, match="File too large") as caught:
        export(weights, "pt2", path)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_pt2_refuses_other_sizes(program):
    with pytest.raises(AssertionError, match="Guard failed"):
        program(random_images(1, 96, 96))


def test_pt2_of_any_size_and_any_number_of_images(weights, tmp_path, model):
    """Against the modules at a fixed size, whose anchors are the generator's: P6 has strides other than 64 at some."""
    exported = export(weights, "pt2", tmp_path / "any.pt2", dynamic_size=True)
    assert exported.takes.startswith("images [B, 3, H, W]")
    program = torch.export.load(exported.path).module()
    for batch, *size in ((1, 160, 160), (3, 352, 192), (2, 160, 544)):
        images = random_images(batch, *size)
        with torch.no_grad():
            expected = ExportedDetector(model, tuple(size))(images)
        assert expected[3].min() > 0
        assert all(torch.equal(a, b) for a, b in zip(program(images), expected, strict=True))
    for size in ((64, 96), (170, 160), (160, 170)):
        with pytest.raises(AssertionError, match="Guard failed"):
            program(random_images(1, *size))


def test_min_score_is_the_program_s_threshold(weights, tmp_path):
    path = export(weights, "pt2", tmp_path / "few.pt2", min_score=0.4, batch_size=2, size=[64]).path
    model = load_model(weights, score_thresh=0.4, max_size=64)[0]
    images = random_images(2, 64, 64)
    outputs = torch.export.load(path).module()(images)
    assert_equal_to(outputs, detections(model, images))
    assert outputs[1][outputs[1] > 0].min() > 0.4


def test_sides_without_an_option_are_the_model_s_rounded_up():
    model = build_model({**CONFIG, "min_size": [40, 60], "max_size": 97})
    assert image_size(None, model) == (64, 128)
    assert image_size([96], model) == (96, 96)
    assert image_size([32, 96], model) == (32, 96)


def test_torchvision_weights(weights, model, tmp_path):
    path = export(weights, "torchvision", tmp_path / "weights.pth").path
    state = torch.load(path, weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_command_says_how_its_file_is_used(weights, model, tmp_path, capsys):
    """And that is so, in a fresh process."""
    path = tmp_path / "new folder" / "it's.pt2"
    assert main(["export", str(weights), "--format", "pt2", "--output", str(path), "--batch-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path)
    assert lines[1].startswith("takes: images [2, 3, 64, 96]")
    assert lines[2].startswith("gives: boxes [2, 50, 4]")
    first, second = (line.strip() for line in lines[4:])
    outputs, images = run_fresh(tmp_path, first, "torch.manual_seed(7)", second)
    assert_equal_to(outputs, detections(model, images))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "tflite"}, "--format: expected one of pt2, .*torchvision, got 'tflite'"),
        ({"output": "out.zip"}, "--output: expected a name that ends in .pt2 for the format pt2, got .*out.zip"),
        ({"output": "there.pt2"}, "--output: .*there.pt2 exists: choose another name, or remove it"),
        ({"output": "file/out.pt2"}, "--output: .*out.pt2 cannot be written: .*file is not a folder"),
        ({"size": "100"}, "--size: expected positive multiples of 32, got 100"),
        ({"size": "64 0"}, "--size: expected positive multiples of 32, got 64 0"),
        ({"size": "64 64 64"}, "--size: expected height and width, or one number for both, got 3 numbers"),
        ({"size": "64", "dynamic-size": ""}, "--size, --dynamic-size: expected one of them, got both"),
        ({"batch-size": "0"}, "--batch-size: expected an integer >= 1, got 0"),
        ({"min-score": "1.5"}, r"--min-score: expected a score in \[0, 1\], got 1.5"),
        ({"device": "tpu"}, "--device: expected auto, cpu or cuda"),
        (
            {"format": "torchvision", "output": "out.pth", "size": "64", "dynamic-size": ""},
            "--size, --dynamic-size: not for the format torchvision: leave it out",
        ),
        ({"format": "onnx", "output": "out.onnx", "device": "cpu"}, "--device: not for the format onnx: leave it out"),
        (
            {"format": "onnx-heads", "output": "out.onnx", "min-score": "0.1"},
            "--min-score: not for the format onnx-heads: leave it out",
        ),
    ],
)
def test_errors_by_name_before_anything_is_written(weights, tmp_path, capsys, changes, text):
    for name in ("there.pt2", "file"):
        (tmp_path / name).write_text("mine")
    options = {"format": "pt2", "output": "out.pt2", **changes}
    options["output"] = str(tmp_path / options["output"])
    argv = [part for name, value in options.items() for part in (f"--{name}", *value.split())]
    assert main(["export", str(weights), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(f"^retinanet-ext export: error: {text}", captured.err), captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there.pt2"]
    assert (tmp_path / "there.pt2").read_text() == "mine"


def test_a_folder_that_must_not_be_written(weights, tmp_path, monkeypatch):
    # Who runs the tests as root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SettingError, match=r"output: .* no permission to write in"):
        export(weights, "pt2", tmp_path / "out.pt2")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_command(weights, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, "onnx", ModuleType("onnx"))
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(weights), "--format", "onnx", "--output", str(tmp_path / "out.onnx")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"retinanet-ext export: error: --format: {package} is needed here")
    assert 'pip install "retinanet_ext[export]"' in error
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(weights, tmp_path, monkeypatch):
    def half(program, stream, **_):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises(OSError, match="No space"):
        export(weights, "pt2", tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []


def test_help_has_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in FORMATS)
    assert "--dynamic-size" in shown
