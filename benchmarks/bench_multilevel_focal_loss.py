"""multilevel_focal_loss over a feature pyramid, forward, and forward with backward, beside what torchvision does.

torchvision's RetinaNet permutes and concatenates the levels, then sums torchvision.ops.sigmoid_focal_loss image by
image. Its dense targets are made before the clock starts.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

import retinanet_ext
from retinanet_ext.reference.focal_loss import anchor_rows

A = 9


class Pyramid(NamedTuple):
    """Level sizes, batch, classes."""

    sizes: Sequence[tuple[int, int]]
    batch: int
    classes: int = 80


VGA = ((60, 80), (30, 40), (15, 20), (8, 10), (4, 5))  # a 480 x 640 image
COCO = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # 800 x 1333, padded to 1344
SQUARE = ((100, 100), (50, 50), (25, 25), (13, 13), (7, 7))  # 800 x 800, with OpenImages' classes
PYRAMIDS = {
    "480x640 B=1": Pyramid(VGA, 1),
    "480x640 B=4": Pyramid(VGA, 4),
    "800x1344 B=1": Pyramid(COCO, 1),
    "800x1344 B=16": Pyramid(COCO, 16),
    "800x1344 B=64": Pyramid(COCO, 64),
    "800x800 B=1 K=264": Pyramid(SQUARE, 1, 264),
    "800x800 B=16 K=264": Pyramid(SQUARE, 16, 264),
}
SMOKE_SIZES = ((6, 8), (3, 4), (2, 2))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def left_out(pyramid, dtype, layout, direction, device):
    """Why a case is not timed, or None: what says more at a price is measured in the form that training has."""
    batch, classes = PYRAMIDS[pyramid][1:]
    as_trained = layout == "channels_last" and direction == "forward+backward"
    if device.type == "cpu":
        if batch > 4:
            return "a batch of 16 takes the CPU peers seconds a call; four images say as much"
        if (batch > 1 or classes > 80) and not (as_trained and dtype != torch.float16):
            return "several images, and 264 classes, take the CPU peers a second a call: timed as trained alone"
        if dtype == torch.float16 and not (as_trained and pyramid == "800x1344 B=1"):
            return "float16 is timed in one case of the CPU's: it is bfloat16's code but for the conversion"
    elif batch > 16 and not (as_trained and dtype != torch.float32):
        return "64 images are timed in halves, as trained alone"
    return None


def make_case(pyramid, dtype, layout, device):
    """Mostly confident background; of the anchors one in 1000 positive, one in 500 ignored; and the normalizer."""
    sizes, batch, classes = pyramid
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    levels = [
        (torch.randn(batch, A * classes, height, width, **random) - 4).to(dtype).contiguous(memory_format=layout)
        for height, width in sizes
    ]
    targets = torch.full((batch, A * sum(height * width for height, width in sizes)), -1, device=device)
    positive = torch.arange(0, targets.numel(), 1000, device=device)
    targets.view(-1)[positive] = torch.randint(0, classes, (len(positive),), **random)
    targets.view(-1)[7::500] = -2
    foreground = (targets >= 0).sum(1).clamp(min=1)
    return levels, targets, (batch * foreground).float()


def torchvision_loss(levels, dense, kept, normalizer, classes, loss):
    """As torchvision's RetinaNetClassificationHead: permute, concatenate, drop what is ignored, sum by image."""
    rows = torch.cat([anchor_rows(level, classes) for level in levels], dim=1)
    total = [
        loss(rows[image][kept[image]], dense[image][kept[image]], reduction="sum") / normalizer[image]
        for image in range(len(rows))
    ]
    return sum(total)


def make_call(function, levels, backward):
    if not backward:

        def forward():
            with torch.no_grad():
                return function(levels)

        return forward

    leaves = [level.detach().clone().requires_grad_() for level in levels]

    def forward_backward():
        for leaf in leaves:
            leaf.grad = None
        function(leaves).backward()
        return [leaf.grad for leaf in leaves]

    return forward_backward


def peers(levels, targets, normalizer, classes, backward, compiled="a smoke run compiles nothing"):
    """`compiled`: the reason why torchvision's is not timed compiled too; None where it is."""
    if importlib.util.find_spec("torchvision") is None:
        yield "torchvision", "torchvision is not installed"
        return
    from torchvision.ops import sigmoid_focal_loss

    positive = targets.clamp(min=0).unsqueeze(-1) == torch.arange(classes, device=targets.device)
    dense = (positive & (targets >= 0).unsqueeze(-1)).to(levels[0].dtype)
    function = functools.partial(
        torchvision_loss,
        dense=dense,
        kept=targets != -2,
        normalizer=normalizer,
        classes=classes,
        loss=sigmoid_focal_loss,
    )
    yield "torchvision", make_call(function, levels, backward)
    yield "torchvision compiled", compiled or make_call(torch.compile(function), levels, backward)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_multilevel_focal_loss(compare, device, timed, pyramid, dtype, layout, direction):
    reason = left_out(pyramid, dtype, layout, direction, device)
    if timed and reason:
        pytest.skip(reason)
    backward = direction == "forward+backward"
    batch, classes = PYRAMIDS[pyramid][1:]
    compiled = None if timed else "a smoke run compiles nothing"
    if device.type == "cpu" and (batch > 1 or classes > 80 or dtype == torch.float16):
        compiled = "compiling takes the CPU many seconds: done for one image and 80 classes, in float32 and bfloat16"
    elif batch > 16:
        compiled = "its loop over 64 images is unrolled into the graph: compiled for 16 at the most"
    case = PYRAMIDS[pyramid] if timed else Pyramid(SMOKE_SIZES, 2, classes)
    levels, targets, normalizer = make_case(case, dtype, LAYOUTS[layout], device)

    def ours(leaves):
        return retinanet_ext.multilevel_focal_loss(leaves, targets, normalizer=normalizer)

    def agree(a, b):
        # The peers compute in the dtype of the logits: this guards against comparing different things.
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        for one, other in zip(a, b, strict=True) if backward else [(a, b)]:
            atol = tolerance * other.abs().max().item()
            torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=atol)

    elements = sum(level.numel() for level in levels)
    width = levels[0].element_size()
    name = next(name for name, value in DTYPES.items() if value == dtype)
    compare(
        f"multilevel_focal_loss {pyramid if timed else 'smoke'} {layout} {name} {direction}",
        make_call(ours, levels, backward),
        dict(peers(levels, targets, normalizer, classes, backward, compiled)),
        agree,
        elements=elements,
        bytes=elements * width * (2 if backward else 1) + targets.numel() * targets.element_size(),
        special_ops=2.0 * elements,
        dtype=name,
    )
