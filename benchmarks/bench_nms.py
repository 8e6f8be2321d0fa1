"""nms and batched_nms, beside mmcv's and torchvision's, which are detectron2's: over boxes of random size and place,
over those that a detector leaves around some objects, and over boxes that all stay."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch

import retinanet_ext

SIZES = (1000, 5000, 20000, 400_000)
CLASSES = 80


def make_case(count, device, kind="random", classes=CLASSES):
    """Boxes, scores of which no two are equal, labels.

    "random": of 5 to 105 pixels in an area of 1000 x 1000. "clustered": around 40 objects, each of one class, as they
    are where a detector has found them. "apart": none touches another one, so that all stay, and every pair is
    compared.
    """
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 1000
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 100 + 5), dim=1)
    scores = (torch.randperm(count, generator=generator) + 1) / count
    labels = torch.randint(0, classes, (count,), generator=generator)
    if kind == "apart":
        side = math.ceil(count**0.5)
        corner = torch.stack((torch.arange(count) % side, torch.arange(count) // side), dim=1) * 10.0
        boxes = torch.cat((corner, corner + 9), dim=1)
    elif kind == "clustered":
        objects = torch.randint(0, 40, (count,), generator=generator)
        size = ((torch.rand(40, 2, generator=generator) * 3.2 + 2.5).exp())[objects]
        corner = (torch.rand(40, 2, generator=generator) * 900)[objects]
        moved = torch.randn(count, 4, generator=generator) * 0.15 * size.repeat(1, 2)
        boxes = torch.cat((corner, corner + size), dim=1) + moved
        boxes = torch.cat((torch.min(boxes[:, :2], boxes[:, 2:]), torch.max(boxes[:, :2], boxes[:, 2:])), dim=1)
        labels = (objects * 7) % classes
    return boxes.to(device), scores.to(device), labels.to(device)


def agree(mine, other):
    assert torch.equal(mine, other)


def mmcv_peer(variant, boxes, scores, labels):
    if importlib.util.find_spec("mmcv") is None:
        return "mmcv is not installed"
    if importlib.util.find_spec("mmcv._ext") is None:
        return "this mmcv has no compiled operators"
    from mmcv.ops import batched_nms, nms

    if variant == "nms":
        return lambda: nms(boxes, scores, 0.5)[1]
    return lambda: batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.5})[1]


ONE_OPERATOR = "torchvision's nms is one compiled operator: nothing of it is left to torch.compile"


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("variant", ["nms", "batched_nms"])
def test_nms(compare, device, timed, variant, count):
    if timed and device.type == "cpu" and count > 20000:
        pytest.skip("400,000 boxes take the CPU peer minutes a call; 20,000 say as much")
    run_case(compare, device, timed, variant, count)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("clustered", torch.float32),
        ("apart", torch.float32),
        ("random", torch.float64),
        ("clustered", torch.float64),
    ],
)
@pytest.mark.parametrize("variant", ["nms", "batched_nms"])
def test_nms_of_other_boxes(compare, device, timed, variant, kind, dtype):
    run_case(compare, device, timed, variant, 5000, kind, dtype)


def run_case(compare, device, timed, variant, count, kind="random", dtype=torch.float32):
    boxes, scores, labels = make_case(count if timed else 200, device, kind)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    arguments = (boxes, scores, 0.5) if variant == "nms" else (boxes, scores, labels, 0.5)
    peers = {
        "torchvision": "torchvision is not installed",
        "torchvision compiled": ONE_OPERATOR,
        "mmcv": mmcv_peer(variant, boxes, scores, labels),
    }
    if importlib.util.find_spec("torchvision") is not None:
        peers["torchvision"] = functools.partial(torchvision_function(variant, kind), *arguments)
    kept = len(getattr(retinanet_ext, variant)(*arguments))
    name = str(dtype).removeprefix("torch.")
    others = "".join(f" {one}" for one, usual in ((kind, "random"), (name, "float32")) if one != usual)
    compare(
        f"{variant} {count if timed else 'smoke'}{others}",
        lambda: getattr(retinanet_ext, variant)(*arguments),
        peers,
        agree,
        elements=len(boxes),
        bytes=len(boxes) * (5 * boxes.element_size() + (0 if variant == "nms" else 8)) + 8 * kept,
        dtype=name,
    )


def torchvision_function(variant, kind="random"):
    """Of crowded boxes its way of label by label, which computes what ours does. Its other one, which moves the labels
    apart, loses digits by that, and with so many pairs near the threshold some fall on its other side."""
    from torchvision.ops import batched_nms, boxes, nms

    if variant == "nms":
        return nms
    return boxes._batched_nms_vanilla if kind == "clustered" else batched_nms


def suppress_each(boxes, scores, labels, most, kind="random"):
    """torchvision, image by image."""
    function = torchvision_function("batched_nms", kind)
    return [function(*image, 0.5)[:most] for image in zip(boxes, scores, labels, strict=True)]


def agree_padded(mine, theirs):
    for row, count, other in zip(mine.indices, mine.counts, theirs, strict=True):
        assert torch.equal(row[: int(count)], other)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", ["random", "clustered", "apart"])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_batched_nms_padded(compare, captured, device, timed, batch, kind, in_graph):
    """What post-processing leaves to suppress: 5 levels of 1,000 candidates an image. "apart" is the worst case: one
    class, and all of them stay."""
    if timed and device.type == "cpu" and kind == "apart" and batch > 1:
        pytest.skip("12.5 million pairs an image: one image says as much on the CPU")
    count, most = (5000, 5000 if kind == "apart" else 300) if timed else (200, 50)
    boxes, scores, labels = (
        torch.stack([value.roll(37 * image, 0) for image in range(batch)]) for value in make_case(count, device, kind)
    )
    if kind == "apart":
        labels = torch.zeros_like(labels)

    def ours():
        return retinanet_ext.batched_nms_padded(boxes, scores, labels, 0.5, most)

    peers = {"torchvision": "torchvision is not installed", "torchvision compiled": ONE_OPERATOR}
    if importlib.util.find_spec("torchvision") is not None:
        peers["torchvision"] = lambda: suppress_each(boxes, scores, labels, most, kind)
    compare(
        f"batched_nms_padded B={batch} {count if timed else 'smoke'}{'' if kind == 'random' else ' ' + kind}"
        f"{' in a graph' if in_graph else ''}",
        captured(ours) if in_graph else ours,
        peers,
        agree_padded,
        elements=batch * count,
        bytes=batch * (count * 28 + most * 8),
        dtype="float32",
    )
