"""multilevel_focal_loss over a feature pyramid, forward, and forward with backward, beside what torchvision does.

torchvision's RetinaNet permutes and concatenates the levels, then sums torchvision.ops.sigmoid_focal_loss image by
image. Its dense targets are made before the clock starts.
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

import retinanet_ext
from retinanet_ext.reference.focal_loss import anchor_rows

A, K = 9, 80
# Level sizes, batch: a 480 x 640 image, COCO's 800 x 1333 (padded to 1344).
PYRAMIDS = {
    "480x640 B=1": (((60, 80), (30, 40), (15, 20), (8, 10), (4, 5)), 1),
    "800x1344 B=1": (((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), 1),
    "800x1344 B=16": (((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), 16),
}
SMOKE_PYRAMID = (((6, 8), (3, 4), (2, 2)), 2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def make_case(pyramid, dtype, layout, device):
    """Mostly confident background; of the anchors one in 1000 positive, one in 500 ignored; and the normalizer."""
    sizes, batch = pyramid
    generator = torch.Generator().manual_seed(0)
    levels = [
        (torch.randn(batch, A * K, height, width, generator=generator) - 4)
        .to(device, dtype)
        .contiguous(memory_format=layout)
        for height, width in sizes
    ]
    targets = torch.full((batch, A * sum(height * width for height, width in sizes)), -1)
    positive = torch.arange(0, targets.numel(), 1000)
    targets.view(-1)[positive] = torch.randint(0, K, (len(positive),), generator=generator)
    targets.view(-1)[7::500] = -2
    foreground = (targets >= 0).sum(1).clamp(min=1)
    return levels, targets.to(device), (batch * foreground).float().to(device)


def torchvision_loss(levels, dense, kept, normalizer, loss):
    """As torchvision's RetinaNetClassificationHead: permute, concatenate, drop what is ignored, sum by image."""
    rows = torch.cat([anchor_rows(level, K) for level in levels], dim=1)
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


def peers(levels, targets, normalizer, backward, timed):
    if importlib.util.find_spec("torchvision") is None:
        yield "torchvision", "torchvision is not installed"
        return
    from torchvision.ops import sigmoid_focal_loss

    positive = targets.clamp(min=0).unsqueeze(-1) == torch.arange(K, device=targets.device)
    dense = (positive & (targets >= 0).unsqueeze(-1)).to(levels[0].dtype)
    function = functools.partial(
        torchvision_loss, dense=dense, kept=targets != -2, normalizer=normalizer, loss=sigmoid_focal_loss
    )
    yield "torchvision", make_call(function, levels, backward)
    if timed:
        compiled = torch.compile(functools.partial(function, loss=sigmoid_focal_loss))
        yield "torchvision compiled", make_call(compiled, levels, backward)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_multilevel_focal_loss(compare, device, timed, pyramid, dtype, layout, direction):
    if timed and device.type == "cpu" and PYRAMIDS[pyramid][1] > 1:
        pytest.skip("a batch of 16 takes the CPU peers seconds a call; one image says as much")
    backward = direction == "forward+backward"
    levels, targets, normalizer = make_case(
        PYRAMIDS[pyramid] if timed else SMOKE_PYRAMID, dtype, LAYOUTS[layout], device
    )

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
        dict(peers(levels, targets, normalizer, backward, timed)),
        agree,
        elements=elements,
        bytes=elements * width * (2 if backward else 1) + targets.numel() * targets.element_size(),
        special_ops=2.0 * elements,
        dtype=name,
    )
