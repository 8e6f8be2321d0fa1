"""The whole of post-processing, from a RetinaNet's head outputs to detections, beside torchvision's."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

import retinanet_ext
from retinanet_ext.models.anchors import AnchorGenerator
from retinanet_ext.reference.focal_loss import anchor_rows

A, K = 9, 80
CASES = {"800x1344 B=1": ((800, 1344), 1), "800x1344 B=4": ((800, 1344), 4)}
SMOKE = ((64, 96), 2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_case(case, dtype, device):
    """Logits of which about one in 60 passes the threshold, as a trained detector's on a busy image."""
    (height, width), batch = case
    grids = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(batch, A * K, *grid, generator=generator) * 1.2 - 5.5 for grid in grids]
    deltas = [torch.randn(batch, A * 4, *grid, generator=generator) * 0.3 for grid in grids]
    anchors = AnchorGenerator()((height, width), grids).to(device)
    return (
        [level.to(device, dtype) for level in logits],
        [level.to(device, dtype) for level in deltas],
        anchors,
        [(height, width)] * batch,
    )


def torchvision_call(logits, deltas, anchors, sizes):
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
        "cls_logits": [anchor_rows(level, K).float() for level in logits],
        "bbox_regression": [anchor_rows(level, 4).float() for level in deltas],
    }
    split = list(anchors.split([level.shape[1] for level in outputs["bbox_regression"]]))
    return lambda: RetinaNet.postprocess_detections(model, outputs, [split] * len(sizes), sizes)


def agree(mine, theirs):
    for image, other in enumerate(theirs):
        count = int(mine.counts[image])
        # Logits that tie are ordered in one way here and left open there: the scores are the same whatever the order.
        torch.testing.assert_close(mine.scores[image, :count], other["scores"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_detect(compare, device, timed, case, dtype):
    if device.type == "cuda":
        pytest.skip("detect has no CUDA kernel yet: it would compare plain PyTorch")
    logits, deltas, anchors, sizes = make_case(CASES[case] if timed else SMOKE, dtype, device)
    peers = {"torchvision": "torchvision is not installed"}
    if importlib.util.find_spec("torchvision") is not None:
        peers["torchvision"] = torchvision_call(logits, deltas, anchors, sizes)
    name = next(name for name, value in DTYPES.items() if value == dtype)
    elements = sum(level.numel() for level in logits)
    compare(
        f"detect {case if timed else 'smoke'} {name}",
        lambda: retinanet_ext.detect(logits, deltas, anchors, sizes),
        peers,
        agree,
        elements=elements,
        bytes=elements * logits[0].element_size(),
        dtype=name,
    )
