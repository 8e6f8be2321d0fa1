"""The loop over optimizer steps, for any model with torchvision's training interface."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retinanet_ext.data import Batch


class TrainingError(RuntimeError):
    """A run that cannot go on; for instance a loss that is not finite, with the step and the images."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Losses are those of its batch; `foreground` is the mean number of foreground
    anchors an image (NaN where the model does not count them); `seconds` the wall time since the step
    before."""

    step: int
    classification: float
    bbox_regression: float
    total: float
    foreground: float
    lr: float
    seconds: float


def train_steps(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    device: torch.device,
    *,
    first_step: int = 0,
    amp: bool = False,
    clip_grad_norm: float = 0.0,
    name_of: Callable[[int], str] = str,
    report: Callable[[list], None] | None = None,
) -> Iterator[StepRecord]:
    """Take one optimizer step a batch and yield what happened, for any model with torchvision's training
    interface.

    Batches left without images are skipped; problems of a batch go to `report`. On a GPU records come one
    step late, so that reading the losses never holds up the queue. Raises TrainingError, naming the step and
    its images (`name_of` image id), if a loss is not finite; on the CPU the weights are then those before
    that step.
    """
    model.train()
    late: tuple | None = None
    step, clock = first_step, time.perf_counter()
    for batch in batches:
        if batch.problems and report is not None:
            report(batch.problems)
        if not batch.images:
            continue
        images = [image.to(device, non_blocking=True) for image in batch.images]
        targets = [
            {k: v.to(device, non_blocking=True) for k, v in target.items() if isinstance(v, torch.Tensor)}
            for target in batch.targets
        ]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            losses = model(images, targets)
        total = losses["classification"] + losses["bbox_regression"]
        foreground = getattr(model, "last_num_foreground", None)
        values = torch.stack(
            [
                losses["classification"].detach().float(),
                losses["bbox_regression"].detach().float(),
                total.detach().float(),
                total.detach().new_tensor(math.nan) if foreground is None else foreground.float().mean(),
            ]
        )
        pending = (step, values, optimizer.param_groups[0]["lr"], [t["image_id"] for t in batch.targets])
        if device.type == "cpu":
            _check_finite(pending, name_of)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        if clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
        optimizer.step()
        scheduler.step()
        step += 1
        late, pending = (None, pending) if device.type == "cpu" else (pending, late)
        if pending is not None:
            now = time.perf_counter()
            yield _record(pending, now - clock, name_of)
            clock = now
    if late is not None:
        yield _record(late, time.perf_counter() - clock, name_of)


def _check_finite(pending: tuple, name_of: Callable[[int], str]) -> list[float]:
    step, values, lr, image_ids = pending
    numbers = values.tolist()
    if not all(map(math.isfinite, numbers[:3])):
        names = ", ".join(name_of(image_id) for image_id in image_ids)
        raise TrainingError(
            f"the loss is not finite at step {step + 1}: classification {numbers[0]:g}, bbox_regression "
            f"{numbers[1]:g}, learning rate {lr:g}; images of the batch: {names}. A lower --lr, a longer "
            "--warmup-steps or --clip-grad-norm help where training diverges"
        )
    return numbers


def _record(pending: tuple, seconds: float, name_of: Callable[[int], str]) -> StepRecord:
    numbers = _check_finite(pending, name_of)
    return StepRecord(pending[0] + 1, *numbers, lr=pending[2], seconds=seconds)
