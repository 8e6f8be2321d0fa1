"""The whole of post-processing, from a RetinaNet's head outputs to detections, beside torchvision's."""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from agreement import same_detections

import retinanet_ext
from retinanet_ext.models.anchors import AnchorGenerator
from retinanet_ext.reference.focal_loss import anchor_rows

A = 9
# Of 16 million logits 2,000 pass the threshold, as a trained detector's; or a hundred times as many, as early in
# training or with a lower threshold.
DENSITIES = {"": -7.35, " busy": -5.5}  # the mean of the logits
# Image, batch, classes.
CASES = {
    "800x1344 B=1 K=80": ((800, 1344), 1, 80),
    "800x1344 B=4 K=80": ((800, 1344), 4, 80),
    "800x1344 B=16 K=80": ((800, 1344), 16, 80),
    "800x1344 B=64 K=80": ((800, 1344), 64, 80),
    "800x800 B=1 K=264": ((800, 800), 1, 264),
    "800x800 B=16 K=264": ((800, 800), 16, 264),
    "800x800 B=64 K=264": ((800, 800), 64, 264),
}
SMOKE = ((64, 96), 2, 80)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATA_DEPENDENT = (
    "torch.compile refuses it as one graph: what it does next depends on how many logits pass the threshold"
)


def make_case(case, mean, dtype, device):
    (height, width), batch, classes = case
    grids = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]
    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "device": device}
    logits = [torch.randn(batch, A * classes, *grid, **random).mul_(1.2).add_(mean).to(dtype) for grid in grids]
    deltas = [torch.randn(batch, A * 4, *grid, **random).mul_(0.3).to(dtype) for grid in grids]
    anchors = AnchorGenerator()((height, width), grids).to(device)
    return logits, deltas, anchors, [(height, width)] * batch


def torchvision_call(logits, deltas, anchors, sizes, classes):
    """torchvision's method; its heads have permuted and joined each level's outputs by then, which is not counted."""
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.retinanet import RetinaNet

    model = SimpleNamespace(
        score_thresh=0.05,
        topk_candidates=1000,
        nms_thresh=0.5,
        detections_per_img=300,
        box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)),
    )
    outputs = {
        "cls_logits": [anchor_rows(level, classes).float() for level in logits],
        "bbox_regression": [anchor_rows(level, 4).float() for level in deltas],
    }
    split = list(anchors.split([level.shape[1] for level in outputs["bbox_regression"]]))
    return lambda: RetinaNet.postprocess_detections(model, outputs, [split] * len(sizes), sizes)


def agree(mine, theirs, open_share=0.0):
    """`open_share` of the detections may differ where logits tie: torchvision leaves the order of those open."""
    for boxes, scores, labels, count, other in zip(
        mine.boxes, mine.scores, mine.labels, mine.counts, theirs, strict=True
    ):
        count = int(count)
        torch.testing.assert_close(scores[:count], other["scores"], rtol=1e-5, atol=0)
        found = {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count]}
        same_detections(found, other, open_share=open_share)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("density", DENSITIES, ids=["sparse", "busy"])
@pytest.mark.parametrize("case", CASES)
def test_detect(compare, captured, device, timed, case, density, dtype, in_graph):
    image, batch, classes = CASES[case] if timed else SMOKE
    if timed and device.type == "cpu" and batch > 4:
        pytest.skip("batches beyond 4 take the CPU peer long, and say no more")
    if timed and batch > 16 and dtype != torch.bfloat16:
        pytest.skip("64 images are measured in bfloat16")
    if timed and dtype == torch.float16 and batch > 1 and device.type == "cpu":
        pytest.skip("of float16 one image says as much on the CPU")
    logits, deltas, anchors, sizes = make_case((image, batch, classes), DENSITIES[density], dtype, device)
    peers = {"torchvision": "torchvision is not installed", "torchvision compiled": DATA_DEPENDENT}
    if batch > 16:
        peers["torchvision"] = "its float32 logits and scores of 64 images take too much memory"
    elif importlib.util.find_spec("torchvision") is not None:
        peers["torchvision"] = torchvision_call(logits, deltas, anchors, sizes, classes)
    name = next(name for name, value in DTYPES.items() if value == dtype)
    elements = sum(level.numel() for level in logits)

    def ours():
        return retinanet_ext.detect(logits, deltas, anchors, sizes)

    compare(
        f"detect {case if timed else 'smoke'}{density} {name}{' in a graph' if in_graph else ''}",
        captured(ours) if in_graph else ours,
        peers,
        # Of the logits in bfloat16, with eight bits, many tie.
        functools.partial(agree, open_share=0.02 if dtype == torch.bfloat16 else 0.0),
        elements=elements,
        bytes=elements * logits[0].element_size(),
        dtype=name,
    )
