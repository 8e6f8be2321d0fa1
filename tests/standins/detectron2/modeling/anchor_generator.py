import math

import torch
from torch import nn

from ..structures import Boxes


class DefaultAnchorGenerator(nn.Module):
    """`Boxes` [H * W * A] of each level, in the order row, column, size, ratio."""

    def __init__(self, *, sizes, aspect_ratios, strides, offset=0.5):
        super().__init__()
        self.strides, self.offset = strides, offset
        self.cells = []
        for level_sizes in sizes:
            halves = [
                (side / math.sqrt(r) / 2, side * math.sqrt(r) / 2) for side in level_sizes for r in aspect_ratios[0]
            ]
            self.cells.append(torch.tensor([[-x, -y, x, y] for x, y in halves]))

    def forward(self, features):
        anchors = []
        for level, stride, cell in zip(features, self.strides, self.cells, strict=True):
            rows, columns = (torch.arange(count) * stride + self.offset * stride for count in level.shape[-2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            anchors.append(Boxes((centres + cell).reshape(-1, 4).to(level.device)))
        return anchors
