"""Checkpoints: one file that holds all a run needs to go on, or a model needs to be used.

The file is what `torch.save` writes of a dictionary of tensors, numbers, strings and lists, so it loads with
`weights_only=True`: no code in it runs. It is written to a temporary file beside its place, flushed to the
disk and renamed, so a crash at any moment leaves the old file or the new one, never half of one.
"""

import glob
import io
import os
import pickle
import platform
import random
import re
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from retinanet_ext.models import RetinaNetConfig, build_retinanet
from retinanet_ext.models.config import CHECKPOINT_FORMAT

VERSION = 2


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this library."""


def build_model(config: dict[str, Any]) -> nn.Module:
    """The RetinaNet of a model configuration: the dictionary of a `RetinaNetConfig`, or part of one, the rest being its
    defaults.

    Raises ValueError for what is no part of one, and for a value out of its range.
    """
    return build_retinanet(RetinaNetConfig.from_dict(config))


def write_atomically(path: str | Path, write) -> None:
    """Call `write(stream)` on a temporary binary file beside `path`, flush it to the disk, and rename it to
    `path`. An OSError of the stream, as of a full disk, names `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = temporary_of(path)
    try:
        stream = _Stream(io.FileIO(temporary, "wb"))
        try:
            with stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:
            if stream.error is None:
                raise
            # torch.save closes its archive after an error of the stream, and raises one of its own in doing so.
            raise OSError(stream.error.errno, stream.error.strerror, str(path)) from error
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        # The rename itself reaches the disk with the folder.
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Stream(io.BufferedWriter):
    """Keeps the error that writing ended in."""

    error: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.error = error
            raise


# A process's number means something on its own host alone, and folders are shared.
_HOST = re.sub(r"[^0-9A-Za-z]+", "-", platform.node())
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9A-Za-z-]*)-(?P<process>[0-9]{1,7})\.tmp")


def temporary_of(path: Path, process: int | None = None) -> Path:
    """What `process`, by default this one, writes before it is `path`."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid() if process is None else process}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove every temporary file of `write_atomically` in `folder`, where nobody writes."""
    for leftover in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(leftover.name):
            with suppress(OSError):
                leftover.unlink()


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of this host's processes that were killed while they wrote to `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = _TEMPORARY.fullmatch(leftover.name)
        if not found or (found["name"], found["host"]) != (path.name, _HOST) or _is_running(int(found["process"])):
            continue
        with suppress(OSError):  # another user's
            leftover.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    model_config: dict[str, Any],
    class_names: Sequence[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    epoch: int = 0,
    step: int = 0,
    best: float | None = None,
    args: dict[str, Any] | None = None,
    ema: dict[str, Any] | None = None,
    progress: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint to `path`, atomically.

    `model_config`: what `build_model` takes. `epoch`: finished epochs; `step`: finished optimizer steps;
    `best`: the best validation AP so far; `ema`: the state of the average of the weights; `progress`: of a run in
    the middle of an epoch, see `train.Training`. Without `optimizer` the file holds a model to use, not a run to
    go on with.
    """
    content = {
        "format": CHECKPOINT_FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "model": model.state_dict(),
        "buffers": other_buffers(model),
        "model_config": model_config,
        "class_names": list(class_names),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "rng": rng_state(),
        "epoch": epoch,
        "step": step,
        "best": best,
        "args": args,
        "ema": ema,
        "progress": progress,
    }
    write_atomically(path, lambda stream: torch.save(content, stream))


def find_weights(path: str | Path) -> Path:
    """The checkpoint that `path` means: the file itself, or weights/best.pt of a run folder, or else its
    weights/last.pt. Raises FileNotFoundError for a folder with neither."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / "weights" / name).is_file():
            return path / "weights" / name
    raise FileNotFoundError(f"{path}: a folder without weights/best.pt and weights/last.pt")


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: the dictionary `save_checkpoint` wrote.

    Raises FileNotFoundError, or CheckpointError where the file is cut short, is something else, or comes from
    a later version of the format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a checkpoint, or one that was cut short ({path.stat().st_size} bytes): expected "
            "the file that retinanet-ext train writes to weights/"
        )
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {_unpickling_reason(error)}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path}: not a checkpoint of retinanet_ext (it holds {held}). A bare state dict goes into a "
            "model with model.load_state_dict()"
        )
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {content['version']}, and this retinanet_ext reads up to {VERSION}: "
            "update retinanet_ext"
        )
    return {"ema": None, "progress": None, **content}  # files of version 1 have neither


def _unpickling_reason(error: pickle.UnpicklingError) -> str:
    """One sentence for torch's page of advice, which is about loading such a file nevertheless."""
    found = re.search(r"\bGLOBAL (\S+)", str(error))
    if found is None:
        return "it is damaged, or was not written by retinanet-ext train"
    return (
        f"it holds a pickled object ({found[1]}), which could run any code, where retinanet-ext train writes tensors "
        "and plain values alone"
    )


def load_model(
    path: str | Path, device: str | torch.device = "cpu", **changes: Any
) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """A model ready to predict, its class names, and the checkpoint it came from.

    `path`: a checkpoint or a run folder, see `find_weights`. `changes` replace entries of the model
    configuration, for instance `score_thresh=0.01`.
    """
    path = find_weights(path)
    checkpoint = load_checkpoint(path)
    model = build_model({**checkpoint["model_config"], **changes})
    try:
        load_state(model, checkpoint)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit the model they name: {error}") from error
    return model.to(device).eval(), checkpoint["class_names"], checkpoint


def load_state(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """The weights of a checkpoint, and the buffers that no state dict has: a running normalizer of the losses. Raises
    RuntimeError where the weights do not fit."""
    model.load_state_dict(checkpoint["model"])
    own = other_buffers(model)
    for name, value in checkpoint.get("buffers", {}).items():  # files of earlier versions have none
        if name in own:
            own[name].copy_(value)


def other_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are no part of the model's state dict, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def rng_state() -> dict[str, Any]:
    """The state of the generators of torch (CPU and every CUDA device), NumPy and Python."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            kind,
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": [version, list(words), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; CUDA states only where there are as many devices as then."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
