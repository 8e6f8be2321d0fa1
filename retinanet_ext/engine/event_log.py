"""TensorBoard events of a run, where tensorboard is installed; nothing where it is not."""

import importlib
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .evaluate import METRICS
from .validation_loss import NAMES as LOSSES

_TRAINING = ("classification", "bbox_regression", "total", "foreground", "lr")


class EventLog:
    """Writes scalars to `folder`: train/* at each step; val/* and metrics/* at the step that ends an epoch.

    `step`: the steps that the run has made already; events after it, of epochs that are run again, are struck out.
    """

    def __init__(self, folder: Path, step: int = 0):
        self.writer = None
        with suppress(ImportError):
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self.writer = writer(str(folder), purge_step=step + 1 if step else None)

    def add_step(self, record: Any) -> None:
        """One optimizer step, a `StepRecord`."""
        self._add(record.step, {f"train/{name}": getattr(record, name) for name in _TRAINING})

    def add_epoch(self, row: Mapping[str, Any]) -> None:
        """The row of results.csv of one epoch, and all events before it, to the disk."""
        values = {f"metrics/{name}": row.get(name) for name in METRICS}
        values |= {f"val/{name}": row.get(f"val_{name}") for name in LOSSES}
        self._add(row["step"], values)
        if self.writer is not None:
            self.writer.flush()

    def _add(self, step: int, values: Mapping[str, float | None]) -> None:
        if self.writer is None:
            return
        for name, value in values.items():
            if value is not None and not math.isnan(value):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
