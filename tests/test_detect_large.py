"""detect on the CPU at its largest: every logit a candidate, more logits than 32 bits count, and its memory."""

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes
from rank_processes import in_processes

from retinanet_ext import detect
from retinanet_ext.models.anchors import AnchorGenerator
from retinanet_ext.reference.anchor_match import decode_boxes
from retinanet_ext.reference.nms import batched_nms

A = 9
IMAGE = (800, 1344)
GRIDS = [(-(-IMAGE[0] // stride), -(-IMAGE[1] // stride)) for stride in (8, 16, 32, 64, 128)]
CPU = torch.device("cpu")
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def anchors():
    return AnchorGenerator()(IMAGE, GRIDS)


def as_rows(level, columns):
    """``[1, A * columns, H, W]`` to ``[H * W * A, columns]``, in the order of the anchors."""
    return level.view(A, columns, -1).permute(2, 0, 1).reshape(-1, columns)


def test_every_one_of_16_million_logits_is_a_candidate(anchors):
    """Against torch.topk of each level and the reference for the rest. No two logits of a level are equal."""
    classes, topk, most = 80, 1000, 300
    generator = torch.Generator().manual_seed(0)
    logits, deltas, chosen, first = [], [], [], 0
    for grid in GRIDS:
        count = A * classes * grid[0] * grid[1]
        mixed = torch.arange(count) * 7_368_787 % (1 << 24)  # an odd factor: no number twice
        logits.append((mixed.float() / (1 << 22)).view(1, A * classes, *grid))  # 0 to 4: scores of 0.5 to 0.98
        deltas.append(torch.randn(1, A * 4, *grid, generator=generator) * 0.3)
        best = as_rows(logits[-1], classes).flatten().topk(topk)
        chosen.append((best.values, best.indices + first * classes))
        first += A * grid[0] * grid[1]
    assert sum(level.numel() for level in logits) > 16e6
    found = detect(logits, deltas, anchors, [IMAGE], topk_per_level=topk, max_detections=most)

    values, indices = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    labels = indices % classes
    rows = torch.cat([as_rows(level, 4) for level in deltas])[indices // classes]
    boxes = decode_boxes(rows, anchors[indices // classes])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([IMAGE[1], IMAGE[0]] * 2).float())
    kept = batched_nms(boxes, values, labels, 0.5)[:most]
    assert len(kept) == most == found.counts.item()
    assert torch.equal(found.indices[0], indices[kept])
    assert torch.equal(found.labels[0], labels[kept])
    torch.testing.assert_close(found.scores[0], values[kept].sigmoid(), rtol=2**-22, atol=0)
    torch.testing.assert_close(found.boxes[0], boxes[kept], rtol=0, atol=4 * 1344 * 2**-23)


def zeros(*shape):
    """bfloat16, of pages that are the system's page of zeros until they are written: read, they take no memory."""
    try:
        return torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16)
    except MemoryError:
        pytest.skip(f"the system refuses {2 * np.prod(shape, dtype=float) / 1e9:.1f} GB of address space")


@pytest.fixture(scope="module")
def free_zeros():
    """Skips where pages that are only read take memory, of which there may not be enough."""
    held = zeros(32 * MEGABYTE)
    peak = peak_bytes(lambda: held.sum(), CPU)
    if peak is None or peak > 16 * MEGABYTE:
        pytest.skip("needs a system (Linux) whose untouched pages take no memory, and that counts what they take")


@pytest.mark.parametrize(("layout", "batch"), [("maps", 64), ("rows", 84)])
def test_more_logits_than_32_bits_count(layout, batch, anchors, free_zeros):
    """264 classes: 3.4 G logits at batch 64, and 4.5 G in one tensor, more than 2³² elements. All are 0, whose score is
    0.5, but for those planted at the ends of images and around 2³¹ and 2³² elements."""
    classes = 264
    if layout == "maps":
        logits = [zeros(batch, A * classes, *grid) for grid in GRIDS]
        deltas = [zeros(batch, A * 4, *grid) for grid in GRIDS]
    else:
        logits, deltas = [zeros(batch, len(anchors), classes)], [zeros(batch, len(anchors), 4)]
    assert sum(level.numel() for level in logits) > (2**32 if layout == "rows" else 3.4e9)

    planted = [[] for _ in range(batch)]  # of each image: logit, flat index
    first = 0
    for level in logits:
        size = level[0].numel()
        places = [image * size + place for image in (0, 31, batch - 1) for place in (0, size // 3, size - 1)]
        places += [limit + near for limit in (2**31, 2**32) for near in (-1, 0) if limit < level.numel()]
        for number, place in enumerate(places):
            logit = 1 + number / 16  # exact in bfloat16
            level.view(-1)[place] = logit
            image, rest = divmod(place, size)
            if layout == "maps":
                channel, cell = divmod(rest, size // (A * classes))
                anchor, label = divmod(channel, classes)
                rest = (cell * A + anchor) * classes + label
            planted[image].append((-logit, first * classes + rest))
        first += size // classes
    assert sum(map(len, planted)) == (47 if layout == "maps" else 13)

    results = []
    call = lambda: results.append(detect(logits, deltas, anchors, [IMAGE] * batch, score_thresh=0.55, nms_thresh=1.0))  # noqa: E731
    assert peak_bytes(call, CPU) < 64 * MEGABYTE
    (found,) = results
    assert found.counts.tolist() == [len(image) for image in planted]
    for image, right in enumerate(planted):
        right = sorted(right)
        indices = torch.tensor([index for _, index in right], dtype=torch.int64)
        assert torch.equal(found.indices[image, : len(right)], indices)
        scores = -torch.tensor([logit for logit, _ in right])
        torch.testing.assert_close(found.scores[image, : len(right)], scores.sigmoid(), rtol=2**-22, atol=0)
        boxes = anchors[indices // classes].clamp(min=0).minimum(torch.tensor([IMAGE[1], IMAGE[0]] * 2).float())
        assert torch.equal(found.boxes[image, : len(right)], boxes)  # deltas are 0


def peak_of(dtype, batch, topk):
    """Of a call for which every one of 16 M logits of an image is a candidate; and how many candidates may be kept."""
    logits = [torch.ones(batch, A * 80, *grid, dtype=dtype) for grid in GRIDS]
    deltas = [torch.zeros(batch, A * 4, *grid, dtype=dtype) for grid in GRIDS]
    anchors = AnchorGenerator()(IMAGE, GRIDS).to(dtype)
    call = lambda: detect(logits, deltas, anchors, [IMAGE] * batch, topk_per_level=topk)  # noqa: E731
    return peak_bytes(call, CPU), batch * sum(min(topk, level[0].numel()) for level in logits)


CALLS = [
    (torch.float32, 1, 1000),
    (torch.float32, 1, 100_000),
    (torch.float32, 2, 100_000),
    (torch.float64, 1, 100_000),
]


def peaks():
    peak_of(torch.float32, 1, 10)
    return [peak_of(*call) for call in CALLS]


def test_memory_follows_the_candidates_that_are_kept():
    """What docs/operators.md states. All candidates of an image would take 390 MB. In a process of its own, in which
    nothing has changed the allocator."""
    (measured,) = in_processes(1, peaks, start="spawn")
    if measured[0][0] is None:
        pytest.skip("only Linux counts a process's pages")
    for (dtype, batch, topk), (peak, kept) in zip(CALLS, measured, strict=True):
        bytes_each = 192 if dtype == torch.float64 else 160
        assert peak < bytes_each * (kept + topk) + MEGABYTE, (dtype, batch, topk)  # a megabyte of anything else
        if topk == 100_000:
            assert peak > 24 * kept  # it was measured
