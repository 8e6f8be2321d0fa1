"""A thin RetinaNet on the operators of this library."""

from .anchors import AnchorGenerator
from .build import (
    build_retinanet,
    retinanet_resnet18_fpn,
    retinanet_resnet34_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
    retinanet_resnet101_fpn,
    retinanet_resnet152_fpn,
    retinanet_resnext50_32x4d_fpn,
    retinanet_resnext101_64x4d_fpn,
)
from .config import PRESETS, RetinaNetConfig
from .fpn import BackboneWithFPN, FeaturePyramid
from .heads import RetinaNetHead
from .inference import fold_batch_norm
from .normalizers import LossNormalizer
from .resnet import BACKBONES, FrozenBatchNorm2d, ResNet, SyncBatchNorm2d
from .retinanet import PaddedDetections, RetinaNet
from .transform import ImageTransform

__all__ = [
    "BACKBONES",
    "PRESETS",
    "AnchorGenerator",
    "BackboneWithFPN",
    "FeaturePyramid",
    "FrozenBatchNorm2d",
    "ImageTransform",
    "LossNormalizer",
    "PaddedDetections",
    "ResNet",
    "RetinaNet",
    "RetinaNetConfig",
    "RetinaNetHead",
    "SyncBatchNorm2d",
    "build_retinanet",
    "fold_batch_norm",
    "retinanet_resnet18_fpn",
    "retinanet_resnet34_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "retinanet_resnet101_fpn",
    "retinanet_resnet152_fpn",
    "retinanet_resnext50_32x4d_fpn",
    "retinanet_resnext101_64x4d_fpn",
]
