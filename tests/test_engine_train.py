"""Training: same seed, same run; resumed equals uninterrupted; losses that are not finite stop it."""

import csv
import dataclasses
import importlib.util
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_retinanet import tiny_retinanet
from torch import nn

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.cli import main  # noqa: E402
from retinanet_ext.data import DatasetError, generate_shapes, make_loader, open_dataset  # noqa: E402
from retinanet_ext.engine import train  # noqa: E402
from retinanet_ext.engine.checkpoint import CheckpointError, load_checkpoint, load_model, temporary_of  # noqa: E402
from retinanet_ext.engine.config import TrainConfig, octaves, resolve_device, resume_config  # noqa: E402
from retinanet_ext.engine.export_programs import check_compiler  # noqa: E402
from retinanet_ext.engine.loop import StepRecord, TrainingError, train_steps  # noqa: E402
from retinanet_ext.engine.run_folder import RunFolder, RunFolderError  # noqa: E402
from retinanet_ext.engine.schedule import make_optimizer, make_scheduler, rate_factor  # noqa: E402
from retinanet_ext.engine.settings import SettingError  # noqa: E402
from retinanet_ext.engine.stepper import Stepper  # noqa: E402
from retinanet_ext.engine.train import Training  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=5, val_images=2, image_size=32)


def tiny(data, **changes):
    settings = {
        "data": str(data),
        "arch": "resnet18",
        "preset": "detectron2",  # its losses have a state of their own, which a resumed run must go on with
        "min_size": (32, 40),
        "max_size": 64,
        "anchor_sizes": (8, 16, 32, 64, 128),
        "epochs": 2,
        "batch_size": 2,
        "vflip": 0.5,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})


def quiet(_):
    pass


def rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same_weights(a, b):
    first, second = load_checkpoint(a)["model"], load_checkpoint(b)["model"]
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_same_run(run, other):
    """Weights, optimizer and logs, bit by bit, but wall times."""
    assert_same_weights(run.last, other.last)
    assert_same_weights(run.best, other.best)
    for a, b in zip(rows(run.steps), rows(other.steps), strict=True):
        assert {**a, "seconds": ""} == {**b, "seconds": ""}
    timed = {"mean_seconds_per_step": "", "val_seconds": ""}
    for a, b in zip(rows(run.results), rows(other.results), strict=True):
        assert {**a, **timed} == {**b, **timed}
    assert load_checkpoint(run.best)["optimizer"] is None
    optimizers = [load_checkpoint(r.last)["optimizer"]["state"] for r in (run, other)]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*(o.values() for o in optimizers), strict=True))


class Interrupted(Exception):
    pass


def stop_after(epoch):
    def check(training):
        if training.epoch == epoch:
            raise Interrupted

    return check


@pytest.fixture(scope="module")
def full_run(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "full"
    result = Training(tiny(data), run_dir, say=quiet).fit()
    return RunFolder(run_dir), result


def test_run_folder_is_complete(full_run, data):
    run, result = full_run
    files = {path.name for path in run.root.iterdir()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == (importlib.util.find_spec("tensorboard") is not None)
    assert files - events == {
        "args.json",
        "results.csv",
        "steps.csv",
        "problems.txt",
        "metrics.json",
        "per_class.csv",
        "detections.json",
        "weights",
    }
    assert {path.name for path in run.last.parent.iterdir()} == {"last.pt", "best.pt"}
    assert run.problems.read_text() == ""
    results, steps = rows(run.results), rows(run.steps)
    assert [row["epoch"] for row in results] == ["1", "2"]
    assert [row["step"] for row in steps] == [str(i) for i in range(1, 5)]
    for row in results:
        own = [s for s in steps if s["epoch"] == row["epoch"]]
        for name in ("classification", "bbox_regression", "total", "foreground"):
            mean = sum(float(s[name]) for s in own) / len(own)
            assert float(row[name]) == pytest.approx(mean, rel=1e-6)
        assert float(row["AP"]) >= 0.0
        seconds = [float(s["seconds"]) for s in own]
        assert float(row["mean_seconds_per_step"]) == pytest.approx(sum(seconds) / len(seconds), rel=1e-6)
    assert float(results[-1]["AP"]) == pytest.approx(result.metrics["AP"], abs=1e-6)
    best = max(float(row["AP"]) for row in results)
    assert load_checkpoint(run.best)["best"] == pytest.approx(best, abs=1e-6)
    metrics = json.loads((run.root / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(best, abs=1e-6)
    assert isinstance(json.loads((run.root / "detections.json").read_text()), list)
    assert [row["class"] for row in rows(run.root / "per_class.csv")] == [
        "disc",
        "square",
        "triangle",
        "star",
    ]
    running = 100.0
    for step in steps:
        running = 0.9 * running + 0.1 * 2 * float(step["foreground"])  # of two images
    assert load_checkpoint(run.last)["buffers"]["loss_normalizer.average"].item() == pytest.approx(running, rel=1e-5)
    assert load_model(run.best)[1] == ["disc", "square", "triangle", "star"]


def test_slow_steps_show_in_the_time_of_an_epoch(data, tmp_path, monkeypatch, capsys):
    from retinanet_ext.engine import train

    seconds = (1.0, 1.0, 7.0)
    records = [StepRecord(step, 1.0, 1.0, 2.0, 3.0, 1e-3, each) for step, each in enumerate(seconds, start=1)]
    monkeypatch.setattr(train, "train_steps", lambda *args, **kwargs: iter(records))
    Training(tiny(data, epochs=1, validate_every=0), tmp_path / "run", say=quiet).fit()
    assert "3.000 s a step (mean)" in capsys.readouterr().out
    assert float(rows(tmp_path / "run" / "results.csv")[0]["mean_seconds_per_step"]) == 3.0


def test_steps_are_in_the_file_while_the_epoch_runs(data, tmp_path, monkeypatch):
    from retinanet_ext.engine import train

    seen = []

    def two_steps_and_a_kill(*args, **kwargs):
        for step in (1, 2):
            yield StepRecord(step, 1.0, 1.0, 2.0, 3.0, 1e-3, 0.5)
            seen.append([row["step"] for row in rows(tmp_path / "run" / "steps.csv")])
        raise Interrupted

    monkeypatch.setattr(train, "train_steps", two_steps_and_a_kill)
    with pytest.raises(Interrupted):
        Training(tiny(data, validate_every=0), tmp_path / "run", say=quiet).fit()
    assert seen == [["1"], ["1", "2"]]


def test_same_seed_same_run(full_run, data, tmp_path):
    run, _ = full_run
    Training(tiny(data), tmp_path / "again", say=quiet).fit()
    again = RunFolder(tmp_path / "again")
    assert_same_weights(run.last, again.last)
    for a, b in zip(rows(run.steps), rows(again.steps), strict=True):
        assert {**a, "seconds": ""} == {**b, "seconds": ""}


def test_a_compiled_run_takes_the_steps_of_the_eager_one(tmp_path, monkeypatch):
    """By the compiler that a user has: two steps of four images, whose network and losses are one graph."""
    try:
        check_compiler()
    except SettingError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(train, "build_model", lambda config: tiny_retinanet(config["num_classes"]))
    data = generate_shapes(tmp_path / "data", train_images=4, val_images=1, image_size=32)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    runs = []
    for compiled in (False, True):
        run_dir = tmp_path / f"compiled_{compiled}"
        Training(tiny(data, epochs=1, compile=compiled, lr=0.1, warmup_steps=0), run_dir, say=quiet).fit()
        runs.append(RunFolder(run_dir))
        counts = torch._dynamo.utils.counters
        assert counts["stats"]["unique_graphs"] == compiled
        assert bool(counts["inductor"]) == compiled
    steps = [rows(run.steps) for run in runs]
    assert len(steps[0]) == len(steps[1]) == 2
    for name in ("classification", "bbox_regression", "total", "foreground", "grad_norm"):
        expected, found = ([float(row[name]) for row in step] for step in steps)
        assert found == pytest.approx(expected, rel=1e-5)
        assert all(value > 0 for value in found)
    assert steps[0][0]["classification"] != steps[0][1]["classification"]
    expected, found = (load_checkpoint(run.last)["model"] for run in runs)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_another_seed_another_run(full_run, data, tmp_path):
    run, _ = full_run
    Training(tiny(data, epochs=1, seed=1, validate_every=0), tmp_path / "other", say=quiet).fit()
    assert rows(RunFolder(tmp_path / "other").steps)[0]["total"] != rows(run.steps)[0]["total"]


def test_a_resumed_run_equals_the_uninterrupted_one(full_run, data, tmp_path):
    run, _ = full_run
    with pytest.raises(Interrupted):
        Training(tiny(data), tmp_path / "run", say=quiet).fit(on_epoch_end=stop_after(1))
    # What a crash in the middle of the next epoch leaves behind.
    with open(tmp_path / "run" / "steps.csv", "a") as stream:
        stream.write("3,2,1.0,1.0,2.0,1.0,0.1,0.1\n4,2,1.")
    torch.rand(5)
    config = resume_config(tmp_path / "run", workers=1)
    Training(config, tmp_path / "run", resume=True, say=quiet).fit()
    assert_same_run(run, RunFolder(tmp_path / "run"))


def test_a_killed_command_resumes_to_the_uninterrupted_run(full_run, data, tmp_path):
    """Killed at a random moment from the first row of steps.csv on, perhaps in the middle of a checkpoint."""
    run, resumed = full_run[0], RunFolder(tmp_path / "run")
    shape = "--arch resnet18 --preset detectron2 --min-size 32 40 --max-size 64 --anchor-sizes 8 16 32 64 128"
    recipe = "--epochs 2 --batch-size 2 --vflip 0.5 --device cpu --save-every 1"
    command = [sys.executable, "-m", "retinanet_ext", "train", str(data), *shape.split(), *recipe.split()]
    process = subprocess.Popen([*command, "--run-dir", str(resumed.root)], cwd=tmp_path)
    chance = random.Random(0)
    steps, delay, end = chance.choice((1, 2)), 0.2 * chance.random(), time.monotonic() + 300
    while not (resumed.steps.exists() and len(rows(resumed.steps)) >= steps) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"killed {delay} s after step {steps}"
    temporary_of(resumed.root / "metrics.json", 1).write_bytes(b"half of it")
    assert main(["train", "--resume", str(resumed.root)]) == 0
    assert_same_run(run, resumed)
    assert not list(resumed.root.rglob("*.tmp"))


def test_a_run_that_ended_in_its_first_epoch_starts_again(full_run, data, tmp_path):
    run, _ = full_run
    Training(tiny(data), tmp_path / "run", say=quiet)
    resumed = RunFolder(tmp_path / "run")
    # A crash in epoch 1, its validation done, or none of it.
    resumed.best.parent.mkdir()
    shutil.copy(run.best, resumed.best)
    with open(resumed.steps, "a") as stream:
        stream.write("1,1,1.0,1.0,2.0,1.0,0.1,0.1\n2,1,1.")
    torch.rand(5)
    said = []
    Training(resume_config(resumed.root), resumed.root, resume=True, say=said.append).fit()
    assert any("from the start" in line for line in said)
    assert_same_weights(run.last, resumed.last)
    assert_same_weights(run.best, resumed.best)
    for a, b in zip(rows(run.steps), rows(resumed.steps), strict=True):
        assert {**a, "seconds": ""} == {**b, "seconds": ""}
    assert [row["epoch"] for row in rows(resumed.results)] == ["1", "2"]


def test_a_finished_run_resumes_to_nothing_or_goes_further(full_run, data, tmp_path):
    Training(tiny(data, epochs=1, validate_every=0, optimizer="sgd"), tmp_path / "run", say=quiet).fit()
    run = RunFolder(tmp_path / "run")
    assert Training(resume_config(run.root), run.root, resume=True, say=quiet).fit() is None
    assert len(rows(run.results)) == 1
    assert_same_weights(run.last, run.best)
    Training(resume_config(run.root, epochs=2), run.root, resume=True, say=quiet).fit()
    assert [row["epoch"] for row in rows(run.results)] == ["1", "2"]
    assert resume_config(run.root).epochs == 2


def test_resume_refuses_to_run_lost_epochs_again(full_run, tmp_path):
    run, _ = full_run
    lost = RunFolder(tmp_path / "run")
    shutil.copytree(run.root, lost.root)
    lost.last.unlink()
    with pytest.raises(RunFolderError, match=r"nothing to resume: .*last\.pt is gone, and results\.csv holds 2 epochs"):
        Training(resume_config(lost.root), lost.root, resume=True, say=quiet)
    assert len(rows(lost.results)) == 2


def test_resume_refuses_what_is_no_run(data, tmp_path):
    with pytest.raises(RunFolderError, match=r"not a run folder: it holds no args\.json"):
        resume_config(tmp_path)
    run = RunFolder(tmp_path / "run")
    run.start(dataclasses.asdict(tiny(data)))
    with pytest.raises(RunFolderError, match=r"holds a run already: choose another --run-dir"):
        Training(tiny(data), run.root, say=quiet)
    run.args.write_text('{"data": "x", "nonsense": 1}')
    with pytest.raises(RunFolderError, match="not the arguments of a training run"):
        resume_config(run.root)


def test_resume_refuses_other_classes(full_run, tmp_path):
    run, _ = full_run
    other = generate_shapes(tmp_path / "other", train_images=5, val_images=1, image_size=32)
    json_file = other / "annotations" / "instances_train.json"
    json_file.write_text(json_file.read_text().replace('"star"', '"moon"'))
    before = run.args.read_text()
    with pytest.raises(CheckpointError, match=r"trained on the classes .*star.* now has .*moon"):
        Training(resume_config(run.root, data=str(other)), run.root, resume=True, say=quiet)
    assert run.args.read_text() == before


def test_a_mistake_leaves_no_run_behind(data, tmp_path):
    with pytest.raises(DatasetError, match="not a data set"):
        Training(tiny(data, split="none"), tmp_path / "run", say=quiet)
    Training(tiny(data, epochs=1, validate_every=0), tmp_path / "run", say=quiet)


def test_problems_are_written_and_strict_stops(tmp_path):
    data = generate_shapes(tmp_path / "data", train_images=4, val_images=1, image_size=32)
    (data / "train" / "000002.jpg").unlink()
    said = []
    Training(tiny(data), tmp_path / "run", say=said.append)
    assert "000002.jpg: missing image" in RunFolder(tmp_path / "run").problems.read_text()
    assert any("1 x missing image" in line for line in said)
    with pytest.raises(DatasetError, match="1 problems, and --strict was given"):
        Training(tiny(data, strict=True), tmp_path / "strict", say=quiet)
    assert "missing image" in (tmp_path / "strict" / "problems.txt").read_text()


def test_an_image_that_breaks_during_training_is_written_down_once(tmp_path):
    data = generate_shapes(tmp_path / "data", train_images=5, val_images=1, image_size=32)
    # A batch of one image of 32 pixels has a single value a channel in the last stage: too few for BatchNorm.
    config = tiny(data, validate_every=0, norm="group", optimizer="sgd")
    training = Training(config, tmp_path / "run", say=quiet)
    (data / "train" / "000003.jpg").write_bytes(b"broken")
    (data / "train" / "000004.jpg").write_bytes(b"broken")
    training.fit()
    lines = RunFolder(tmp_path / "run").problems.read_text().splitlines()
    assert 1 <= len(lines) <= 2
    assert len(set(lines)) == len(lines)
    assert all("broken image" in line for line in lines)


def test_no_readable_image_at_all(tmp_path):
    data = generate_shapes(tmp_path / "data", train_images=3, val_images=1, image_size=32)
    training = Training(tiny(data, validate_every=0), tmp_path / "run", say=quiet)
    for path in (data / "train").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(TrainingError, match=r"epoch 1: no image of .* could be read"):
        training.fit()


class Toy(nn.Module):
    """Losses of one weight; from step `bad` on the box loss is NaN."""

    def __init__(self, bad=math.inf):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0]]))
        self.calls, self.bad = 0, bad

    def forward(self, images, targets):
        assert all(isinstance(v, torch.Tensor) for target in targets for v in target.values())
        self.calls += 1
        loss = (self.weight * images[0].mean()).square().sum()
        box = loss * math.nan if self.calls > self.bad else loss
        return {"classification": loss, "bbox_regression": box}


def test_a_loss_that_is_not_finite_stops_with_step_and_images(data):
    dataset = open_dataset(data)
    model = Toy(bad=1)
    optimizer = make_optimizer(model, "sgd", 0.1)
    scheduler = make_scheduler(optimizer, 10, 0, "cosine")
    stepper = Stepper(model, optimizer, scheduler, torch.device("cpu"))
    steps = train_steps(stepper, make_loader(dataset, 2, train=False), name_of=dataset.file_of)
    assert next(steps).step == 1
    before = model.weight.clone()
    with pytest.raises(TrainingError, match=r"not finite at step 2: .*000003\.jpg, .*000004\.jpg") as caught:
        next(steps)
    assert "bbox_regression nan" in str(caught.value)
    assert torch.equal(model.weight, before)


def test_gradients_are_clipped(data):
    model = Toy()
    optimizer = make_optimizer(model, "sgd", 1.0, weight_decay=0.0)
    scheduler = make_scheduler(optimizer, 10, 0, "cosine")
    loader = make_loader(open_dataset(data), 2, train=False)
    next(train_steps(Stepper(model, optimizer, scheduler, torch.device("cpu"), clip_grad_norm=1e-3), loader))
    assert (1.0 - model.weight.item()) == pytest.approx(1e-3, rel=1e-3)


def test_rates():
    assert [rate_factor(s, 10, 4, "cosine") for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate_factor(4, 10, 4, "cosine") == 1.0
    assert rate_factor(7, 10, 4, "cosine") == pytest.approx(0.5)
    assert rate_factor(10, 10, 4, "cosine") == pytest.approx(0.0)
    factors = [rate_factor(s, 12, 0, "step") for s in range(12)]
    assert factors == pytest.approx([1.0] * 8 + [0.1] * 3 + [0.01])
    with pytest.raises(ValueError, match="schedule: expected one of cosine, step, got 'linear'"):
        rate_factor(0, 10, 0, "linear")


def test_norms_and_biases_take_no_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(True)
    decayed, plain = make_optimizer(model, "adamw", 1e-3).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert decayed["weight_decay"] == 0.01
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0.0
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, sgd, got 'lion'"):
        make_optimizer(model, "lion", 1e-3)


def test_anchor_octaves_are_torchvisions():
    assert octaves((32, 512)) == [[32, 40, 50], [512, 645, 812]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"batch_size": -1}, "batch_size: expected an integer >= 1"),
        ({"lr": 0.0}, "lr: expected a number > 0"),
        ({"lr": math.nan}, "lr: expected a number > 0"),
        ({"seed": -1}, "seed: expected a number >= 0"),
        ({"anchor_sizes": (1, 2)}, "anchor_sizes: expected five sizes of at least 1 pixel"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("x", **changes)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda"):
        resolve_device("abacus")
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda"):
        resolve_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: cuda was asked for"):
            resolve_device("cuda")
