"""Matching the anchors of a feature pyramid with the boxes of a batch: labels, matched rows and numbers of foreground
anchors, beside torchvision's Matcher(box_iou(...)) and detectron2's, an image at a time."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch

import retinanet_ext
from retinanet_ext.models.anchors import AnchorGenerator

# Image, batch, boxes an image, or "ragged": as many as COCO's images have, 7.3 on average, some none and a few dozens.
# 800x1344 has 201,600 anchors.
CASES = {
    "800x1344 B=1 M=8": ((800, 1344), 1, 8),
    "800x1344 B=1 M=50": ((800, 1344), 1, 50),
    "800x1344 B=1 M=300": ((800, 1344), 1, 300),
    "800x1344 B=16 M=8": ((800, 1344), 16, 8),
    "800x1344 B=64 M=500": ((800, 1344), 64, 500),
    "800x1344 B=16 ragged": ((800, 1344), 16, "ragged"),
    "800x800 B=1 M=50": ((800, 800), 1, 50),
    "800x800 B=16 ragged": ((800, 800), 16, "ragged"),
    "240x320 B=16 M=12": ((240, 320), 16, 12),
}
SMOKE = ((64, 96), 2, 5)


def make_case(case, device):
    """Anchors, and boxes of log-uniform size from 12 to 300 pixels at random places."""
    (height, width), batch, count = case
    grids = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]
    anchors = AnchorGenerator()((height, width), grids).to(device)
    generator = torch.Generator().manual_seed(0)
    counts = [count] * batch
    if count == "ragged":
        chances = torch.rand(batch, generator=generator)
        counts = (chances.log() / math.log(7.3 / 8.3)).int().tolist()  # geometric
    boxes = []
    for count in counts:
        size = (torch.rand(count, 2, generator=generator) * 3.2 + 2.5).exp().clamp(max=min(height, width) / 2)
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)
        boxes.append(torch.cat((corner, corner + size), dim=1).to(device))
    labels = [torch.arange(count, device=device) % 80 for count in counts]
    return anchors, boxes, labels


def torchvision_targets(anchors, boxes, labels):
    """As torchvision's RetinaNet: the matrix of an image's IoU, its matcher, and the classes of what matched."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    all_labels, all_matched, counts = [], [], []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        if len(image_boxes):
            matched = matcher(box_iou(image_boxes, anchors))
        else:  # the Matcher refuses it, torchvision's RetinaNet makes it background
            matched = torch.full((len(anchors),), -1, device=anchors.device)
            image_labels = matched
        foreground = matched >= 0
        all_matched.append(matched)
        all_labels.append(torch.where(foreground, image_labels[matched.clamp(min=0)], matched))
        counts.append(foreground.sum())
    return torch.stack(all_labels), torch.stack(all_matched), torch.stack(counts)


def detectron2_targets(anchors, boxes, labels):
    """As detectron2's RetinaNet; in the numbers of torchvision."""
    from detectron2.modeling.matcher import Matcher
    from detectron2.structures import Boxes, pairwise_iou

    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    all_labels, all_matched, counts = [], [], []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        matched, kinds = matcher(pairwise_iou(Boxes(image_boxes), Boxes(anchors)))
        matched = torch.where(kinds == 1, matched, kinds.long() - 1)
        if not len(image_boxes):
            image_labels = matched
        all_matched.append(matched)
        all_labels.append(torch.where(kinds == 1, image_labels[matched.clamp(min=0)], matched))
        counts.append((kinds == 1).sum())
    return torch.stack(all_labels), torch.stack(all_matched), torch.stack(counts)


def torchvision_matches(anchors, boxes):
    """torchvision's matcher over the matrix of each image's IoU, in our numbers: -1 background, -2 ignored."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    return torch.stack([matcher(box_iou(image, anchors)) for image in boxes])


def agree(mine, other):
    for one, two in zip(mine, other, strict=True):
        assert torch.equal(one.long(), two.long())


def not_compiled(device, timed, batch, case):
    """Why torchvision's is not timed compiled too, or None."""
    if not timed:
        return "a smoke run compiles nothing"
    if batch > 1:
        return "its loop over the images is unrolled into the graph: compiled for one image alone"
    if device.type == "cpu" and case != "800x1344 B=1 M=50":
        return "compiling takes the CPU many seconds: done for 800x1344 B=1 M=50 alone"
    return None


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("case", CASES)
def test_assign_targets(compare, captured, device, timed, case, in_graph):
    batch = CASES[case][1]
    if timed and device.type == "cpu" and batch > 16:
        pytest.skip("64 images of 500 boxes take the CPU peer minutes a call; one image says as much")
    anchors, boxes, labels = make_case(CASES[case] if timed else SMOKE, device)

    def ours():
        return retinanet_ext.assign_targets(anchors, boxes, labels, policy="torchvision")

    peers = {}
    for name, targets in (("torchvision", torchvision_targets), ("detectron2", detectron2_targets)):
        if importlib.util.find_spec(name) is None:
            peers[name] = f"{name} is not installed"
        else:
            peers[name] = functools.partial(targets, anchors, boxes, labels)
    if callable(peers["torchvision"]):
        # As one graph: torch.compile then takes the number of low-quality matches as unknown.
        compiled = functools.partial(torch.compile(torchvision_targets, fullgraph=True), anchors, boxes, labels)
        peers["torchvision compiled"] = not_compiled(device, timed, batch, case) or compiled

    batch, pairs = len(boxes), len(anchors) * sum(len(image) for image in boxes)
    compare(
        f"assign_targets {case if timed else 'smoke'}{' in a graph' if in_graph else ''}",
        captured(ours) if in_graph else ours,
        peers,
        agree,
        elements=pairs,
        bytes=anchors.numel() * 4 + 2 * 4 * batch * len(anchors),
        dtype="float32",
    )


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("800x1344 B=1 M=50", torch.float32),
        ("800x1344 B=1 M=50", torch.float64),
        ("800x1344 B=16 M=8", torch.float32),
        ("240x320 B=16 M=12", torch.float32),
    ],
)
def test_match_anchors(compare, captured, device, timed, case, dtype, in_graph):
    """The matcher alone, without labels."""
    anchors, boxes, _ = make_case(CASES[case] if timed else SMOKE, device)
    anchors, boxes = anchors.to(dtype), [image.to(dtype) for image in boxes]

    def ours():
        return retinanet_ext.match_anchors(anchors, boxes, policy="torchvision")

    peers = {"torchvision": "torchvision is not installed"}
    if importlib.util.find_spec("torchvision") is not None:
        peers["torchvision"] = functools.partial(torchvision_matches, anchors, boxes)
        peers["torchvision compiled"] = "as that of assign_targets, nearly all of which is this matcher"
    name = str(dtype).removeprefix("torch.")
    compare(
        f"match_anchors {case if timed else 'smoke'}{'' if name == 'float32' else ' ' + name}"
        f"{' in a graph' if in_graph else ''}",
        captured(ours) if in_graph else ours,
        peers,
        agree,
        elements=len(anchors) * sum(len(image) for image in boxes),
        bytes=anchors.numel() * anchors.element_size() + 4 * len(boxes) * len(anchors),
        dtype=name,
    )
