"""The losses of a model in evaluation mode, from the same pass through the network that gives its detections."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retinanet_ext.models import LossNormalizer, RetinaNet

NAMES = ("classification", "bbox_regression", "total")


def detect_with_losses(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The detections of a batch, and its losses as training would have them; `MeanLosses` puts batches together.

    See `RetinaNet.detections_and_losses`. A model that is no RetinaNet of this library has no losses here, only
    detections.

    Args:
        images: ``[3, H, W]`` each, on the model's device.
        targets: ``boxes``, ``labels`` and ``ignore`` of each image, on any device.
    """
    if not isinstance(model, RetinaNet):
        return model(images), {}
    wanted = ("boxes", "labels", "ignore")
    device = images[0].device
    moved = [{name: target[name].to(device) for name in wanted if name in target} for target in targets]
    return model.detections_and_losses(images, moved)


class MeanLosses:
    """The losses of all images as of one batch, whatever batches they come in.

    By "per_image" that is the mean over the images; by a normalizer of the whole batch the sum over the images by what
    is counted in all of them, also by "ema", whose running mean is of batches as large as training's.
    """

    def __init__(self):
        self.count: float | Tensor = 0
        self.sums: dict[str, Tensor | float] = {}

    def add(self, losses: Mapping[str, Tensor], images: int, model: nn.Module | None = None) -> None:
        """`losses` of a batch of so many images, by `model` in evaluation mode. Nothing waits for the device."""
        divisor = count = images
        normalizer = getattr(model, "loss_normalizer", None)
        if losses and isinstance(normalizer, LossNormalizer) and normalizer.of_whole_batch:
            foreground = model.last_num_foreground
            divisor, count = normalizer(foreground, torch.float64), normalizer.count(foreground)
        self.count = self.count + count
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double() * divisor

    def join(self, other: "MeanLosses") -> None:
        """Add another process's."""
        self.count += other.count
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def on_host(self) -> "MeanLosses":
        """The same in Python's numbers."""
        self.count = int(self.count)
        self.sums = {name: float(value) for name, value in self.sums.items()}
        return self

    def result(self) -> dict[str, float]:
        """Classification, bbox_regression and their total; empty where no batch had losses."""
        if not self.sums:
            return {}
        count = max(1, int(self.count))
        means = {name: float(value) / count for name, value in self.sums.items()}
        return {**means, "total": math.fsum(means.values())}
