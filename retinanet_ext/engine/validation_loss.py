"""The losses of a model in evaluation mode, from the same pass through the network that gives its detections."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from retinanet_ext.models import RetinaNet

NAMES = ("classification", "bbox_regression", "total")


def detect_with_losses(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The detections of a batch, and its losses as training would have them.

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
    """The mean losses of all images, from those of batches that may differ in size."""

    def __init__(self):
        self.images = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor], images: int) -> None:
        """`losses`: means over the `images` of a batch. Nothing waits for the device."""
        self.images += images
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double() * images

    def result(self) -> dict[str, float]:
        """Classification, bbox_regression and their total; empty where no batch had losses."""
        if not self.sums:
            return {}
        means = {name: float(value) / self.images for name, value in self.sums.items()}
        return {**means, "total": math.fsum(means.values())}
