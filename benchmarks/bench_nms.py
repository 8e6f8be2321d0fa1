"""nms and batched_nms beside torchvision's, over boxes of random size and place."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import retinanet_ext

SIZES = (1000, 5000, 20000)
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


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("variant", ["nms", "batched_nms"])
def test_nms(compare, device, timed, variant, count):
    if device.type == "cuda":
        pytest.skip(f"{variant} has no CUDA kernel yet: it would compare plain PyTorch")
    boxes, scores, labels = make_case(count if timed else 200, device)
    arguments = (boxes, scores, 0.5) if variant == "nms" else (boxes, scores, labels, 0.5)
    peers = {"torchvision": "torchvision is not installed"}
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
