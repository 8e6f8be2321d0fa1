"""Trained models as files for other programs: torch.export, AOTInductor, ONNX, torchvision's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinanet_ext.models import RetinaNet

from .checkpoint import load_model
from .config import resolve_device
from .export_modules import SIZE_DIVISIBLE
from .export_onnx import check_onnx, write_onnx, write_onnx_heads
from .export_programs import check_compiler, write_aoti, write_pt2, write_torchvision
from .export_report import Exported, ExportOptions, make_metadata
from .settings import SettingError, check_count, check_probability


@dataclass(frozen=True)
class Format:
    """A format of exports.

    Attributes:
        suffixes: how its files are named; loaders look at that.
        write: called as ``write(model, options, metadata, output)``.
        check: raises SettingError where the format needs what is not here.
        without: settings that mean nothing to it.
    """

    suffixes: tuple[str, ...]
    write: Callable[[RetinaNet, ExportOptions, str, Path], Exported]
    check: Callable[[], None] = lambda: None
    without: tuple[str, ...] = ()


FORMATS = {
    "pt2": Format((".pt2",), write_pt2),
    # Compiled code does not notice a side that is no multiple of 32: its sizes are fixed.
    "aoti": Format((".pt2",), write_aoti, check_compiler, ("dynamic_size",)),
    "onnx": Format((".onnx",), write_onnx, check_onnx, ("device",)),
    "onnx-heads": Format((".onnx",), write_onnx_heads, check_onnx, ("device", "min_score")),
    "torchvision": Format(
        (".pth", ".pt"),
        write_torchvision,
        without=("size", "dynamic_size", "batch_size", "min_score", "device"),
    ),
}


def export(
    weights: str | Path,
    format: str,
    output: str | Path,
    *,
    size: Sequence[int] | None = None,
    dynamic_size: bool = False,
    batch_size: int | None = None,
    min_score: float | None = None,
    device: str | None = None,
) -> Exported:
    """Write the model of a checkpoint in another format.

    Args:
        weights: a checkpoint of training, or its run folder: the best weights.
        format: one of `FORMATS`, see docs/export.md.
        output: the file to write; it must not exist.
        size: height and width of the images, or one side of squares, multiples of 32; by default the model's
            min_size x max_size, rounded up.
        dynamic_size: take any height and width that are multiples of 32 and at least 160.
        batch_size: images a call; any number by default.
        min_score: detections have a score above this; the model's own threshold by default.
        device: where a `pt2` or `aoti` program runs, "auto", "cpu" or "cuda:0"; the CPU by default.

    Raises:
        SettingError: a wrong argument, or one whose format needs what is not here. Nothing was written.
        FileNotFoundError, CheckpointError: no such weights, or weights that cannot be read.
    """
    output = check_output(format, output)
    given = {
        "size": size,
        "dynamic_size": dynamic_size or None,
        "batch_size": batch_size,
        "min_score": min_score,
        "device": device,
    }
    if unused := [name for name in FORMATS[format].without if given[name] is not None]:
        raise SettingError(unused, f"not for the format {format}: leave it out")
    if min_score is not None:
        check_probability("min_score", min_score, "a score")
    changes = {} if min_score is None else {"score_thresh": min_score}
    check_inputs(size, dynamic_size, batch_size)
    target = resolve_device(device or "cpu")
    FORMATS[format].check()
    model, class_names, checkpoint = load_model(weights, **changes)
    config = {**checkpoint["model_config"], **changes}
    options = ExportOptions(None if dynamic_size else image_size(size, model), batch_size, target)
    return export_model(model, class_names, config, format, output, options)


def export_model(
    model: RetinaNet,
    class_names: Sequence[str],
    model_config: dict[str, Any],
    format: str,
    output: Path,
    options: ExportOptions,
) -> Exported:
    """`export` of a model in evaluation mode on the CPU, with arguments that were checked."""
    metadata = make_metadata(format, class_names, model_config, options)
    return FORMATS[format].write(model, options, metadata, output)


def check_output(format: str, output: str | Path) -> Path:
    """The file to write. Raises SettingError if that cannot be, before any work is done."""
    if format not in FORMATS:
        raise SettingError("format", f"expected one of {', '.join(FORMATS)}, got {format!r}")
    output = Path(output)
    if output.suffix not in FORMATS[format].suffixes:
        expected = " or ".join(FORMATS[format].suffixes)
        raise SettingError("output", f"expected a name that ends in {expected} for the format {format}, got {output}")
    if os.path.lexists(output):
        raise SettingError("output", f"{output} exists: choose another name, or remove it")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise SettingError("output", f"{output} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingError("output", f"{output} cannot be written: no permission to write in {folder}")
    return output


def check_inputs(size: Sequence[int] | None, dynamic_size: bool, batch_size: int | None) -> None:
    """Raises SettingError for sizes that no program can have."""
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if size is None:
        return
    if dynamic_size:
        raise SettingError(("size", "dynamic_size"), "expected one of them, got both")
    if len(size) not in (1, 2):
        raise SettingError("size", f"expected height and width, or one number for both, got {len(size)} numbers")
    if any(side < 1 or side % SIZE_DIVISIBLE for side in size):
        got = " ".join(map(str, size))
        raise SettingError("size", f"expected positive multiples of {SIZE_DIVISIBLE}, got {got}")


def image_size(size: Sequence[int] | None, model: RetinaNet) -> tuple[int, int]:
    """Height and width: as given, or of the largest landscape image that the model's own resizing makes."""
    if size is None:
        sides = (model.transform.min_size[-1], model.transform.max_size)
        return tuple(-(-side // SIZE_DIVISIBLE) * SIZE_DIVISIBLE for side in sides)
    return size[0], size[-1]
