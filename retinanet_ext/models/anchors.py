"""Anchors as torchvision lays them out, with its roundings, so that weights and losses carry over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_SIZES = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
DEFAULT_ASPECT_RATIOS = (0.5, 1.0, 2.0)

_CACHED_GRIDS = 16  # training at several scales meets few shapes again and again; each takes 3 MB at 800 x 1333


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """The anchors of one cell, centred at the origin and rounded to whole pixels.

    Args:
        sizes: side of the square of each anchor's area, in pixels of the network's input.
        aspect_ratios: height / width of each anchor.

    Returns:
        float32 ``[len(aspect_ratios) * len(sizes), 4]``, ratio outer, size inner.
    """
    heights_over_side = torch.tensor(aspect_ratios, dtype=torch.float32, device="cpu").sqrt()
    sides = torch.tensor(sizes, dtype=torch.float32, device="cpu")
    widths = ((1 / heights_over_side)[:, None] * sides).flatten()
    heights = (heights_over_side[:, None] * sides).flatten()
    return (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round()


class AnchorGenerator(nn.Module):
    """Anchors of all levels of a feature pyramid.

    The anchors of cell (row i, column j) of a level are centred at ``(j * stride_x, i * stride_y)``, and a
    stride is the input's side divided by the grid's, rounded down. The order is level, row, column, ratio,
    size.

    Args:
        sizes: for each level, finest first, the anchor sizes in pixels of the network's input.
        aspect_ratios: height / width, the same at every level.

    Raises:
        ValueError: ``sizes`` or ``aspect_ratios`` are empty or not positive, or levels differ in how many
            sizes they have (one head serves them all).
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]] = DEFAULT_SIZES,
        aspect_ratios: Sequence[float] = DEFAULT_ASPECT_RATIOS,
    ):
        super().__init__()
        sizes = tuple(tuple(level) if isinstance(level, Sequence) else (level,) for level in sizes)
        aspect_ratios = tuple(aspect_ratios)
        if not sizes or not all(level and all(size > 0 for size in level) for level in sizes):
            raise ValueError(f"anchor_sizes: expected positive sizes for each level, got {sizes}")
        if len({len(level) for level in sizes}) != 1:
            raise ValueError(f"anchor_sizes: expected as many sizes at each level, got {sizes}")
        if not aspect_ratios or not all(ratio > 0 for ratio in aspect_ratios):
            raise ValueError(f"aspect_ratios: expected positive numbers, got {aspect_ratios}")
        self.sizes = sizes
        self.aspect_ratios = aspect_ratios
        self._cache: OrderedDict[tuple, Tensor] = OrderedDict()

    @property
    def num_anchors(self) -> int:
        """Anchors a cell, ``A``."""
        return len(self.sizes[0]) * len(self.aspect_ratios)

    def forward(
        self,
        image_size: tuple[int, int],
        grid_sizes: Sequence[tuple[int, int]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The anchors of one image (all images of a batch have the same).

        Args:
            image_size: height and width of the network's input.
            grid_sizes: height and width of each level's features, finest first.
            device: where the anchors are wanted.
            dtype: their type; a half would not hold whole pixels beyond 2048 (bfloat16: 256).

        Returns:
            ``[N, 4]`` of ``dtype``. Not to be written to: the same tensor is returned for the same arguments.

        Raises:
            ValueError: the features have another number of levels than the anchor sizes.
        """
        if len(grid_sizes) != len(self.sizes):
            raise ValueError(
                f"anchor_sizes: expected sizes for each of the {len(grid_sizes)} levels of features, "
                f"got sizes for {len(self.sizes)}"
            )
        grids = tuple((int(height), int(width)) for height, width in grid_sizes)
        strides = tuple((image_size[0] // height, image_size[1] // width) for height, width in grids)
        key = (grids, strides, torch.device(device), dtype)
        if key not in self._cache:
            # anchors made in evaluation serve training too, where inference tensors cannot be saved
            with torch.inference_mode(False):
                levels = zip(self.sizes, grids, strides, strict=True)
                anchors = [self._grid_anchors(*level) for level in levels]
                self._cache[key] = torch.cat(anchors).to(device, dtype)
            if len(self._cache) > _CACHED_GRIDS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _grid_anchors(self, sizes: Sequence[float], grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """float32 ``[H * W * A, 4]`` of one level."""
        centers_y = torch.arange(grid[0], device="cpu") * stride[0]
        centers_x = torch.arange(grid[1], device="cpu") * stride[1]
        y, x = torch.meshgrid(centers_y, centers_x, indexing="ij")
        centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
        return (centers + cell_anchors(sizes, self.aspect_ratios)).reshape(-1, 4)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, aspect_ratios={self.aspect_ratios}"
