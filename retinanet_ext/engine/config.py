"""What defines a training run, and what follows from it where nothing was said."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from retinanet_ext.models import PRESETS, RetinaNetConfig
from retinanet_ext.models.anchors import octave_sizes
from retinanet_ext.models.config import truncates_sizes

from .run_folder import RunFolder, RunFolderError
from .schedule import default_rate, scaled_rate
from .settings import SettingError, check_count, check_probability, check_sizes


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; written to args.json. None: chosen from the rest, see `resolve`. A wrong value
    raises SettingError.

    `preset`: whose conventions the model has, see `RetinaNetConfig.preset`; None: the defaults of `RetinaNetConfig`.
    `weights`: a file or a run folder to start from, see `interop.load_weights`; None: random weights.
    `data`, `images`, `split`: see `data.open_dataset`; `val_*` likewise, `val_data` None: `data`.
    `anchor_sizes`: the smallest anchor side of each of the five levels in pixels; each level has it times 1,
    2^(1/3) and 2^(2/3). `min_size`: sides the shorter image side is resized to; of several, training draws
    one for each image. `batch_size`: images at once over all processes; an optimizer step has `accumulate` times as
    many. `scale_lr`: `lr` is meant for 16 images a step. `lr_steps`: epochs at which the step schedule divides the rate
    by ten. `warmup_steps`: optimizer steps of linear warm-up. `clip_grad_norm` 0: no clipping. `ema`: decay of the
    average of the weights, None: no average. `scale_jitter`: lowest and highest scale, see `data.ScaleJitter`.
    `validate_every`: epochs between validations, 0: none; the last epoch is always validated otherwise. `patience`: the
    run ends after so many validations without a better AP. `save_every`: optimizer steps between checkpoints, 0: after
    each epoch alone.
    """

    data: str
    images: str | None = None
    split: str = "train"
    val_data: str | None = None
    val_images: str | None = None
    val_split: str = "val"
    validate_every: int = 1
    preset: str | None = None
    arch: str = "resnet50"
    norm: str = "batch"
    weights: str | None = None
    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    epochs: int = 12
    batch_size: int = 4
    optimizer: str = "adamw"
    accumulate: int = 1
    lr: float | None = None
    scale_lr: bool = False
    weight_decay: float | None = None
    schedule: str = "cosine"
    lr_steps: tuple[float, ...] | None = None
    warmup_steps: int | None = None
    clip_grad_norm: float | None = None
    ema: float | None = None
    scale_jitter: tuple[float, float] | None = None
    hflip: float = 0.5
    vflip: float = 0.0
    patience: int | None = None
    save_every: int = 0
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    amp: bool | None = None
    channels_last: bool = True
    sync_batch_norm: bool = False
    compile: bool = False
    cuda_graph: bool = False
    verify: str = "header"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise SettingError("preset", f"expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name in ("epochs", "batch_size", "accumulate"):
            check_count(name, getattr(self, name))
        if self.patience is not None:
            check_count("patience", self.patience)
            if not self.validate_every:
                raise SettingError("patience", "counts validations, and there are none without a validation set")
        for name in (
            "seed",
            "validate_every",
            "save_every",
            "clip_grad_norm",
            "warmup_steps",
            "workers",
            "weight_decay",
        ):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise SettingError(name, f"expected a number >= 0, got {value!r}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise SettingError("lr", f"expected a number > 0, got {self.lr!r}")
        for name in ("hflip", "vflip"):
            check_probability(name, getattr(self, name))
        if self.scale_lr and self.lr is None:
            raise SettingError("scale_lr", "scales the rate of --lr, and none is given")
        if self.lr_steps is not None:
            check_milestones(self.lr_steps, self.schedule)
        if self.ema is not None and not 0 < self.ema < 1:
            raise SettingError("ema", f"expected a decay between 0 and 1, such as 0.9998, got {self.ema!r}")
        if self.scale_jitter is not None and not (
            len(self.scale_jitter) == 2 and 0 < self.scale_jitter[0] <= self.scale_jitter[1] < math.inf
        ):
            raise SettingError("scale_jitter", f"expected two scales, 0 < LOW <= HIGH, got {self.scale_jitter!r}")
        if self.cuda_graph and (self.compile or self.accumulate > 1):
            other = "compile" if self.compile else "accumulate"
            raise SettingError(("cuda_graph", other), "a graph holds a whole step, as it is: only one of the two")
        if self.sync_batch_norm and self.norm != "batch":
            raise SettingError("sync_batch_norm", f"needs --norm batch, got {self.norm}")
        check_sizes(("min_size", "max_size"), self.min_size, self.max_size)
        if len(self.anchor_sizes) != 5 or not all(size >= 1 and math.isfinite(size) for size in self.anchor_sizes):
            raise SettingError(
                "anchor_sizes",
                f"expected five sizes of at least 1 pixel, one a level from P3 to P7, got {self.anchor_sizes!r}",
            )
        if not self.aspect_ratios or not all(ratio > 0 and math.isfinite(ratio) for ratio in self.aspect_ratios):
            raise SettingError("aspect_ratios", f"expected numbers > 0, got {self.aspect_ratios!r}")

    def to_args(self) -> dict[str, Any]:
        """What args.json holds: the fields, paths made absolute, so that a run goes on from any folder."""
        names = ("data", "images", "val_data", "val_images", "weights")
        paths = {name: os.path.abspath(value) for name in names if (value := getattr(self, name)) is not None}
        return {**asdict(self), **paths}

    @property
    def images_a_step(self) -> int:
        """Images an optimizer step, over all processes and the batches it accumulates."""
        return self.batch_size * self.accumulate

    def rate(self) -> float:
        """The learning rate after warm-up."""
        if self.lr is None:
            return default_rate(self.optimizer, self.images_a_step)
        return scaled_rate(self.lr, self.images_a_step) if self.scale_lr else self.lr

    def model_config(self, num_classes: int) -> dict[str, Any]:
        """What `checkpoint.build_model` takes: the dictionary of a `RetinaNetConfig`."""
        values = {
            "num_classes": num_classes,
            "backbone": self.arch,
            "norm": self.norm,
            "min_size": self.min_size if len(self.min_size) > 1 else self.min_size[0],
            "max_size": self.max_size,
            "anchor_sizes": octave_sizes(self.anchor_sizes, truncates_sizes(self.preset)),
            "aspect_ratios": self.aspect_ratios,
        }
        config = RetinaNetConfig(**values) if self.preset is None else RetinaNetConfig.preset(self.preset, **values)
        return config.to_dict()


def check_milestones(epochs: Sequence[float], schedule: str) -> None:
    if schedule != "step":
        raise SettingError("lr_steps", f"belongs to --schedule step, got {schedule}")
    rising = all(a < b for a, b in pairwise(epochs))
    if not epochs or not rising or not all(0 < epoch < math.inf for epoch in epochs):
        raise SettingError("lr_steps", f"expected rising epochs > 0, got {epochs!r}")


def octaves(sizes: Iterable[float]) -> list[list[int]]:
    """Anchor sizes of each level: s, s * 2^(1/3), s * 2^(2/3), truncated to integers as torchvision's are."""
    return [list(level) for level in octave_sizes(sizes)]


def resolve_device(name: str) -> torch.device:
    """ "auto": CUDA where there is one, else the CPU. Raises SettingError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError("device", f"expected auto, cpu or cuda[:N], got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(
            "device", "cuda was asked for, and torch finds no usable CUDA device here (see: retinanet-ext env)"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise SettingError("device", f"got {name!r}, and there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise SettingError("device", f"expected auto, cpu or cuda[:N], got {name!r}")
    return device


def resolve_amp(amp: bool | None, device: torch.device) -> bool:
    """bf16 autocast: as asked, else on where the device is a GPU with bf16 arithmetic of its own."""
    if amp is not None:
        return amp
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_workers(workers: int | None, device: torch.device) -> int:
    """Loader processes: as asked, else 4 beside a GPU, and none on the CPU, where the model needs the
    cores. Raises SettingError for less than none."""
    if workers is None:
        return 4 if device.type == "cuda" else 0
    check_count("workers", workers, least=0)
    return workers


def resume_config(run_dir: str | Path, **changes: Any) -> TrainConfig:
    """The configuration of an earlier run with `changes` (None: unchanged). Raises RunFolderError,
    ValueError."""
    run = RunFolder(run_dir)
    stored = run.read_args()
    try:
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return TrainConfig(**{**stored, **{k: v for k, v in changes.items() if v is not None}})
    except TypeError as error:
        raise RunFolderError(f"{run.args}: not the arguments of a training run ({error})") from None
