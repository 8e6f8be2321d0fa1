"""From images to the network's input and back: torchvision's ``GeneralizedRCNNTransform``, to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]  # height, width


class ImageBatch(NamedTuple):
    """Images of different sizes as one tensor.

    Attributes:
        tensor: ``[B, 3, H, W]``, zero beyond each image's own size, at the right and at the bottom.
        sizes: height and width of each resized image inside ``tensor``.
        original_sizes: height and width of each image as it came.
    """

    tensor: Tensor
    sizes: list[Size]
    original_sizes: list[Size]


def resize_ratios(size: Size, new_size: Size, boxes: Tensor) -> Tensor:
    """float32 ``[4]`` on the device of `boxes`: what their coordinates are multiplied by as an image of ``size`` is
    resized to ``new_size``.

    The ratios are float32 quotients, as torchvision's are. They are filled on the device: a tensor made of the host's
    numbers would make the host wait for its copy.
    """
    y, x = (boxes.new_full((), new / old, dtype=torch.float32) for new, old in zip(new_size, size, strict=True))
    return torch.stack((x, y, x, y))


def resize_boxes(boxes: Tensor, size: Size, new_size: Size) -> Tensor:
    """Boxes ``[M, 4]`` in pixels of an image of ``size``, as the image is resized to ``new_size``."""
    return boxes * resize_ratios(size, new_size, boxes)


class ImageTransform(nn.Module):
    """Normalises, resizes and pads images.

    Args:
        min_size: the shorter side after resizing; of several, training draws one for each image and
            evaluation takes the last.
        max_size: the longer side is at most this, and then the shorter side may be less than ``min_size``.
        image_mean, image_std: of each channel, for images in 0..1.
        size_divisible: sides of the batch are rounded up to a multiple of this.

    Raises:
        ValueError: a size that is not positive, or other than three means or standard deviations.
    """

    def __init__(
        self,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        size_divisible: int = 32,
    ):
        super().__init__()
        self.min_size = tuple(min_size) if isinstance(min_size, Sequence) else (min_size,)
        self.max_size = max_size
        self.image_mean = tuple(IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = tuple(IMAGENET_STD if image_std is None else image_std)
        self.size_divisible = size_divisible
        if not self.min_size or min(self.min_size) <= 0:
            raise ValueError(f"min_size: expected a positive number of pixels, or several, got {min_size}")
        if max_size <= 0:
            raise ValueError(f"max_size: expected a positive number of pixels, got {max_size}")
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if len(values) != 3:
                raise ValueError(f"{name}: expected a value for each of 3 channels, got {values}")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std: expected positive values, got {self.image_std}")

    def forward(self, images: Sequence[Tensor]) -> ImageBatch:
        """Floating images ``[3, H_b, W_b]`` in 0..1, of any sizes, to one batch."""
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        images = [self._resize(self._normalize(image)) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (
            math.ceil(max(sides) / self.size_divisible) * self.size_divisible for sides in zip(*sizes, strict=True)
        )
        batch = images[0].new_zeros((len(images), 3, height, width))
        for index, image in enumerate(images):
            batch[index, :, : image.shape[1], : image.shape[2]] = image
        return ImageBatch(batch, sizes, original_sizes)

    def _normalize(self, image: Tensor) -> Tensor:
        # Filled on the device: a tensor made of the host's numbers would make the host wait for its copy.
        mean, std = (
            torch.stack([image.new_full((), value) for value in values]) for values in (self.image_mean, self.image_std)
        )
        return (image - mean[:, None, None]) / std[:, None, None]

    def _resize(self, image: Tensor) -> Tensor:
        min_size = self.min_size[-1]
        if self.training and len(self.min_size) > 1:
            min_size = self.min_size[int(torch.randint(len(self.min_size), ()))]
        height, width = image.shape[-2:]
        scale = min(min_size / min(height, width), self.max_size / max(height, width))
        size = (math.floor(height * scale), math.floor(width * scale))
        if min(size) < 1:
            raise ValueError(
                f"images: expected sides that stay at least one pixel when the longer one is at most "
                f"{self.max_size}, got an image of {height} x {width}"
            )
        # By its size, not by `scale`, of which torch 2.15 does not compile a second size of images.
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]

    def extra_repr(self) -> str:
        return (
            f"min_size={self.min_size}, max_size={self.max_size}, image_mean={self.image_mean}, "
            f"image_std={self.image_std}, size_divisible={self.size_divisible}"
        )
