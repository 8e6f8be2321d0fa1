"""The IoU of every pair of boxes, beside torchvision.ops.box_iou, equal to the bit before any clock starts, and what
torch.compile makes of it, which rounds otherwise."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import retinanet_ext

# Small calls, an image's proposals with its candidates, ground truth with the anchors of 800 x 1344 (and the other way
# round), square matrices.
SHAPES = [(10, 10), (300, 1000), (50, 200_000), (200_000, 8), (1000, 1000), (5000, 5000)]
SMOKE = (30, 40)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def random_boxes(count, dtype, device, seed):
    """Log-uniform sizes from 12 to 300 pixels at random places of an 800 x 1344 image."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.rand(count, 2, generator=generator) * 3.2 + 2.5).exp()
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([1344, 800]) - size).clamp(min=0)
    return torch.cat((corner, corner + size), dim=1).to(device, dtype)


def same_bits(ours, theirs):
    assert torch.equal(ours, theirs)


def nearly_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def nearly_same_halves(ours, theirs):
    """torchvision rounds areas and the overlaps' sides to the boxes' dtype, ours (float32) nothing."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


def close(ours, theirs):
    """Gradients: sums of thousands of terms, in another order."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def make_call(function, boxes, backward):
    if not backward:
        return lambda: function(*boxes)
    leaves = [one.clone().requires_grad_() for one in boxes]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def peers(boxes, backward, timed):
    if importlib.util.find_spec("torchvision") is None:
        yield "torchvision", "torchvision is not installed"
        return
    from torchvision.ops import box_iou

    yield "torchvision", make_call(box_iou, boxes, backward)
    # Compiling takes the CPU many seconds: there for large matrices alone.
    large = not backward and len(boxes[0]) * len(boxes[1]) >= 10_000_000 and boxes[0].element_size() > 2
    if timed and (boxes[0].is_cuda or large):
        yield "torchvision compiled", make_call(torch.compile(box_iou, dynamic=False), boxes, backward)
    else:
        yield "torchvision compiled", "compiling takes the CPU many seconds: done for ten million pairs, forward, alone"


def run_case(compare, device, timed, shape, dtype, backward):
    shape = shape if timed else SMOKE
    boxes = [random_boxes(count, dtype, device, seed) for seed, count in enumerate(shape)]
    name = next(name for name, value in {**DTYPES, **HALVES}.items() if value == dtype)
    others = dict(peers(boxes, backward, timed))
    half = dtype in HALVES.values()
    if not backward and not half and callable(others["torchvision"]):
        same_bits(retinanet_ext.box_iou(*boxes), others["torchvision"]())
    pairs, width = shape[0] * shape[1], boxes[0].element_size()
    compare(
        f"box_iou {shape[0]}x{shape[1]} {name} {'forward+backward' if backward else 'forward'}",
        make_call(retinanet_ext.box_iou, boxes, backward),
        others,
        close if backward else nearly_same_halves if half else nearly_same,
        elements=pairs,
        bytes=pairs * max(4, width) * (2 if backward else 1) + 4 * sum(shape) * width,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_box_iou(compare, device, timed, shape, dtype):
    run_case(compare, device, timed, shape, dtype, backward=False)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("shape", [(300, 1000), (50, 200_000)], ids=str)
def test_box_iou_of_halves(compare, device, timed, shape, dtype):
    run_case(compare, device, timed, shape, dtype, backward=False)


@pytest.mark.parametrize("shape", [(10, 10), (300, 1000)], ids=str)
def test_box_iou_with_backward(compare, device, timed, shape):
    run_case(compare, device, timed, shape, torch.float32, backward=True)
