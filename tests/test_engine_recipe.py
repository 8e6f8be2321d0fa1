"""What a run can be asked for: accumulation, average of the weights, patience, checkpoints within an epoch, rates."""

import copy
import csv
import math
import os
import random
import signal
import time

import pytest
import torch
from small_retinanet import PICTURES, build_small_model
from torch import nn

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.data import Batch, generate_shapes  # noqa: E402
from retinanet_ext.engine import checkpoint as checkpoints  # noqa: E402
from retinanet_ext.engine import train  # noqa: E402
from retinanet_ext.engine.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from retinanet_ext.engine.config import TrainConfig, resume_config  # noqa: E402
from retinanet_ext.engine.ema import ModelAverage  # noqa: E402
from retinanet_ext.engine.failure import Before  # noqa: E402
from retinanet_ext.engine.loop import NotFiniteError, train_steps  # noqa: E402
from retinanet_ext.engine.run_folder import RunFolder  # noqa: E402
from retinanet_ext.engine.schedule import (  # noqa: E402
    change_rate,
    current_rate,
    load_optimizer,
    make_optimizer,
    make_scheduler,
    rate_factor,
)
from retinanet_ext.engine.stepper import Stepper, Taken  # noqa: E402
from retinanet_ext.engine.train import Training  # noqa: E402

CPU = torch.device("cpu")


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
    (run.last.parent / ".last.pt.1.tmp").write_bytes(b"half of a checkpoint")
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


def write_for_ever(path):
    model = nn.Linear(300, 300).requires_grad_(False)
    for step in range(1, 1_000_000):
        for parameter in model.parameters():
            parameter.fill_(step)
        save_checkpoint(path, model, {}, ["a"], step=step)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the writing process")
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Thirty times, each time from 0 to 30 ms after the file was first there."""
    path = tmp_path / "last.pt"
    moments = random.Random(0)
    last = 0
    for _ in range(30):
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(path)
            finally:
                os._exit(1)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(moments.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = load_checkpoint(path)
        assert all((value == content["step"]).all() for value in content["model"].values())
        last = max(last, content["step"])
    assert last > 1


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


class Linear(nn.Module):
    """Losses of one weight and a batch norm, in the precision of the weight or of autocast."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), weight))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, images, targets):
        means = torch.stack([image.mean() for image in images])[:, None]
        self.norm(means)
        loss = (means @ self.weight).float().square().mean()
        return {"classification": loss, "bbox_regression": loss * 0}


def batch_of(*values, boxes=()):
    targets = [{"boxes": torch.tensor(boxes).reshape(-1, 4), "image_id": number} for number in range(len(values))]
    return Batch([torch.full((3, 8, 8), value) for value in values], targets, [])


def failure_of(model, batches, **options):
    optimizer = make_optimizer(model, "sgd", 0.1)
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), CPU, **options)
    with pytest.raises(NotFiniteError) as caught:
        list(train_steps(stepper, batches, name_of="{}.jpg".format))
    return stepper, caught.value


good = batch_of(0.5, 0.25)


@pytest.mark.parametrize(
    ("model", "bad", "options", "cause"),
    [
        (Linear(), batch_of(0.5, math.inf), {}, "1.jpg has pixels that are not finite"),
        (
            Linear(),
            batch_of(0.5, math.nan, boxes=((0.0, 0.0, 1.0, math.nan),)),
            {},
            "0.jpg has a box 0, (0, 0, 1, nan), that is not finite",
        ),
        (
            Linear(3e38),
            batch_of(2.0, 2.0, boxes=((3.0, 3.0, 3.0, 5.0),)),
            {},
            "has a box 0, (3, 3, 3, 5), without area",
        ),
        (
            Linear(3e38),
            batch_of(2.0, 2.0, boxes=((0.0, 0.0, 99.0, 5.0),)),
            {},
            "(0, 0, 99, 5), far outside its 8 x 8 pixels",
        ),
        (Linear(math.nan), good, {}, "the weights were not finite before the step (weight)"),
        (Linear(3e38), good, {}, "training diverges (learning rate 0.1): a lower --lr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_loss_that_is_not_finite_has_a_likely_cause(model, bad, options, cause):
    before = copy.deepcopy(model.state_dict())
    _, error = failure_of(model, [bad], **options)
    assert f"Likely cause: {cause}" in str(error) or cause in str(error)
    assert "the loss is not finite at step 1" in str(error)
    assert (error.step, error.batches) == (0, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name


def test_an_overflow_of_half_precision_is_named():
    class Half(Linear):
        def forward(self, images, targets):
            losses = super().forward(images, targets)
            if torch.is_autocast_enabled("cpu"):
                losses["bbox_regression"] = losses["classification"].half() * 1e6
            return losses

    _, error = failure_of(Half(), [good], amp=True)
    assert "an overflow in half precision: in float32 the same batch has a finite loss (--no-amp)" in str(error)


def test_a_gradient_that_is_not_finite_is_a_failure_too():
    class Root(Linear):
        def forward(self, images, targets):
            loss = (self.weight * 0).sqrt().sum() + images[0].mean()
            return {"classification": loss, "bbox_regression": loss * 0}

    model = Root()
    _, error = failure_of(model, [good])
    assert "the gradient is not finite at step 1: classification 0.5" in str(error)
    assert model.weight.item() == 1.0


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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_update_is_left_out_after_a_failure(name):
    """What a GPU does, whose host reads the losses a step late."""
    model = Linear()
    optimizer = make_optimizer(model, name, 0.1)
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer._step_supports_amp_scaling = True
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), CPU)
    assert stepper.take([good]) is not None
    before, moved = model.weight.item(), model.weight.item() != 1.0
    assert moved
    stepper.failed.fill_(1.0)
    model.weight.grad = torch.full((1, 1), math.nan)
    stepper._update(torch.tensor(math.nan))
    assert model.weight.item() == before


def test_the_average_is_as_it_was_before_a_step_that_a_gpu_found_out_late():
    """There the average is updated before the host knows, with running statistics that the images have spoiled."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    optimizer = make_optimizer(model, "sgd", 0.1)
    average = ModelAverage(model, 0.9)
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), CPU, average=average)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(model, stepper.failed)
    lerped = ModelAverage(model, 0.9)
    lerped.load_state_dict({"model": {**average.model.state_dict(), "0.weight": model[0].weight - 1.0}, "updates": 0})
    lerped.update(model)
    torch.testing.assert_close(average.model[0].weight, lerped.model[0].weight)
    expected = copy.deepcopy(average.state_dict())
    before = Before(model, stepper.scheduler, average)
    stepper.failed.fill_(1.0)
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.fill_(math.nan)
    for _ in range(2):  # the failed step, and the one after it
        average.update(model, stepper.failed)
    stepper.undo(Taken(torch.zeros(5), 0.1, [], before))
    found = average.state_dict()
    assert found["updates"] == expected["updates"] == 1
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    assert model[1].running_mean.item() == 0.0


def summed(losses):
    return losses, losses["classification"] + losses["bbox_regression"]


def test_the_curves_are_drawn_while_the_run_goes_on(data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("retinanet_ext.engine.recorder.plot_results", lambda *_: drawn.append(1))
    for interval, pictures in ((0.0, 3), (1e9, 1)):
        monkeypatch.setattr("retinanet_ext.engine.recorder.PLOT_INTERVAL", interval)
        drawn.clear()
        Training(tiny(data, epochs=2, validate_every=0), tmp_path / str(pictures), say=quiet).fit()
        assert len(drawn) == pictures


def test_records_come_at_once_where_they_are_asked_for():
    """A GPU's come a step late; one that a checkpoint follows does not."""
    model = Linear()
    optimizer = make_optimizer(model, "sgd", 0.1)
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), CPU)
    taken = []
    stepper.take = lambda group, take=stepper.take: (taken.append(1), take(group))[1]
    stepper.device = torch.device("meta")  # no CPU to the loop
    prepare = stepper.own_losses.prepare
    stepper.own_losses.prepare = lambda batch, device: prepare(batch, CPU)
    stepper._losses_of = lambda prepared: summed(stepper.losses(*prepared))
    make_zeros = torch.zeros
    seen = []
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch, "zeros", lambda *size, device=None, **options: make_zeros(*size, **options))
        for record in train_steps(stepper, [good] * 5, current_at=lambda step: step == 3):
            seen.append((record.step, len(taken)))
    assert seen == [(1, 2), (2, 3), (3, 3), (4, 5), (5, 5)]


def test_old_checkpoints_still_load(tmp_path):
    path = tmp_path / "old.pt"
    save_checkpoint(path, nn.Linear(1, 1), {}, ["a"])
    content = torch.load(path, weights_only=True)
    for name in ("ema", "progress"):
        del content[name]
    torch.save({**content, "version": 1}, path)
    loaded = load_checkpoint(path)
    assert (loaded["ema"], loaded["progress"]) == (None, None)
    assert checkpoints.VERSION == 2
