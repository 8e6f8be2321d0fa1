"""BatchNorm folded into convolutions: the same network with fewer passes."""

import pytest
import torch
from torch import nn

from retinanet_ext.models import FrozenBatchNorm2d, fold_batch_norm, retinanet_resnet18_fpn
from retinanet_ext.models.build import build_retinanet
from retinanet_ext.models.config import RetinaNetConfig

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def trained(backbone, norm):
    """A model of random weights whose statistics are those of no layer in particular."""
    model = build_retinanet(RetinaNetConfig(num_classes=3, backbone=backbone, norm=norm, min_size=96, max_size=128))
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.weight.data.uniform_(0.3, 0.9)
            module.bias.data.normal_(std=0.2)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval().double()


@pytest.mark.parametrize("norm", ["batch", "frozen_batch", "sync_batch"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_the_same_levels_without_batch_norm(backbone, norm):
    model = trained(backbone, norm)
    images = torch.rand(2, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = model.backbone(images)
        assert fold_batch_norm(model) is model
        found = model.backbone(images)
    assert not any(isinstance(module, BATCH_NORMS) for module in model.modules())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-10 * other.abs().max()


def test_types_and_layout_stay():
    model = trained("resnet18", "batch").float().to(memory_format=torch.channels_last)
    fold_batch_norm(model)
    body = model.backbone.body
    for conv in (body.conv1, body.layer2[0].conv2, body.layer2[0].downsample[0]):
        assert conv.weight.dtype == conv.bias.dtype == torch.float32
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    detections = model([torch.rand(3, 96, 128)])
    assert detections[0]["boxes"].dtype == torch.float32


def test_group_norm_stays():
    model = retinanet_resnet18_fpn(3, norm="group", min_size=64, max_size=64).eval()
    images = torch.rand(1, 3, 64, 64)
    expected = model.backbone(images)
    fold_batch_norm(model)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone(images), expected, strict=True))


def test_a_model_in_training_mode_is_refused():
    model = retinanet_resnet18_fpn(3)
    with pytest.raises(ValueError, match=r"model: expected evaluation mode.*got training mode"):
        fold_batch_norm(model)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_another_backbone_is_refused_before_anything_is_folded():
    model = retinanet_resnet18_fpn(3).eval()
    model.backbone.extra = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="expected a backbone of this library"):
        fold_batch_norm(model)
    assert isinstance(model.backbone.body.bn1, nn.BatchNorm2d)
