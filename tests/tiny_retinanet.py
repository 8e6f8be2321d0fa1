"""A RetinaNet as small as they get, on two levels, its images and targets: for tests of what stands around a model."""

import torch
from torch import nn

from retinanet_ext.models.retinanet import RetinaNet


class TinyBackbone(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, images):
        fine = self.stem(images).relu()
        return [fine, self.down(fine)]


def tiny_retinanet(num_classes=5, score=0.12):
    """`score`: of every anchor, about, so that something is detected."""
    torch.manual_seed(0)
    model = RetinaNet(
        TinyBackbone(), num_classes, min_size=64, max_size=64, anchor_sizes=((16, 24), (32, 48)), nms_thresh=0.3
    )
    nn.init.constant_(model.head.classification_head.cls_logits.bias, torch.logit(torch.tensor(score)).item())
    return model


IMAGES = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 40, 60], [30, 10, 64, 50]]), "labels": torch.tensor([1, 3])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]
OTHER_TARGETS = [
    {"boxes": torch.tensor([[10.0, 20, 50, 55]]), "labels": torch.tensor([0])},
    {"boxes": torch.tensor([[1.0, 2, 30, 40], [20, 20, 60, 60], [5, 5, 20, 20]]), "labels": torch.tensor([2, 4, 4])},
]
