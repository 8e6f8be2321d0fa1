"""What the model says about wrong images, targets and arguments."""

import math

import pytest
import torch

from retinanet_ext import models

SMALL = dict(min_size=64, max_size=112)
NUM_CLASSES = 5


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def target_of(boxes, labels):
    return dict(boxes=boxes_of(*boxes), labels=torch.tensor(labels, dtype=torch.int64))


NOTHING = target_of([], [])
OBJECT = target_of([(10, 10, 50, 60)], [3])


@pytest.fixture(scope="module")
def model():
    return models.retinanet_resnet18_fpn(NUM_CLASSES, **SMALL)


@pytest.fixture
def images():
    return [torch.zeros(3, 64, 80), torch.zeros(3, 90, 70)]


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (None, ValueError, "targets: expected a dictionary for each image.*got None"),
        ([OBJECT], ValueError, "targets: expected one for each of 2 images, got 1"),
        ([OBJECT, 3], TypeError, r"targets\[1\]: expected a dictionary.*got int"),
        (
            [OBJECT, dict(boxes=boxes_of())],
            ValueError,
            r"targets\[1\]: expected the key 'labels', got \['boxes'\]",
        ),
        (
            [OBJECT, dict(NOTHING, boxes=[])],
            TypeError,
            r"targets\[1\]\['boxes'\]: expected a tensor, got list",
        ),
        (
            [OBJECT, dict(NOTHING, boxes=torch.zeros(0))],
            ValueError,
            r"\['boxes'\]: expected shape \[M, 4\], got \[0\]",
        ),
        (
            [OBJECT, dict(NOTHING, boxes=boxes_of().long())],
            TypeError,
            r"\['boxes'\]: expected a floating type",
        ),
        (
            [OBJECT, dict(NOTHING, labels=torch.zeros(0))],
            TypeError,
            r"\['labels'\]: expected an integer type",
        ),
        (
            [OBJECT, target_of([], [1])],
            ValueError,
            r"targets\[1\]\['labels'\]: expected shape \[0\], got \[1\]",
        ),
        (
            [OBJECT, dict(NOTHING, boxes=boxes_of().to("meta"))],
            ValueError,
            r"\['boxes'\]: expected it on the image's",
        ),
        ([OBJECT, dict(NOTHING, ignore=torch.zeros(0))], TypeError, r"\['ignore'\]: expected torch.bool"),
        (
            [OBJECT, dict(NOTHING, ignore=torch.zeros(1, dtype=torch.bool))],
            ValueError,
            r"\['ignore'\]: expected shape \[0\]",
        ),
        (
            [NOTHING, target_of([(0, 0, 5, 5), (7, 3, 7, 9)], [0, 1])],
            ValueError,
            r"targets\[1\]\['boxes'\]\[1\]: expected a finite .*got \(7.0, 3.0, 7.0, 9.0\)",
        ),
        ([target_of([(0, 0, math.nan, 5)], [0]), NOTHING], ValueError, r"targets\[0\]\['boxes'\]\[0\].*nan"),
        ([target_of([(0, 0, math.inf, 5)], [0]), NOTHING], ValueError, r"targets\[0\]\['boxes'\]\[0\].*inf"),
        (
            [OBJECT, target_of([(0, 0, 5, 5)], [NUM_CLASSES])],
            ValueError,
            r"\[1\]\['labels'\]\[0\].*\[0, 5\), got 5",
        ),
        ([OBJECT, target_of([(0, 0, 5, 5)], [-1])], ValueError, r"\[1\]\['labels'\]\[0\].*got -1"),
    ],
)
def test_bad_targets_are_named(model, images, bad, error, text):
    with pytest.raises(error, match=text):
        model.train()(images, bad)


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ([], ValueError, "images: expected at least one image, got an empty list"),
        (3, TypeError, "images: expected a list of tensors"),
        ([torch.zeros(3, 8, 8), [1]], TypeError, r"images\[1\]: expected a tensor \[3, H, W\], got list"),
        (
            [torch.zeros(3, 8, 8, dtype=torch.uint8)],
            TypeError,
            r"images\[0\]: expected a floating type.*uint8",
        ),
        ([torch.zeros(1, 8, 8)], ValueError, r"images\[0\]: expected shape \[3, H, W\], got \[1, 8, 8\]"),
        ([torch.zeros(3, 0, 8)], ValueError, r"images\[0\]: expected shape"),
        (torch.zeros(3, 8, 8), ValueError, r"images\[0\]: expected shape \[3, H, W\], got \[8, 8\]"),
        ([torch.zeros(3, 1, 1000)], ValueError, "images: .*at most 112, got an image of 1 x 1000"),
    ],
)
def test_bad_images_are_named(model, bad, error, text):
    with pytest.raises(error, match=text):
        model.eval()(bad)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (dict(num_classes=0), "num_classes: expected at least 1, got 0"),
        (dict(norm="layer"), "norm: expected one of .*got 'layer'"),
        (dict(match_policy="greedy"), "match_policy: expected one of .*got 'greedy'"),
        (dict(fg_iou_thresh=0.3), "bg_iou_thresh, fg_iou_thresh: expected .*got 0.4, 0.3"),
        (dict(score_thresh=2), r"score_thresh: expected a number in \[0, 1\], got 2"),
        (dict(nms_thresh=-1), "nms_thresh: expected a number"),
        (dict(detections_per_img=0), "detections_per_img: expected at least 1, got 0"),
        (dict(topk_candidates=0), "topk_candidates: expected at least 1, got 0"),
        (dict(min_size=0), "min_size: expected a positive number"),
        (dict(max_size=-5), "max_size: expected a positive number"),
        (dict(image_mean=(0.5,)), "image_mean: expected a value for each of 3 channels"),
        (dict(image_std=(1, 1, 0)), "image_std: expected positive values"),
        (dict(anchor_sizes=((32,), (64, 80))), "anchor_sizes: expected as many sizes at each level"),
        (dict(anchor_sizes=()), "anchor_sizes: expected positive sizes"),
        (dict(aspect_ratios=(0.0,)), "aspect_ratios: expected positive numbers"),
    ],
)
def test_bad_arguments_are_named(bad, text):
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        models.retinanet_resnet18_fpn(**bad)


def test_anchor_sizes_for_another_number_of_levels(images):
    model = models.retinanet_resnet18_fpn(NUM_CLASSES, anchor_sizes=((32,),) * 3, **SMALL)
    with pytest.raises(ValueError, match=r"anchor_sizes: expected sizes for each of the 5 levels.*got sizes for 3"):
        model(images, [OBJECT, NOTHING])
