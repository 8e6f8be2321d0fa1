"""The loop over optimizer steps: what is fed to them, and what is recorded of them."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from retinanet_ext.data import Batch

from .failure import NotFiniteError, TrainingError, describe_failure, likely_cause
from .stepper import Stepper, Taken

__all__ = ["NotFiniteError", "StepRecord", "TrainingError", "train_steps"]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Losses are means over its images, those of all processes; `foreground` is the mean number of
    foreground anchors an image (NaN where the model does not count them); `seconds` the wall time since the step
    before; `grad_norm` the gradient's norm before it was clipped; `batches` how many batches of the epoch are done."""

    step: int
    classification: float
    bbox_regression: float
    total: float
    foreground: float
    lr: float
    seconds: float
    grad_norm: float = math.nan
    batches: int = 0


def train_steps(
    stepper: Stepper,
    batches: Iterable[Batch],
    *,
    first_step: int = 0,
    first_batch: int = 0,
    accumulate: int = 1,
    current_at: Callable[[int], bool] = lambda step: False,
    name_of: Callable[[int], str] = str,
    report: Callable[[list], None] | None = None,
) -> Iterator[StepRecord]:
    """Take an optimizer step for each `accumulate` batches (the last may have fewer) and yield what happened.

    Steps without any image are skipped; problems of a batch go to `report`. On a GPU records come one step late, so
    that reading the losses never holds up the queue; after a step for which `current_at` is true the record comes at
    once, and the model is then as that step left it. Raises NotFiniteError, naming the step, its images (`name_of`
    image id) and the likely cause, if a loss or gradient is not finite; the training is then as before that step.
    """
    stepper.model.train()
    reader = _Reader(stepper, name_of)
    batches, done, step = iter(batches), first_batch, first_step
    while group := list(islice(batches, accumulate)):
        done += len(group)
        for batch in group:
            if batch.problems and report is not None:
                report(batch.problems)
        taken = stepper.take(group)
        if taken is None:
            continue
        step += 1
        reader.add(step, done, len(group), taken)
        # On the CPU the numbers are there already.
        yield from reader.read(0 if stepper.device.type == "cpu" or current_at(step) else 1)
    yield from reader.read(0)


class _Reader:
    """Reads the numbers of steps that were taken, in order."""

    def __init__(self, stepper: Stepper, name_of: Callable[[int], str]):
        self.stepper, self.name_of = stepper, name_of
        self.unread: list[tuple[int, int, int, Taken]] = []
        self.last_norm = math.nan
        self.clock = time.perf_counter()

    def add(self, step: int, done: int, batches: int, taken: Taken) -> None:
        self.unread.append((step, done, batches, taken))

    def read(self, leave: int) -> Iterator[StepRecord]:
        """The records of all steps but the latest `leave`."""
        while len(self.unread) > leave:
            step, done, batches, taken = self.unread.pop(0)
            numbers = taken.values.tolist()
            classification, box, total, foreground, norm = numbers
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise self._failure(step, done - batches, taken, numbers)
            self.last_norm = norm
            now = time.perf_counter()
            seconds, self.clock = now - self.clock, now
            yield StepRecord(step, classification, box, total, foreground, taken.rate, seconds, norm, done)

    def _failure(self, step: int, done: int, taken: Taken, numbers: list[float]) -> NotFiniteError:
        """The error, the same on every process; the training as it was before the step."""
        stepper = self.stepper
        stepper.undo(taken)
        own = likely_cause(stepper.model, taken.batches, stepper.losses_in_float32, self.name_of, stepper.amp)
        stepper.undo(taken)  # the cause was looked for with the model, too
        names = [self.name_of(target["image_id"]) for batch in taken.batches for target in batch.targets]
        shares = stepper.world.gather((names, own))
        cause = next((cause for _, cause in shares if cause is not None), None)
        images = [name for names, _ in shares for name in names]
        message = describe_failure(step, numbers, taken.rate, self.last_norm, images, cause)
        return NotFiniteError(message, step - 1, done)
