"""box_iou on CUDA against the CPU operator, to the bit: values, graphs, host synchronisation, identical bits, sizes,
sanitizer cases. Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own."""

import pytest
import torch
from cuda_gates import capture, host_must_not_wait

from retinanet_ext import box_iou

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
FORMATS = ("xyxy", "xywh", "cxcywh")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random_boxes(*shape, seed=0, dtype=torch.float32, extent=300.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * extent
    size = 1 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 80
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def same_bits(a, b):
    """Equal, with NaN equal to NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def check(boxes1, boxes2, fmt="xyxy"):
    result = box_iou(boxes1.to(DEVICE), boxes2.to(DEVICE), fmt)
    assert result.is_cuda
    assert same_bits(result.cpu(), box_iou(boxes1, boxes2, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (700, 8), (33, 255), (40, 257), (300, 1000), (9, 5000), (2000, 1025)], ids=str
)
def test_every_shape_of_tile(shape, dtype, fmt):
    check(random_boxes(shape[0], seed=1, dtype=dtype), random_boxes(shape[1], seed=2, dtype=dtype), fmt)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_boxes_that_hardly_overlap(dtype):
    """Most pairs skip the division."""
    check(random_boxes(500, seed=1, dtype=dtype, extent=1e4), random_boxes(3000, seed=2, dtype=dtype, extent=1e4))


@pytest.mark.parametrize("shapes", [((3, 1, 2, 60), (5, 1, 300)), ((70,), (4, 20)), ((2, 30), (2, 30))], ids=str)
def test_batches_that_broadcast(shapes):
    check(random_boxes(*shapes[0], seed=1), random_boxes(*shapes[1], seed=2))


def test_any_strides():
    wide, boxes = random_boxes(200, seed=1).repeat(1, 2)[:, 1:].to(DEVICE), random_boxes(300, seed=2).to(DEVICE)
    for first in (wide[:, 1:5], wide[:, 3:], wide.T.contiguous().T[:, 3:]):
        for second in (boxes, boxes[::2], boxes.T.contiguous().T, boxes[:1].expand(300, 4)):
            assert same_bits(box_iou(first, second).cpu(), box_iou(first.cpu(), second.cpu()))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numbers_that_are_not_finite(dtype, fmt):
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan, largest, -largest], dtype=dtype)
    spans = torch.cartesian_prod(values, values)
    boxes = torch.stack([spans[:, 0], spans[:, 0].flip(0), spans[:, 1], spans[:, 1].flip(0)], dim=1)
    one_axis = torch.stack([spans[:, 0], torch.zeros(81), spans[:, 1], torch.full((81,), 3.0)], dim=1).to(dtype)
    check(torch.cat((boxes, one_axis)), torch.cat((one_axis, boxes)), fmt)


def test_quotients_that_underflow():
    """The division's path for subnormal numbers."""
    boxes = random_boxes(200, seed=1, extent=100.0)
    check(boxes * 1e-21, boxes * 1e-21)
    check(boxes * 1e-20, torch.cat((boxes * 1e-20, boxes * 1e17)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_cpus(dtype):
    gradients = []
    for device in ("cpu", DEVICE):
        inputs = [random_boxes(n, seed=n, dtype=dtype).to(device).requires_grad_() for n in (40, 300)]
        weight = torch.linspace(0, 1, 300, device=device, dtype=torch.float64)
        gradients.append(torch.autograd.grad((box_iou(*inputs) * weight).sum(), inputs))
    for host, device in zip(*gradients, strict=True):
        rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (max(1e-5, torch.finfo(dtype).eps), 1e-6)
        torch.testing.assert_close(device.cpu(), host, rtol=rtol, atol=atol)


def test_opcheck():
    arguments = [random_boxes(n, seed=n).to(DEVICE).requires_grad_() for n in (5, 7)]
    torch.library.opcheck(OPS.box_iou.default, (*arguments, 0))


def test_other_streams():
    boxes1, boxes2 = random_boxes(300, seed=1).to(DEVICE), random_boxes(400, seed=2).to(DEVICE)
    expected = box_iou(boxes1, boxes2)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert torch.equal(box_iou(boxes1, boxes2), expected)


@pytest.mark.graph
def test_a_graph_replays_with_other_boxes():
    boxes1, boxes2 = random_boxes(50, seed=1).to(DEVICE), random_boxes(2000, seed=2).to(DEVICE)
    graph, result = capture(lambda: box_iou(boxes1, boxes2))
    for seed in range(3, 6):
        boxes1.copy_(random_boxes(50, seed=seed))
        result.fill_(-77)
        graph.replay()
        assert same_bits(result.cpu(), box_iou(boxes1.cpu(), boxes2.cpu()))


@pytest.mark.sync
def test_no_call_makes_the_host_wait():
    inputs = [random_boxes(n, seed=n).to(DEVICE).requires_grad_() for n in (50, 2000)]
    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        torch.autograd.grad(box_iou(*inputs).sum(), inputs)
    with host_must_not_wait():
        torch.autograd.grad(box_iou(*inputs).sum(), inputs)


@pytest.mark.identity
def test_same_bits_in_100_runs():
    inputs = [random_boxes(n, seed=n).to(DEVICE).requires_grad_() for n in (300, 5000)]
    expected = box_iou(*inputs)
    gradients = torch.autograd.grad(expected.sum(), inputs)
    other_work, stream = torch.zeros(32 << 20, device=DEVICE), torch.cuda.Stream()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(stream):
                other_work.add_(1)
        iou = box_iou(*inputs)
        assert torch.equal(iou, expected)
        for one, other in zip(torch.autograd.grad(iou.sum(), inputs), gradients, strict=True):
            assert torch.equal(one, other)
    torch.cuda.synchronize()


@pytest.mark.large
@pytest.mark.parametrize("shape", [(50_000, 50_001), (3, 800_000_000), (800_000_000, 3)], ids=str)
def test_more_than_2_31_pairs(shape):
    needed = 4 * shape[0] * shape[1] + 16 * sum(shape) + (2 << 30)
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, and {free / 1e9:.0f} GB are free")
    few = random_boxes(1000, seed=1).to(DEVICE)
    boxes1, boxes2 = (few[torch.arange(n, device=DEVICE) * 7 % 1000] for n in shape)
    iou = box_iou(boxes1, boxes2)
    assert iou.numel() > 2**31
    for rows, columns in ((slice(0, 50), slice(0, 50)), (slice(-50, None), slice(-50, None))):
        assert same_bits(iou[rows, columns].cpu(), box_iou(boxes1[rows].cpu(), boxes2[columns].cpu()))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_calls_of_every_kernel(dtype):
    """For compute-sanitizer: partial tiles of every width, wide rows, batches, strides."""
    boxes = random_boxes(2, 37, seed=1, dtype=dtype)
    for columns in (1, 9, 100, 300, 1030):
        check(boxes, random_boxes(columns, seed=2, dtype=dtype), "cxcywh")
    check(boxes[0, ::2], boxes[:, 1:])
