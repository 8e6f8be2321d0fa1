"""What an export takes, what travels with it, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import retinanet_ext
from retinanet_ext.models import RetinaNet

from .export_modules import LEAST_DYNAMIC_SIDE, SIZE_DIVISIBLE

# The name of the metadata, in archives and in properties of files.
METADATA_NAME = "retinanet_ext.json"


@dataclass(frozen=True)
class ExportOptions:
    """What an export takes as input.

    Attributes:
        size: height and width of the images; None for any, and then at least 160.
        batch_size: images a call; None for any.
        device: where a program runs that is made for one.
    """

    size: tuple[int, int] | None
    batch_size: int | None
    device: torch.device

    @property
    def batch(self) -> str:
        return "B" if self.batch_size is None else str(self.batch_size)

    @property
    def takes(self) -> str:
        height, width = ("H", "W") if self.size is None else self.size
        limits = (
            f"H and W multiples of {SIZE_DIVISIBLE}, at least {LEAST_DYNAMIC_SIDE}"
            if self.size is None
            else "resized or padded to this size already"
        )
        return f"images [{self.batch}, 3, {height}, {width}], float32, RGB in 0..1, {limits}"

    @property
    def example_shape(self) -> tuple[int, int, int, int]:
        """Of a batch of images that the export takes."""
        height, width = (LEAST_DYNAMIC_SIDE, 2 * LEAST_DYNAMIC_SIDE) if self.size is None else self.size
        return self.batch_size or 1, 3, height, width

    @property
    def example(self) -> str:
        """Python for a batch of images."""
        device = "" if self.device.type == "cpu" else f', device="{self.device}"'
        return f"torch.rand({', '.join(map(str, self.example_shape))}{device})"


@dataclass(frozen=True)
class Exported:
    """What was written. `takes`, `gives`: inputs and outputs in words; `usage`: two lines of Python."""

    path: Path
    takes: str
    gives: str
    usage: str

    def __str__(self) -> str:
        usage = "\n".join(f"  {line}" for line in self.usage.splitlines())
        return f"{self.path}\ntakes: {self.takes}\ngives: {self.gives}\nuse it:\n{usage}"


def describe_detections(model: RetinaNet, options: ExportOptions) -> str:
    rows = f"{options.batch}, {model.detections_per_img}"
    return (
        f"boxes [{rows}, 4], x1 y1 x2 y2 in pixels of the input, scores [{rows}], best first, labels [{rows}], -1 "
        f"beyond an image's last, counts [{options.batch}]"
    )


def make_metadata(format: str, class_names: Sequence[str], model_config: dict[str, Any], options: ExportOptions) -> str:
    """What travels with a program, as json: classes, the model's configuration, the input."""
    content = {
        "format": f"retinanet_ext.export.{format}",
        "retinanet_ext": retinanet_ext.__version__,
        "torch": str(torch.__version__),
        "class_names": list(class_names),
        "model_config": model_config,
        "input": {
            "size": None if options.size is None else list(options.size),
            "size_divisible": SIZE_DIVISIBLE,
            "batch_size": options.batch_size,
            "device": str(options.device),
        },
    }
    return json.dumps(content, indent=2)
