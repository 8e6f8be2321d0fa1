"""The compiled match_anchors and assign_targets at sizes where tiles, levels and threads matter: against the reference
and torchvision's matcher, in every policy; memory; registrations; raw arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from started_anew import on_instruction_sets

import retinanet_ext
from retinanet_ext import assign_targets, match_anchors, reference
from retinanet_ext.models.anchors import AnchorGenerator

OPS = torch.ops.retinanet_ext
POLICIES = ("safe", "torchvision", "detectron2", "mmdet")


def pyramid_anchors(height=256, width=320):
    """RetinaNet's anchors for an image, finest level first."""
    grids = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]
    return AnchorGenerator()((height, width), grids)


def whole_boxes(count, height=256, width=320, seed=0, dtype=torch.float32):
    """Boxes of all sizes with whole numbers as coordinates, as annotated ones often are."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.rand(count, 2, generator=generator) * 3.5 + 2).exp().round().clamp(max=200)
    corner = (torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)).round()
    return torch.cat((corner, corner + size), dim=1).to(dtype)


def assert_same(got, expected):
    for name, mine, right in zip(expected._fields, got, expected, strict=True):
        assert torch.equal(mine, right), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", POLICIES)
def test_pyramids(policy, dtype):
    anchors = pyramid_anchors().to(dtype)
    boxes = [whole_boxes(count, seed=count, dtype=dtype) for count in (150, 0, 1, 33)]
    labels = [torch.arange(len(image)) % 9 for image in boxes]
    for thresholds in ((0.5, 0.4), (0.7, 0.3), (0.5, 0.0)):
        arguments = (anchors, boxes, labels, *thresholds)
        assert_same(assign_targets(*arguments, policy=policy), reference.assign_targets(*arguments, policy=policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_5000_boxes_of_an_image(policy):
    anchors = pyramid_anchors(128, 160)
    boxes = [whole_boxes(5000, 128, 160), whole_boxes(7, 128, 160, seed=1)]
    labels = [torch.arange(len(image)) % 80 for image in boxes]
    ignore = [torch.arange(len(image)) % 11 == 3 for image in boxes]
    arguments, options = (anchors, boxes, labels, 0.6, 0.3), {"policy": policy, "gt_ignore": ignore}
    expected = reference.assign_targets(*arguments, **options)
    assert expected.matched.max() > 4000
    assert_same(assign_targets(*arguments, **options), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_tied_best_anchors(policy):
    """On a grid many boxes have several best anchors, to the last bit; each of them is restored."""
    anchors = pyramid_anchors()
    boxes = whole_boxes(200)
    iou = reference.box_iou(boxes, anchors)
    ties = (iou == iou.amax(dim=1, keepdim=True)).sum(dim=1)
    assert (ties > 1).float().mean() > 0.2
    matched = match_anchors(anchors, [boxes], 0.9, 0.4, policy=policy)
    assert torch.equal(matched, reference.match_anchors(anchors, [boxes], 0.9, 0.4, policy=policy))
    assert (matched >= 0).sum() > (iou.amax(dim=0) >= 0.9).sum()


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchvision_matcher(dtype, low_quality):
    pytest.importorskip("torchvision", reason="the peer is not installed")
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    anchors = pyramid_anchors(512, 640).to(dtype)
    for seed in range(4):
        boxes = whole_boxes(80, 512, 640, seed, dtype) + (seed % 2) * torch.rand(80, 1, dtype=dtype)
        for fg_iou_thresh, bg_iou_thresh in ((0.5, 0.4), (0.7, 0.3)):
            matcher = Matcher(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches=low_quality)
            expected = matcher(box_iou(boxes, anchors)).int()
            got = match_anchors(anchors, [boxes], fg_iou_thresh, bg_iou_thresh, low_quality, policy="torchvision")
            assert torch.equal(got[0], expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_box_that_no_anchor_touches(policy):
    """It floods the image with foreground under the peers' rules, and changes nothing under the default's."""
    anchors = pyramid_anchors()
    far = torch.tensor([[9000.0, 9000.0, 9050.0, 9040.0]])
    boxes = whole_boxes(20)
    arguments = (anchors, [torch.cat((boxes, far)), boxes], [torch.zeros(21).long(), torch.zeros(20).long()])
    targets = assign_targets(*arguments, policy=policy)
    assert_same(targets, reference.assign_targets(*arguments, policy=policy))
    flood, alone = targets.num_foreground.tolist()
    assert flood == (alone if policy == "safe" else len(anchors))


def test_any_order_of_anchors():
    """Nothing needs the anchors of a grid in their order: shuffled ones get the same boxes."""
    anchors, boxes = pyramid_anchors(), [whole_boxes(60)]
    order = torch.randperm(len(anchors))
    for policy in POLICIES:
        expected = match_anchors(anchors, boxes, policy=policy)
        assert torch.equal(match_anchors(anchors[order], boxes, policy=policy), expected[:, order])


def test_regions_and_anchors_of_each_image():
    anchors = pyramid_anchors()
    per_image = torch.stack((anchors, anchors + 3, anchors.flip(0)))
    boxes = [whole_boxes(40, seed=seed) for seed in range(3)]
    labels = [torch.arange(40) % 5] * 3
    ignore = [torch.arange(40) % 4 == seed for seed in range(3)]
    for policy in POLICIES:
        arguments, options = (per_image, boxes, labels), {"policy": policy, "gt_ignore": ignore}
        targets = assign_targets(*arguments, **options)
        assert_same(targets, reference.assign_targets(*arguments, **options))
        assert all((row == -2).any() for row in targets.labels)


@pytest.mark.parametrize("scale", [1e-22, 3e-20, 1e-19, 1e17, 1e30])
def test_extreme_sizes(scale):
    """Areas that vanish or overflow: what is left out because it cannot matter must not be left out by a rounding."""
    anchors = pyramid_anchors(96, 96) * scale
    boxes = whole_boxes(60, 96, 96) * scale
    boxes[1::3] *= 10.0 ** torch.randint(-3, 4, (20, 1))
    assert torch.equal(match_anchors(anchors, [boxes]), reference.match_anchors(anchors, [boxes]))


def test_any_number_of_threads(num_threads):
    anchors, boxes = pyramid_anchors(512, 640), [whole_boxes(90, 512, 640, seed) for seed in range(3)]
    labels = [torch.arange(90)] * 3
    for policy in POLICIES:
        results = []
        for threads in (1, 2, 3, 7):
            num_threads(threads)
            results.append(assign_targets(anchors, boxes, labels, policy=policy))
        for other in results[1:]:
            assert_same(other, results[0])


def run_python(folder, program, *arguments, **environment):
    """What the program prints, run in `folder`: in a checkout it would find a package that is not built."""
    environment = {**os.environ, "PYTHONPATH": str(Path(retinanet_ext.__file__).parents[1]), **environment}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=folder)
    return run.stdout


def matched_in_both_types():
    boxes = [whole_boxes(90), whole_boxes(7, seed=1) + 0.3]
    return [
        match_anchors(pyramid_anchors().to(dtype), [image.to(dtype) for image in boxes])
        for dtype in (torch.float32, torch.float64)
    ]


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    expected = matched_in_both_types()
    for isa, results in on_instruction_sets(matched_in_both_types, tmp_path).items():
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), isa


def test_three_million_anchors():
    """On their grid, and in any order; one image has no box."""
    anchors = pyramid_anchors(4040, 4040)
    boxes = [torch.cat([whole_boxes(4, 4040, 4040), whole_boxes(4, 4040, 4040, seed=1)[:1] * 4]), torch.zeros(0, 4)]
    labels = [torch.arange(len(image)) for image in boxes]
    assert len(anchors) > 3e6
    found = assign_targets(anchors, boxes, labels)
    assert found.num_foreground[0] > 50
    assert (found.matched[0] == -2).sum() > 50
    expected = reference.assign_targets(anchors, boxes, labels)
    assert_same(found, expected)
    assert torch.equal(match_anchors(anchors, boxes), expected.matched)
    order = torch.randperm(len(anchors))
    mixed = assign_targets(anchors[order], boxes, labels)
    assert torch.equal(mixed.labels, expected.labels[:, order])
    assert torch.equal(mixed.matched, expected.matched[:, order])


def test_memory_does_not_grow_with_pairs(num_threads):
    """Sixteen images of 201,600 anchors and 5,000 boxes, whose IoU would take 4 GB each. Beyond what one box an image
    takes, which is the results, there are 3 MB for the boxes (of one thread); a bit for each tile of 128 anchors and
    box were 16."""
    from peak_memory import peak_bytes  # of benchmarks/, which the processes of other tests here do not see

    if peak_bytes(lambda: None, torch.device("cpu")) is None:
        pytest.skip("only Linux counts a process's pages")
    num_threads(1)
    anchors = pyramid_anchors(800, 1344)
    boxes = [whole_boxes(5000, 800, 1344, seed) for seed in range(16)]
    labels = [torch.zeros(5000).long()] * 16

    def peak(count):
        first = [image[:count] for image in boxes], [row[:count] for row in labels]
        return min(peak_bytes(lambda: assign_targets(anchors, *first), torch.device("cpu")) for _ in range(2))

    few, many = peak(1), peak(5000)
    assert few >= 16 * len(anchors) * 4  # the matches are seen
    assert many - few < 8 << 20


def test_mixed_types():
    """One image in float64 makes all of them float64; labels of any integer types."""
    anchors = pyramid_anchors()
    boxes = [whole_boxes(30) + 0.1, (whole_boxes(30, seed=1) + 0.1).double(), whole_boxes(30, seed=2).half()]
    labels = [torch.arange(30, dtype=dtype) for dtype in (torch.uint8, torch.int64, torch.int32)]
    expected = assign_targets(anchors.double(), [image.double() for image in boxes], [row.long() for row in labels])
    assert_same(assign_targets(anchors, boxes, labels), expected)
    assert_same(expected, reference.assign_targets(anchors, boxes, labels))


def raw_arguments(packed=False, ignore=True):
    anchors = pyramid_anchors(64, 64)
    boxes = [whole_boxes(5, 64, 64), whole_boxes(0), whole_boxes(3, 64, 64, seed=1)]
    labels = [torch.arange(len(image)) for image in boxes]
    regions = [torch.arange(len(image)) == 1 for image in boxes] if ignore else []
    offsets = None
    if packed:
        boxes, labels = [torch.cat(boxes)], [torch.cat(labels)]
        regions = [torch.cat(regions)] if ignore else []
        offsets = torch.tensor([0, 5, 5, 8], dtype=torch.int32)
    return anchors, boxes, labels, regions, offsets, 0.5, 0.4, True, 0, 0.0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_opcheck(packed, ignore):
    arguments = raw_arguments(packed, ignore)
    torch.library.opcheck(OPS.assign_targets.default, arguments)
    torch.library.opcheck(OPS.match_anchors.default, arguments[:2] + arguments[3:])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    anchors = pyramid_anchors(64, 64)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def targets_of(boxes, labels, regions):
        return assign_targets(anchors, boxes, labels, policy="torchvision", gt_ignore=regions)

    for count in (4, 9, 0):
        boxes, labels = [whole_boxes(count, 64, 64), whole_boxes(2, 64, 64)], [torch.arange(count), torch.arange(2)]
        regions = [torch.arange(count) == 2, torch.tensor([True, False])]
        expected = assign_targets(anchors, boxes, labels, policy="torchvision", gt_ignore=regions)
        assert_same(targets_of(boxes, labels, regions), expected)


def test_compiles_with_packed_boxes():
    anchors, [boxes], [labels], [regions], offsets, *_ = raw_arguments(packed=True)
    compiled = torch.compile(assign_targets, fullgraph=True, backend="aot_eager")
    for rows in (offsets, torch.tensor([0, 2, 4, 4], dtype=torch.int32)):
        options = {"gt_ignore": regions, "gt_offsets": rows}
        assert_same(
            compiled(anchors, boxes, labels, **options), reference.assign_targets(anchors, boxes, labels, **options)
        )


def test_exports():
    class Targets(torch.nn.Module):
        def forward(self, anchors, boxes, labels, offsets):
            return tuple(assign_targets(anchors, boxes, labels, gt_offsets=offsets))

    anchors, [boxes], [labels], _, offsets, *_ = raw_arguments(packed=True)
    program = torch.export.export(Targets(), (anchors, boxes, labels, offsets))
    expected = assign_targets(anchors, boxes, labels, gt_offsets=offsets)
    for mine, right in zip(program.module()(anchors, boxes, labels, offsets), expected, strict=True):
        assert torch.equal(mine, right)


def test_exports_with_any_batch():
    class Targets(torch.nn.Module):
        def forward(self, anchors, boxes, labels, offsets):
            return tuple(assign_targets(anchors, boxes, labels, gt_offsets=offsets))

    anchors, boxes = pyramid_anchors(64, 64), whole_boxes(12, 64, 64)
    labels = torch.arange(12) % 5
    batch = torch.export.Dim("batch", min=2, max=16)
    offsets = torch.tensor([0, 5, 5, 8], dtype=torch.int32)
    shapes = ({}, {}, {}, {0: batch + 1})
    program = torch.export.export(Targets(), (anchors, boxes, labels, offsets), dynamic_shapes=shapes).module()
    for rows in ([0, 12, 12], [0, 1, 3, 3, 9, 12]):
        offsets = torch.tensor(rows, dtype=torch.int32)
        expected = assign_targets(anchors, boxes, labels, gt_offsets=offsets)
        assert_same(program(anchors, boxes, labels, offsets), expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(4, 4, dtype=torch.float16)}, "anchors must be float32 or float64, and are float16"),
        ({0: torch.zeros(4, 5)}, r"anchors must have shape \[N, 4\] or \[B, N, 4\], and have shape \[4, 5\]"),
        ({0: torch.zeros(2, 4, 4)}, r"anchors must be \[N, 4\] or \[3, N, 4\]"),
        ({1: [torch.zeros(5, 4).double()] * 3}, "gt_boxes must be float32, as anchors are"),
        ({1: [torch.zeros(5, 3)] * 3}, r"gt_boxes must be float32, .* of shape \[M, 4\], and one is .* \[5, 3\]"),
        ({2: []}, "gt_labels must hold 3 tensors"),
        ({2: [torch.zeros(5).long()] * 2}, "gt_labels must hold 3 tensors, as gt_boxes does, and holds 2"),
        ({2: [torch.zeros(4).long()] * 3}, r"gt_labels\[0\] must have shape \[5\], and has shape \[4\]"),
        ({2: [torch.zeros(n) for n in (5, 0, 3)]}, "gt_labels must be int32 or int64"),
        ({3: [torch.zeros(n).long() for n in (5, 0, 3)]}, "gt_ignore must be bool"),
        ({4: torch.zeros(3, dtype=torch.int32)}, "gt_boxes must be one tensor where gt_offsets are given, and are 3"),
        ({5: 0.3}, "thresholds must be 0 <= bg_iou_thresh <= fg_iou_thresh <= 1, and are 0.4 and 0.3"),
        ({8: 3}, r"policy must be 0 \(safe\), 1 \(torchvision\) or 2 \(mmdet\), and is 3"),
    ],
)
def test_raw_errors(change, text):
    arguments = list(raw_arguments())
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match="assign_targets: " + text):
        OPS.assign_targets(*arguments)


@pytest.mark.parametrize("offsets", [[-1, 5, 5, 8], [0, 6, 5, 8], [0, 5, 5, 9]])
def test_offsets_outside_the_boxes(offsets):
    arguments = list(raw_arguments(packed=True))
    arguments[4] = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="assign_targets: gt_offsets must rise from 0 or more to at most the 8 rows"):
        OPS.assign_targets(*arguments)
