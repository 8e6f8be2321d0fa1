"""A thin RetinaNet on the operators of this library."""

from .anchors import AnchorGenerator
from .fpn import BackboneWithFPN, FeaturePyramid
from .heads import RetinaNetHead
from .resnet import FrozenBatchNorm2d, ResNet
from .retinanet import (
    RetinaNet,
    retinanet_resnet18_fpn,
    retinanet_resnet34_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
    retinanet_resnet101_fpn,
)
from .transform import ImageTransform

__all__ = [
    "AnchorGenerator",
    "BackboneWithFPN",
    "FeaturePyramid",
    "FrozenBatchNorm2d",
    "ImageTransform",
    "ResNet",
    "RetinaNet",
    "RetinaNetHead",
    "retinanet_resnet18_fpn",
    "retinanet_resnet34_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "retinanet_resnet101_fpn",
]
