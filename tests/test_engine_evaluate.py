"""COCO evaluation against cases computed by hand."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("PIL.Image", reason="Pillow is not installed")

from retinanet_ext.data import generate_shapes, open_dataset
from retinanet_ext.engine.evaluate import (
    METRICS,
    coco_results,
    evaluate,
    format_metrics,
    precisions_and_recalls,
    score_detections,
)
from retinanet_ext.engine.run_folder import RunFolder


def truth(objects, classes=1, images=1):
    """`objects`: (image, class, xywh) or (image, class, xywh, marks)."""
    return {
        "images": [{"id": i, "width": 100, "height": 100, "file_name": f"{i}.png"} for i in range(1, images + 1)],
        "categories": [{"id": k, "name": f"class{k}"} for k in range(1, classes + 1)],
        "annotations": [
            {
                "id": number,
                "image_id": item[0],
                "category_id": item[1],
                "bbox": item[2],
                "area": item[2][2] * item[2][3],
                "iscrowd": 0,
                "ignore": 0,
                **(item[3] if len(item) > 3 else {}),
            }
            for number, item in enumerate(objects, start=1)
        ],
    }


def found(*items):
    return [{"image_id": i, "category_id": k, "bbox": box, "score": score} for i, k, box, score in items]


BOX, OTHER, FAR = [10, 10, 40, 40], [60, 60, 30, 30], [0, 80, 10, 10]


def test_a_perfect_detection(capsys):
    result = score_detections(truth([(1, 1, BOX)]), found((1, 1, BOX, 0.9)))
    for name in ("AP", "AP50", "AP75", "APm", "AR1", "AR10", "AR100", "ARm"):
        assert result.metrics[name] == pytest.approx(1.0)
    for name in ("APs", "APl", "ARs", "ARl"):
        assert math.isnan(result.metrics[name])
    assert result.precision50.shape == (101, 1)
    assert capsys.readouterr().out == ""


def test_iou_decides_the_thresholds():
    # 40 x 40 against 40 x 25 inside it: IoU 0.625, above 0.50, 0.55 and 0.60 of the ten thresholds.
    result = score_detections(truth([(1, 1, BOX)]), found((1, 1, [10, 10, 40, 25], 0.9)))
    assert result.metrics["AP"] == pytest.approx(0.3)
    assert result.metrics["AP50"] == pytest.approx(1.0)
    assert result.metrics["AP75"] == 0.0


def test_a_false_detection_ahead_of_a_true_one():
    # Of two objects one is found, behind a false detection: precision 1/2 up to recall 1/2, 51 of 101 points.
    result = score_detections(truth([(1, 1, BOX), (1, 1, OTHER)]), found((1, 1, FAR, 0.9), (1, 1, BOX, 0.8)))
    assert result.metrics["AP50"] == pytest.approx(0.5 * 51 / 101)
    assert result.metrics["AR100"] == pytest.approx(0.5)
    # At recall 1 nothing is found.
    assert result.precision50[50, 0] == pytest.approx(0.5)
    assert result.precision50[51, 0] == 0.0


def test_a_second_detection_of_an_object_is_false():
    result = score_detections(
        truth([(1, 1, BOX), (1, 1, OTHER)]),
        found((1, 1, BOX, 0.9), (1, 1, BOX, 0.8), (1, 1, OTHER, 0.7)),
    )
    # Precision 1 up to recall 1/2 (51 points), then 2/3 (50 points).
    assert result.metrics["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_recall_by_the_size_of_the_object():
    # 20 x 20, 40 x 40 and 100 x 100: of one small, two medium and two large ones one, one and both are found.
    small, medium, large = ([[x, y, side, side] for x, y in ((0, 0), (200, 0))] for side in (20, 40, 100))
    ground_truth = truth(
        [(1, 1, small[0]), *((2, 1, box) for box in medium), *((3, 1, box) for box in large)], images=3
    )
    detections = found((1, 1, small[0], 0.9), (2, 1, medium[0], 0.9), *((3, 1, box, 0.9) for box in large))
    result = score_detections(ground_truth, detections)
    assert [result.metrics[name] for name in ("ARs", "ARm", "ARl", "AR100")] == pytest.approx([1.0, 0.5, 1.0, 0.8])
    # Two lines, in COCO's order.
    precisions, recalls = format_metrics(result).splitlines()[:2]
    assert precisions.split()[::2] == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert recalls == "AR1 0.600  AR10 0.800  AR100 0.800  ARs 1.000  ARm 0.500  ARl 1.000"


def test_classes_are_counted_apart():
    result = score_detections(
        truth([(1, 1, BOX), (2, 2, BOX), (2, 3, OTHER)], classes=4, images=2),
        found((1, 1, BOX, 0.9), (2, 2, FAR, 0.9)),
    )
    assert [row["AP50"] for row in result.per_class[:3]] == pytest.approx([1.0, 0.0, 0.0])
    assert math.isnan(result.per_class[3]["AP50"])
    assert [row["objects"] for row in result.per_class] == [1, 1, 1, 0]
    assert [row["images"] for row in result.per_class] == [1, 1, 1, 0]
    assert result.metrics["AP50"] == pytest.approx(1 / 3)
    table = format_metrics(result)
    assert "class4" in table
    assert "0.333" in table


def test_figures_go_to_their_class_whatever_the_order_of_the_ids():
    ground_truth = truth([(1, 2, BOX), (1, 1, OTHER), (2, 1, OTHER)], classes=2, images=2)
    ground_truth["categories"].reverse()  # the labels' order where a model's classes are given by name
    result = score_detections(ground_truth, found((1, 2, BOX, 0.9), (1, 1, FAR, 0.8)))
    assert [(row["class"], row["objects"], row["images"]) for row in result.per_class] == [
        ("class2", 1, 1),
        ("class1", 2, 2),
    ]
    assert [row["AP50"] for row in result.per_class] == pytest.approx([1.0, 0.0])
    assert result.precision50[0].tolist() == [1.0, 0.0]


def test_the_figures_are_those_of_pycocotools():
    """Every precision and recall: many images, crowds, objects of all sizes, ties of scores, empty images."""
    pycocotools = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    objects, detections = [], []
    for image in range(1, 61):
        for _ in range(rng.poisson(3)):
            box = [*rng.uniform(0, 300, 2).tolist(), *np.exp(rng.uniform(2, 5.5, 2)).tolist()]
            label = int(rng.integers(1, 4))
            objects.append((image, label, box, {"iscrowd": int(rng.random() < 0.1)}))
            for _ in range(rng.poisson(4)):
                near = (np.array(box) * rng.normal(1, 0.06, 4)).clip(1).tolist()
                detections.append((image, label if rng.random() < 0.8 else 1, near, round(float(rng.random()), 1)))
    # More than the hundred that count.
    detections += [(1, 1, [*rng.uniform(0, 300, 2).tolist(), 20.0, 30.0], 0.55) for _ in range(120)]
    ground_truth, detections = truth(objects, classes=3, images=62), found(*detections)
    result = score_detections(ground_truth, detections)

    theirs, results = pycocotools.COCO(), None
    theirs.dataset = {"info": {}, **ground_truth, "annotations": [dict(a) for a in ground_truth["annotations"]]}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.createIndex()
        results = theirs.loadRes([dict(detection) for detection in detections])
        scorer = COCOeval(theirs, results, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    # Ten IoUs, 101 recalls, three classes, four areas, three limits of detections; all of them are there.
    assert (precision.shape, recall.shape) == ((10, 101, 3, 4, 3), (10, 3, 4, 3))
    assert (recall > -1).all()
    ours = precisions_and_recalls(ground_truth, detections)
    # pycocotools adds 2^-52 to the number of detections that it divides by.
    np.testing.assert_allclose(ours[0], precision, rtol=0, atol=2.5e-16)
    np.testing.assert_array_equal(ours[1], recall)
    np.testing.assert_array_equal(result.precision50, ours[0][0, :, :, 0, 2])
    assert len(METRICS) == len(scorer.stats) == 12
    assert [result.metrics[name] for name in METRICS] == pytest.approx([*scorer.stats], abs=1e-12)
    assert 0.05 < result.metrics["AP"] < 0.9
    # By class, from its one evaluated alone.
    for label, row in enumerate(result.per_class, start=1):
        scorer.params.catIds = [label]
        with contextlib.redirect_stdout(io.StringIO()):
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        of_class = {name: float(scorer.stats[METRICS.index(name)]) for name in ("AP", "AP50", "AP75", "AR100")}
        assert {name: row[name] for name in of_class} == pytest.approx(of_class, abs=1e-12)


def test_no_detections_and_no_ground_truth():
    result = score_detections(truth([(1, 1, BOX)]), [])
    assert result.metrics["AP"] == 0.0
    assert result.detections == []
    result = score_detections(truth([]), found((1, 1, BOX, 0.9)))
    assert math.isnan(result.metrics["AP"])
    format_metrics(result)


def test_an_evaluation_is_read_back_from_its_files(tmp_path, without_pictures):
    run = RunFolder(tmp_path)
    assert run.read_evaluation() is None
    result = score_detections(truth([(1, 1, BOX)], classes=2), found((1, 1, BOX, 0.9)))
    result.losses = {"classification": 0.25, "bbox_regression": 0.5, "total": 0.75}
    run.write_evaluation(result, None)
    again = run.read_evaluation()
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True)
    assert again.per_class[0] == {name: pytest.approx(value) for name, value in result.per_class[0].items()}
    assert again.losses == result.losses
    assert format_metrics(again) == format_metrics(result)
    assert format_metrics(again).endswith("loss  classification 0.2500  bbox_regression 0.5000  total 0.7500")
    # A loss that is no number is none in json.
    result.losses = {"classification": math.nan, "bbox_regression": 0.5, "total": math.inf}
    run.write_evaluation(result, None)
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    assert "Infinity" not in (tmp_path / "metrics.json").read_text()
    assert run.read_evaluation().losses == pytest.approx({"bbox_regression": 0.5})


def test_an_evaluation_of_before_the_recalls_by_size_is_read(tmp_path, without_pictures):
    run = RunFolder(tmp_path)
    run.write_evaluation(score_detections(truth([(1, 1, BOX)]), found((1, 1, BOX, 0.9))), None)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["ARm"] == 1.0
    for name in ("ARs", "ARm", "ARl"):
        del metrics[name]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    again = run.read_evaluation()
    assert again.metrics["AR100"] == 1.0
    assert all(math.isnan(again.metrics[name]) for name in ("ARs", "ARm", "ARl"))
    assert "ARm   -  " in format_metrics(again)


def test_difficult_objects_count_neither_found_nor_missed():
    difficult = (1, 1, OTHER, {"ignore": 1})
    normal = found((1, 1, BOX, 0.5))
    assert score_detections(truth([(1, 1, BOX), difficult]), normal).metrics["AP50"] == pytest.approx(1.0)
    both = normal + found((1, 1, OTHER, 0.9))
    result = score_detections(truth([(1, 1, BOX), difficult]), both)
    assert result.metrics["AP50"] == pytest.approx(1.0)
    assert result.per_class[0]["objects"] == 1
    # A second detection of a difficult object is false; of a crowd it is not.
    twice = both + found((1, 1, OTHER, 0.8))
    assert score_detections(truth([(1, 1, BOX), difficult]), twice).metrics["AP50"] == pytest.approx(0.5)
    crowd = (1, 1, OTHER, {"ignore": 1, "iscrowd": 1})
    assert score_detections(truth([(1, 1, BOX), crowd]), twice).metrics["AP50"] == pytest.approx(1.0)


def test_ground_truth_is_left_as_it_was():
    ground_truth = truth([(1, 1, BOX, {"ignore": 1})])
    copy = [dict(a) for a in ground_truth["annotations"]]
    score_detections(ground_truth, found((1, 1, BOX, 0.9)))
    assert ground_truth["annotations"] == copy


class Oracle(nn.Module):
    """Returns the annotated boxes of the images in order, or nothing."""

    def __init__(self, dataset, empty=False):
        super().__init__()
        self.targets = iter([dataset[i][1] for i in range(len(dataset))])
        self.empty = empty

    def forward(self, images):
        outputs = []
        for _ in images:
            target = next(self.targets)
            keep = slice(0, 0) if self.empty else slice(None)
            outputs.append(
                {
                    "boxes": target["boxes"][keep],
                    "labels": target["labels"][keep],
                    "scores": torch.ones(len(target["boxes"]))[keep],
                }
            )
        return outputs


@pytest.fixture
def shapes(tmp_path):
    return open_dataset(generate_shapes(tmp_path, train_images=1, val_images=6, image_size=64), "val")


def test_evaluate_a_data_set(shapes):
    model = Oracle(shapes).train()
    result = evaluate(model, shapes, batch_size=4)
    assert model.training
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert result.images == 6
    assert len(result.detections) == shapes.num_objects
    assert evaluate(Oracle(shapes, empty=True), shapes).metrics["AP"] == 0.0


def test_an_unreadable_image_is_reported_and_not_counted_as_missed(shapes):
    model = Oracle(shapes)
    shapes.records[5].path.write_bytes(b"bad")
    result = evaluate(model, shapes)
    assert result.images == 5
    assert "broken image" in str(result.problems[0])
    assert result.metrics["AP"] == pytest.approx(1.0)


def test_coco_results_are_xywh(shapes):
    shapes.category_ids = [11, 12, 13, 14]
    output = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0]]),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([2]),
    }
    assert coco_results(output, 1, shapes) == [
        {"image_id": 1, "category_id": 13, "bbox": [1, 2, 10, 20], "score": 0.5, "file_name": "000001.jpg"}
    ]
