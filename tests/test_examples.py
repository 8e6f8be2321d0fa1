"""The examples run as their first lines say."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import retinanet_ext

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, folder, *options):
    """In another folder: there the installed package is found, not the sources."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_accelerated_torchvision(tmp_path):
    pytest.importorskip("torchvision", reason="the example accelerates torchvision's RetinaNet")
    lines = run("accelerated_torchvision.py", tmp_path, "--size", "64", "--steps", "1").splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["RetinaNet", "AcceleratedRetinaNet"]
    assert float(re.search(r"losses: (\S+) in the first step", lines[2])[1]) < 2e-6
    assert re.fullmatch(r"[1-9]\d* detections, labels the same", lines[3])


@pytest.fixture
def run_here(monkeypatch, capsys):
    """As a program, but in this process, which has torch: seconds less."""

    def run_here(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_drop_in_loss(run_here):
    same, first, last, result = run_here("drop_in_loss.py", "--steps", "50").splitlines()
    by_one_hot, by_class = re.search(r"same loss: (\S+) and (\S+)$", same).groups()
    assert float(by_one_hot) == pytest.approx(float(by_class), abs=2e-6)
    first_loss, last_loss = (float(re.search(r"loss (\S+) a coloured cell", line)[1]) for line in (first, last))
    assert last_loss < first_loss / 2
    assert float(re.search(r"named right: (\S+)%", result)[1]) > 92  # nothing named at all: 90


def test_nms_in_your_detector(run_here):
    _, one, every = run_here("nms_in_your_detector.py", "--steps", "50").splitlines()
    reports, kept = map(int, re.search(r"(\d+) cells report something, (\d+) boxes stay", one).groups())
    assert reports > kept >= 2
    bars, boxes, found = map(int, re.search(r"(\d+) bars, (\d+) boxes, (\d+) bars found", every).groups())
    assert 56 <= found <= bars == 64
    assert boxes < 4 * bars


def python_says():
    """What from_cpp.cpp computes, computed here."""
    lines = []

    def say(name, values):
        lines.append(" ".join([name, *(f"{value:.4f}" for value in values.double().flatten().tolist())]))

    y, x = torch.meshgrid(*[(torch.arange(4) + 0.5) * 16] * 2, indexing="ij")
    anchors = torch.stack((x - 16, y - 16, x + 16, y + 16), dim=-1).view(16, 4)
    gt_boxes = [torch.tensor([[16.0, 22, 48, 54]]), torch.tensor([[30.0, 30, 62, 62]])]
    say("box_iou", retinanet_ext.box_iou(gt_boxes[0], anchors))
    targets = retinanet_ext.assign_targets(anchors, gt_boxes, [torch.tensor([1]), torch.tensor([2])])
    assert targets.num_foreground.tolist() == [2, 1]
    say("labels", targets.labels)
    say("matched", targets.matched)
    say("foreground", targets.num_foreground)
    say("match_anchors", retinanet_ext.match_anchors(anchors, gt_boxes))
    deltas = retinanet_ext.encode_boxes(gt_boxes[0], anchors)
    say("encode_boxes", deltas[9])
    say("decode_boxes", retinanet_ext.decode_boxes(deltas, anchors)[9])
    logits = torch.linspace(-4, 2, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    rows, labels = logits.permute(0, 2, 3, 1).reshape(32, 3), targets.labels
    say("sigmoid_focal_loss", retinanet_ext.sigmoid_focal_loss(rows, labels.flatten(), reduction="sum"))
    normalizer = targets.num_foreground
    say("multilevel_focal_loss", retinanet_ext.multilevel_focal_loss([logits], labels, normalizer=normalizer))
    levels = [torch.linspace(-1, 1, 2 * 4 * 4 * 4).view(2, 4, 4, 4)]
    options = {"loss": "smooth_l1", "normalizer": normalizer}
    loss = retinanet_ext.box_regression_loss(levels, anchors, gt_boxes, targets.matched, **options)
    assert loss > 0
    say("box_regression_loss", loss)

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    scores = torch.tensor([0.8, 0.9, 0.7])
    say("nms", retinanet_ext.nms(boxes, scores, 0.5))
    indices, counts = retinanet_ext.batched_nms_padded(
        boxes[None], scores[None], torch.zeros(1, 3, dtype=torch.int64), 0.5, max_detections=3
    )
    say("batched_nms_padded", indices)
    say("counts", counts)
    logits, deltas = torch.full((2, 3, 4, 4), -5.0), torch.zeros(2, 4, 4, 4)
    logits[0, 1, 2, 1], logits[0, 1, 2, 2], logits[1, 2, 3, 3] = 3, 2, 1
    deltas[0, 0, 2, 2] = -0.5
    found = retinanet_ext.detect([logits], [deltas], anchors, [(64, 64), (60, 60)], max_detections=10)
    for image, count in enumerate(found.counts.tolist()):
        for i in range(count):
            box = " ".join(f"{side:.1f}" for side in found.boxes[image, i].tolist())
            label, score = found.labels[image, i], found.scores[image, i]
            lines.append(f"image {image}: class {label}, score {score:.4f}, box {box}")
    return lines


def test_the_program_in_cpp_calls_every_forward_operator():
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("retinanet_ext::")}
    of_gradients = ("_backward", "_with_grad", "_refresh_grad")
    forward = {name for name in schemas if not name.endswith(of_gradients)}
    assert len(forward) >= 11
    assert set(re.findall(r'"(retinanet_ext::\w+)"', (EXAMPLES / "cpp" / "from_cpp.cpp").read_text())) == forward


def test_from_cpp(tmp_path):
    """Built as its first lines say, and run without Python; also where a program resolves every symbol as it loads."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for program in ("cmake", "ninja"):
        if shutil.which(program, path=path) is None:
            pytest.skip(f"{program} builds the example and was not found: pip install 'retinanet_ext[test]'")
    environment = {**os.environ, "PATH": path}
    configure = ["cmake", f"-S{EXAMPLES / 'cpp'}", f"-B{tmp_path}", "-GNinja", f"-DTORCH={Path(torch.__file__).parent}"]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    library = Path(retinanet_ext.__file__).parent / "_C.abi3.so"
    for variables in ({}, {"LD_BIND_NOW": "1"}):
        command = [tmp_path / "from_cpp", library]
        done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == python_says()
