"""How the cost of each operator grows with one number, beside torchvision's; `python -m benchmarks.report` plots it.

Over three decades and more of it, or of the anchors, which go with the square of an image's side. `match_anchors`,
which is `assign_targets` without its labels, has no curve of its own.

Where a call of torchvision's takes more than a second it is timed once. Where it would hold more memory than there is,
or runs out of it, its line ends, and the results say at what size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import bench_anchor_match
import bench_box_coder
import bench_box_iou
import bench_box_loss
import bench_detect
import bench_focal_loss
import bench_multilevel_focal_loss
import bench_nms
import pytest
import torch
from peak_memory import out_of_memory, system_memory

import retinanet_ext

Side = Callable[[], object]


@dataclass(frozen=True)
class Curve:
    """`make(x, device)`: our call, what makes torchvision's (which may take its memory), the comparison, elements and
    bytes. `holds(x)`: bytes that torchvision's call holds at least, where they may be more than a machine has."""

    axis: str
    values: tuple[int, ...]
    make: Callable[[int, torch.device], tuple[Side, Callable[[], Side], Callable, int, int]]
    holds: Callable[[int], int] = lambda x: 0


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def focal(rows: int, classes: int, device: torch.device):
    logits, targets = bench_focal_loss.make_case(rows, classes, torch.float32, device)
    ours = bench_focal_loss.make_call(
        functools.partial(retinanet_ext.sigmoid_focal_loss, reduction="sum"), logits, targets, backward=True
    )

    def peer():
        from torchvision.ops import sigmoid_focal_loss

        dense = bench_focal_loss.one_hot(targets, classes, torch.float32)
        function = functools.partial(sigmoid_focal_loss, reduction="sum")
        return bench_focal_loss.make_call(function, logits, dense, backward=True)

    def agree(mine, other):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())

    return ours, peer, agree, logits.numel(), 8 * logits.numel() + 8 * rows


def grids_of(side: int) -> list[tuple[int, int]]:
    """Of P3 to P7 of a square image."""
    return [(-(-side // stride), -(-side // stride)) for stride in (8, 16, 32, 64, 128)]


def agree_by_level(mine, other):
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())


def focal_of_levels(side: int, batch: int, device: torch.device, classes: int = 80):
    bench = bench_multilevel_focal_loss
    pyramid = bench.Pyramid(grids_of(side), batch, classes)
    levels, targets, normalizer = bench.make_case(pyramid, torch.float32, torch.contiguous_format, device)

    def loss(leaves):
        return retinanet_ext.multilevel_focal_loss(leaves, targets, normalizer=normalizer)

    def peer():
        return dict(bench.peers(levels, targets, normalizer, pyramid.classes, backward=True))["torchvision"]

    elements = sum(level.numel() for level in levels)
    return (
        bench.make_call(loss, levels, backward=True),
        peer,
        agree_by_level,
        elements,
        8 * elements + 8 * targets.numel(),
    )


def matching(image: tuple[int, int], count: int, device: torch.device, batch: int = 1):
    anchors, boxes, labels = bench_anchor_match.make_case((image, batch, count), device)

    def ours():
        return retinanet_ext.assign_targets(anchors, boxes, labels, policy="torchvision")

    def peer():
        return functools.partial(bench_anchor_match.torchvision_targets, anchors, boxes, labels)

    def agree(mine, other):
        for one, two in zip(mine, other, strict=True):
            assert torch.equal(one.long(), two.long())

    return ours, peer, agree, batch * len(anchors) * count, (16 + 8 * batch) * len(anchors)


def box_loss(grids: list[tuple[int, int]], batch: int, device: torch.device, boxes: int = bench_box_loss.BOXES):
    bench = bench_box_loss
    levels, *others = bench.make_case((grids, batch), torch.float32, torch.contiguous_format, device, boxes)
    anchors, gt_boxes, matched, normalizer = others

    def loss(leaves):
        return retinanet_ext.box_regression_loss(leaves, anchors, gt_boxes, matched, normalizer=normalizer)

    def peer():
        return dict(bench.peers(levels, others, backward=True, loss="l1"))["torchvision"]

    elements = sum(level.numel() for level in levels)
    ours = bench.make_call(loss, levels, backward=True)
    return ours, peer, agree_by_level, elements, 4 * elements + 8 * batch * len(anchors)


def suppression(variant: str, count: int, device: torch.device, classes: int = bench_nms.CLASSES):
    boxes, scores, labels = bench_nms.make_case(count, device, classes=classes)
    arguments = (boxes, scores, 0.5) if variant == "nms" else (boxes, scores, labels, 0.5)

    def peer():
        # many labels moved apart lose digits: label by label there
        kind = "clustered" if classes > bench_nms.CLASSES else "random"
        return functools.partial(bench_nms.torchvision_function(variant, kind), *arguments)

    return functools.partial(getattr(retinanet_ext, variant), *arguments), peer, bench_nms.agree, count, 28 * count


def padded_suppression(batch: int, device: torch.device):
    count, most = 1000, 100
    images = [[value.roll(37 * image, 0) for image in range(batch)] for value in bench_nms.make_case(count, device)]
    boxes, scores, labels = map(torch.stack, images)
    ours = functools.partial(retinanet_ext.batched_nms_padded, boxes, scores, labels, 0.5, most)

    def peer():
        return functools.partial(bench_nms.suppress_each, boxes, scores, labels, most)

    return ours, peer, bench_nms.agree_padded, batch * count, batch * (28 * count + 8 * most)


def coding(task: str, count: int, device: torch.device):
    arguments = bench_box_coder.make_case(task, count, torch.float32, device)
    ours = bench_box_coder.make_call(bench_box_coder.FUNCTIONS[task], arguments, backward=False)

    def peer():
        return dict(bench_box_coder.peers(task, arguments, backward=False, timed=False))["torchvision"]

    def agree(mine, other):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())

    return ours, peer, agree, count, 48 * count


def post_processing(side: int, batch: int, classes: int, device: torch.device):
    mean = bench_detect.DENSITIES[""]
    case = ((side, side), batch, classes)
    logits, deltas, anchors, sizes = bench_detect.make_case(case, mean, torch.float32, device)

    def peer():
        return bench_detect.torchvision_call(logits, deltas, anchors, sizes, classes)

    elements = sum(level.numel() for level in logits)
    ours = functools.partial(retinanet_ext.detect, logits, deltas, anchors, sizes)
    return ours, peer, bench_detect.agree, elements, 4 * elements


def pairs(count: int, device: torch.device):
    boxes = [bench_box_iou.random_boxes(count, torch.float32, device, seed) for seed in range(2)]

    def peer():
        from torchvision.ops import box_iou

        return bench_box_iou.make_call(box_iou, boxes, backward=False)

    ours = bench_box_iou.make_call(retinanet_ext.box_iou, boxes, backward=False)
    return ours, peer, bench_box_iou.same_bits, count * count, 4 * count * count + 32 * count


COCO = (800, 1344)
SLOW_MS = 1000.0


def iou_matrix(rows: int, columns: int) -> int:
    """Bytes that torchvision's `box_iou` holds: nine float32 a pair, which are the overlap's two corners, its two sides
    and its area, the union's area and a sum on the way to that."""
    return 9 * 4 * rows * columns


def anchors_of(side: int) -> int:
    """Of a square image, nine a cell."""
    return 9 * sum(height * width for height, width in grids_of(side))


# By the title of the plot.
CURVES = {
    "sigmoid_focal_loss, forward and backward, 80 classes": Curve(
        "rows N", (100, 1000, 10_000, 100_000), lambda x, device: focal(x, 80, device)
    ),
    "sigmoid_focal_loss, forward and backward, 10,000 rows": Curve(
        "classes K", (1, 10, 100, 1000), lambda x, device: focal(10_000, x, device)
    ),
    "multilevel_focal_loss, forward and backward, 80 classes": Curve(
        "side of the image, pixels", (64, 256, 1024, 2048), lambda x, device: focal_of_levels(x, 1, device)
    ),
    "multilevel_focal_loss, forward and backward, 64 x 64, 20 classes": Curve(
        "images B", (1, 10, 100, 1000), lambda x, device: focal_of_levels(64, x, device, 20)
    ),
    "multilevel_focal_loss, forward and backward, 256 x 256": Curve(
        "classes K", (1, 10, 100, 1000), lambda x, device: focal_of_levels(256, 1, device, x)
    ),
    "assign_targets, 201,600 anchors": Curve(
        "boxes M",
        (1, 10, 100, 1000, 5000),
        lambda x, device: matching(COCO, x, device),
        lambda x: iou_matrix(201_600, x),
    ),
    "assign_targets, 50 boxes": Curve(
        "side of the image, pixels",
        (64, 256, 1024, 4096),
        lambda x, device: matching((x, x), 50, device),
        lambda x: iou_matrix(anchors_of(x), 50),
    ),
    "assign_targets, 128 x 128, 50 boxes an image": Curve(
        "images B", (1, 10, 100, 1000), lambda x, device: matching((128, 128), 50, device, batch=x)
    ),
    "box_regression_loss, forward and backward": Curve(
        "side of the image, pixels", (64, 256, 1024, 4096), lambda x, device: box_loss(grids_of(x), 1, device)
    ),
    "box_regression_loss, forward and backward, 128 x 128": Curve(
        "images B", (1, 10, 100, 1000), lambda x, device: box_loss(grids_of(128), x, device)
    ),
    "box_regression_loss, forward and backward, 512 x 512": Curve(
        "boxes M", (1, 10, 100, 1000), lambda x, device: box_loss(grids_of(512), 1, device, boxes=x)
    ),
    "encode_boxes": Curve(
        "boxes N", (100, 1000, 10_000, 100_000, 1_000_000), lambda x, device: coding("encode", x, device)
    ),
    "decode_boxes": Curve(
        "boxes N", (100, 1000, 10_000, 100_000, 1_000_000), lambda x, device: coding("decode", x, device)
    ),
    "box_iou, N x N": Curve("boxes N", (10, 100, 1000, 10_000), pairs, lambda x: iou_matrix(x, x)),
    "nms": Curve("boxes N", (100, 1000, 10_000, 100_000), lambda x, device: suppression("nms", x, device)),
    "batched_nms, 80 classes": Curve(
        "boxes N", (100, 1000, 10_000, 100_000), lambda x, device: suppression("batched_nms", x, device)
    ),
    "batched_nms, 5,000 boxes": Curve(
        "classes K", (1, 10, 100, 1000), lambda x, device: suppression("batched_nms", 5000, device, x)
    ),
    "batched_nms_padded, 1,000 boxes an image": Curve("images B", (1, 10, 100, 1000), padded_suppression),
    "detect, 128 x 128, 80 classes": Curve(
        "images B", (1, 10, 100, 1000), lambda x, device: post_processing(128, x, 80, device)
    ),
    "detect, one image, 80 classes": Curve(
        "side of the image, pixels", (64, 256, 1024, 2048), lambda x, device: post_processing(x, 1, 80, device)
    ),
    "detect, 320 x 320, one image": Curve(
        "classes K", (1, 10, 100, 1000), lambda x, device: post_processing(320, 1, x, device)
    ),
}


@pytest.fixture(scope="module")
def ended() -> dict[str, str]:
    """Curves whose peer ran out of memory, or would have, with the reason: its line ends there."""
    return {}


def too_large(holds: int, at: str) -> str | None:
    """Why a call that holds so many bytes is not tried on the CPU, or None: a system may end a process that takes more
    than there is, without an error to catch."""
    memory = system_memory()
    if memory is None or holds <= memory[0]:
        return None
    needed, free, total = (count / 2**30 for count in (holds, *memory))
    return f"would hold {needed:.0f} GiB at {at}: of the machine's {total:.0f} GiB {free:.0f} are free"


def measure(compare, device, title: str, curve: Curve, x: int, ended: dict[str, str]) -> None:
    """One point of a curve."""
    ours, make_peer, agree, elements, bytes = curve.make(x, device)
    at = f"{curve.axis} = {x:,}"
    if not has_torchvision():
        peer = "torchvision is not installed"
    elif title in ended:
        peer = ended[title]
    elif device.type == "cpu" and (reason := too_large(curve.holds(x), at)) is not None:
        peer = ended[title] = reason
    else:
        try:
            peer = make_peer()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            peer = ended[title] = f"out of memory at {at}"
    skipped = compare(
        f"growth of {title}: {curve.axis} = {x}",
        ours,
        {"torchvision": peer},
        agree,
        elements=elements,
        bytes=bytes,
        at=at,
        slow_ms=SLOW_MS,
        curve=title,
        axis=curve.axis,
        x=x,
    )
    if skipped.get("torchvision", "").startswith("out of memory"):
        ended[title] = skipped["torchvision"]


@pytest.mark.parametrize(
    ("title", "x"), [(title, x) for title, curve in CURVES.items() for x in curve.values], ids=lambda value: str(value)
)
def test_growth(compare, device, timed, ended, title, x):
    curve = CURVES[title]
    if not timed and x != curve.values[0]:
        pytest.skip("a smoke run takes the smallest case of a curve")
    measure(compare, device, title, curve, x, ended)
