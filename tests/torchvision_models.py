"""Small torchvision RetinaNets with random weights, images and targets for them, and what their tests compare."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

NUM_CLASSES = 7
CHANNELS = 32


class TinyBackbone(nn.Module):
    """Two levels of strides 8 and 16."""

    out_channels = CHANNELS

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 9, stride=8, padding=4)
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)

    def forward(self, images):
        fine = self.stem(images).relu()
        return OrderedDict([("0", fine), ("1", self.down(fine).relu())])


def tiny_retinanet(version=1, cls=RetinaNet, **options):
    """Version 2 is what torchvision calls v2: GroupNorm in the head, and GIoU as the box loss."""
    generator = AnchorGenerator(((16, 24), (40, 64)), ((0.5, 1.0, 2.0),) * 2)
    if version == 2:
        options.setdefault(
            "head", RetinaNetHead(CHANNELS, 6, NUM_CLASSES, norm_layer=lambda channels: nn.GroupNorm(32, channels))
        )
        options["head"].regression_head._loss_type = "giou"
    options = dict(anchor_generator=generator, min_size=64, max_size=112) | options
    model = cls(TinyBackbone(), NUM_CLASSES, **options)
    spread_outputs(model)
    return model


@torch.no_grad()
def spread_outputs(model):
    """Random heads predict nearly the same everywhere: scale their last layers, so that some anchors are detections.

    No scores near 1: there many logits share a float32 score, and torchvision leaves the order of equal scores open.
    """
    outputs = {}
    for layer in (model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg):
        layer.bias.zero_()
        handle = layer.register_forward_hook(
            lambda layer, inputs, output: outputs.setdefault(layer, []).append(output.flatten())
        )
        model.head(list(model.backbone(model.transform(IMAGES)[0].tensors).values()))
        handle.remove()
        wanted = 0.2 if layer is model.head.regression_head.bbox_reg else 1.2
        layer.weight *= wanted / torch.cat(outputs[layer]).std()
    model.head.classification_head.cls_logits.bias.fill_(-3.0)


def images_of(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator).to(dtype) for size in sizes]


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


IMAGES = images_of((100, 140), (130, 90), (64, 200))
TARGETS = [
    dict(boxes=boxes_of((10, 10, 60, 70), (30, 30, 100, 90), (5, 60, 40, 95)), labels=torch.tensor([1, 6, 0])),
    dict(boxes=boxes_of(), labels=torch.zeros(0, dtype=torch.int64)),
    dict(boxes=boxes_of((100, 5, 180, 60)), labels=torch.tensor([3])),
]
# A box that overlaps no anchor: torchvision's rule then makes foreground of every anchor.
FLOODING = dict(boxes=boxes_of((20, 20, 60, 60), (900, 900, 990, 990)), labels=torch.tensor([2, 4]))

LOSS_OPERATORS = ["assign_targets", "multilevel_focal_loss", "box_regression_loss"]
ALL = [*LOSS_OPERATORS, "detect"]  # in the order that a training and an evaluation step call them


def results(model):
    """Losses and detections, or the error that came instead."""
    found = []
    for training, arguments in ((True, (IMAGES, TARGETS)), (False, (IMAGES,))):
        model.train(training)
        try:
            with torch.no_grad():
                found.append(model(*arguments))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def assert_same_results(found, expected):
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, str):
            assert a == b
        elif isinstance(b, dict):
            assert list(a) == list(b)
            for name in b:
                torch.testing.assert_close(a[name], b[name], rtol=2e-6, atol=0)
        else:
            assert_same_detections(a, b)


def assert_same_detections(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert list(a) == list(b) == ["boxes", "scores", "labels"]
        assert [value.dtype for value in a.values()] == [value.dtype for value in b.values()]
        assert torch.equal(a["labels"], b["labels"])
        # The two exponentials are each within an ulp of the truth; sides are at most 200 pixels.
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=4 * 200 * 2**-23)
        torch.testing.assert_close(a["scores"], b["scores"], rtol=2**-22, atol=0)
