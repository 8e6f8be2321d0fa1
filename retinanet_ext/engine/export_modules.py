"""What is exported of a RetinaNet: modules of one batch tensor, that torch.export can follow.

The model itself takes images of any sizes, resizes them and returns lists as long as what was found. These take a batch
that has the network's size already, and return tensors of fixed shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..models import RetinaNet

SIZE_DIVISIBLE = 32

# From here on every level has at least 2 x 2 cells (P7 has one for each 128 pixels). A level of one cell would have
# torch.export take its side for a constant, and refuse all other sizes.
LEAST_DYNAMIC_SIDE = 160


class _FixedAnchors(nn.Module):
    """The anchors of one size of image, as a constant."""

    def __init__(self, model: RetinaNet, size: tuple[int, int]):
        super().__init__()
        with torch.no_grad():
            levels = model.backbone(torch.zeros(1, 3, *size))
        grids = [tuple(level.shape[-2:]) for level in levels]
        self.register_buffer("anchors", model.anchor_generator(size, grids).clone())

    def forward(self, images: Tensor, levels: list[Tensor]) -> Tensor:
        return self.anchors


class _GridAnchors(nn.Module):
    """The anchors as `AnchorGenerator` makes them, of whatever size the images have when the program runs."""

    def __init__(self, model: RetinaNet):
        super().__init__()
        generator = model.anchor_generator
        self.register_buffer("cells", torch.stack(generator.cell_anchors()))  # [L, A, 4]
        self.strides = generator.strides or (None,) * len(self.cells)
        self.offset = generator.offset

    def forward(self, images: Tensor, levels: list[Tensor]) -> Tensor:
        anchors = []
        for cell, stride, level in zip(self.cells, self.strides, levels, strict=True):
            height, width = level.shape[-2:]
            y = self._centers(height, images.shape[-2] // height if stride is None else stride, images.device)
            x = self._centers(width, images.shape[-1] // width if stride is None else stride, images.device)
            y, x = torch.meshgrid(y, x, indexing="ij")
            centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            anchors.append((centers + cell).reshape(-1, 4))
        return torch.cat(anchors)

    def _centers(self, count: int, stride: float, device: torch.device) -> Tensor:
        cells = torch.arange(count, device=device)
        return (cells + self.offset if self.offset else cells) * stride


class ExportedNetwork(nn.Module):
    """Images to head outputs and anchors; shares the weights of `model`.

    Args:
        model: a RetinaNet in evaluation mode, on the CPU.
        size: height and width of the images; None to take any.
    """

    output_names: tuple[str, ...]

    def __init__(self, model: RetinaNet, size: tuple[int, int] | None):
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head
        self.checks_sides = size is None  # inside the program, where nothing else does
        self.make_anchors = _GridAnchors(model) if size is None else _FixedAnchors(model, size)
        transform = model.transform
        self.register_buffer("mean", torch.tensor(transform.image_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(transform.image_std).view(1, 3, 1, 1))

    def levels(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Class logits ``[B, A * K, H_l, W_l]``, deltas ``[B, 4 * A, H_l, W_l]``, and anchors ``[N, 4]``."""
        if self.checks_sides:
            images = _in_squares(images)
        features = self.backbone((images - self.mean) / self.std)
        return *self.head(features), self.make_anchors(images, features)


class ExportedDetector(ExportedNetwork):
    """Images ``[B, 3, H, W]``, float32 in 0..1, to boxes ``[B, D, 4]`` in their pixels, scores ``[B, D]``, labels int64
    ``[B, D]`` and counts int32 ``[B]``; past an image's count 0, 0 and -1."""

    output_names = ("boxes", "scores", "labels", "counts")

    def __init__(self, model: RetinaNet, size: tuple[int, int] | None):
        super().__init__(model, size)
        self.options = model.detect_options

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cls_logits, box_deltas, anchors = self.levels(images)
        sides = [images.new_full(images.shape[:1], side) for side in images.shape[-2:]]
        found = ops.detect(cls_logits, box_deltas, anchors, torch.stack(sides, dim=1), **self.options)
        return found.boxes, found.scores, found.labels, found.counts


class ExportedHeads(ExportedNetwork):
    """Images ``[B, 3, H, W]``, float32 in 0..1, to each level's class logits ``[B, n_l, K]``, each level's deltas
    ``[B, n_l, 4]``, and anchors ``[N, 4]``, rows in the order of the anchors, ``N`` the sum of all ``n_l``."""

    def __init__(self, model: RetinaNet, size: tuple[int, int] | None):
        super().__init__(model, size)
        self.num_classes = model.num_classes
        levels = [f"p{3 + level}" for level in range(len(model.anchor_generator.sizes))]
        self.output_names = (
            *(f"cls_logits_{level}" for level in levels),
            *(f"box_deltas_{level}" for level in levels),
            "anchors",
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        cls_logits, box_deltas, anchors = self.levels(images)
        logits = [_rows(level, self.num_classes) for level in cls_logits]
        deltas = [_rows(level, 4) for level in box_deltas]
        return *logits, *deltas, anchors


def _in_squares(images: Tensor) -> Tensor:
    """The images as they are, or an error where a side is no multiple of 32, which not every torch notices itself."""
    batch, channels, height, width = images.shape
    rows, columns = height // SIZE_DIVISIBLE, width // SIZE_DIVISIBLE
    return images.view(batch, channels, rows, SIZE_DIVISIBLE, columns, SIZE_DIVISIBLE).view(images.shape)


def _rows(level: Tensor, channels: int) -> Tensor:
    """``[B, A * C, H, W]`` to ``[B, H * W * A, C]``."""
    batch, of_cell, height, width = level.shape
    anchors = of_cell // channels
    return level.view(batch, anchors, channels, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3)


def trace(
    module: ExportedNetwork, size: tuple[int, int] | None, batch_size: int | None, device: torch.device
) -> torch.export.ExportedProgram:
    """torch.export of `module`; a `size` or a `batch_size` of None stays open."""
    dimensions: dict[int, object] = {}
    if batch_size is None:
        dimensions[0] = torch.export.Dim("batch", min=1, max=4096)
    if size is None:
        least = LEAST_DYNAMIC_SIDE // SIZE_DIVISIBLE
        for axis, name in ((2, "height"), (3, "width")):
            cells = torch.export.Dim(f"{name}_{SIZE_DIVISIBLE}", min=least, max=512)
            dimensions[axis] = SIZE_DIVISIBLE * cells
    # Of open sides the example has other numbers than 0, 1 and each other, which torch.export would take for constants.
    height, width = (224, 288) if size is None else size
    example = torch.zeros(batch_size or 2, 3, height, width, device=device)
    with torch.no_grad():
        return torch.export.export(
            module.to(device).eval(), (example,), dynamic_shapes={"images": dimensions}, strict=False
        )
