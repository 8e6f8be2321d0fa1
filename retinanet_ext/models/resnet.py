"""ResNet (He et al., 2015, arXiv 1512.03385) and ResNeXt (Xie et al., 2016, arXiv 1611.05431) as backbones: images in,
C3, C4 and C5 out.

The bottleneck strides in its 3x3 convolution ("v1.5"), as torchvision's does, or in its first 1x1 convolution, as
the paper's and the MSRA weights of detectron2 do. Modules are named as torchvision names them, so that state dicts
go both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
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


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, and BatchNorm wherever there is nobody to share statistics with: outside of a process
    group, in a group of one, in evaluation; there it works on the CPU too.

    Args:
        num_features: channels of the input ``[B, C, H, W]``.

    Raises:
        ValueError: training of several processes on the CPU, where torch has no shared statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and _group_size(self.process_group) > 1):
            return nn.modules.batchnorm._BatchNorm.forward(self, x)
        if x.device.type == "cpu":
            raise ValueError(
                'norm: "sync_batch" shares statistics between processes on GPUs alone, got an input on the CPU in a '
                f'group of {_group_size(self.process_group)}: use "batch", or for few images a process "group" or '
                '"frozen_batch"'
            )
        return super().forward(x)


def _group_size(group: Any) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _group_norm(channels: int, eps: float = 1e-5) -> nn.Module:
    return nn.GroupNorm(32, channels, eps)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen_batch": FrozenBatchNorm2d,
    "group": _group_norm,
    "sync_batch": SyncBatchNorm2d,
}


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
    )


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
        groups: int = 1,
        group_width: int = 64,
    ):
        if (groups, group_width) != (1, 64):
            raise ValueError(f"groups, group_width: a basic block has 1 and 64, got {groups}, {group_width}")
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
        return self.relu(out.add_(shortcut))  # nothing needs the norm's output in the backward pass


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, and a shortcut; the 3x3 strides, or the first 1x1. ``[B, C, H, W]`` to
    ``[B, 4 * planes, H/s, W/s]``. ResNeXt's 3x3 has several groups of channels."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        shortcut: nn.Module | None,
        norm: Norm,
        stride_in_1x1: bool = False,
        groups: int = 1,
        group_width: int = 64,
    ):
        super().__init__()
        width = planes * group_width // 64 * groups
        self.conv1 = _conv(in_channels, width, 1, stride if stride_in_1x1 else 1)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, 1 if stride_in_1x1 else stride, groups)
        self.bn2 = norm(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out.add_(shortcut))  # nothing needs the norm's output in the backward pass


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: how many blocks each of the four stages has.
        norm: makes a normalisation layer for a number of channels.
        stride_in_1x1: bottlenecks stride in their first 1x1 convolution.
        groups, group_width: of a bottleneck's 3x3 convolution in the first stage; each stage doubles the width.

    Attributes:
        out_channels: channels of C3, C4 and C5.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        norm: Norm = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
        groups: int = 1,
        group_width: int = 64,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        widths = [64, *(planes * block.expansion for planes in (64, 128, 256, 512))]
        options = {"norm": norm, "stride_in_1x1": stride_in_1x1, "groups": groups, "group_width": group_width}
        self.layer1 = _stage(block, widths[0], 64, depths[0], 1, **options)
        self.layer2 = _stage(block, widths[1], 128, depths[1], 2, **options)
        self.layer3 = _stage(block, widths[2], 256, depths[2], 2, **options)
        self.layer4 = _stage(block, widths[3], 512, depths[3], 2, **options)
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
    **options: Any,
) -> nn.Sequential:
    """``depth`` blocks, of which the first strides and changes the number of channels."""
    out_channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(_conv(in_channels, out_channels, 1, stride), norm(out_channels))
    blocks = [block(in_channels, planes, stride, shortcut, norm, **options)]
    blocks += [block(out_channels, planes, 1, None, norm, **options) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


# block, depths, groups, group_width
_BACKBONES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), 64, 4),
}
BACKBONES = tuple(_BACKBONES)


def make_resnet(name: str, norm: str = "batch", stride_in_1x1: bool = False, norm_eps: float = 1e-5) -> ResNet:
    """The backbone of that name with random weights.

    Args:
        name: one of `BACKBONES`.
        norm: one of `NORMS`.
        stride_in_1x1: see `ResNet`.
        norm_eps: what the normalisation adds to the variance; 0 with "frozen_batch" alone.

    Raises:
        ValueError: another name or norm.
    """
    if name not in _BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {tuple(NORMS)}, got {norm!r}")
    block, depths, groups, group_width = _BACKBONES[name]
    return ResNet(block, depths, partial(NORMS[norm], eps=norm_eps), stride_in_1x1, groups, group_width)
