"""What a run can be asked for: accumulation, average of the weights, patience, checkpoints within an epoch, rates."""

import copy
import csv
import math

import pytest
import torch
from small_retinanet import PICTURES, build_small_model
from torch import nn

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.data import generate_shapes  # noqa: E402
from retinanet_ext.engine import train  # noqa: E402
from retinanet_ext.engine.checkpoint import load_checkpoint, temporary_of  # noqa: E402
from retinanet_ext.engine.config import TrainConfig, resume_config  # noqa: E402
from retinanet_ext.engine.ema import ModelAverage  # noqa: E402
from retinanet_ext.engine.loop import NotFiniteError  # noqa: E402
from retinanet_ext.engine.run_folder import RunFolder  # noqa: E402
from retinanet_ext.engine.schedule import (  # noqa: E402
    change_rate,
    current_rate,
    load_optimizer,
    make_optimizer,
    make_scheduler,
    rate_factor,
)
from retinanet_ext.engine.stepper import Stepper  # noqa: E402
from retinanet_ext.engine.train import Training  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model of milliseconds, and no pictures."""
    monkeypatch.setattr(train, "build_model", build_small_model)
    for name in PICTURES:
        monkeypatch.setattr(f"retinanet_ext.engine.{name}", lambda *_: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=6, val_images=1, image_size=32)


def tiny(data, **changes):
    settings = {
        "data": str(data),
        "arch": "resnet18",
        "norm": "batch",
        "min_size": (32, 40),
        "max_size": 64,
        "anchor_sizes": (8, 16, 32, 64, 128),
        "epochs": 1,
        "batch_size": 2,
        "scale_jitter": (0.5, 1.5),
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})


def quiet(_):
    pass


def rows(path):
    with open(path, newline="") as stream:
        return [
            {**row, "seconds": "", "mean_seconds_per_step": "", "val_seconds": ""} for row in csv.DictReader(stream)
        ]


def assert_same_state(mine, right):
    """Everything that checkpoints hold, bit by bit, but wall times."""
    if isinstance(right, torch.Tensor):
        assert torch.equal(mine, right)
    elif isinstance(right, dict):
        assert mine.keys() == right.keys()
        for key in right:
            if key not in ("seconds", "args"):
                assert_same_state(mine[key], right[key])
    elif isinstance(right, list | tuple):
        assert len(mine) == len(right)
        for a, b in zip(mine, right, strict=True):
            assert_same_state(a, b)
    else:
        assert mine == right


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    """From now on a run ends in the middle of this step, its update made and nothing written."""
    update = Stepper._update

    def update_and_die(stepper, norm):
        update(stepper, norm)
        stepper.steps_taken = getattr(stepper, "steps_taken", 0) + 1
        if stepper.steps_taken == step:
            raise Killed

    monkeypatch.setattr(Stepper, "_update", update_and_die)


def test_a_run_killed_within_an_epoch_equals_the_uninterrupted_one(data, tmp_path, monkeypatch):
    # Three batches an epoch, and steps of two: the second step of an epoch has one batch.
    config = tiny(data, epochs=2, accumulate=2, save_every=1, ema=0.9)
    Training(config, tmp_path / "whole", say=quiet).fit()
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    with monkeypatch.context() as patches:
        killed_at(patches, 4)
        with pytest.raises(Killed):
            Training(config, run.root, say=quiet).fit()
    temporary_of(run.last, 1).write_bytes(b"half of a checkpoint")
    progress = load_checkpoint(run.last)["progress"]
    assert (progress["batches"], progress["means"]["steps"]) == (2, 1)
    torch.rand(7)
    said = []
    Training(resume_config(run.root, workers=1), run.root, resume=True, say=said.append).fit()
    assert any("after epoch 1 of 2, 2 batches into the next" in line for line in said)
    assert_same_state(load_checkpoint(run.last), load_checkpoint(whole.last))
    assert_same_state(load_checkpoint(run.best)["model"], load_checkpoint(whole.best)["model"])
    assert rows(run.steps) == rows(whole.steps)
    assert [row["step"] for row in rows(run.steps)] == ["1", "2", "3", "4"]
    assert rows(run.results) == rows(whole.results)
    assert [path.name for path in run.last.parent.iterdir() if path.suffix == ".tmp"] == []
    # best.pt holds the average, and with the running statistics that belong to it.
    last, best = load_checkpoint(whole.last), load_checkpoint(whole.best)
    assert last["ema"]["updates"] == 4
    if best["epoch"] == last["epoch"]:
        assert_same_state(best["model"], last["ema"]["model"])
    assert not torch.equal(
        best["model"]["head.classification_head.cls_logits.weight"],
        last["model"]["head.classification_head.cls_logits.weight"],
    )


def test_the_average_follows_the_weights():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = ModelAverage(model, 0.5)
    assert not average.model.training
    expected, statistics = model[0].weight.item(), 0.0
    for update, weight in enumerate((1.0, 3.0, -2.0), start=1):
        with torch.no_grad():
            model[0].weight.fill_(weight)
            model[1].running_mean.fill_(weight)
            model[1].num_batches_tracked.fill_(update)
        average.update(model)
        share = min(0.5, update / (update + 9))
        expected = share * expected + (1 - share) * weight
        statistics = share * statistics + (1 - share) * weight
        assert average.model[0].weight.item() == pytest.approx(expected)
        assert average.model[1].running_mean.item() == pytest.approx(statistics)
        assert average.model[1].num_batches_tracked.item() == update
    model.register_buffer("mean", torch.tensor(7.0), persistent=False)
    again = ModelAverage(model, 0.5)
    model.mean.fill_(8.0)
    again.update(model)
    assert again.model.mean == 8
    again.load_state_dict(copy.deepcopy(average.state_dict()))
    assert again.updates == 3
    assert torch.equal(again.model[0].weight, average.model[0].weight)


def scored(monkeypatch, scores):
    """Validations with these APs, without evaluating anything."""
    from retinanet_ext.engine.evaluate import METRICS, Evaluation

    left = iter(scores)
    monkeypatch.setattr(
        train, "evaluate_together", lambda *_, **__: Evaluation(dict.fromkeys(METRICS, next(left)), [], None)
    )
    monkeypatch.setattr(RunFolder, "write_evaluation", lambda *_: None)
    monkeypatch.setattr(Training, "_train_epoch", no_epoch)


def no_epoch(training):
    training.epoch += 1
    names = ("classification", "bbox_regression", "total", "foreground", "lr", "mean_seconds_per_step")
    return {"epoch": training.epoch, "step": training.epoch, **dict.fromkeys(names, 1.0)}


def test_patience(data, tmp_path, monkeypatch):
    config = tiny(data, epochs=4, patience=2)
    scored(monkeypatch, (0.3, 0.3, math.nan, 0.5))
    said = []
    Training(config, tmp_path / "run", say=said.append).fit()
    run = RunFolder(tmp_path / "run")
    assert said[-1] == "stopped after epoch 3: 2 validations without a better AP than 0.300 (--patience)"
    assert load_checkpoint(run.best)["epoch"] == 1
    assert run.logged_epochs() == 3
    # Resumed as it is it has nothing left to do; with more patience it goes on, and counts from where it was.
    Training(resume_config(run.root), run.root, resume=True, say=quiet).fit()
    assert run.logged_epochs() == 3
    Training(resume_config(run.root, patience=3), run.root, resume=True, say=quiet).fit()
    assert load_checkpoint(run.best)["epoch"] == 4


def test_a_resumed_run_takes_another_rate(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "_train_epoch", no_epoch)
    run = tmp_path / "run"
    Training(tiny(data, validate_every=0, lr=0.1, warmup_steps=0), run, say=quiet).fit()
    config = resume_config(run, epochs=2, lr=0.02, clip_grad_norm=0.5, amp=True)
    training = Training(config, run, resume=True, say=quiet)
    assert [group["lr"] for group in training.stepper.optimizer.param_groups] == [0.02, 0.02]
    assert training.stepper.clip_grad_norm == 0.5
    assert training.amp
    training.stepper.optimizer.step()
    training.stepper.scheduler.step()
    assert training.stepper.optimizer.param_groups[0]["lr"] < 0.02


def test_rates_follow_the_images_of_a_step():
    def rate(**settings):
        return TrainConfig("x", **settings).rate()

    assert rate(optimizer="sgd", batch_size=8) == pytest.approx(0.005)
    assert rate(optimizer="sgd", batch_size=8, accumulate=4) == pytest.approx(0.02)
    assert rate(batch_size=8) == rate(batch_size=2) == 3e-4
    assert rate(lr=0.01, batch_size=8, accumulate=4) == 0.01
    assert rate(lr=0.01, batch_size=8, accumulate=4, scale_lr=True) == pytest.approx(0.02)


def test_milestones(data, tmp_path):
    factors = [rate_factor(step, 12, 0, "step", (3, 7.5)) for step in range(12)]
    assert factors == pytest.approx([1.0] * 3 + [0.1] * 5 + [0.01] * 4)
    config = tiny(data, epochs=4, validate_every=0, schedule="step", lr_steps=(1, 2.5), lr=1.0, warmup_steps=0)
    scheduler = Training(config, tmp_path / "run", say=quiet).stepper.scheduler
    assert [scheduler.lr_lambdas[0](step) for step in range(12)] == pytest.approx([1.0] * 3 + [0.1] * 5 + [0.01] * 4)


def test_a_rate_on_a_device_stays_there_and_is_the_schedules():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, "sgd", 0.5, tensor_rate=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = make_scheduler(optimizer, 10, 5, "cosine")
    assert [rate.item() for rate in rates] == pytest.approx([0.1, 0.1])
    optimizer.step()
    scheduler.step()
    assert [rate.item() for rate in rates] == pytest.approx([0.2, 0.2])
    assert current_rate(scheduler) == pytest.approx(0.2)
    plain = make_optimizer(model, "sgd", 0.5)
    make_scheduler(plain, 10, 5, "cosine")
    load_optimizer(optimizer, plain.state_dict())
    assert [rate.item() for rate in rates] == pytest.approx([0.1, 0.1])
    change_rate(scheduler, [1.0, 1.0])
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [rate.item() for rate in rates] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate: expected an integer >= 1, got 0"),
        ({"ema": 1.0}, r"ema: expected a decay between 0 and 1, such as 0\.9998, got 1\.0"),
        ({"ema": 0.0}, "ema: expected a decay between 0 and 1"),
        ({"patience": 0}, "patience: expected an integer >= 1, got 0"),
        ({"patience": 1, "validate_every": 0}, "patience: counts validations, and there are none"),
        ({"save_every": -1}, "save_every: expected a number >= 0, got -1"),
        ({"scale_jitter": (0.0, 1.0)}, r"scale_jitter: expected two scales, 0 < LOW <= HIGH, got \(0\.0, 1\.0\)"),
        ({"scale_jitter": (1.0, 0.5)}, "scale_jitter: expected two scales"),
        ({"scale_jitter": (1.0, math.inf)}, "scale_jitter: expected two scales"),
        ({"scale_jitter": (1.0,)}, "scale_jitter: expected two scales"),
        ({"scale_lr": True}, "scale_lr: scales the rate of --lr, and none is given"),
        ({"lr_steps": (1.0,)}, "lr_steps: belongs to --schedule step, got cosine"),
        ({"lr_steps": (2.0, 1.0), "schedule": "step"}, r"lr_steps: expected rising epochs > 0, got \(2\.0, 1\.0\)"),
        ({"lr_steps": (), "schedule": "step"}, "lr_steps: expected rising epochs > 0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("x", **changes)


def test_a_failed_step_leaves_everything_as_it_was_and_the_run_goes_on(data, tmp_path, monkeypatch):
    """The state before the step is written: mended and resumed, the run is the one that never failed."""
    config = tiny(data, validate_every=0, ema=0.9)
    Training(config, tmp_path / "whole", say=quiet).fit()
    gradients = Stepper._gradients

    def fail_once(stepper, batches, images):
        values = gradients(stepper, batches, images)
        stepper.calls = getattr(stepper, "calls", 0) + 1
        return values * math.nan if stepper.calls == 3 else values

    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patches:
        patches.setattr(Stepper, "_gradients", fail_once)
        with pytest.raises(NotFiniteError) as caught:
            Training(config, run.root, say=quiet).fit()
    assert f"{run.last} holds the training as it was before that step" in str(caught.value)
    assert load_checkpoint(run.last)["step"] == 2
    Training(resume_config(run.root), run.root, resume=True, say=quiet).fit()
    assert_same_state(load_checkpoint(run.last), load_checkpoint(tmp_path / "whole" / "weights" / "last.pt"))


def test_the_curves_are_drawn_while_the_run_goes_on(data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("retinanet_ext.engine.recorder.plot_results", lambda *_: drawn.append(1))
    for interval, pictures in ((0.0, 3), (1e9, 1)):
        monkeypatch.setattr("retinanet_ext.engine.recorder.PLOT_INTERVAL", interval)
        drawn.clear()
        Training(tiny(data, epochs=2, validate_every=0), tmp_path / str(pictures), say=quiet).fit()
        assert len(drawn) == pictures
