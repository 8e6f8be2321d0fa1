"""What an accelerated torchvision RetinaNet does after its convolutions, beside the model as it was.

Both sides run the model's own ``forward`` from images to losses (and back to the heads' outputs) or to detections. The
transform, the backbone and the convolutions of the head are stand-ins that hand over what the real ones would, so that
the time is that of the anchors, the losses and the post-processing alone.
"""

from __future__ import annotations

import copy
import importlib.util
from collections import OrderedDict

import pytest
import torch
from agreement import same_detections
from torch import nn

import retinanet_ext

A, K, BOXES = 9, 91, 8
# Image, batch.
CASES = {"480x640 B=2": ((480, 640), 2), "800x1344 B=2": ((800, 1344), 2), "800x1344 B=16": ((800, 1344), 16)}
SMOKE = ((64, 96), 2)
LOSSES = {"v1": "l1", "v2": "giou"}
MISSING = importlib.util.find_spec("torchvision") is None


class Given(nn.Module):
    """Hands over the tensors that it was given, one a call, in turns."""

    def __init__(self, levels):
        super().__init__()
        self.levels, self.calls = levels, 0

    def forward(self, _features):
        level = self.levels[self.calls % len(self.levels)]
        self.calls += 1
        return level


class GivenFeatures(nn.Module):
    out_channels = 1

    def __init__(self, grids, batch, device):
        super().__init__()
        self.features = OrderedDict(
            (str(index), torch.zeros(batch, 1, *grid, device=device)) for index, grid in enumerate(grids)
        )

    def forward(self, _images):
        return self.features


class GivenImages(nn.Module):
    """In the place of the transform: images of the network's size already."""

    def __init__(self, image_list):
        super().__init__()
        self.image_list = image_list

    def forward(self, _images, targets=None):
        return self.image_list, targets

    def postprocess(self, detections, _sizes, _original_sizes):
        return detections


def make_model(case, device, *, bias, spread, loss="l1"):
    """A RetinaNet whose head predicts random numbers, and its images and targets."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.retinanet import RetinaNetHead

    (height, width), batch = case
    grids = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]
    generator = torch.Generator(device).manual_seed(0)

    def levels(channels, scale, shift):
        shapes = [(batch, channels, *grid) for grid in grids]
        return [torch.randn(shape, generator=generator, device=device).mul_(scale).add_(shift) for shape in shapes]

    head = RetinaNetHead(1, A, K)
    for subnet, name, outputs in (
        (head.classification_head, "cls_logits", levels(A * K, spread, bias)),
        (head.regression_head, "bbox_reg", levels(A * 4, 0.3, 0.0)),
    ):
        subnet.conv = nn.Identity()
        setattr(subnet, name, Given([level.requires_grad_() for level in outputs]))
    head.regression_head._loss_type = loss
    model = RetinaNet(GivenFeatures(grids, batch, device), K, head=head)
    images = torch.zeros(batch, 3, height, width, device=device)
    model.transform = GivenImages(ImageList(images, [(height, width)] * batch))
    targets = [random_target(height, width, generator, device) for _ in range(batch)]
    return model, list(images), targets


def random_target(height, width, generator, device):
    limit = torch.tensor([width, height], device=device)
    corner = torch.rand(BOXES, 2, generator=generator, device=device) * limit * 0.7
    size = (0.05 + 0.25 * torch.rand(BOXES, 2, generator=generator, device=device)) * limit
    labels = torch.randint(0, K, (BOXES,), generator=generator, device=device)
    return {"boxes": torch.cat([corner, corner + size], dim=1), "labels": labels}


def head_outputs(model):
    return [*model.head.classification_head.cls_logits.levels, *model.head.regression_head.bbox_reg.levels]


def training_call(model, images, targets):
    model.train()
    leaves = head_outputs(model)

    def forward_backward():
        for leaf in leaves:
            leaf.grad = None
        losses = model(images, targets)
        (losses["classification"] + losses["bbox_regression"]).backward()
        return [*losses.values(), *(leaf.grad for leaf in leaves)]

    return forward_backward


def evaluation_call(model, images):
    model.eval()

    def detections():
        with torch.no_grad():
            return model(images)

    return detections


def size_of(outputs):
    return sum(level.numel() for level in outputs), sum(level.numel() * level.element_size() for level in outputs)


@pytest.mark.skipif(MISSING, reason="torchvision, whose model is accelerated, is not installed")
@pytest.mark.parametrize("version", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_training(compare, device, timed, case, version):
    model, images, targets = make_model(
        CASES[case] if timed else SMOKE, device, bias=-4.6, spread=0.5, loss=LOSSES[version]
    )
    accelerated = retinanet_ext.accelerate(copy.deepcopy(model))

    def agree(mine, theirs):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())

    elements, size = size_of(head_outputs(model))
    compare(
        f"accelerate {version} losses {case if timed else 'smoke'} forward+backward",
        training_call(accelerated, images, targets),
        {"torchvision": training_call(model, images, targets)},
        agree,
        elements=elements,
        bytes=2 * size,
        dtype="float32",
    )


@pytest.mark.skipif(MISSING, reason="torchvision, whose model is accelerated, is not installed")
@pytest.mark.parametrize("case", CASES)
def test_detections(compare, device, timed, case):
    """Of the logits about one in 60 passes the threshold, as a trained detector's on a busy image."""
    model, images, _ = make_model(CASES[case] if timed else SMOKE, device, bias=-5.5, spread=1.2)
    accelerated = retinanet_ext.accelerate(copy.deepcopy(model))

    def agree(mine, theirs):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-5, atol=0)
            same_detections(one, other)

    elements, size = size_of(head_outputs(model))
    compare(
        f"accelerate detections {case if timed else 'smoke'}",
        evaluation_call(accelerated, images),
        {"torchvision": evaluation_call(model, images)},
        agree,
        elements=elements,
        bytes=size,
        dtype="float32",
    )
