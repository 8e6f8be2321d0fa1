"""The folder of a run: its arguments, csv logs, problems, weights and pictures."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from retinanet_ext.data import DetectionDataset, Problem

from .checkpoint import remove_temporaries, write_atomically
from .evaluate import METRICS, Evaluation
from .evaluation_pictures import draw_evaluation
from .validation_loss import NAMES as LOSSES

STEP_COLUMNS = (
    "step",
    "epoch",
    "classification",
    "bbox_regression",
    "total",
    "foreground",
    "lr",
    "seconds",
    "grad_norm",
)
EPOCH_COLUMNS = (
    "epoch",
    "step",
    "classification",
    "bbox_regression",
    "total",
    "foreground",
    "lr",
    "mean_seconds_per_step",
    "memory_mb",
    *(f"val_{name}" for name in LOSSES),
    *METRICS,
    "val_seconds",
)

CLASS_COLUMNS = ("class", "images", "objects", "AP", "AP50", "AP75", "AR100")


class RunFolderError(ValueError):
    """A run folder that cannot be used: taken by another run, or without what a resumed run needs."""


def next_run_dir(parent: str | Path, name: str) -> Path:
    """Make `parent/name`, or the first of `parent/name2`, `parent/name3`, ... that does not exist, and return it."""
    parent, number = Path(parent), 1
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = parent / (name if number == 1 else f"{name}{number}")
        try:
            # Two runs that start at once must not get one folder: whoever makes it has it.
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


@contextmanager
def new_run_dir(given: str | Path | None, name: str) -> Iterator[Path]:
    """The folder of a new run: `given`, or one made by `next_run_dir` in runs/, which goes again if the block fails
    before anything was written to it."""
    if given:
        yield Path(given)
        return
    path = next_run_dir("runs", name)
    try:
        yield path
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


class RunFolder:
    """Names and writes the files of one run. Its folders are made when the first file is written."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.args = self.root / "args.json"
        self.results = self.root / "results.csv"
        self.steps = self.root / "steps.csv"
        self.problems = self.root / "problems.txt"
        self.last = self.root / "weights" / "last.pt"
        self.best = self.root / "weights" / "best.pt"

    def start(self, args: dict[str, Any]) -> None:
        """Begin a new run: args.json and the heads of the csv files."""
        self.check_free()
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.args, args)
        _write_rows(self.results, EPOCH_COLUMNS, [])
        _write_rows(self.steps, STEP_COLUMNS, [])

    def check_free(self) -> None:
        """Raises RunFolderError if the folder holds a run already."""
        if self.args.exists():
            raise RunFolderError(
                f"{self.root}: holds a run already: choose another --run-dir, or go on with it: --resume {self.root}"
            )

    def check_empty(self) -> None:
        """Raises RunFolderError if the folder holds anything but the problems.txt of a run that was refused."""
        if self.root.is_dir() and any(path != self.problems for path in self.root.iterdir()):
            raise RunFolderError(f"{self.root}: is not empty: choose another --run-dir")

    def read_args(self) -> dict[str, Any]:
        """The arguments the run was started with."""
        try:
            return json.loads(self.args.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunFolderError(f"{self.root}: not a run folder: it holds no args.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RunFolderError(f"{self.args}: broken ({error})") from None

    def logged_epochs(self) -> int:
        """How many epochs results.csv holds."""
        if not self.results.exists():
            return 0
        with open(self.results, newline="", encoding="utf-8") as stream:
            return sum((row["epoch"] or "").isdigit() for row in csv.DictReader(stream))

    def rewind(self, epoch: int, step: int) -> None:
        """Drop the csv rows of epochs after `epoch` and steps after `step` (1-based, 0: all), which are about to be run
        again, and what a write that was killed has left."""
        for path, columns, key, last in (
            (self.results, EPOCH_COLUMNS, "epoch", epoch),
            (self.steps, STEP_COLUMNS, "step", step),
        ):
            rows = []
            if path.exists():
                with open(path, newline="", encoding="utf-8") as stream:
                    # A row cut short by a crash has no number, or one that is dropped anyway.
                    rows = [
                        row for row in csv.DictReader(stream) if (row[key] or "").isdigit() and int(row[key]) <= last
                    ]
            _write_rows(path, columns, rows)
        for folder in (self.root, self.last.parent):
            remove_temporaries(folder)

    def add_epoch(self, row: dict[str, Any]) -> None:
        _append_row(self.results, EPOCH_COLUMNS, row)

    def add_problems(self, problems: Sequence[Problem]) -> None:
        """Append to problems.txt what is not there yet, as of a run that was resumed; an empty file says that there
        were none."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.problems, "a+", encoding="utf-8") as stream:
            stream.seek(0)
            known = set(stream)
            stream.writelines(line for line in dict.fromkeys(f"{p}\n" for p in problems) if line not in known)

    def write_evaluation(self, result: Evaluation, dataset: DetectionDataset) -> None:
        """metrics.json, per_class.csv, detections.json (COCO results) and the pictures of `draw_evaluation`."""
        self.root.mkdir(parents=True, exist_ok=True)
        metrics = {name: None if math.isnan(value) else value for name, value in result.metrics.items()}
        write_json(
            self.root / "metrics.json",
            {
                **metrics,
                **{f"val_{name}": value for name, value in result.losses.items() if math.isfinite(value)},
                "images": result.images,
                "predict_seconds": round(result.seconds, 3),
            },
        )
        _write_rows(self.root / "per_class.csv", CLASS_COLUMNS, result.per_class)
        write_json(self.root / "detections.json", result.detections, indent=None)
        draw_evaluation(self.root, result, dataset)

    def read_evaluation(self) -> Evaluation | None:
        """The figures of metrics.json and per_class.csv, None where they are not there: an evaluation without
        `precision50`, `detections` and `problems`."""
        metrics_file, classes_file = self.root / "metrics.json", self.root / "per_class.csv"
        if not (metrics_file.exists() and classes_file.exists()):
            return None
        content = json.loads(metrics_file.read_text(encoding="utf-8"))
        # Older files have fewer.
        metrics = {name: math.nan if content.get(name) is None else content[name] for name in METRICS}
        with open(classes_file, newline="", encoding="utf-8") as stream:
            per_class = [_class_figures(row) for row in csv.DictReader(stream)]
        losses = {name: content[f"val_{name}"] for name in LOSSES if f"val_{name}" in content}
        seconds = content["predict_seconds"]
        return Evaluation(metrics, per_class, None, losses=losses, images=content["images"], seconds=seconds)


class StepLog:
    """steps.csv, a row an optimizer step, kept open over an epoch; each row is in the file at once."""

    def __init__(self, path: Path):
        # Line by line: a run that is killed leaves the steps it has made, and who follows the file sees them.
        self.stream = open(path, "a", buffering=1, newline="", encoding="utf-8")  # noqa: SIM115
        self.writer = csv.DictWriter(self.stream, STEP_COLUMNS, extrasaction="ignore")

    def add(self, row: dict[str, Any]) -> None:
        self.writer.writerow(_formatted(row))

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write `content` to `path`, atomically."""
    text = json.dumps(content, indent=indent) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def _class_figures(row: dict[str, str]) -> dict[str, Any]:
    """A row of per_class.csv as `Evaluation.per_class` has it."""
    figures = {name: float(row[name] or math.nan) for name in ("AP", "AP50", "AP75", "AR100")}
    return {"class": row["class"], "images": int(row["images"]), "objects": int(row["objects"]), **figures}


def _formatted(row: dict[str, Any]) -> dict[str, Any]:
    """Floats with seven digits, NaN as an empty field."""
    return {
        key: ("" if math.isnan(value) else f"{value:.7g}") if isinstance(value, float) else value
        for key, value in row.items()
    }


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    lines: list[str] = []

    class Lines:
        write = staticmethod(lines.append)

    writer = csv.DictWriter(Lines, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(_formatted(row) for row in rows)
    write_atomically(path, lambda stream: stream.write("".join(lines).encode()))


def _append_row(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    with open(path, "a", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, columns, extrasaction="ignore").writerow(_formatted(row))
