"""A RetinaNet that takes milliseconds, in the place of a ResNet's."""

import torch
from torch import nn

from retinanet_ext.models import RetinaNet

# Of `engine.recorder` and `engine.run_folder`: what draws, which takes longer than such a model's epoch.
PICTURES = ("recorder.plot_labels", "recorder.plot_results", "run_folder.draw_evaluation")


class Backbone(nn.Module):
    """Five levels of 8 channels."""

    out_channels = 8

    def __init__(self, norm="group"):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 8, 1), nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8), nn.ReLU()
        )

    def forward(self, images):
        levels = [self.stem(images)]
        for _ in range(4):
            levels.append(nn.functional.max_pool2d(levels[-1], 2, ceil_mode=True))
        return levels


def small_model(num_classes=3, norm="group", **options):
    torch.manual_seed(0)
    sizes = [(size,) for size in (8, 16, 32, 64, 128)]
    return RetinaNet(Backbone(norm), num_classes, **{"min_size": 32, "max_size": 64, "anchor_sizes": sizes, **options})


def build_small_model(config):
    """In the place of ``engine.train.build_model``."""
    names = ("num_classes", "norm", "min_size", "max_size")
    return small_model(**{name: config[name] for name in names})
