"""A trained model made faster for inference."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .resnet import BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet
from .retinanet import RetinaNet

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def fold_batch_norm(model: RetinaNet) -> RetinaNet:
    """Puts every BatchNorm of the backbone into the convolution before it, in place: the same detections to rounding,
    without the passes over the features. GroupNorm, whose statistics are the image's, stays.

    For inference alone: what was folded is no longer what was trained, and its state dict has other keys.

    Args:
        model: in evaluation mode, with weights of float32 or float64; its backbone is one of `BACKBONES`.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is in training mode, or its backbone has a BatchNorm outside of this library's ResNets.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, whose statistics are fixed, got training mode: model.eval()")
    blocks = [module for module in model.backbone.modules() if isinstance(module, ResNet | BasicBlock | Bottleneck)]
    norms = sum(isinstance(module, _BATCH_NORMS) for module in model.backbone.modules())
    if norms != sum(len(list(_pairs(block))) for block in blocks):
        raise ValueError("model: expected a backbone of this library, got one with BatchNorm in other places")
    for block in blocks:
        for parent, convolution, norm in _pairs(block):
            _fold(parent, convolution, norm)
    return model


def _pairs(block: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Where a block has a convolution without a bias and a BatchNorm after it: their parent and their names."""
    places = [(block, f"conv{number}", f"bn{number}") for number in (1, 2, 3)]
    if isinstance(getattr(block, "downsample", None), nn.Sequential):
        places.append((block.downsample, "0", "1"))
    for parent, convolution, norm in places:
        if isinstance(getattr(parent, norm, None), _BATCH_NORMS):
            yield parent, convolution, norm


def _fold(parent: nn.Module, convolution: str, norm: str) -> None:
    """The norm becomes an identity."""
    conv, bn = getattr(parent, convolution), getattr(parent, norm)
    mean, variance, gain, shift = (
        value.detach().double() for value in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    weight, bias = fuse_conv_bn_weights(conv.weight.detach().double(), None, mean, variance, bn.eps, gain, shift)
    conv.weight.data.copy_(weight)  # its type and memory format stay
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    setattr(parent, norm, nn.Identity())
