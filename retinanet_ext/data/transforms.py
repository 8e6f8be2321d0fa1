"""Random changes to a training image and its boxes. Resizing to the network's input and normalising are the model's.

Every random choice comes from a generator made of (seed, epoch, index), so a sample is the same whatever the
number of loader workers, the order of the samples, or whether the run was interrupted.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Target = dict[str, Any]
# Of a float32 image in 0..1; of one of uint8 too where the transform says so by an attribute `takes_bytes`, True.
Transform = Callable[[Tensor, Target, np.random.Generator], tuple[Tensor, Target]]


def takes_bytes(transform: Transform) -> bool:
    return getattr(transform, "takes_bytes", False)


# First words of the generators' seeds: they keep samples and orders from sharing random numbers.
_SAMPLE, _ORDER = 1, 2


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample in one epoch; the three are integers >= 0."""
    return np.random.default_rng([_SAMPLE, seed, epoch, index])


def order_rng(seed: int, epoch: int) -> np.random.Generator:
    """The generator of one epoch's order of samples."""
    return np.random.default_rng([_ORDER, seed, epoch])


def horizontal_flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror left and right. image [..., W]; target["boxes"] float [M, 4] absolute pixels."""
    width = image.shape[-1]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - target["boxes"][:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes}


def vertical_flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror top and bottom. image [..., H, W]; target["boxes"] float [M, 4] absolute pixels."""
    height = image.shape[-2]
    boxes = target["boxes"].clone()
    boxes[:, [1, 3]] = height - target["boxes"][:, [3, 1]]
    return image.flip(-2), {**target, "boxes": boxes}


class RandomHorizontalFlip:
    """`horizontal_flip` with probability `p`."""

    takes_bytes = True

    def __init__(self, p: float = 0.5):
        self.p = _probability(p)

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        return horizontal_flip(image, target) if rng.random() < self.p else (image, target)


class RandomVerticalFlip:
    """`vertical_flip` with probability `p`."""

    takes_bytes = True

    def __init__(self, p: float = 0.5):
        self.p = _probability(p)

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        return vertical_flip(image, target) if rng.random() < self.p else (image, target)


class ScaleJitter:
    """Large-scale jitter: the content at a random scale, cut or padded back to the image's shape.

    A scale above 1 zooms in, to a window of the image at a random place; one below 1 zooms out, and the image lies
    somewhere on a larger canvas of `fill`. The model resizes the result as it would have resized the image, so an
    object of s pixels comes to the network with scale * s. Windows are cut, never enlarged here, and a canvas is shrunk
    only where its longer side would exceed `limit`, which the model would do anyway. Boxes follow, are clipped, and are
    dropped where a side of less than `LEAST_SIDE` pixels is left.

    `low`, `high`: the scale is uniform between them, as torchvision's `ScaleJitter` draws it (0.1 to 2 there).
    """

    LEAST_SIDE = 1.0

    def __init__(
        self, low: float = 0.1, high: float = 2.0, limit: int = 1333, fill: Sequence[float] = (0.485, 0.456, 0.406)
    ):
        if not 0 < low <= high < math.inf:
            raise ValueError(f"low, high: expected finite scales with 0 < low <= high, got {low!r} and {high!r}")
        if limit < 1:
            raise ValueError(f"limit: expected a number of pixels >= 1, got {limit!r}")
        self.low, self.high, self.limit = low, high, limit
        self.fill = torch.tensor(fill)[:, None, None]

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        scale = self.low + (self.high - self.low) * rng.random()
        # Where the window lies in the image, or the image on the canvas: 0 is the left or upper end, 1 the other.
        place = rng.random(2)
        return (_zoom_in if scale >= 1 else self._zoom_out)(image, target, scale, place)

    def _zoom_out(self, image: Tensor, target: Target, scale: float, place: np.ndarray) -> tuple[Tensor, Target]:
        height, width = image.shape[-2:]
        shrink = min(1.0, self.limit / (max(height, width) / scale))
        if shrink < 1.0:
            size = tuple(max(1, round(side * shrink)) for side in (height, width))
            image = functional.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        canvas_size = [
            max(side, round(old / scale * shrink)) for side, old in zip(image.shape[-2:], (height, width), strict=True)
        ]
        top, left = (int(p * (out - side)) for p, out, side in zip(place, canvas_size, image.shape[-2:], strict=True))
        canvas = self.fill.to(image.dtype).expand(-1, *canvas_size).clone()
        canvas[:, top : top + image.shape[-2], left : left + image.shape[-1]] = image
        ratio_y, ratio_x = image.shape[-2] / height, image.shape[-1] / width
        boxes = target["boxes"] * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y])
        return canvas, _moved(target, boxes, left, top, canvas_size)


def _zoom_in(image: Tensor, target: Target, scale: float, place: np.ndarray) -> tuple[Tensor, Target]:
    height, width = image.shape[-2:]
    size = [max(1, round(side / scale)) for side in (height, width)]
    top, left = (int(p * (side - part + 1)) for p, side, part in zip(place, (height, width), size, strict=True))
    window = image[:, top : top + size[0], left : left + size[1]].contiguous()
    return window, _moved(target, target["boxes"], -left, -top, size)


def _moved(target: Target, boxes: Tensor, right: int, down: int, size: Sequence[int]) -> Target:
    """`target` with `boxes` moved and clipped to an image of `size` (height, width), without those that are gone."""
    limit = torch.tensor([size[1], size[0], size[1], size[0]], dtype=boxes.dtype)
    boxes = (boxes + torch.tensor([right, down, right, down], dtype=boxes.dtype)).clamp(min=0).minimum(limit)
    kept = (boxes[:, 2:] - boxes[:, :2] >= ScaleJitter.LEAST_SIDE).all(dim=1)
    rows = {name: target[name][kept] for name in ("labels", "ignore") if name in target}
    return {**target, **rows, "boxes": boxes[kept]}


class Compose:
    """Several transforms in order."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = list(transforms)

    @property
    def takes_bytes(self) -> bool:
        return all(map(takes_bytes, self.transforms))

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target


def _probability(p: float) -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability in [0, 1], got {p!r}")
    return float(p)
