"""nms and batched_nms over boxes of random size and place, beside mmcv's and torchvision's, which are detectron2's."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import retinanet_ext

SIZES = (1000, 5000, 20000, 400_000)
CLASSES = 80


def make_case(count, device):
    """Boxes of 5 to 105 pixels in an area of 1000 x 1000, no two scores equal."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 1000
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 100 + 5), dim=1)
    scores = (torch.randperm(count, generator=generator) + 1) / count
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
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
    boxes, scores, labels = make_case(count if timed else 200, device)
    arguments = (boxes, scores, 0.5) if variant == "nms" else (boxes, scores, labels, 0.5)
    peers = {
        "torchvision": "torchvision is not installed",
        "torchvision compiled": ONE_OPERATOR,
        "mmcv": mmcv_peer(variant, boxes, scores, labels),
    }
    if importlib.util.find_spec("torchvision") is not None:
        import torchvision

        peers["torchvision"] = lambda: getattr(torchvision.ops, variant)(*arguments)
    kept = len(getattr(retinanet_ext, variant)(*arguments))
    compare(
        f"{variant} {count if timed else 'smoke'}",
        lambda: getattr(retinanet_ext, variant)(*arguments),
        peers,
        agree,
        elements=len(boxes),
        bytes=len(boxes) * (20 if variant == "nms" else 28) + 8 * kept,
        dtype="float32",
    )


def suppress_each(boxes, scores, labels, most):
    """torchvision, image by image."""
    from torchvision.ops import batched_nms

    return [batched_nms(*image, 0.5)[:most] for image in zip(boxes, scores, labels, strict=True)]


def agree_padded(mine, theirs):
    for row, count, other in zip(mine.indices, mine.counts, theirs, strict=True):
        assert torch.equal(row[: int(count)], other)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_batched_nms_padded(compare, captured, device, timed, batch, in_graph):
    """What post-processing leaves to suppress: 5 levels of 1,000 candidates an image."""
    count, most = (5000, 300) if timed else (200, 50)
    boxes, scores, labels = (
        torch.stack([value.roll(37 * image, 0) for image in range(batch)]) for value in make_case(count, device)
    )

    def ours():
        return retinanet_ext.batched_nms_padded(boxes, scores, labels, 0.5, most)

    peers = {"torchvision": "torchvision is not installed", "torchvision compiled": ONE_OPERATOR}
    if importlib.util.find_spec("torchvision") is not None:
        peers["torchvision"] = lambda: suppress_each(boxes, scores, labels, most)
    compare(
        f"batched_nms_padded B={batch} {count if timed else 'smoke'}{' in a graph' if in_graph else ''}",
        captured(ours) if in_graph else ours,
        peers,
        agree_padded,
        elements=batch * count,
        bytes=batch * (count * 28 + most * 8),
        dtype="float32",
    )
