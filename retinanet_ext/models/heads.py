"""The class subnet and the box subnet (Lin et al., 2017, arXiv 1708.02002, section 4).

Each is four 3x3 convolutions with ReLU and a 3x3 output convolution, with weights shared by all levels but
not by the two subnets. The output stays as the convolution leaves it: the operators of `retinanet_ext.ops`
read that layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def _init_conv(conv: nn.Conv2d, bias: float = 0.0) -> None:
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)


class _Subnet(nn.Module):
    """Four 3x3 convolutions with ReLU; the names and the files of earlier versions are torchvision's."""

    _version = 2  # of the state dict: 2 names a convolution "conv.1.0", older files "conv.2"

    def __init__(self, in_channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(in_channels, in_channels, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(4))
        )
        for block in self.conv:
            _init_conv(block[0])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: dict, *args: Any) -> None:
        for layer in range(len(self.conv)):
            for name in ("weight", "bias"):
                old = f"{prefix}conv.{2 * layer}.{name}"
                if old in state_dict:
                    state_dict[f"{prefix}conv.{layer}.0.{name}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


class ClassificationHead(_Subnet):
    """Class logits of every anchor: features ``[B, C, H, W]`` to ``[B, A * K, H, W]``, channel ``a * K + k``.

    Args:
        in_channels: channels of the features.
        num_anchors: ``A``, anchors a cell.
        num_classes: ``K``.
        prior_probability: what every class of every anchor is predicted at before training, so that the many
            background anchors do not drown the loss in the first steps (section 3.3 of the paper).
    """

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int, prior_probability: float = 0.01):
        super().__init__(in_channels)
        self.cls_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        _init_conv(self.cls_logits, bias=-math.log((1 - prior_probability) / prior_probability))

    def forward(self, features: Tensor) -> Tensor:
        return self.cls_logits(self.conv(features))


class RegressionHead(_Subnet):
    """Box deltas of every anchor: features ``[B, C, H, W]`` to ``[B, 4 * A, H, W]``, channel ``4 * a + c``.

    Args:
        in_channels: channels of the features.
        num_anchors: ``A``, anchors a cell.
    """

    def __init__(self, in_channels: int, num_anchors: int):
        super().__init__(in_channels)
        self.bbox_reg = nn.Conv2d(in_channels, 4 * num_anchors, 3, padding=1)
        _init_conv(self.bbox_reg)

    def forward(self, features: Tensor) -> Tensor:
        return self.bbox_reg(self.conv(features))


class RetinaNetHead(nn.Module):
    """Both subnets.

    Args:
        in_channels: channels of the features.
        num_anchors: ``A``, anchors a cell.
        num_classes: ``K``.
    """

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int):
        super().__init__()
        self.classification_head = ClassificationHead(in_channels, num_anchors, num_classes)
        self.regression_head = RegressionHead(in_channels, num_anchors)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels ``[B, C, H, W]`` to class logits ``[B, A * K, H, W]`` and deltas ``[B, 4 * A, H, W]``."""
        cls_logits = [self.classification_head(level) for level in features]
        box_deltas = [self.regression_head(level) for level in features]
        return cls_logits, box_deltas
