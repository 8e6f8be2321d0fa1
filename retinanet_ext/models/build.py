"""RetinaNets on ResNet and ResNeXt backbones, by configuration and by name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .config import RetinaNetConfig
from .fpn import BackboneWithFPN
from .resnet import make_resnet
from .retinanet import RetinaNet


def build_retinanet(config: RetinaNetConfig) -> RetinaNet:
    """The model of a configuration, with random weights; nothing is ever downloaded. The model has it as ``config``.

    Raises:
        ValueError: a value out of its range, by name.
    """
    options = asdict(config)
    body = make_resnet(
        options.pop("backbone"), options.pop("norm"), options.pop("stride_in_1x1"), options.pop("norm_eps")
    )
    pyramid = BackboneWithFPN(body, p6_from=options.pop("p6_from"), p7_relu=options.pop("p7_relu"))
    model = RetinaNet(pyramid, **options)
    model.config = config
    return model


def _named(backbone: str, num_classes: int, norm: str, options: dict[str, Any]) -> RetinaNet:
    return build_retinanet(RetinaNetConfig(num_classes=num_classes, backbone=backbone, norm=norm, **options))


def retinanet_resnet18_fpn(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """RetinaNet on ResNet-18; see `retinanet_resnet50_fpn`."""
    return _named("resnet18", num_classes, norm, kwargs)


def retinanet_resnet34_fpn(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """RetinaNet on ResNet-34; see `retinanet_resnet50_fpn`."""
    return _named("resnet34", num_classes, norm, kwargs)


def retinanet_resnet50_fpn(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """RetinaNet on ResNet-50 with P3 to P7, with random weights; nothing is ever downloaded.

    The weights of ``torchvision.models.detection.retinanet_resnet50_fpn`` load as they are:
    ``model.load_state_dict(torchvision_model.state_dict())``. (torchvision's COCO_V1 checkpoint was trained
    with ``norm="frozen_batch", norm_eps=0.0``: torchvision sets the latter when it loads it.)

    Args:
        num_classes: ``K``; 91 is what torchvision's COCO weights have.
        norm: the normalisation of the ResNet: "batch", trainable BatchNorm; "frozen_batch", fixed statistics,
            for weights that were trained elsewhere; "group", GroupNorm of 32 groups, for batches of one or
            two images; "sync_batch", BatchNorm whose statistics are those of all processes of a training on several
            GPUs (`torch.nn.SyncBatchNorm`; of one process, on a GPU or the CPU, it is "batch"; of several on the CPU
            training is an error).
        **kwargs: the other fields of `RetinaNetConfig`.

    Raises:
        ValueError: an unknown ``norm``, or an argument out of its range.
        TypeError: an argument that is no field.
    """
    return _named("resnet50", num_classes, norm, kwargs)


def retinanet_resnet50_fpn_v2(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """`retinanet_resnet50_fpn` as torchvision's ``retinanet_resnet50_fpn_v2`` has it: P6 made from C5, GroupNorm in the
    subnets, GIoU as the box loss. That model's weights load as they are."""
    return _named("resnet50", num_classes, norm, {"p6_from": "c5", "head_norm": "group", "box_loss": "giou", **kwargs})


def retinanet_resnet101_fpn(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """RetinaNet on ResNet-101; see `retinanet_resnet50_fpn`."""
    return _named("resnet101", num_classes, norm, kwargs)


def retinanet_resnet152_fpn(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """RetinaNet on ResNet-152; see `retinanet_resnet50_fpn`."""
    return _named("resnet152", num_classes, norm, kwargs)


def retinanet_resnext50_32x4d_fpn(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """RetinaNet on ResNeXt-50 of 32 groups of 4 channels; see `retinanet_resnet50_fpn`."""
    return _named("resnext50_32x4d", num_classes, norm, kwargs)


def retinanet_resnext101_64x4d_fpn(num_classes: int = 91, *, norm: str = "batch", **kwargs: Any) -> RetinaNet:
    """RetinaNet on ResNeXt-101 of 64 groups of 4 channels; see `retinanet_resnet50_fpn`."""
    return _named("resnext101_64x4d", num_classes, norm, kwargs)
