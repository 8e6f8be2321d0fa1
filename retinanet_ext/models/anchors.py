"""Anchors as the implementations of RetinaNet lay them out: torchvision's by default, so that its weights and losses
carry over.

They agree in the areas and the ratios, and differ in what is rounded, where a cell's centre is, what its stride is, and
in which order the anchors of a cell come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROUNDINGS = ("pixels", "none", "strides")
ORDERS = ("ratio", "size")

DEFAULT_ASPECT_RATIOS = (0.5, 1.0, 2.0)
DEFAULT_SMALLEST_SIZES = (32, 64, 128, 256, 512)

_CACHED_GRIDS = 16  # training at several scales meets few shapes again and again; each takes 3 MB at 800 x 1333


def octave_sizes(smallest: Iterable[float], truncated: bool = True) -> tuple[tuple[float, ...], ...]:
    """Three anchor sizes of each level: s, s * 2^(1/3), s * 2^(2/3); torchvision's are truncated to whole pixels."""
    levels = [tuple(size * 2 ** (step / 3) for step in range(3)) for size in smallest]
    return tuple(tuple(int(size) for size in level) if truncated else level for level in levels)


DEFAULT_SIZES = octave_sizes(DEFAULT_SMALLEST_SIZES)


def cell_anchors(
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    *,
    rounding: str = "pixels",
    order: str = "ratio",
    stride: float | None = None,
) -> Tensor:
    """The anchors of one cell, centred at the origin.

    Args:
        sizes: side of the square of each anchor's area, in pixels of the network's input.
        aspect_ratios: height / width of each anchor.
        rounding, order: see `AnchorGenerator`.
        stride: of the level, for the rounding "strides".

    Returns:
        float32 ``[len(aspect_ratios) * len(sizes), 4]``; of the order "ratio": ratio outer, size inner.
    """
    # torchvision rounds to pixels what it computed in float32
    dtype = torch.float32 if rounding == "pixels" else torch.float64
    sides = torch.tensor(sizes, dtype=dtype, device="cpu")
    ratios = torch.tensor(aspect_ratios, dtype=dtype, device="cpu")[:, None]
    if rounding == "strides":
        widths = (stride / ratios.sqrt()).round()
        heights = (widths * ratios).round() * (sides / stride)
        widths = widths * (sides / stride)
    else:
        heights_over_side = ratios.sqrt()
        widths, heights = (1 / heights_over_side) * sides, heights_over_side * sides
    if order == "size":
        widths, heights = widths.T, heights.T
    widths, heights = widths.flatten(), heights.flatten()
    anchors = torch.stack((-widths, -heights, widths, heights), dim=1) / 2
    return anchors.round() if rounding == "pixels" else anchors.float()


def _can_be_kept(tensor: Tensor) -> bool:
    """Not what stands for a tensor while a program is exported, nor what a CUDA graph fills when it is replayed."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return type(tensor) is Tensor and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class AnchorGenerator(nn.Module):
    """Anchors of all levels of a feature pyramid.

    The anchors of cell (row i, column j) of a level are centred at ``((j + offset) * stride_x, (i + offset) *
    stride_y)``. The order is level, row, column, and of a cell ratio, size or size, ratio.

    Args:
        sizes: for each level, finest first, the anchor sizes in pixels of the network's input.
        aspect_ratios: height / width, the same at every level.
        strides: of each level, in pixels; None: the input's side divided by the grid's, rounded down, as torchvision
            has it (at 800 x 1344 pixels P7's are 114 and 122).
        rounding: "pixels": an anchor's corners to whole pixels around its cell's centre (torchvision). "none"
            (detectron2, mmdet). "strides": sides are those of an anchor of the area of one cell, rounded to whole
            pixels, times size / stride (Detectron).
        offset: of the centre, in strides. (Detectron's is 0.5: in its coordinates, which count a box's last pixel in,
            the centre of the first cell of stride 8 is at 3.5.)
        order: of the anchors of a cell: "ratio", ratio outer and size inner (torchvision, mmdet), or "size", the other
            way round (detectron2, Detectron).

    Raises:
        ValueError: ``sizes``, ``aspect_ratios`` or ``strides`` are empty or not positive, levels differ in how many
            sizes they have (one head serves them all), there is not a stride for each level, "strides" without strides,
            an unknown ``rounding`` or ``order``, an ``offset`` outside [0, 1).
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]] = DEFAULT_SIZES,
        aspect_ratios: Sequence[float] = DEFAULT_ASPECT_RATIOS,
        *,
        strides: Sequence[float] | None = None,
        rounding: str = "pixels",
        offset: float = 0.0,
        order: str = "ratio",
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
        for name, value, choices in (("anchor_rounding", rounding, ROUNDINGS), ("anchor_order", order, ORDERS)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
        if strides is not None and (len(strides) != len(sizes) or not all(stride > 0 for stride in strides)):
            raise ValueError(f"anchor_strides: expected a positive one for each of {len(sizes)} levels, got {strides}")
        if strides is None and rounding == "strides":
            raise ValueError('anchor_strides: expected one for each level, for the rounding "strides", got None')
        if not 0 <= offset < 1:
            raise ValueError(f"anchor_offset: expected a number in [0, 1), got {offset}")
        self.sizes = sizes
        self.aspect_ratios = aspect_ratios
        self.strides = None if strides is None else tuple(strides)
        self.rounding = rounding
        self.offset = offset
        self.order = order
        self._cache: OrderedDict[tuple, Tensor] = OrderedDict()
        self._cells: dict[torch.device, list[Tensor]] = {}

    @property
    def num_anchors(self) -> int:
        """Anchors a cell, ``A``."""
        return len(self.sizes[0]) * len(self.aspect_ratios)

    def cell_anchors(self) -> list[Tensor]:
        """float32 ``[A, 4]`` of each level: the anchors of a cell around its centre."""
        strides = self.strides or (None,) * len(self.sizes)
        return [
            cell_anchors(sizes, self.aspect_ratios, rounding=self.rounding, order=self.order, stride=stride)
            for sizes, stride in zip(self.sizes, strides, strict=True)
        ]

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
        if self.strides is None:
            strides = tuple((image_size[0] // height, image_size[1] // width) for height, width in grids)
        else:
            strides = tuple((stride, stride) for stride in self.strides)
        key = (grids, strides, torch.device(device), dtype)
        if key not in self._cache:
            # anchors made in evaluation serve training too, where inference tensors cannot be saved
            with torch.inference_mode(False):
                levels = zip(self._cells_on(torch.device(device)), grids, strides, strict=True)
                anchors = torch.cat([self._grid_anchors(*level) for level in levels]).to(dtype)
            if not _can_be_kept(anchors):
                return anchors
            self._cache[key] = anchors
            if len(self._cache) > _CACHED_GRIDS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _cells_on(self, device: torch.device) -> list[Tensor]:
        """What `_grid_anchors` starts from, where the anchors are wanted: images of a new size then copy nothing from
        the host, which would wait for the device."""
        if device in self._cells:
            return self._cells[device]
        cells = [cell.to(device) for cell in self.cell_anchors()]
        if _can_be_kept(cells[0]):
            self._cells[device] = cells
        return cells

    def _grid_anchors(self, cell: Tensor, grid: tuple[int, int], stride: tuple[float, float]) -> Tensor:
        """float32 ``[H * W * A, 4]`` of one level."""
        centers_y, centers_x = (
            (torch.arange(count, dtype=torch.float32, device=cell.device) + self.offset) * step
            for count, step in zip(grid, stride, strict=True)
        )
        y, x = torch.meshgrid(centers_y, centers_x, indexing="ij")
        centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
        return (centers + cell).reshape(-1, 4)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_cells": {}}

    def extra_repr(self) -> str:
        return (
            f"sizes={self.sizes}, aspect_ratios={self.aspect_ratios}, strides={self.strides}, "
            f"rounding={self.rounding!r}, offset={self.offset}, order={self.order!r}"
        )
