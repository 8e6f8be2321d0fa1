"""A checkpoint of an untrained RetinaNet-18 that finds many boxes of all its classes."""

import torch
from torch import nn

from retinanet_ext.engine.checkpoint import build_model, save_checkpoint

CLASSES = ["disc", "square", "star"]


def model_config(min_size=64, max_size=64):
    return {
        "arch": "resnet18",
        "num_classes": len(CLASSES),
        "norm": "batch",
        "min_size": min_size,
        "max_size": max_size,
        "anchor_sizes": [[8, 10, 12], [16, 20, 25], [32, 40, 50], [64, 80, 101], [128, 161, 203]],
        "detections_per_img": 50,
        "topk_candidates": 100,
    }


def save_busy_checkpoint(folder, config):
    """`best.pt` in `folder`: heads so random that no two detections have one score."""
    torch.manual_seed(0)
    model = build_model(config)
    nn.init.normal_(model.head.classification_head.cls_logits.weight, std=1.0)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.05)
    path = folder / "best.pt"
    save_checkpoint(path, model, config, CLASSES)
    return path
