"""The feature pyramid (Lin et al., 2017, arXiv 1612.03144) with RetinaNet's P3 to P7, as torchvision's.

The RetinaNet paper makes P6 from C5, and so do torchvision's ``retinanet_resnet50_fpn_v2``, detectron2 and mmdet;
torchvision's ``retinanet_resnet50_fpn`` makes it from P5, which is the default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def _init_conv(conv: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)


P6_SOURCES = ("p5", "c5")


class P6P7(nn.Module):
    """The two coarse levels: P6 = 3x3 stride 2 of P5 or C5, P7 = 3x3 stride 2 of ReLU(P6) (mmdet: of P6)."""

    def __init__(self, in_channels: int, channels: int, relu: bool = True):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.relu = relu
        _init_conv(self.p6)
        _init_conv(self.p7)

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        p6 = self.p6(source)
        return p6, self.p7(F.relu(p6) if self.relu else p6)


class FeaturePyramid(nn.Module):
    """1x1 laterals, nearest top-down pathway, 3x3 outputs, and P6, P7 on top.

    Args:
        in_channels: channels of C3, C4 and C5.
        channels: channels of every output level.
        p6_from: "p5" or "c5".
        p7_relu: whether P7 is made from ReLU(P6), or from P6 itself.

    Raises:
        ValueError: another ``p6_from``.
    """

    _version = 2  # of the state dict: 2 names a lateral "inner_blocks.0.0", older files "inner_blocks.0"

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, p6_from: str = "p5", p7_relu: bool = True):
        super().__init__()
        if p6_from not in P6_SOURCES:
            raise ValueError(f"p6_from: expected one of {P6_SOURCES}, got {p6_from!r}")
        # Sequentials of one convolution: torchvision's names end in ".0"
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in in_channels
        )
        for block in (*self.inner_blocks, *self.layer_blocks):
            _init_conv(block[0])
        self.p6_from = p6_from
        self.extra_blocks = P6P7(channels if p6_from == "p5" else in_channels[-1], channels, p7_relu)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C3, C4, C5, ``[B, C_l, H_l, W_l]``, to P3, ..., P7, ``[B, channels, H_l, W_l]``, finest first."""
        laterals = [lateral(feature) for lateral, feature in zip(self.inner_blocks, features, strict=True)]
        top_down = laterals[-1]
        merged = [top_down]
        for lateral in reversed(laterals[:-1]):
            top_down = lateral + F.interpolate(top_down, size=lateral.shape[-2:], mode="nearest")
            merged.insert(0, top_down)
        outputs = [output(level) for output, level in zip(self.layer_blocks, merged, strict=True)]
        return [*outputs, *self.extra_blocks(outputs[-1] if self.p6_from == "p5" else features[-1])]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: dict, *args: Any) -> None:
        for blocks in ("inner_blocks", "layer_blocks"):
            for level in range(len(self.inner_blocks)):
                for name in ("weight", "bias"):
                    old = f"{prefix}{blocks}.{level}.{name}"
                    if old in state_dict:
                        state_dict[f"{prefix}{blocks}.{level}.0.{name}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


class BackboneWithFPN(nn.Module):
    """A backbone and the feature pyramid on top of it.

    Args:
        body: returns C3, C4, C5 and has their channels as ``out_channels``.
        channels: channels of every output level.
        p6_from, p7_relu: see `FeaturePyramid`.

    Attributes:
        out_channels: channels of every output level.
    """

    def __init__(self, body: nn.Module, channels: int = 256, *, p6_from: str = "p5", p7_relu: bool = True):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramid(body.out_channels, channels, p6_from=p6_from, p7_relu=p7_relu)
        self.out_channels = channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` to P3, ..., P7, ``[B, out_channels, H_l, W_l]``, finest first."""
        return self.fpn(self.body(images))
