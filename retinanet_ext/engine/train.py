"""Training: the run around the steps (data, validation, checkpoints, logs, resume).

On the CPU a run is a function of its configuration and the number of processes: the same ones give the same bits twice,
and a run that was interrupted and resumed ends as one that was not. Order and augmentation come from (seed, epoch,
index), the rest of the state from the checkpoint written after each epoch and, where asked for, in between.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from retinanet_ext.data import (
    Compose,
    DatasetError,
    DetectionDataset,
    RandomHorizontalFlip,
    RandomVerticalFlip,
    ScaleJitter,
    Transform,
    make_loader,
    names_splits,
    open_dataset,
)
from retinanet_ext.data.extras import require_all
from retinanet_ext.interop.weights import load_start_weights, start_layout

from .checkpoint import (
    CheckpointError,
    build_model,
    find_weights,
    load_checkpoint,
    load_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from .config import TrainConfig, resolve_amp, resolve_device, resolve_workers
from .distributed import World
from .ema import ModelAverage
from .evaluate import METRICS, Evaluation
from .failure import NotFiniteError, TrainingError
from .graphed_stepper import GraphedStepper
from .loop import train_steps
from .progress import reading
from .rank_evaluation import evaluate_together
from .recorder import EpochMeans, Recorder, report_problems
from .run_folder import RunFolder, RunFolderError
from .schedule import CLIP_GRAD_NORM, change_rate, default_warmup, load_optimizer, make_optimizer, make_scheduler
from .settings import SettingError
from .stepper import Stepper

EXTRAS = ("PIL.Image", "faster_coco_eval", "matplotlib.figure", "tqdm")


def open_datasets(
    config: TrainConfig, run: RunFolder | None, say: Callable[[str], None]
) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The training set and, unless `validate_every` is 0, the validation set, their problems reported."""
    verify = "decode" if config.strict else config.verify
    train_set = open_dataset(config.data, config.split, images=config.images, verify=verify, progress=reading)
    sets = [train_set]
    if config.validate_every:
        if config.val_data is None and Path(config.data).is_file() and not names_splits(config.data):
            raise SettingError(
                "val_data", f"expected the validation set, as the json file {config.data} holds one split, or --no-val"
            )
        try:
            val_set = open_dataset(
                config.val_data or config.data,
                config.val_split,
                images=config.val_images or config.images,
                class_names=train_set.class_names,
                verify=verify,
                progress=reading,
            )
        except DatasetError as error:
            raise DatasetError(f"validation set: {error} (--no-val trains without one)") from None
        sets.append(val_set)
    for dataset in sets:
        report_problems(dataset, run, say, config.strict)
    return train_set, (sets[1] if len(sets) > 1 else None)


def augmentation(config: TrainConfig) -> Transform:
    """What the loader does to each training image."""
    jitter = [] if config.scale_jitter is None else [ScaleJitter(*config.scale_jitter, limit=config.max_size)]
    return Compose([*jitter, RandomHorizontalFlip(config.hflip), RandomVerticalFlip(config.vflip)])


@contextmanager
def _naming(weights: Path) -> Iterator[None]:
    """Errors of the file that --weights names."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"--weights {weights}: {str(error).removeprefix(f'{weights}: ')}") from error


class Training:
    """One run: the objects that take part, made anew or from the last checkpoint, and the loop over
    epochs. Every process of a run has one; see `World` for what they share."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        resume: bool = False,
        say: Callable[[str], None] = print,
        world: World | None = None,
    ):
        require_all(*EXTRAS)
        self.config, self.world = config, World() if world is None else world
        self.run = RunFolder(run_dir)
        self.recorder = Recorder(self.run, self.world, say)
        self.say = self.recorder.say
        self.device = self.world.device(resolve_device(config.device))
        self.amp = resolve_amp(config.amp, self.device)
        self.workers = resolve_workers(config.workers, self.device)
        self._check_world()
        checkpoint = self.world.share(self._resumed_checkpoint() if resume and self.world.is_main else None)
        if checkpoint is not None and config.epochs < checkpoint["epoch"]:
            raise SettingError("epochs", f"the run has finished {checkpoint['epoch']} already, got {config.epochs}")
        if config.weights is not None and checkpoint is None and self.world.is_main:
            path = find_weights(config.weights)
            with _naming(path):
                start_layout(path)  # a mistake is found before a large set is looked through
        # One process looks at the files: all have the same images then, and each problem is reported once.
        self.train_set, self.val_set = self.world.share(self._open_datasets(resume) if self.world.is_main else None)
        if checkpoint is not None and checkpoint["class_names"] != self.train_set.class_names:
            raise CheckpointError(
                f"{self.run.last}: trained on the classes {checkpoint['class_names']}, and the data set "
                f"now has {self.train_set.class_names}"
            )
        self.loader = make_loader(
            self.train_set,
            config.batch_size,
            train=True,
            transform=augmentation(config),
            seed=config.seed,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
            as_bytes=True,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.steps_an_epoch = -(-len(self.loader) // config.accumulate)
        self.model_config = config.model_config(len(self.train_set.class_names))
        self.stepper = self._make_stepper(new=checkpoint is None)
        self.model, self.average = self.stepper.model, self.stepper.average
        self.epoch, self.step, self.best = 0, 0, -math.inf
        # Of the epoch that is under way: batches done, and means. Validations since the best one.
        self.batches, self.means, self.stale = 0, EpochMeans(), 0
        self.said_no_ap = False
        # The folder counts as a run only now: a mistake in the arguments leaves nothing that is in the way.
        if resume:
            self._restore(checkpoint)
        else:
            self.recorder.begin(config.to_args(), self.train_set)

    def _check_world(self) -> None:
        config, size = self.config, self.world.size
        if config.batch_size < size:
            raise SettingError(
                "batch_size", f"expected an image for each of {size} processes at least, got {config.batch_size}"
            )
        for name in ("sync_batch_norm", "cuda_graph"):
            if getattr(config, name) and self.device.type != "cuda":
                raise SettingError(name, f"is for CUDA devices alone, got {self.device}")
        if config.norm == "sync_batch" and size > 1 and self.device.type != "cuda":
            raise SettingError(
                "norm", f"sync_batch of several processes is for CUDA alone: take group, got {self.device}"
            )
        if config.cuda_graph and size > 1:
            raise SettingError("cuda_graph", f"captures the step of one process, got {size} processes")

    def _open_datasets(self, resume: bool) -> tuple[DetectionDataset, DetectionDataset | None]:
        if not resume:
            self.run.check_free()
            self.run.problems.unlink(missing_ok=True)
        return open_datasets(self.config, None if resume else self.run, self.say)

    def _make_stepper(self, new: bool) -> Stepper:
        """The model and what trains it; `new`: no checkpoint's weights will follow."""
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(self.model_config)
        if new and config.weights is not None:
            self._load_weights(model)
        model = model.to(self.device)
        if config.sync_batch_norm and self.world.size > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(
            model, config.optimizer, config.rate(), config.weight_decay, tensor_rate=config.cuda_graph
        )
        total = self.steps_an_epoch * config.epochs
        warmup = default_warmup(total) if config.warmup_steps is None else config.warmup_steps
        milestones = config.lr_steps and [epoch * self.steps_an_epoch for epoch in config.lr_steps]
        return (GraphedStepper if config.cuda_graph else Stepper)(
            model,
            optimizer,
            make_scheduler(optimizer, total, warmup, config.schedule, milestones),
            self.device,
            world=self.world,
            amp=self.amp,
            clip_grad_norm=CLIP_GRAD_NORM[config.optimizer] if config.clip_grad_norm is None else config.clip_grad_norm,
            average=None if config.ema is None else ModelAverage(model, config.ema),
            compiled=config.compile,
        )

    def _load_weights(self, model: torch.nn.Module) -> None:
        """Weights to start from, which the main process alone reads."""
        if self.world.is_main:
            path = find_weights(self.config.weights)
            with _naming(path):
                self.say(f"{path}: {load_start_weights(model, path)}")
        model.load_state_dict(self.world.share(model.state_dict() if self.world.is_main else None))

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
            load_optimizer(self.stepper.optimizer, checkpoint["optimizer"])
            self.stepper.scheduler.load_state_dict(checkpoint["scheduler"])
            # As it is now: --resume may change it.
            change_rate(self.stepper.scheduler, [self.config.rate()] * len(self.stepper.optimizer.param_groups))
            if self.average is not None:
                self.average.load_state_dict(checkpoint["ema"])
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.best = -math.inf if checkpoint["best"] is None else checkpoint["best"]
            where = f"after epoch {self.epoch} of {self.config.epochs}"
            states = [checkpoint["rng"]]
            if (progress := checkpoint["progress"]) is not None:
                self.batches, self.means, self.stale = (
                    progress["batches"],
                    EpochMeans(progress["means"]),
                    progress["stale"],
                )
                states = progress["rng"]
                if self.batches:
                    where += f", {self.batches} batches into the next"
            # With another number of processes than then, each goes on from one of their states.
            set_rng_state(states[self.world.rank % len(states)])
        self.recorder.go_on(self.config.to_args(), self.epoch, self.step, where)

    def fit(self, on_epoch_end: Callable[["Training"], None] | None = None) -> Evaluation | None:
        """Run the epochs that are left. The last evaluation, or None where none was made."""
        config = self.config
        precision = "bf16 autocast" if self.amp else "float32"
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        accumulated = f" x {config.accumulate}" if config.accumulate > 1 else ""
        self.say(
            f"{config.arch}, {self.device}{processes}, {precision}, {config.epochs} epochs of {self.steps_an_epoch} "
            f"steps of {config.batch_size}{accumulated} images, run folder {self.run.root}"
        )
        result = None
        with self.recorder.steps(self.steps_an_epoch * config.epochs, self.step, self.device):
            while self.epoch < config.epochs and not self._given_up():
                row = self._train_epoch()
                result = self._validate(row) or result
                self.recorder.epoch(row, config.epochs)
                self._save_last()
                if on_epoch_end is not None:
                    on_epoch_end(self)
        self.recorder.finish()
        return result

    def _given_up(self) -> bool:
        """Whether the validation AP has not risen for as long as the run has patience."""
        if self.config.patience is None or self.stale < self.config.patience:
            return False
        self.say(
            f"stopped after epoch {self.epoch}: {self.stale} validations without a better AP than {self.best:.3f} "
            "(--patience)"
        )
        return True

    def _train_epoch(self) -> dict[str, Any]:
        """One pass over the training set, or what is left of it; the row of results.csv without the validation."""
        self.loader.set_epoch(self.epoch, self.batches)
        self.recorder.progress.describe(f"epoch {self.epoch + 1}/{self.config.epochs}")
        every = self.config.save_every
        steps = train_steps(
            self.stepper,
            self.recorder.pictured(self.loader, self.train_set) if self.step == 0 else self.loader,
            first_step=self.step,
            first_batch=self.batches,
            accumulate=self.config.accumulate,
            current_at=lambda step: bool(every) and step % every == 0,
            name_of=self.train_set.file_of,
            report=lambda problems: self.recorder.broken_images(problems, self.config.strict),
        )
        rate = math.nan
        try:
            with self.recorder.step_log() as log:
                for record in steps:
                    self.step, self.batches, rate = record.step, record.batches, record.lr
                    self.means.add(record)
                    self.recorder.step(log, record, self.epoch + 1)
                    if every and self.step % every == 0 and self.batches < len(self.loader):
                        self._save_last()
        except NotFiniteError as error:
            raise self._with_state_saved(error) from None
        if not self.means.steps:
            raise TrainingError(f"epoch {self.epoch + 1}: no image of {self.train_set.name} could be read")
        self.epoch += 1
        row = self.means.row()
        self.batches, self.means = 0, EpochMeans()
        memory = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else math.nan
        return {"epoch": self.epoch, "step": self.step, **row, "lr": rate, "memory_mb": memory}

    def _with_state_saved(self, error: NotFiniteError) -> NotFiniteError:
        """The error, with where the state before the failed step is now."""
        if error.step == 0:
            return error
        self.step, self.batches = error.step, error.batches
        self._save_last()
        return NotFiniteError(
            f"{error}. {self.run.last} holds the training as it was before that step: mend the cause and go on with "
            f"--resume {self.run.root}, which takes another --lr, --clip-grad-norm or --no-amp",
            error.step,
            error.batches,
        )

    def _validate(self, row: dict[str, Any]) -> Evaluation | None:
        """Validate if it is time to, add the figures to `row`, and keep the weights if they are the best so
        far."""
        every = self.config.validate_every
        self.world.share_buffers(self.model)
        if self.average is not None:
            self.world.share_buffers(self.average.model)
        if self.val_set is None:
            self._save_best()
            return None
        if self.epoch % every and self.epoch != self.config.epochs:
            return None
        result = evaluate_together(
            self.world,
            self._used_model(),
            self.val_set,
            batch_size=self.config.batch_size,
            device=self.device,
            workers=self.workers,
            amp=self.amp,
        )
        if self.world.is_main:
            self.recorder.broken_images(result.problems, self.config.strict)
        row.update({name: result.metrics[name] for name in METRICS}, val_seconds=result.seconds)
        row.update({f"val_{name}": value for name, value in result.losses.items()})
        self._keep_if_best(result)
        return result

    def _keep_if_best(self, result: Evaluation) -> None:
        ap = result.metrics["AP"]
        # No AP: nothing in the validation set counts. Unless an earlier one had an AP, the latest weights are kept.
        no_ap = math.isnan(ap) and math.isinf(self.best)
        if no_ap and not self.said_no_ap:
            self.said_no_ap = True
            self.recorder.write(
                f"{self.val_set.name}: no object to count, so there is no AP: best.pt holds the latest weights"
            )
        self.stale += 1
        if ap > self.best or no_ap or not self.world.share(self.run.best.exists()):
            self.best, self.stale = -math.inf if math.isnan(ap) else ap, 0
            self._save_best()
            self.recorder.evaluation(result, self.val_set)

    def _used_model(self) -> torch.nn.Module:
        """The model that is evaluated and kept: the average where there is one."""
        return self.model if self.average is None else self.average.model

    def _save_best(self) -> None:
        """Write best.pt: a model to use."""
        self._save(self.run.best, self._used_model())

    def _save_last(self) -> None:
        """Write last.pt: all that a resumed run needs."""
        progress = {
            "batches": self.batches,
            "means": self.means.state_dict(),
            "stale": self.stale,
            "rng": self.world.gather(rng_state()),
        }
        self._save(
            self.run.last,
            self.model,
            optimizer=self.stepper.optimizer,
            scheduler=self.stepper.scheduler,
            ema=None if self.average is None else self.average.state_dict(),
            progress=progress,
        )

    def _save(self, path: Path, model: torch.nn.Module, **state: Any) -> None:
        if not self.world.is_main:
            return
        save_checkpoint(
            path,
            model,
            self.model_config,
            self.train_set.class_names,
            epoch=self.epoch,
            step=self.step,
            best=None if math.isinf(self.best) else self.best,
            args=self.config.to_args(),
            **state,
        )
