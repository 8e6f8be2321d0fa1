"""box_regression_loss over a feature pyramid, forward, and forward with backward, beside what torchvision does.

torchvision's RetinaNet permutes and concatenates the levels, then, image by image, picks the foreground by indices
(which waits for the device), encodes its boxes with BoxCoder and sums torch.nn.functional.l1_loss, or smooth_l1_loss;
its v2 decodes them and sums the generalized IoU loss.
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

import retinanet_ext
from retinanet_ext.reference.focal_loss import anchor_rows

A, BOXES, BETA = 9, 20, 1 / 9
# Level sizes, batch: a 480 x 640 image, COCO's 800 x 1333 (padded to 1344).
PYRAMIDS = {
    "480x640 B=1": (((60, 80), (30, 40), (15, 20), (8, 10), (4, 5)), 1),
    "800x1344 B=1": (((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), 1),
    "800x1344 B=16": (((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), 16),
    "800x1344 B=64": (((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), 64),
}
SMOKE_PYRAMID = (((6, 8), (3, 4), (2, 2)), 2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def random_boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 800
    return torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=generator) * 300], dim=1)


def make_case(pyramid, dtype, layout, device, boxes=BOXES):
    """Of the anchors one in 1000 is foreground, in runs of nine, as an object's anchors lie; and the normalizer."""
    sizes, batch = pyramid
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(batch, 4 * A, height, width, generator=generator).to(device, dtype).contiguous(memory_format=layout)
        for height, width in sizes
    ]
    count = A * sum(height * width for height, width in sizes)
    matched = torch.full((batch * count // A, A), -1, dtype=torch.int32)
    runs = torch.arange(0, len(matched), min(1000, len(matched) // 4))
    matched[runs] = torch.randint(0, boxes, (len(runs), 1), generator=generator, dtype=torch.int32)
    matched = matched.view(batch, count)
    normalizer = (batch * (matched >= 0).sum(1).clamp(min=1)).float()
    gt_boxes = [random_boxes(boxes, generator).to(device) for _ in range(batch)]
    anchors = random_boxes(count, generator).to(device)
    return levels, anchors, gt_boxes, matched.to(device), normalizer.to(device)


def torchvision_loss(levels, anchors, gt_boxes, matched, normalizer, coder, loss=torch.nn.functional.l1_loss):
    """As torchvision's RetinaNetRegressionHead: permute, concatenate, gather the foreground of each image."""
    rows = torch.cat([anchor_rows(level, 4) for level in levels], dim=1)
    losses = []
    for image, boxes in enumerate(gt_boxes):
        foreground = torch.where(matched[image] >= 0)[0]
        expected = coder.encode_single(boxes[matched[image][foreground].long()], anchors[foreground])
        difference = loss(rows[image][foreground], expected, reduction="sum")
        losses.append(difference / normalizer[image])
    return sum(losses)


def torchvision_giou(levels, anchors, gt_boxes, matched, normalizer, coder):
    """As the RetinaNetRegressionHead of torchvision's v2."""
    from torchvision.ops import generalized_box_iou_loss

    rows = torch.cat([anchor_rows(level, 4) for level in levels], dim=1)
    losses = []
    for image, boxes in enumerate(gt_boxes):
        foreground = torch.where(matched[image] >= 0)[0]
        predicted = coder.decode_single(rows[image][foreground], anchors[foreground])
        expected = boxes[matched[image][foreground].long()]
        losses.append(generalized_box_iou_loss(predicted, expected, reduction="sum", eps=1e-7) / normalizer[image])
    return sum(losses)


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


def peers(levels, others, backward, loss, compiled="a smoke run compiles nothing"):
    """`compiled`: the reason why torchvision's is not timed compiled too; None where it is."""
    if importlib.util.find_spec("torchvision") is None:
        yield "torchvision", "torchvision is not installed"
        return
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    anchors, gt_boxes, matched, normalizer = others
    function = functools.partial(
        {
            "l1": torchvision_loss,
            "smooth_l1": functools.partial(
                torchvision_loss, loss=functools.partial(torch.nn.functional.smooth_l1_loss, beta=BETA)
            ),
            "giou": torchvision_giou,
        }[loss],
        anchors=anchors,
        gt_boxes=gt_boxes,
        matched=matched,
        normalizer=normalizer,
        coder=coder,
    )
    yield "torchvision", make_call(function, levels, backward)
    # As one graph: torch.compile then takes the numbers of foreground anchors as unknown.
    yield (
        "torchvision compiled",
        compiled or make_call(torch.compile(function, fullgraph=True), levels, backward),
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_box_regression_loss(compare, device, timed, pyramid, dtype, layout, direction):
    run_case(compare, device, timed, pyramid, dtype, layout, direction, "l1")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_giou(compare, device, timed, pyramid, direction):
    run_case(compare, device, timed, pyramid, torch.float32, "channels_last", direction, "giou")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("pyramid", ["480x640 B=1", "800x1344 B=1", "800x1344 B=16"])
def test_smooth_l1(compare, device, timed, pyramid, direction):
    run_case(compare, device, timed, pyramid, torch.float32, "channels_last", direction, "smooth_l1")


def run_case(compare, device, timed, pyramid, dtype, layout, direction, loss):
    backward = direction == "forward+backward"
    batch = PYRAMIDS[pyramid][1]
    if timed and device.type == "cpu" and batch > 16:
        pytest.skip("16 images say as much on the CPU")
    if timed and device.type == "cpu" and dtype == torch.float16 and (batch > 1 or layout == "contiguous"):
        pytest.skip("of float16 one image, channels_last, says as much on the CPU")
    compiled = None if timed else "a smoke run compiles nothing"
    if batch > 1:
        compiled = "its loop over the images is unrolled into the graph: compiled for one image alone"
    elif device.type == "cpu" and (pyramid, dtype, layout, loss) != (
        "800x1344 B=1",
        torch.float32,
        "channels_last",
        "l1",
    ):
        compiled = "compiling takes the CPU many seconds: done for 800x1344 B=1 channels_last float32, l1, alone"
    levels, *others = make_case(PYRAMIDS[pyramid] if timed else SMOKE_PYRAMID, dtype, LAYOUTS[layout], device)
    anchors, gt_boxes, matched, normalizer = others

    def ours(leaves):
        return retinanet_ext.box_regression_loss(leaves, anchors, gt_boxes, matched, loss, BETA, normalizer=normalizer)

    def agree(a, b):
        # The peer rounds halves to their dtype on the way: this guards against comparing different things.
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        for one, other in zip(a, b, strict=True) if backward else [(a, b)]:
            atol = tolerance * other.abs().max().item()
            torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=atol)

    elements = sum(level.numel() for level in levels)
    gradient = elements * levels[0].element_size() if backward else 0
    name = next(name for name, value in DTYPES.items() if value == dtype)
    case = f"{'' if loss == 'l1' else loss + ' '}{pyramid if timed else 'smoke'}"
    compare(
        f"box_regression_loss {case} {layout} {name} {direction}",
        make_call(ours, levels, backward),
        dict(peers(levels, others, backward, loss, compiled)),
        agree,
        elements=elements,
        bytes=gradient + matched.numel() * matched.element_size() * (2 if backward else 1),
        dtype=name,
        foreground=int((matched >= 0).sum()),
    )
