"""Single steps: losses and gradients that are not finite, what such a step leaves alone, records a step late."""

import copy
import math

import pytest
import torch
from torch import nn

from retinanet_ext.data import Batch
from retinanet_ext.engine.ema import ModelAverage
from retinanet_ext.engine.failure import Before
from retinanet_ext.engine.loop import NotFiniteError, train_steps
from retinanet_ext.engine.schedule import make_optimizer, make_scheduler
from retinanet_ext.engine.stepper import Stepper, Taken

CPU = torch.device("cpu")


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
