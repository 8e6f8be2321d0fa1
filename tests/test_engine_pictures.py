"""The pictures of a run and of predictions, the verdicts behind them, the validation loss, and the event log."""

import copy
import csv
import json
import math
import sys
import types

import numpy as np
import pytest
import torch

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from PIL import Image  # noqa: E402

from retinanet_ext.data import Batch, generate_shapes, open_dataset  # noqa: E402
from retinanet_ext.engine import drawing  # noqa: E402
from retinanet_ext.engine.config import TrainConfig, resume_config  # noqa: E402
from retinanet_ext.engine.drawing import Box, draw_boxes, enlargement  # noqa: E402
from retinanet_ext.engine.evaluate import METRICS, evaluate  # noqa: E402
from retinanet_ext.engine.event_log import EventLog  # noqa: E402
from retinanet_ext.engine.loop import StepRecord  # noqa: E402
from retinanet_ext.engine.matches import match_detections  # noqa: E402
from retinanet_ext.engine.plots import _plot_loss, new_figure, save_figure  # noqa: E402
from retinanet_ext.engine.plots_evaluation import plot_confusion_matrix, plot_scores  # noqa: E402
from retinanet_ext.engine.plots_labels import plot_labels  # noqa: E402
from retinanet_ext.engine.sheets import with_pictures, write_annotations, write_detections  # noqa: E402
from retinanet_ext.engine.train import Training  # noqa: E402
from retinanet_ext.engine.validation_loss import MeanLosses, detect_with_losses  # noqa: E402
from retinanet_ext.models import LossNormalizer, retinanet_resnet18_fpn  # noqa: E402
from retinanet_ext.models.normalizers import NORMALIZERS  # noqa: E402


class Writer:
    """In the place of torch's SummaryWriter."""

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.flushed = folder, purge_step, [], 0
        opened.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, step, value))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.flushed += 1


opened: list[Writer] = []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=4, val_images=12, image_size=32)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of one epoch, resumed for a second, with tensorboard's writer replaced."""
    root = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        data=str(data),
        arch="resnet18",
        min_size=(32,),
        max_size=64,
        anchor_sizes=(8, 16, 32, 64, 128),
        epochs=1,
        batch_size=2,
        device="cpu",
    )
    opened.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
        Training(config, root, say=lambda _: None).fit()
        before = (root / "train_batch0.jpg").read_bytes()
        Training(resume_config(root, epochs=2), root, resume=True, say=lambda _: None).fit()
    assert (root / "train_batch0.jpg").read_bytes() == before
    return root


def test_a_run_leaves_every_file_that_people_expect(run):
    assert {path.name for path in run.iterdir()} == {
        *("args.json", "results.csv", "steps.csv", "results.png", "problems.txt", "weights", "labels.png"),
        *("metrics.json", "per_class.csv", "detections.json"),
        *("PR_curve.png", "confusion_matrix.png", "scores.png"),
        *("train_batch0.jpg", "train_batch1.jpg"),
        *(f"val_batch{i}_{kind}.jpg" for i in (0, 1) for kind in ("labels", "pred")),
    }
    for path in (*run.glob("*.png"), *run.glob("*.jpg")):
        with Image.open(path) as picture:
            assert min(picture.size) >= 400, path.name
            low, high = picture.convert("L").getextrema()
            assert high - low > 100, path.name


def test_the_validation_loss_is_logged(run):
    with open(run / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        parts = [float(row[f"val_{name}"]) for name in ("classification", "bbox_regression")]
        assert float(row["val_total"]) == pytest.approx(sum(parts), rel=1e-6)
        assert all(part > 0 for part in parts)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val_total"] in [pytest.approx(float(row["val_total"]), rel=1e-6) for row in rows]


def test_events_of_a_run_and_of_a_resumed_one(run):
    first, second = opened
    assert first.folder == str(run)
    assert (first.purge_step, second.purge_step) == (None, 3)
    assert [step for name, step, _ in first.scalars if name == "train/total"] == [1, 2]
    assert [step for name, step, _ in second.scalars if name == "train/total"] == [3, 4]
    assert {name for name, step, _ in second.scalars if step == 4} > {"train/lr", "val/total", "metrics/AP50"}
    assert not any(math.isnan(value) for _, _, value in first.scalars)
    assert first.flushed == 2


def test_the_events_are_read_by_tensorboard(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )

    def write(step, values):
        """A run of four steps, two an epoch, from `step` on."""
        log = EventLog(tmp_path, step)
        for number in range(step + 1, 5):
            value = values[number - 1]
            log.add_step(StepRecord(number, value, 2 * value, 3 * value, 8.0, 1e-3, 0.1))
            if number % 2 == 0:
                figures = dict.fromkeys(METRICS, value)
                log.add_epoch({"step": number, **figures, "APs": math.nan, "val_total": value + 1})
        log.close()

    write(0, [0.5, 0.25, 8.0, 9.0])
    write(2, [None, None, 0.125, 0.0625])  # resumed after the second step: the third and fourth are made again
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    names = [name for name in METRICS if name != "APs"]  # there was none
    training = ("classification", "bbox_regression", "total", "foreground", "lr")
    assert set(events.Tags()["scalars"]) == {
        *(f"train/{name}" for name in training),
        *(f"metrics/{name}" for name in names),
        "val/total",
    }

    def scalars(name):
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert scalars("train/classification") == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]
    assert scalars("train/total") == [(1, 1.5), (2, 0.75), (3, 0.375), (4, 0.1875)]
    assert scalars("train/lr") == [(step, pytest.approx(1e-3)) for step in (1, 2, 3, 4)]
    assert scalars("metrics/ARl") == [(2, 0.25), (4, 0.0625)]
    assert scalars("val/total") == [(2, 1.25), (4, 1.0625)]


def test_without_tensorboard_there_are_no_events(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = EventLog(tmp_path)
    log.add_step(StepRecord(1, *(0.5,) * 6))
    log.add_epoch({"step": 1, "AP": 0.5})
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = retinanet_resnet18_fpn(4, min_size=64, max_size=96, anchor_sizes=[[s] for s in (8, 16, 32, 64, 128)])
    return model.eval()


def test_losses_beside_detections_are_those_of_training_without_batch_statistics(model, data):
    images, targets = zip(*(open_dataset(data, "val")[i] for i in range(3)), strict=True)
    targets[0]["ignore"][0] = True
    with torch.no_grad():
        outputs, losses = detect_with_losses(model, images, targets)
        expected = model(images)
        # Only the outermost module believes that it trains: its layers keep what they have learned.
        model.training = True
        try:
            of_training = model(list(images), list(targets))
        finally:
            model.training = False
    assert losses.keys() == of_training.keys()
    for name, value in losses.items():
        assert torch.equal(value, of_training[name])
    for one, other in zip(outputs, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "scores", "labels"))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_mean_loss_is_that_of_the_images(model, data, normalizer):
    """However they are batched; with a normalizer of the whole batch, the set is one batch."""
    model = copy.deepcopy(model)
    model.loss_normalizer = LossNormalizer(normalizer).eval()
    dataset = open_dataset(data, "val")
    dataset.records = dataset.records[:3]
    whole, uneven = (evaluate(model, dataset, batch_size=size).losses for size in (3, 2))
    assert whole.keys() == {"classification", "bbox_regression", "total"}
    assert uneven == pytest.approx(whole, rel=1e-5)
    if normalizer in ("foreground", "foreground_plus_one"):
        images, targets = zip(*(dataset[index] for index in range(3)), strict=True)
        with torch.no_grad():
            expected = detect_with_losses(model, images, targets)[1]
        assert whole["classification"] == pytest.approx(float(expected["classification"]), rel=1e-6)
    losses = MeanLosses()
    assert losses.result() == {}
    losses.add({"classification": torch.tensor(1.0)}, 3)
    losses.add({"classification": torch.tensor(5.0)}, 1)
    assert losses.result() == {"classification": 2.0, "total": 2.0}


BOX, NEAR, FAR, THIRD = [0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 10, 10], [80, 0, 10, 10]


def truth(*objects):
    """(class, box) or (class, box, marks) of one image."""
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 5, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": item[0], "bbox": item[1], **(item[2] if len(item) > 2 else {})}
            for item in objects
        ],
    }


def found(*items):
    return [{"image_id": 1, "category_id": label, "bbox": box, "score": score} for label, box, score in items]


@pytest.mark.parametrize(
    ("objects", "detections", "confusion", "right"),
    [
        ([(5, BOX), (3, FAR)], [(5, NEAR, 0.9)], [[1, 0, 0], [0, 0, 1], [0, 0, 0]], [True]),
        # A second detection, and one that is nowhere, are false.
        ([(5, BOX)], [(5, BOX, 0.8), (5, NEAR, 0.9), (3, FAR, 0.5)], [[1, 0, 0], [0, 0, 0], [1, 1, 0]], [1, 0, 0]),
        # Taken for another class; but an object that its own class finds is not confused.
        ([(5, BOX)], [(3, BOX, 0.9)], [[0, 1, 0], [0, 0, 0], [0, 0, 0]], [False]),
        ([(5, BOX)], [(3, BOX, 0.9), (5, NEAR, 0.4)], [[1, 0, 0], [0, 0, 0], [0, 1, 0]], [False, True]),
        # Too weak to be drawn: missed there, and yet right.
        ([(5, BOX)], [(5, BOX, 0.2)], [[0, 0, 1], [0, 0, 0], [0, 0, 0]], [True]),
        # Below the IoU: 10 x 10 and 10 x 4.
        ([(5, BOX)], [(5, [0, 0, 10, 4], 0.9)], [[0, 0, 1], [0, 0, 0], [1, 0, 0]], [False]),
        # What lies in a crowd or on a difficult object counts nowhere, nor do these.
        ([(5, [0, 0, 90, 90], {"iscrowd": 1})], [(5, BOX, 0.9), (5, FAR, 0.8)], np.zeros((3, 3)), []),
        ([(5, BOX, {"ignore": 1}), (3, FAR)], [(5, NEAR, 0.9)], [[0, 0, 0], [0, 0, 1], [0, 0, 0]], []),
        ([(5, BOX, {"ignore": 1})], [(5, THIRD, 0.9)], [[0, 0, 0], [0, 0, 0], [1, 0, 0]], [False]),
        ([], [], np.zeros((3, 3)), []),
    ],
)
def test_verdicts_by_hand(objects, detections, confusion, right):
    matches = match_detections(truth(*objects), found(*detections))
    assert matches.confusion.tolist() == np.asarray(confusion).tolist()
    assert matches.right.tolist() == [bool(value) for value in right]
    assert len(matches.scores) == len(right)
    assert matches.scores.tolist() == sorted(matches.scores.tolist(), reverse=True)


def test_plots_of_many_classes_and_of_nothing(tmp_path):
    many = truth()
    many["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 91)]
    for name, ground_truth in (("many", many), ("nothing", truth())):
        matches = match_detections(ground_truth, [])
        plot_confusion_matrix(matches, tmp_path / f"{name}_matrix.png")
        plot_scores(matches, tmp_path / f"{name}_scores.png")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("losses", "validation", "scale"),
    [([0.0, 0.0], [0.0], "linear"), ([1.1, 0.8], [math.nan], "linear"), ([0.9, 0.0], [0.1], "log"), ([], [], "linear")],
)
def test_losses_have_an_axis_that_fits_them(losses, validation, scale, tmp_path):
    figure, axes = new_figure(4, 3)
    steps = {"step": np.arange(len(losses)) + 1.0, "total": np.array(losses)}
    epochs = {"step": np.arange(len(validation)) + 2.0, "val_total": np.array(validation)}
    _plot_loss(axes, steps, epochs, "total", "tab:blue")
    save_figure(figure, tmp_path / "loss.png")
    assert axes.get_yscale() == scale


def test_labels_of_a_set_without_objects(data, tmp_path):
    dataset = open_dataset(data, "val")
    for record in dataset.records:
        record.boxes, record.labels = record.boxes[:0], record.labels[:0]
        record.ignore = record.ignore[:0]
    plot_labels(dataset, tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.width > 1000


def colours(path):
    """How many pixels are near each colour of the first classes."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return [int((np.abs(pixels - colour).max(axis=2) < 40).sum()) for colour in drawing.PALETTE[:4]]


def test_sheets_show_what_is_annotated_and_what_was_detected(data, tmp_path):
    dataset = open_dataset(data, "val")
    for record in dataset.records:
        Image.new("RGB", (record.width, record.height), (128, 128, 128)).save(record.path.with_suffix(".png"))
        record.path = record.path.with_suffix(".png")
    detection = {
        "image_id": dataset.records[1].image_id,
        "category_id": dataset.category_ids[2],
        "bbox": [2, 2, 20, 20],
    }
    write_detections(dataset, [0, 1], [{**detection, "score": 0.6}], tmp_path / "a.jpg")
    write_detections(dataset, [0, 1], [{**detection, "score": 0.2}], tmp_path / "b.jpg")
    shown, hidden = colours(tmp_path / "a.jpg"), colours(tmp_path / "b.jpg")
    assert hidden == [0, 0, 0, 0]
    assert shown[2] > 500
    assert shown[0] == shown[1] == 0
    write_annotations(dataset, [0, 1], tmp_path / "c.jpg")
    there = set(dataset.records[0].labels.tolist()) | set(dataset.records[1].labels.tolist())
    assert {label for label, count in enumerate(colours(tmp_path / "c.jpg")) if count > 100} == there
    dataset.records[0].path.unlink()
    dataset.records[1].path.unlink()
    write_annotations(dataset, [0, 1], tmp_path / "none.jpg")
    assert not (tmp_path / "none.jpg").exists()


def test_pictures_of_batches_leave_the_batches_as_they_are(tmp_path):
    target = {"boxes": torch.tensor([[2.0, 2.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    batches = [Batch([torch.full((3, 24, 32), 0.5)], [target], []) for _ in range(4)]
    batches.insert(1, Batch([], [], []))
    assert list(with_pictures(batches, tmp_path, ["a", "b"])) == batches
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train_batch{i}.jpg" for i in range(3)]
    counts = colours(tmp_path / "train_batch0.jpg")
    assert counts[1] > 500
    assert counts[0] == 0


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((64, 48), (640, 480)), ((640, 480), (640, 480)), ((3000, 2000), (3000, 2000)), ((60, 960), (120, 1920))],
)
def test_small_pictures_are_enlarged_before_boxes_are_drawn(size, drawn):
    assert draw_boxes(Image.new("RGB", size), []).size == drawn
    assert draw_boxes(Image.new("RGB", size), [], side=420).size[size[1] > size[0]] == 420
    assert enlargement(*size) >= 1


def test_a_label_on_a_small_picture_is_high_enough_to_be_read():
    picture = draw_boxes(Image.new("RGB", (48, 36), (128, 128, 128)), [Box((10, 12, 30, 30), 0, "cell", 0.5)])
    red = (np.abs(np.asarray(picture).astype(int) - drawing.PALETTE[0]).max(axis=2) < 8).any(axis=1)
    box_top = round(12 * enlargement(48, 36))
    assert 15 <= box_top - int(np.flatnonzero(red)[0]) <= 30
