"""match_anchors and assign_targets on CUDA against the CPU operators: values, graphs, host synchronisation, identical
bits, sizes, memory, sanitizer cases. Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own."""

import pytest
import torch
from cuda_gates import capture, host_must_not_wait

from retinanet_ext import assign_targets, match_anchors
from retinanet_ext.models.anchors import AnchorGenerator

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
POLICIES = ("safe", "torchvision", "detectron2", "mmdet")


def pyramid_anchors(height=256, width=320, dtype=torch.float32):
    grids = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]
    return AnchorGenerator()((height, width), grids).to(dtype)


def whole_boxes(count, height=256, width=320, seed=0, dtype=torch.float32):
    """Boxes of all sizes with whole numbers as coordinates, which tie."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.rand(count, 2, generator=generator) * 3.5 + 2).exp().round().clamp(max=200)
    corner = (torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)).round()
    return torch.cat((corner, corner + size), dim=1).to(dtype)


def to_device(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return [to_device(one) for one in value] if isinstance(value, (list, tuple)) else value


def check(*arguments, **options):
    """The device's targets are the host's, to the last bit."""
    expected = assign_targets(*arguments, **options)
    got = assign_targets(*to_device(arguments), **{name: to_device(value) for name, value in options.items()})
    for name, mine, right in zip(expected._fields, got, expected, strict=True):
        assert mine.is_cuda
        assert torch.equal(mine.cpu(), right), name
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_ragged_batches(policy, dtype):
    anchors = pyramid_anchors(dtype=dtype)
    boxes = [whole_boxes(count, seed=count, dtype=dtype) for count in (150, 0, 1, 33)]
    labels = [torch.arange(len(image)) % 9 for image in boxes]
    for thresholds in ((0.5, 0.4), (0.7, 0.3), (1.0, 0.0), (0.0, 0.0)):
        for low_quality in (True, False):
            check(anchors, boxes, labels, *thresholds, low_quality, policy=policy)
    matched = match_anchors(to_device(anchors), to_device(boxes), policy=policy)
    assert torch.equal(matched.cpu(), match_anchors(anchors, boxes, policy=policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_whole_pyramid(policy):
    """As in training: 201,600 anchors, 16 images, up to 500 boxes."""
    anchors = pyramid_anchors(800, 1344)
    boxes = [whole_boxes(count, 800, 1344, seed=count) for count in (8, 50, 500, 0) * 4]
    check(anchors, boxes, [torch.arange(len(image)) % 80 for image in boxes], policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_boxes_and_anchors_that_are_none(policy):
    """Degenerate, NaN and infinite boxes and anchors; boxes that overlap no anchor; regions to ignore."""
    nan, inf = float("nan"), float("inf")
    anchors, boxes = pyramid_anchors(), whole_boxes(70)
    anchors[5], anchors[77, 0], anchors[900, 2], anchors[901] = nan, nan, inf, anchors[901].flip(0)
    boxes[[0, 33]] = torch.tensor([[5.0, 5.0, 5.0, 20.0], [nan, 5.0, 20.0, 20.0]])
    boxes[34] = torch.tensor([0.0, 5.0, inf, 20.0])
    boxes[40] = torch.tensor([9000.0, 9000.0, 9050.0, 9040.0])
    regions = torch.arange(70) % 3 == 1
    for mask in (regions, torch.ones(70, dtype=torch.bool), torch.zeros(70, dtype=torch.bool)):
        check(anchors, [boxes], [torch.arange(70)], policy=policy, gt_ignore=[mask])
        check(anchors, [boxes], [torch.arange(70)], policy=policy, min_pos_iou=0.2, gt_ignore=[mask])


@pytest.mark.parametrize("scale", [1e-22, 3e-20, 1e-19, 1e17, 1e30])
def test_extreme_sizes(scale):
    boxes = whole_boxes(60, 96, 96) * scale
    boxes[1::3] *= 10.0 ** torch.randint(-3, 4, (20, 1))
    check(pyramid_anchors(96, 96) * scale, [boxes], [torch.arange(60)])


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_views_that_are_not_aligned(offset):
    """Anchors, boxes and labels anywhere in their storage; anchors of each image; any number of them."""
    storage = torch.empty(offset + 4 * 1029)
    anchors = storage[offset:].view(-1, 4)[: 1029 - offset].copy_(pyramid_anchors()[: 1029 - offset])
    for per_image in (anchors, torch.stack((anchors, anchors + 5, anchors.flip(0)))):
        boxes = [
            torch.cat((torch.zeros(offset), whole_boxes(9, seed=s).flatten()))[offset:].view(-1, 4) for s in range(3)
        ]
        moved = (
            to_device(storage)[offset:].view(-1, 4)[: 1029 - offset] if per_image is anchors else to_device(per_image)
        )
        labels = [torch.arange(9)] * 3
        got = assign_targets(moved, to_device(boxes), to_device(labels))
        for mine, right in zip(got, assign_targets(per_image, boxes, labels), strict=True):
            assert torch.equal(mine.cpu(), right)


def test_more_images_than_a_launch_holds():
    boxes = [whole_boxes(seed % 7, seed=seed) for seed in range(150)]
    check(pyramid_anchors(96, 96), boxes, [torch.arange(len(image)) for image in boxes], policy="torchvision")


def test_other_streams():
    anchors, boxes = to_device(pyramid_anchors()), to_device([whole_boxes(40)])
    expected = match_anchors(anchors, boxes)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert torch.equal(match_anchors(anchors, boxes), expected)


def test_opcheck():
    arguments = (to_device(pyramid_anchors(64, 64)), to_device([whole_boxes(5, 64, 64)]))
    labels, options = to_device([torch.arange(5)]), ([], None, 0.5, 0.4, True, 0, 0.0)
    torch.library.opcheck(OPS.assign_targets.default, (*arguments, labels, *options))
    torch.library.opcheck(OPS.match_anchors.default, (*arguments, *options))


def packed_case(counts, capacity, seed):
    """Boxes of a batch in one tensor of fixed size, NaN past the last; their labels, regions and offsets."""
    boxes = torch.full((capacity, 4), float("nan"))
    rows = sum(counts)
    boxes[:rows] = whole_boxes(rows, seed=seed)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return boxes, torch.arange(capacity) % 11, torch.arange(capacity) % 7 == seed, offsets


@pytest.mark.graph
@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_replays_with_other_boxes_and_another_number_of_them(policy):
    anchors = to_device(pyramid_anchors())
    static = to_device(packed_case((5, 0, 9), 64, 0))

    def step():
        boxes, labels, regions, offsets = static
        return assign_targets(anchors, boxes, labels, policy=policy, gt_ignore=regions, gt_offsets=offsets)

    graph, results = capture(step)
    for seed, counts in enumerate(((5, 0, 9), (0, 0, 0), (40, 20, 4), (1, 33, 0))):
        case = packed_case(counts, 64, seed)
        for target, value in zip(static, case, strict=True):
            target.copy_(value)
        for result in results:
            result.fill_(-77)
        graph.replay()
        boxes, labels, regions, offsets = case
        expected = assign_targets(
            pyramid_anchors(), boxes, labels, policy=policy, gt_ignore=regions, gt_offsets=offsets
        )
        for mine, right in zip(results, expected, strict=True):
            assert torch.equal(mine.cpu(), right)


@pytest.mark.sync
@pytest.mark.parametrize("packed", [False, True])
def test_no_call_makes_the_host_wait(packed):
    anchors = to_device(pyramid_anchors())
    boxes, labels, regions, offsets = to_device(packed_case((5, 0, 9), 64, 1))
    options = {"gt_ignore": regions, "gt_offsets": offsets}
    if not packed:
        boxes, labels, options = [boxes[:5], boxes[5:14].half()], [labels[:5], labels[5:14].to(torch.uint8)], {}
    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        assign_targets(anchors, boxes, labels, **options)
    with host_must_not_wait():
        targets = assign_targets(anchors, boxes, labels, **options)
    assert (targets.num_foreground > 0).any()


@pytest.mark.identity
@pytest.mark.parametrize("policy", POLICIES)
def test_same_targets_in_100_runs(policy):
    """Half of the runs share the device with other work, which moves the blocks about: how far the best IoUs have come
    when a tile is asked must not show."""
    anchors = to_device(pyramid_anchors(800, 1344))
    boxes = to_device([whole_boxes(count, 800, 1344, seed=count) for count in (300, 20, 3, 0)])
    labels = to_device([torch.arange(len(image)) for image in boxes])
    expected = assign_targets(anchors, boxes, labels, policy=policy)
    other_work, stream = torch.zeros(32 << 20, device=DEVICE), torch.cuda.Stream()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(stream):
                other_work.add_(1)
        for mine, right in zip(assign_targets(anchors, boxes, labels, policy=policy), expected, strict=True):
            assert torch.equal(mine, right)
    torch.cuda.synchronize()


def test_memory_does_not_grow_with_pairs():
    """201,600 anchors and 5,000 boxes: a matrix of their IoU would take 4 GB."""
    anchors, boxes = to_device(pyramid_anchors(800, 1344)), to_device([whole_boxes(5000, 800, 1344)])
    labels = to_device([torch.arange(5000)])
    assign_targets(anchors, boxes, labels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    targets = assign_targets(anchors, boxes, labels)
    assert torch.cuda.max_memory_allocated() - before < 4 << 20
    assert torch.equal(targets.matched.cpu(), match_anchors(anchors.cpu(), [boxes[0].cpu()]))


@pytest.mark.large
def test_more_than_2_31_results():
    """Images times anchors beyond 2^31: offsets in 64 bits."""
    anchors = to_device(pyramid_anchors(800, 1344)).repeat(52, 1)  # 10.5 million
    batch = 2**31 // len(anchors) + 2
    free, _ = torch.cuda.mem_get_info()
    needed = 4 * batch * len(anchors) + (1 << 30)
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, and {free / 1e9:.0f} GB are free")
    boxes = to_device([whole_boxes(3, 800, 1344, seed=seed) for seed in range(batch)])
    matched = match_anchors(anchors, boxes)
    assert matched.numel() > 2**31
    for image in (0, batch // 2, batch - 1):
        assert torch.equal(matched[image], match_anchors(anchors, boxes[image : image + 1])[0])
        assert (matched[image] >= 0).any()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("policy", ["safe", "torchvision", "mmdet"])
def test_small_calls_of_every_kernel(policy, dtype):
    """For compute-sanitizer: partial tiles, warps and blocks, ragged images, packed boxes, regions."""
    anchors = pyramid_anchors(64, 64, dtype)[:757]
    boxes = [whole_boxes(count, 64, 64, seed=count, dtype=dtype) for count in (35, 0, 2)]
    labels = [torch.arange(len(image)) for image in boxes]
    check(anchors, boxes, labels, policy=policy)
    check(torch.stack((anchors, anchors + 1, anchors + 2)), boxes, [row.int() for row in labels], policy=policy)
    packed, offsets = torch.cat((*boxes, boxes[0][:3])), torch.tensor([0, 35, 35, 37], dtype=torch.int32)
    rows = torch.cat((*labels, labels[0][:3]))
    check(anchors, packed, rows, policy=policy, gt_ignore=rows % 4 == 1, gt_offsets=offsets)
