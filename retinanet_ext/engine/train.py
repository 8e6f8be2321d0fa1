"""Training: the run around the steps (data, validation, checkpoints, logs, resume).

On the CPU a run is a function of its configuration: the same one gives the same bits twice, and a run that
was interrupted and resumed ends as one that was not. Order and augmentation come from (seed, epoch, index),
the rest of the state from the checkpoint written after each epoch.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retinanet_ext.data import (
    Compose,
    DatasetError,
    DetectionDataset,
    RandomHorizontalFlip,
    RandomVerticalFlip,
    make_loader,
    names_splits,
    open_dataset,
    summarise,
)
from retinanet_ext.data.extras import require, require_all

from .checkpoint import CheckpointError, build_model, load_checkpoint, load_state, save_checkpoint, set_rng_state
from .config import TrainConfig, resolve_amp, resolve_device, resolve_workers
from .evaluate import METRICS, Evaluation, evaluate
from .event_log import EventLog
from .loop import StepRecord, TrainingError, train_steps
from .plots import plot_results
from .plots_labels import plot_labels
from .progress import Progress
from .run_folder import RunFolder, RunFolderError, StepLog, write_json
from .schedule import CLIP_GRAD_NORM, default_rate, default_warmup, make_optimizer, make_scheduler
from .settings import SettingError
from .sheets import with_pictures

EXTRAS = ("PIL.Image", "faster_coco_eval", "matplotlib.figure", "tqdm")


def open_datasets(
    config: TrainConfig, run: RunFolder | None, say: Callable[[str], None]
) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The training set and, unless `validate_every` is 0, the validation set, their problems reported."""
    verify = "decode" if config.strict else config.verify
    train_set = open_dataset(config.data, config.split, images=config.images, verify=verify)
    sets = [train_set]
    if config.validate_every:
        if config.val_data is None and Path(config.data).is_file() and not names_splits(config.data):
            raise DatasetError(
                f"{config.data}: a json file holds one split: name the validation set (--val-data), or train "
                "without one (--no-val)"
            )
        try:
            val_set = open_dataset(
                config.val_data or config.data,
                config.val_split,
                images=config.val_images or config.images,
                class_names=train_set.class_names,
                verify=verify,
            )
        except DatasetError as error:
            raise DatasetError(f"validation set: {error} (--no-val trains without one)") from None
        sets.append(val_set)
    for dataset in sets:
        report_problems(dataset, run, say, config.strict)
    return train_set, (sets[1] if len(sets) > 1 else None)


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


class Training:
    """One run: the objects that take part, made anew or from the last checkpoint, and the loop over
    epochs."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        resume: bool = False,
        say: Callable[[str], None] = print,
    ):
        require_all(*EXTRAS)
        self.config, self.say = config, say
        self.run = RunFolder(run_dir)
        self.device = resolve_device(config.device)
        self.amp = resolve_amp(config.amp, self.device)
        self.workers = resolve_workers(config.workers, self.device)
        checkpoint = self._resumed_checkpoint() if resume else None
        if checkpoint is not None and config.epochs < checkpoint["epoch"]:
            raise SettingError("epochs", f"the run has finished {checkpoint['epoch']} already, got {config.epochs}")
        if not resume:
            self.run.check_free()
            self.run.problems.unlink(missing_ok=True)
        self.train_set, self.val_set = open_datasets(config, None if resume else self.run, say)
        if checkpoint is not None and checkpoint["class_names"] != self.train_set.class_names:
            raise CheckpointError(
                f"{self.run.last}: trained on the classes {checkpoint['class_names']}, and the data set "
                f"now has {self.train_set.class_names}"
            )
        self.loader = make_loader(
            self.train_set,
            config.batch_size,
            train=True,
            transform=Compose([RandomHorizontalFlip(config.hflip), RandomVerticalFlip(config.vflip)]),
            seed=config.seed,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        total_steps = len(self.loader) * config.epochs
        torch.manual_seed(config.seed)
        self.model_config = config.model_config(len(self.train_set.class_names))
        self.model = build_model(self.model_config).to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        rate = default_rate(config.optimizer, config.batch_size) if config.lr is None else config.lr
        self.optimizer = make_optimizer(self.model, config.optimizer, rate, config.weight_decay)
        warmup = default_warmup(total_steps) if config.warmup_steps is None else config.warmup_steps
        self.scheduler = make_scheduler(self.optimizer, total_steps, warmup, config.schedule)
        self.clip_grad_norm = (
            CLIP_GRAD_NORM[config.optimizer] if config.clip_grad_norm is None else config.clip_grad_norm
        )
        self.total_steps = total_steps
        self.epoch, self.step, self.best = 0, 0, -math.inf
        self.broken: set[str] = set()
        self.said_no_ap = False
        # The folder counts as a run only now: a mistake in the arguments leaves nothing that is in the way.
        if resume:
            self._restore(checkpoint)
        else:
            self.run.start(config.to_args())
            plot_labels(self.train_set, self.run.root / "labels.png")
        self.events = EventLog(self.run.root, self.step)

    def _resumed_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint of the run; None for a run that ended before it had written one."""
        self.run.read_args()
        if self.run.last.exists():
            return load_checkpoint(self.run.last)
        # The row of an epoch is written just before its checkpoint: one row without a checkpoint is a crash between.
        if (epochs := self.run.logged_epochs()) > 1:
            raise RunFolderError(
                f"{self.run.root}: nothing to resume: {self.run.last} is gone, and results.csv holds {epochs} epochs"
            )
        return None

    def _restore(self, checkpoint: dict[str, Any] | None) -> None:
        where = "from the start: no epoch was finished"
        if checkpoint is not None:
            load_state(self.model, checkpoint)
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            set_rng_state(checkpoint["rng"])
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.best = -math.inf if checkpoint["best"] is None else checkpoint["best"]
            where = f"after epoch {self.epoch} of {self.config.epochs}"
        write_json(self.run.args, self.config.to_args())
        self.run.rewind(self.epoch)
        self.say(f"resuming {self.run.root} {where}")

    def fit(self, on_epoch_end: Callable[["Training"], None] | None = None) -> Evaluation | None:
        """Run the epochs that are left. The last evaluation, or None where none was made."""
        say, config = self.say, self.config
        precision = "bf16 autocast" if self.amp else "float32"
        say(
            f"{config.arch}, {self.device}, {precision}, {config.epochs} epochs of {len(self.loader)} steps "
            f"of {config.batch_size} images, run folder {self.run.root}"
        )
        result = None
        with Progress(self.total_steps, "step", done=self.step) as progress:
            while self.epoch < config.epochs:
                row = self._train_epoch(progress)
                result = self._validate(row) or result
                self.run.add_epoch(row)
                self.events.add_epoch(row)
                self._save(self.run.last, whole=True)
                progress.write(self._line(row))
                if on_epoch_end is not None:
                    on_epoch_end(self)
        self.events.close()
        plot_results(self.run.results, self.run.steps, self.run.root / "results.png")
        return result

    def _train_epoch(self, progress: Progress) -> dict[str, Any]:
        """One pass over the training set; the row of results.csv without the validation."""
        self.loader.set_epoch(self.epoch)
        records: list[StepRecord] = []
        steps = train_steps(
            self.model,
            with_pictures(self.loader, self.run.root, self.train_set.class_names) if self.step == 0 else self.loader,
            self.optimizer,
            self.scheduler,
            self.device,
            first_step=self.step,
            amp=self.amp,
            clip_grad_norm=self.clip_grad_norm,
            name_of=self.train_set.file_of,
            report=self._report_broken,
        )
        progress.describe(f"epoch {self.epoch + 1}/{self.config.epochs}")
        with StepLog(self.run.steps) as log:
            for record in steps:
                records.append(record)
                log.add({**dataclasses.asdict(record), "epoch": self.epoch + 1})
                self.events.add_step(record)
                progress.advance(
                    cls=f"{record.classification:.3f}",
                    box=f"{record.bbox_regression:.3f}",
                    fg=f"{record.foreground:.0f}",
                    lr=f"{record.lr:.1e}",
                )
        if not records:
            raise TrainingError(f"epoch {self.epoch + 1}: no image of {self.train_set.name} could be read")
        self.epoch += 1
        self.step = records[-1].step
        names = ("classification", "bbox_regression", "total", "foreground")
        row = {name: sum(getattr(r, name) for r in records) / len(records) for name in names}
        # The mean, which the slow steps of a busy machine raise; a median would hide them.
        seconds = sum(record.seconds for record in records) / len(records)
        memory = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else math.nan
        return {
            "epoch": self.epoch,
            "step": self.step,
            **row,
            "lr": records[-1].lr,
            "mean_seconds_per_step": seconds,
            "memory_mb": memory,
        }

    def _validate(self, row: dict[str, Any]) -> Evaluation | None:
        """Validate if it is time to, add the figures to `row`, and keep the weights if they are the best so
        far."""
        every = self.config.validate_every
        if self.val_set is None:
            self._save(self.run.best, whole=False)
            return None
        if self.epoch % every and self.epoch != self.config.epochs:
            return None
        result = evaluate(
            self.model,
            self.val_set,
            batch_size=self.config.batch_size,
            device=self.device,
            workers=self.workers,
            amp=self.amp,
        )
        self._report_broken(result.problems)
        row.update({name: result.metrics[name] for name in METRICS}, val_seconds=result.seconds)
        row.update({f"val_{name}": value for name, value in result.losses.items()})
        ap = result.metrics["AP"]
        # No AP: nothing in the validation set counts. Unless an earlier one had an AP, the latest weights are kept.
        no_ap = math.isnan(ap) and math.isinf(self.best)
        if no_ap and not self.said_no_ap:
            self.said_no_ap = True
            require("tqdm").tqdm.write(
                f"{self.val_set.name}: no object to count, so there is no AP: best.pt holds the latest weights"
            )
        if ap > self.best or no_ap or not self.run.best.exists():
            self.best = -math.inf if math.isnan(ap) else ap
            self._save(self.run.best, whole=False)
            self.run.write_evaluation(result, self.val_set)
        return result

    def _save(self, path: Path, whole: bool) -> None:
        """Write a checkpoint; `whole` with what a resumed run needs, otherwise a model to use."""
        save_checkpoint(
            path,
            self.model,
            self.model_config,
            self.train_set.class_names,
            optimizer=self.optimizer if whole else None,
            scheduler=self.scheduler if whole else None,
            epoch=self.epoch,
            step=self.step,
            best=None if math.isinf(self.best) else self.best,
            args=self.config.to_args(),
        )

    def _report_broken(self, problems: list) -> None:
        """Say and write down each broken image once; with strict, stop."""
        new = [problem for problem in problems if problem.file not in self.broken]
        self.broken.update(problem.file for problem in new)
        if not new:
            return
        self.run.add_problems(new)
        for problem in new:
            require("tqdm").tqdm.write(f"skipped: {problem}")
        if self.config.strict:
            raise DatasetError(f"{new[0]} (--strict was given)")

    def _line(self, row: dict[str, Any]) -> str:
        line = (
            f"epoch {self.epoch}/{self.config.epochs}  classification {row['classification']:.4f}  "
            f"bbox_regression {row['bbox_regression']:.4f}  foreground {row['foreground']:.1f}  "
            f"lr {row['lr']:.2e}  {row['mean_seconds_per_step']:.3f} s a step (mean)"
        )
        if "AP" in row:
            line += f"  AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}"
        return line
