"""What a run says and writes down while it goes on: the main process's part; the others' recorders do nothing."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from retinanet_ext.data import Batch, DatasetError, DetectionDataset, Problem, summarise
from retinanet_ext.data.extras import require

from .distributed import World
from .evaluate import Evaluation
from .event_log import EventLog
from .loop import StepRecord
from .plots import plot_results
from .plots_labels import plot_labels
from .progress import Progress, memory_held
from .run_folder import RunFolder, StepLog, write_json
from .sheets import with_pictures

# Seconds from one results.png to the next while a run goes on: short epochs do not wait for a picture each.
PLOT_INTERVAL = 60.0


class EpochMeans:
    """Means over the steps of an epoch so far; the state goes into the checkpoint."""

    NAMES = ("classification", "bbox_regression", "total", "foreground", "seconds")

    def __init__(self, state: dict[str, Any] | None = None):
        self.steps = 0 if state is None else state["steps"]
        self.sums = dict.fromkeys(self.NAMES, 0.0) if state is None else dict(state["sums"])

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        for name in self.NAMES:
            self.sums[name] += getattr(record, name)

    def row(self) -> dict[str, float]:
        means = {name: total / self.steps for name, total in self.sums.items()}
        # The mean, which the slow steps of a busy machine raise; a median would hide them.
        return {**means, "mean_seconds_per_step": means.pop("seconds")}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": dict(self.sums)}


class Recorder:
    """The run folder, the progress and the messages of one run."""

    def __init__(self, run: RunFolder, world: World, say: Callable[[str], None]):
        self.run, self.world = run, world
        self.say = say if world.is_main else _say_nothing
        self.progress: Progress | None = None
        self.device = torch.device("cpu")
        self.events: EventLog | None = None  # the main process's
        self.broken: set[str] = set()
        self.kept: list[Problem] = []
        self.plotted = time.monotonic()

    def begin(self, args: dict[str, Any], dataset: DetectionDataset) -> None:
        if self.world.is_main:
            self.run.start(args)
            plot_labels(dataset, self.run.root / "labels.png")
            self.events = EventLog(self.run.root)

    def go_on(self, args: dict[str, Any], epoch: int, step: int, where: str) -> None:
        if self.world.is_main:
            write_json(self.run.args, args)
            self.run.rewind(epoch, step)
            self.events = EventLog(self.run.root, step)
        self.say(f"resuming {self.run.root} {where}")

    def steps(self, total: int, done: int, device: torch.device) -> Progress:
        """The progress over `total` steps on `device`, `done` of them already."""
        self.device = device
        self.progress = Progress(total, "step", done=done, quiet=not self.world.is_main)
        return self.progress

    def pictured(self, batches: Iterable[Batch], dataset: DetectionDataset) -> Iterable[Batch]:
        """`batches`; pictures of the first are drawn."""
        return with_pictures(batches, self.run.root, dataset.class_names) if self.world.is_main else batches

    def step_log(self) -> "StepLog | _NoLog":
        return StepLog(self.run.steps) if self.world.is_main else _NoLog()

    def step(self, log: "StepLog | _NoLog", record: StepRecord, epoch: int) -> None:
        log.add({**dataclasses.asdict(record), "epoch": epoch})
        if self.events is not None:
            self.events.add_step(record)
        self.progress.advance(
            cls=f"{record.classification:.3f}",
            box=f"{record.bbox_regression:.3f}",
            fg=f"{record.foreground:.0f}",
            lr=f"{record.lr:.1e}",
            mem=memory_held(self.device),
        )

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """The end of an epoch: its row, and the problems that the other processes met."""
        shares = self.world.gather(self.kept)
        self.kept = []
        if self.world.is_main:
            self.add_problems([problem for share in shares[1:] for problem in share])
            self.run.add_epoch(row)
            self.events.add_epoch(row)
            self.progress.write(_epoch_line(row, epochs))
            if time.monotonic() - self.plotted >= PLOT_INTERVAL:
                self._plot()

    def evaluation(self, result: Evaluation, dataset: DetectionDataset) -> None:
        if self.world.is_main:
            self.run.write_evaluation(result, dataset)

    def finish(self) -> None:
        if self.world.is_main:
            self.events.close()
            self._plot()

    def _plot(self) -> None:
        self.plotted = time.monotonic()
        plot_results(self.run.results, self.run.steps, self.run.root / "results.png")

    def write(self, text: str) -> None:
        """A line on standard output, above the bar."""
        if self.world.is_main:
            require("tqdm").tqdm.write(text)

    def broken_images(self, problems: Sequence[Problem], strict: bool) -> None:
        """Say and write down each broken image once; with `strict`, raise DatasetError."""
        new = self.add_problems(problems)
        for problem in new:
            require("tqdm").tqdm.write(f"skipped: {problem}")
        if new and strict:
            raise DatasetError(f"{new[0]} (--strict was given)")

    def add_problems(self, problems: Sequence[Problem]) -> list[Problem]:
        """Write down the problems of files that have none yet; these problems."""
        new = [problem for problem in problems if problem.file not in self.broken]
        self.broken.update(problem.file for problem in new)
        if new and self.world.is_main:
            self.run.add_problems(new)
        elif new:
            self.kept.extend(new)
        return new


def report_problems(dataset: DetectionDataset, run: RunFolder | None, say: Callable[[str], None], strict: bool) -> None:
    """Print the summary of a set's problems and write them out in full; with `strict`, raise DatasetError."""
    say(dataset.describe())
    for line in summarise(dataset.problems):
        say(f"  {line}")
    if run is not None:
        run.add_problems(dataset.problems)
    if strict and dataset.problems:
        where = f"; all of them are in {run.problems}" if run is not None else ""
        raise DatasetError(f"{dataset.name}: {len(dataset.problems)} problems, and --strict was given{where}")


class _NoLog:
    """In the place of a StepLog."""

    def add(self, row: dict[str, Any]) -> None:
        pass

    def __enter__(self) -> "_NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _say_nothing(_: str) -> None:
    pass


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    line = (
        f"epoch {row['epoch']}/{epochs}  classification {row['classification']:.4f}  "
        f"bbox_regression {row['bbox_regression']:.4f}  foreground {row['foreground']:.1f}  "
        f"lr {row['lr']:.2e}  {row['mean_seconds_per_step']:.3f} s a step (mean)"
    )
    if "AP" in row:
        line += "".join(f"  {name} {'-' if math.isnan(row[name]) else f'{row[name]:.3f}'}" for name in ("AP", "AP50"))
    return line
