"""The model as torchvision's v2 has it beside torchvision's own: keys, losses, gradients, detections. And options of
the pyramid, the heads and the backbone that other implementations need."""

import pytest
import torch
from torch import nn

from retinanet_ext import models
from retinanet_ext.models.fpn import FeaturePyramid
from retinanet_ext.models.resnet import Bottleneck, make_resnet

NUM_CLASSES = 5
SMALL = {"min_size": 64, "max_size": 112}
IMAGES = [torch.rand(3, *size, generator=torch.Generator().manual_seed(size[0])) for size in ((100, 140), (64, 110))]
TARGETS = [
    {"boxes": torch.tensor([[10.0, 10, 60, 70], [30, 30, 100, 90]]), "labels": torch.tensor([1, 4])},
    {"boxes": torch.tensor([[40.0, 5, 90, 60]]), "labels": torch.tensor([3])},
]


@pytest.fixture(scope="module")
def both():
    """torchvision's model and ours with the same weights."""
    detection = pytest.importorskip("torchvision.models.detection", reason="compares with torchvision")
    torch.manual_seed(0)
    theirs = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=NUM_CLASSES, **SMALL)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained, so that evaluation has something to normalise by
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    nn.init.normal_(theirs.head.regression_head.bbox_reg.weight, std=0.03)
    nn.init.normal_(theirs.head.classification_head.cls_logits.weight, std=0.03)
    ours = models.build_retinanet(models.RetinaNetConfig.preset("torchvision_v2", NUM_CLASSES, **SMALL))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def test_keys_order_and_shapes(both):
    theirs, ours = ({name: tuple(value.shape) for name, value in model.state_dict().items()} for model in both)
    assert list(ours.items()) == list(theirs.items())
    assert sum(parameter.numel() for parameter in models.retinanet_resnet50_fpn_v2().parameters()) == 38_198_935


def test_losses_and_gradients(both):
    theirs, ours = both
    results = []
    for model in (theirs, ours):
        model.train()
        model.zero_grad()
        # Statistics of one batch: the running ones would move between the two.
        losses = model(IMAGES, TARGETS)
        sum(losses.values()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((torch.stack(list(losses.values())).detach(), gradient))
    (expected, expected_gradient), (found, gradient) = results
    assert found.tolist() == pytest.approx(expected.tolist(), rel=2e-6)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


def test_detections(both):
    theirs, ours = both
    theirs.eval()
    ours.eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected, found = theirs(IMAGES), ours(IMAGES)
    for a, b in zip(found, expected, strict=True):
        assert len(b["boxes"]) > 10
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=4 * 140 * 2**-23)
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["scores"], b["scores"], rtol=2**-22, atol=0)


def test_p7_of_p6_without_relu():
    features = [torch.randn(1, channels, 8 >> level, 8 >> level) for level, channels in enumerate((4, 8, 16))]
    pyramid = FeaturePyramid((4, 8, 16), 32, p6_from="c5", p7_relu=False)
    p6, p7 = pyramid(features)[3:]
    torch.testing.assert_close(p6, pyramid.extra_blocks.p6(features[-1]))
    torch.testing.assert_close(p7, pyramid.extra_blocks.p7(p6))
    pyramid.extra_blocks.relu = True
    torch.testing.assert_close(pyramid(features)[4], pyramid.extra_blocks.p7(p6.relu()))
    assert FeaturePyramid((4, 8, 16), 32).extra_blocks.p6.in_channels == 32


def test_bottlenecks_that_stride_in_their_first_convolution():
    """The same weights and sizes, another place of the stride."""
    for early, strides in ((True, (2, 1)), (False, (1, 2))):
        model = make_resnet("resnet50", stride_in_1x1=early)
        first = [stage[0] for stage in (model.layer2, model.layer3, model.layer4)]
        assert all(isinstance(block, Bottleneck) for block in first)
        assert {(block.conv1.stride[0], block.conv2.stride[0]) for block in first} == {strides}
        assert [level.shape[-1] for level in model(torch.zeros(1, 3, 64, 64))] == [8, 4, 2]
    built = models.retinanet_resnet50_fpn(3, stride_in_1x1=True)
    assert built.backbone.body.layer2[0].conv1.stride == (2, 2)


def test_smooth_l1_is_between():
    """The option reaches the operator: with a beta of 0.1 smooth L1 is below L1, by at most 0.05 a number."""
    losses = []
    for options in ({}, {"box_loss": "smooth_l1", "box_loss_beta": 0.1}):
        torch.manual_seed(1)
        model = models.retinanet_resnet18_fpn(NUM_CLASSES, **options, **SMALL)
        with torch.no_grad():
            losses.append(model(IMAGES, TARGETS)["bbox_regression"].item())
    assert losses[0] - 4 * 0.05 <= losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"p6_from": "c4"}, r"p6_from: expected one of \('p5', 'c5'\), got 'c4'"),
        ({"head_norm": "batch"}, r"head_norm: expected one of \('none', 'group'\), got 'batch'"),
        ({"box_loss": "l2"}, r"box_loss: expected one of \('l1', 'smooth_l1', 'giou'\), got 'l2'"),
        ({"box_loss_beta": 0}, "box_loss_beta: expected a positive number, got 0"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        models.retinanet_resnet18_fpn(3, **options)
