"""What is done about a step whose loss or gradient is not finite: the state before it, and why it probably happened."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from retinanet_ext.data import Batch

from .ema import ModelAverage
from .schedule import set_rate


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class NotFiniteError(TrainingError):
    """A loss or gradient that is not finite. The training is as it was before that step: `step` optimizer steps and
    `batches` batches of the epoch are done."""

    def __init__(self, message: str, step: int, batches: int):
        super().__init__(message)
        self.step, self.batches = step, batches


class Before:
    """What a step changes even where its update is not made: running statistics, those of the average of the weights
    too, random state, learning rate."""

    def __init__(self, model: nn.Module, scheduler: Any, average: ModelAverage | None = None):
        self.updates = None if average is None else average.updates
        # One tensor a type: a copy for each of a hundred buffers would cost a GPU a hundred launches.
        self.buffers = {
            dtype: torch.cat([buffer.flatten() for buffer in buffers])
            for dtype, buffers in _by_dtype(model, average).items()
        }
        self.random = torch.get_rng_state()
        self.scheduler = dict(scheduler.state_dict())
        rates = [group["lr"] for group in scheduler.optimizer.param_groups]
        self.rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def restore(self, model: nn.Module, scheduler: Any, average: ModelAverage | None = None) -> None:
        if average is not None:
            average.updates = self.updates
        for dtype, buffers in _by_dtype(model, average).items():
            parts = self.buffers[dtype].split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
        torch.set_rng_state(self.random)
        scheduler.load_state_dict(self.scheduler)
        for group, rate in zip(scheduler.optimizer.param_groups, self.rates, strict=True):
            set_rate(group, rate)


def likely_cause(
    model: nn.Module,
    batches: Sequence[Batch],
    losses_of: Callable[[Batch], dict[str, Tensor]],
    name_of: Callable[[int], str],
    amp: bool,
) -> str | None:
    """Why this process's part of a step was not finite, as far as its images, boxes and weights tell; None where they
    are in order.

    `losses_of`: the losses of a batch in float32.
    """
    for batch in batches:
        for image, target in zip(batch.images, batch.targets, strict=True):
            if (fault := _fault_of(image, target)) is not None:
                return f"{name_of(target['image_id'])} {fault}"
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            return f"the weights were not finite before the step ({name})"
    # Synchronised statistics would wait for the other processes.
    alone = not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if amp and alone and all(_is_finite(losses_of(batch)) for batch in batches if batch.images):
        return "an overflow in half precision: in float32 the same batch has a finite loss (--no-amp)"
    return None


def describe_failure(
    step: int,
    numbers: Sequence[float],
    rate: float,
    last_norm: float,
    images: Sequence[str],
    cause: str | None,
) -> str:
    """The message: which step, its losses, its images, and what to do. `numbers`: classification, box and total loss,
    foreground, gradient norm."""
    classification, box, total, _, norm = numbers
    what = "gradient" if math.isfinite(total) else "loss"
    if cause is None:
        grown = "" if math.isnan(last_norm) else f", and the step before had a gradient norm of {last_norm:g}"
        cause = (
            f"training diverges (learning rate {rate:g}{grown}): a lower --lr, a longer --warmup-steps or "
            "--clip-grad-norm help"
        )
    return (
        f"the {what} is not finite at step {step}: classification {classification:g}, bbox_regression {box:g}, "
        f"gradient norm {norm:g}, learning rate {rate:g}; images of the batch: {', '.join(images)}. "
        f"Likely cause: {cause}"
    )


def _fault_of(image: Tensor, target: dict[str, Any]) -> str | None:
    """What is wrong with an image or its boxes, to stand behind the file's name."""
    if not image.isfinite().all():
        return "has pixels that are not finite"
    boxes, (height, width) = target["boxes"], image.shape[-2:]
    for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        box = f"has a box {row}, ({x1:g}, {y1:g}, {x2:g}, {y2:g}),"
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            return f"{box} that is not finite"
        if not (x1 < x2 and y1 < y2):
            return f"{box} without area"
        if min(x1, y1) < -width - height or x2 > 2 * width + height or y2 > 2 * height + width:
            return f"{box} far outside its {width} x {height} pixels"
    return None


@torch.no_grad()
def _is_finite(losses: dict[str, Tensor]) -> bool:
    return all(bool(loss.isfinite()) for loss in losses.values())


def _by_dtype(model: nn.Module, average: ModelAverage | None) -> dict[torch.dtype, list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for buffer in chain(model.buffers(), () if average is None else average.model.buffers()):
        found.setdefault(buffer.dtype, []).append(buffer)
    return found
