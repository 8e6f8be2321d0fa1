"""Anchor coverage against every anchor there is, and proposals that cover more."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL.Image", reason="Pillow is not installed")

from retinanet_ext.cli import main
from retinanet_ext.data import generate_shapes
from retinanet_ext.data.dataset import DetectionDataset, ImageRecord
from retinanet_ext.engine.anchor_report import (
    Anchors,
    best_overlaps,
    coverage_table,
    propose_anchors,
    report_anchors,
    resized_boxes,
)
from retinanet_ext.engine.checkpoint import build_model
from retinanet_ext.engine.config import TrainConfig
from retinanet_ext.models.config import PRESETS
from retinanet_ext.reference import box_iou

DEFAULT = Anchors((32, 64, 128, 256, 512), (0.5, 1.0, 2.0))


def dataset_of(sides, size=(300, 400), labels=None, ignore=None, seed=0):
    """One image of `size` (height, width) with boxes of `sides` [M, 2] (width, height) at random places."""
    sides = np.asarray(sides, np.float64)
    corner = np.random.default_rng(seed).random(sides.shape) * (np.array(size[::-1]) - sides)
    record = ImageRecord("x.jpg", 1, size[1], size[0])
    record.boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    record.labels = np.zeros(len(sides), np.int64) if labels is None else np.asarray(labels)
    record.ignore = np.zeros(len(sides), bool) if ignore is None else np.asarray(ignore)
    return DetectionDataset("set", ["a", "b"], [1, 2], [record], [])


@pytest.mark.parametrize("size", [(300, 400), (333, 211), (97, 500)])
@pytest.mark.parametrize(
    "anchors",
    [
        DEFAULT,
        Anchors((10, 25, 50, 110, 200), (0.7, 1.5)),
        *(Anchors((10, 25, 50, 110, 200), (0.7, 1.5), preset) for preset in PRESETS),
    ],
)
def test_the_best_anchor_is_that_of_all_the_models_anchors(size, anchors):
    rng = np.random.default_rng(1)
    dataset = dataset_of(np.exp(rng.uniform(1.5, 4.4, (40, 2))), size)
    boxes = resized_boxes(dataset, 160, 256)
    settings = TrainConfig(
        "",
        arch="resnet18",
        preset=anchors.preset,
        min_size=(160,),
        max_size=256,
        anchor_sizes=anchors.sizes,
        aspect_ratios=anchors.ratios,
    )
    model = build_model(settings.model_config(num_classes=2)).eval()
    caught = []
    model.anchor_generator.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        model([torch.zeros(3, *size)])
    expected = box_iou(torch.from_numpy(boxes.xyxy), caught[0].double()).max(dim=1).values
    # The model rounds the resized sides on the way; boxes here are scaled by the factor itself.
    np.testing.assert_allclose(best_overlaps(boxes, anchors), expected, atol=1e-6)


def test_ignored_boxes_do_not_count():
    boxes = resized_boxes(dataset_of([[20, 20], [30, 40]], ignore=[True, False]), 300, 400)
    assert len(boxes.xyxy) == 1
    assert boxes.sizes[0] == pytest.approx(np.sqrt(1200), rel=1e-5)


def test_boxes_are_resized_as_the_images_are():
    boxes = resized_boxes(dataset_of([[20, 30]], size=(300, 400)), 600, 1333)
    sides = boxes.xyxy[0, 2:] - boxes.xyxy[0, :2]
    np.testing.assert_allclose(sides, [40, 60], rtol=1e-5)
    assert boxes.padded.tolist() == [[608, 800]]
    assert boxes.sizes[0] == pytest.approx(np.sqrt(600), rel=1e-5)
    # The longer side has a limit.
    np.testing.assert_allclose(np.ptp(resized_boxes(dataset_of([[20, 30]]), 600, 400).xyxy[0, ::2]), 20, rtol=1e-5)


def test_the_table_counts_by_size_and_class():
    dataset = dataset_of([[8, 8], [50, 50], [120, 120]], labels=[0, 1, 1])
    boxes = resized_boxes(dataset, 300, 400)
    table = coverage_table(boxes, np.array([0.1, 0.45, 0.9]), ["a", "b"]).splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in table[1:]}
    assert rows["all"] == ["3", "33.3%", "33.3%", "0.483"]
    assert rows["small  (< 32 px)"] == ["1", "0.0%", "100.0%", "0.100"]
    assert rows["medium (32 to 96 px)"] == ["1", "0.0%", "0.0%", "0.450"]
    assert rows["large  (from 96 px)"] == ["1", "100.0%", "0.0%", "0.900"]
    assert rows["a"][0] == "1"
    assert rows["b"] == ["2", "50.0%", "0.0%", "0.675"]
    assert table[1].startswith("all")


@pytest.mark.parametrize(
    "sides",
    [
        np.exp(np.random.default_rng(0).uniform(2.9, 3.3, (80, 2))),  # 18 to 27 pixels
        np.array([[100, 20]]) * np.random.default_rng(0).uniform(0.6, 1.4, (80, 1)),  # five times as wide as high
    ],
    ids=["small", "wide"],
)
def test_a_proposal_covers_more_at_the_same_cost(sides):
    boxes = resized_boxes(dataset_of(sides), 300, 400)
    better = propose_anchors(boxes, DEFAULT)
    before, after = ((best_overlaps(boxes, anchors) >= 0.5).mean() for anchors in (DEFAULT, better))
    assert before < 0.7
    assert after > 0.9
    assert len(better.ratios) == 3
    assert list(better.sizes) == sorted(better.sizes)


def test_anchors_that_fit_are_kept():
    boxes = resized_boxes(dataset_of(np.full((30, 2), 64.0)), 300, 400)
    assert propose_anchors(boxes, DEFAULT) is None


def test_a_rare_class_counts():
    sides = [[64, 64]] * 100 + [[20, 20]] * 3
    boxes = resized_boxes(dataset_of(sides, labels=[0] * 100 + [1] * 3), 300, 400)
    better = propose_anchors(boxes, DEFAULT)
    assert (best_overlaps(boxes, better) >= 0.5)[100:].all()


def test_the_command_reports_and_says_how_to_train(tmp_path, capsys):
    data = generate_shapes(tmp_path / "set", train_images=6, val_images=1, image_size=64)
    argv = ("anchors", str(data), "--min-size", "64", "--max-size", "64")
    assert main(list(argv)) == 0
    out = capsys.readouterr().out
    assert "--anchor-sizes 32 64 128 256 512 --aspect-ratios 0.5 1 2, images resized to 64, at most 64:" in out
    assert "triangle" in out
    command = next(line for line in out.splitlines() if line.startswith("next: "))
    assert command.startswith(f"next: retinanet-ext train {data} --min-size 64 --max-size 64 --anchor-sizes ")
    one = [str(data / "annotations" / "instances_train.json"), "--images", str(data / "train")]
    assert main(["anchors", *one, *argv[2:]]) == 0
    assert f"next: retinanet-ext train {' '.join(one)} --min-size 64 " in capsys.readouterr().out
    # What is proposed is accepted, and then there is nothing better.
    sizes, ratios = command.split("--anchor-sizes ")[1].split(" --aspect-ratios ")
    assert main([*argv, "--anchor-sizes", *sizes.split(), "--aspect-ratios", *ratios.split()]) == 0
    kept = capsys.readouterr().out
    assert "keep them" in kept
    assert kept.endswith(f"\n{command}\n")
    assert main([*argv, "--preset", "paper"]) == 0
    assert f"next: retinanet-ext train {data} --min-size 64 --max-size 64 --preset paper --anchor-s" in (
        capsys.readouterr().out
    )


def test_a_set_without_objects_has_nothing_to_cover(capsys):
    said = report_anchors(dataset_of(np.zeros((0, 2))), TrainConfig("a set", images="its images"))
    assert "nothing to cover" in said
    assert said.endswith("\nnext: retinanet-ext check-data 'a set' --images 'its images'")
