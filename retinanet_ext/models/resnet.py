"""ResNet (He et al., 2015, arXiv 1512.03385) as a backbone: images in, C3, C4 and C5 out.

The bottleneck strides in its 3x3 convolution ("v1.5"), as torchvision's does, or in its first 1x1 convolution, as
the paper's and the MSRA weights of detectron2 do. Modules are named as torchvision names them, so that state dicts
go both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation that is fixed: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    All four are buffers: nothing is trained and nothing is updated. Keys and arithmetic are those of
    ``torchvision.ops.FrozenBatchNorm2d``; a checkpoint of `torch.nn.BatchNorm2d` loads too.

    Args:
        num_features: channels of the input ``[B, C, H, W]``.
        eps: added to the variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # trainable BatchNorm has it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


NORMS: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "frozen_batch": FrozenBatchNorm2d,
    "group": _group_norm,
}


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class BasicBlock(nn.Module):
    """3x3 (strides), 3x3, and a shortcut. ``[B, C, H, W]`` to ``[B, planes, H/s, W/s]``."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        shortcut: nn.Module | None,
        norm: Norm,
        stride_in_1x1: bool = False,  # it has none
    ):
        super().__init__()
        self.conv1 = _conv(in_channels, planes, 3, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm(planes)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, and a shortcut; the 3x3 strides, or the first 1x1. ``[B, C, H, W]`` to
    ``[B, 4 * planes, H/s, W/s]``."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        shortcut: nn.Module | None,
        norm: Norm,
        stride_in_1x1: bool = False,
    ):
        super().__init__()
        self.conv1 = _conv(in_channels, planes, 1, stride if stride_in_1x1 else 1)
        self.bn1 = norm(planes)
        self.conv2 = _conv(planes, planes, 3, 1 if stride_in_1x1 else stride)
        self.bn2 = norm(planes)
        self.conv3 = _conv(planes, planes * self.expansion, 1)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + shortcut)


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: how many blocks each of the four stages has.
        norm: makes a normalisation layer for a number of channels.
        stride_in_1x1: bottlenecks stride in their first 1x1 convolution.

    Attributes:
        out_channels: channels of C3, C4 and C5.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        norm: Norm = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        widths = [64, *(planes * block.expansion for planes in (64, 128, 256, 512))]
        self.layer1 = _stage(block, widths[0], 64, depths[0], 1, norm, stride_in_1x1)
        self.layer2 = _stage(block, widths[1], 128, depths[1], 2, norm, stride_in_1x1)
        self.layer3 = _stage(block, widths[2], 256, depths[2], 2, norm, stride_in_1x1)
        self.layer4 = _stage(block, widths[3], 512, depths[3], 2, norm, stride_in_1x1)
        self.out_channels = tuple(widths[2:])

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, 3, H, W]`` to C3, C4, C5, of stride 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return c3, c4, c5


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    planes: int,
    depth: int,
    stride: int,
    norm: Norm,
    stride_in_1x1: bool,
) -> nn.Sequential:
    """``depth`` blocks, of which the first strides and changes the number of channels."""
    out_channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(_conv(in_channels, out_channels, 1, stride), norm(out_channels))
    blocks = [block(in_channels, planes, stride, shortcut, norm, stride_in_1x1)]
    blocks += [block(out_channels, planes, 1, None, norm) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def resnet18(norm: Norm = nn.BatchNorm2d, stride_in_1x1: bool = False) -> ResNet:
    """ResNet-18 with random weights."""
    return ResNet(BasicBlock, (2, 2, 2, 2), norm, stride_in_1x1)


def resnet34(norm: Norm = nn.BatchNorm2d, stride_in_1x1: bool = False) -> ResNet:
    """ResNet-34 with random weights."""
    return ResNet(BasicBlock, (3, 4, 6, 3), norm, stride_in_1x1)


def resnet50(norm: Norm = nn.BatchNorm2d, stride_in_1x1: bool = False) -> ResNet:
    """ResNet-50 with random weights."""
    return ResNet(Bottleneck, (3, 4, 6, 3), norm, stride_in_1x1)


def resnet101(norm: Norm = nn.BatchNorm2d, stride_in_1x1: bool = False) -> ResNet:
    """ResNet-101 with random weights."""
    return ResNet(Bottleneck, (3, 4, 23, 3), norm, stride_in_1x1)
