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

HEAD_NORMS = ("none", "group")
_GROUPS = 32


def _init_conv(conv: nn.Conv2d, bias: float = 0.0) -> None:
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)


def _subnet_block(channels: int, norm: str) -> nn.Sequential:
    relu = nn.ReLU(inplace=True)
    if norm == "none":
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), relu)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(_GROUPS, channels), relu)


class _Subnet(nn.Module):
    """Four 3x3 convolutions with ReLU, GroupNorm before it where wanted (torchvision's v2); the names and the files of
    earlier versions are torchvision's."""

    _version = 2  # of the state dict: 2 names a convolution "conv.1.0", older files "conv.2"

    def __init__(self, in_channels: int, norm: str = "none"):
        super().__init__()
        if norm not in HEAD_NORMS:
            raise ValueError(f"head_norm: expected one of {HEAD_NORMS}, got {norm!r}")
        self.conv = nn.Sequential(*(_subnet_block(in_channels, norm) for _ in range(4)))
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
        norm: "none", or "group" for GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        prior_probability: float = 0.01,
        norm: str = "none",
    ):
        super().__init__(in_channels, norm)
        self.cls_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        _init_conv(self.cls_logits, bias=-math.log((1 - prior_probability) / prior_probability))

    def forward(self, features: Tensor) -> Tensor:
        return self.cls_logits(self.conv(features))


class RegressionHead(_Subnet):
    """Box deltas of every anchor: features ``[B, C, H, W]`` to ``[B, 4 * A, H, W]``, channel ``4 * a + c``.

    Args:
        in_channels: channels of the features.
        num_anchors: ``A``, anchors a cell.
        norm: "none", or "group" for GroupNorm.
    """

    def __init__(self, in_channels: int, num_anchors: int, norm: str = "none"):
        super().__init__(in_channels, norm)
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
        norm: of both subnets: "none", or "group" for GroupNorm.

    Raises:
        ValueError: another ``norm``.
    """

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int, norm: str = "none"):
        super().__init__()
        self.classification_head = ClassificationHead(in_channels, num_anchors, num_classes, norm=norm)
        self.regression_head = RegressionHead(in_channels, num_anchors, norm)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels ``[B, C, H, W]`` to class logits ``[B, A * K, H, W]`` and deltas ``[B, 4 * A, H, W]``."""
        cls_logits = [self.classification_head(level) for level in features]
        box_deltas = [self.regression_head(level) for level in features]
        return cls_logits, box_deltas
