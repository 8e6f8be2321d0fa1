"""Random changes to a training image and its boxes. Resizing and normalising are the model's.

Every random choice comes from a generator made of (seed, epoch, index), so a sample is the same whatever the
number of loader workers, the order of the samples, or whether the run was interrupted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Target = dict[str, Any]
Transform = Callable[[Tensor, Target, np.random.Generator], tuple[Tensor, Target]]


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

    def __init__(self, p: float = 0.5):
        self.p = _probability(p)

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        return horizontal_flip(image, target) if rng.random() < self.p else (image, target)


class RandomVerticalFlip:
    """`vertical_flip` with probability `p`."""

    def __init__(self, p: float = 0.5):
        self.p = _probability(p)

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        return vertical_flip(image, target) if rng.random() < self.p else (image, target)


class Compose:
    """Several transforms in order."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = list(transforms)

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target


def _probability(p: float) -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability in [0, 1], got {p!r}")
    return float(p)
