"""A trained model made faster for inference."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .resnet import BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet
from .retinanet import RetinaNet

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def fold_batch_norm(model: RetinaNet) -> RetinaNet:
    """Puts every BatchNorm of the backbone into the convolution before it, in place: the same detections to rounding,
    without the passes over the features. GroupNorm, whose statistics are the image's, stays.

    What was folded can neither be trained nor written to a checkpoint: the state dict has other keys.

    Args:
        model: in evaluation mode, with weights of float32 or float64.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, whose statistics are fixed, got training mode: model.eval()")
    for module in model.backbone.modules():
        if isinstance(module, ResNet | BasicBlock | Bottleneck):
            for number in (1, 2, 3):
                _fold(module, f"conv{number}", f"bn{number}")
            if isinstance(getattr(module, "downsample", None), nn.Sequential):
                _fold(module.downsample, "0", "1")
    return model


def _fold(parent: nn.Module, convolution: str, norm: str) -> None:
    """One pair of children, if there is one: a convolution without a bias, and a norm, which becomes an identity."""
    conv, bn = getattr(parent, convolution, None), getattr(parent, norm, None)
    if not isinstance(bn, _BATCH_NORMS):
        return
    mean, variance, gain, shift = (
        value.detach().double() for value in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    weight, bias = fuse_conv_bn_weights(conv.weight.detach().double(), None, mean, variance, bn.eps, gain, shift)
    conv.weight.data.copy_(weight)  # its type and memory format stay
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    setattr(parent, norm, nn.Identity())
