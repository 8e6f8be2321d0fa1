"""A small detectron2 RetinaNet, of the installed detectron2 or of its stand-in, and something to train it on."""

from __future__ import annotations

import torch
from torch import nn

NUM_CLASSES = 5
STRIDES = (8, 16)
SIZES = [(64, 80), (56, 64)]  # (height, width)


class Backbone(nn.Module):
    size_divisibility = 16
    padding_constraints = {}  # noqa: RUF012 - detectron2's name and type

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 8, 3, stride=stride, padding=1) for stride in STRIDES)

    def forward(self, images):
        return {f"p{index}": convolution(images) for index, convolution in enumerate(self.convolutions)}


class Head(nn.Module):
    """Logits and deltas of each level, with a spread that makes detections."""

    def __init__(self, num_anchors):
        super().__init__()
        self.cls_score = nn.Conv2d(8, num_anchors * NUM_CLASSES, 3, padding=1)
        self.bbox_pred = nn.Conv2d(8, num_anchors * 4, 3, padding=1)
        nn.init.normal_(self.cls_score.weight, std=0.2)
        nn.init.constant_(self.cls_score.bias, -2.0)
        nn.init.normal_(self.bbox_pred.weight, std=0.1)

    def forward(self, features):
        return [self.cls_score(level) for level in features], [self.bbox_pred(level) for level in features]


def tiny_retinanet(cls=None, **options):
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch.retinanet import RetinaNet

    torch.manual_seed(3)
    generator = DefaultAnchorGenerator(
        sizes=[[12.0, 18.0], [28.0, 36.0]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=list(STRIDES), offset=0.5
    )
    parts = {
        "backbone": Backbone(),
        "head": Head(num_anchors=6),
        "head_in_features": ["p0", "p1"],
        "anchor_generator": generator,
        "box2box_transform": Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        "anchor_matcher": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        "num_classes": NUM_CLASSES,
        "test_topk_candidates": 60,
        "pixel_mean": [120.0, 115.0, 100.0],
        "pixel_std": [60.0, 60.0, 60.0],
    }
    return (cls or RetinaNet)(**{**parts, **options})


def instances_of(size, boxes, classes):
    from detectron2.structures import Boxes, Instances

    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


BOXES = [[4.0, 6.0, 22.0, 20.0], [30.0, 10.0, 62.0, 44.0], [10.0, 30.0, 40.0, 52.0]]


def batch(truth=None):
    """Two images and their objects; ``truth``: boxes and classes of each."""
    torch.manual_seed(4)
    truth = truth or [(BOXES, [0, 4, 2]), ([], [])]
    return [
        {"image": 255 * torch.rand(3, *size), "instances": instances_of(size, *objects)}
        for size, objects in zip(SIZES, truth, strict=True)
    ]


def losses_of(model, inputs=None):
    """The losses of a training step, the gradients of all parameters, and what was put into the event storage."""
    from detectron2.utils.events import EventStorage

    model.train()
    model.zero_grad()
    with EventStorage() as storage:
        losses = model(inputs or batch())
        scalars = {name: value[0] for name, value in storage.latest().items()}
    sum(losses.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()}, gradients, scalars


def detections_of(model, inputs=None):
    model.eval()
    with torch.no_grad():
        return [image["instances"] for image in model(inputs or batch())]


def unclipped_detections_of(model, inputs=None):
    """Before detectron2 scales them to the size of the output, and clips them."""
    model.eval()
    with torch.no_grad():
        images = model.preprocess_image(inputs or batch())
        features = list(model.backbone(images.tensor).values())
        return model.forward_inference(images, features, model.head(features))
