"""encode_boxes and decode_boxes on CUDA against the CPU operators: values, gradients, graphs, host synchronisation,
identical bits, sizes, sanitizer cases. Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own."""

import pytest
import torch
from cuda_gates import capture, host_must_not_wait

from retinanet_ext import decode_boxes, encode_boxes

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WEIGHTS = (10.0, 9.0, 5.0, 4.0)
FUNCTIONS = {"encode_boxes": encode_boxes, "decode_boxes": decode_boxes}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def random_boxes(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 300
    size = 8 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 80
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def values_of(name, *shape, dtype=torch.float32):
    """Ground-truth boxes; or deltas of which some are clipped."""
    if name == "encode_boxes":
        return random_boxes(*shape, seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    return (torch.randn(*shape, 4, generator=generator, dtype=torch.float64) * 8).to(dtype)


def assert_close(name, found, right, values, anchors):
    """Centres to the bit; what goes through exp or log within two units of the last place of that, and its rounding."""
    assert found.is_cuda
    assert found.dtype == right.dtype
    found, dtype = found.cpu(), right.dtype
    compute = torch.promote_types(dtype, torch.float32)
    eps, rounding = torch.finfo(compute).eps, torch.finfo(dtype).eps if dtype != compute else 0.0
    if name == "encode_boxes":
        assert torch.equal(found[..., :2], right[..., :2])
        bound = 4 * eps * right.abs()
    else:
        half = ((right[..., 2:] - right[..., :2]).repeat(*(1,) * (right.dim() - 1), 2) / 2).to(compute)
        bound = 4 * eps * half.abs() + eps * right.abs()
    assert ((found.to(compute) - right.to(compute)).abs() <= bound + rounding * right.abs()).all()


def check(name, values, anchors):
    right = FUNCTIONS[name](values, anchors, WEIGHTS)
    assert_close(name, FUNCTIONS[name](values.to(DEVICE), anchors.to(DEVICE), WEIGHTS), right, values, anchors)


@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 255, 257, 5000, 300_000])
def test_every_size_and_type(name, dtype, count):
    check(name, values_of(name, count, dtype=dtype), random_boxes(count, seed=1, dtype=dtype))


@every_function
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_two_types(name, dtypes):
    check(name, values_of(name, 500, dtype=dtypes[0]), random_boxes(500, seed=1, dtype=dtypes[1]))


@every_function
@pytest.mark.parametrize(
    "shapes", [((4, 500), (500,)), ((3, 1, 2, 50), (5, 1, 50)), ((), (70,)), ((0, 3), (3,))], ids=str
)
def test_shapes_that_broadcast(name, shapes):
    check(name, values_of(name, *shapes[0]), random_boxes(*shapes[1], seed=1))


@every_function
def test_any_strides(name):
    wide = torch.full((200, 7), torch.nan)
    wide[:, 3:] = values_of(name, 200)
    anchors = random_boxes(200, seed=1)
    expected = FUNCTIONS[name](wide[:, 3:].contiguous().to(DEVICE), anchors.to(DEVICE))
    assert torch.equal(FUNCTIONS[name](wide.to(DEVICE)[:, 3:], anchors.to(DEVICE).T.contiguous().T), expected)


@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [((300,), (300,)), ((4, 300), (300,))], ids=str)
def test_gradients(name, dtype, shapes):
    """Within a few units of the last place of the largest, which sums over the batch have too."""
    results = []
    for device in ("cpu", DEVICE):
        pair = values_of(name, *shapes[0], dtype=dtype), random_boxes(*shapes[1], seed=1, dtype=dtype)
        inputs = [one.to(device).requires_grad_() for one in pair]
        result = FUNCTIONS[name](*inputs, WEIGHTS)
        grad = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result).to(device, dtype)
        results.append(torch.autograd.grad(result, inputs, grad))
    for host, device in zip(*results, strict=True):
        assert device.dtype == dtype
        wide = host.double()
        scale = wide.abs().amax(dim=-1, keepdim=True)
        bound = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * scale
        assert ((device.cpu().double() - wide).abs() <= bound + torch.finfo(dtype).eps * wide.abs()).all()


@every_function
def test_opcheck(name):
    pair = values_of(name, 2, 5).to(DEVICE).requires_grad_(), random_boxes(5, seed=1).to(DEVICE).requires_grad_()
    options = WEIGHTS if name == "encode_boxes" else (*WEIGHTS, 4.0)
    torch.library.opcheck(getattr(OPS, name).default, (*pair, *options))
    plain = [one.detach() for one in pair]
    grad = torch.ones(2, 5, 4, device=DEVICE)
    torch.library.opcheck(getattr(OPS, name + "_backward").default, (grad, *plain, *options, True, False))


@pytest.mark.graph
@every_function
def test_a_graph_replays_with_other_boxes(name):
    values, anchors = values_of(name, 4, 500).to(DEVICE).requires_grad_(), random_boxes(500, seed=1).to(DEVICE)

    def step():
        result = FUNCTIONS[name](values, anchors)
        return result.detach(), *torch.autograd.grad(result.sum(), values)

    graph, results = capture(step)
    for seed in range(5, 8):
        anchors.copy_(random_boxes(500, seed=seed))
        for result in results:
            result.fill_(-77)
        graph.replay()
        for replayed, eager in zip([result.clone() for result in results], step(), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.sync
@every_function
def test_no_call_makes_the_host_wait(name):
    inputs = values_of(name, 2, 500).to(DEVICE).requires_grad_(), random_boxes(500, seed=1).to(DEVICE).requires_grad_()
    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        torch.autograd.grad(FUNCTIONS[name](*inputs).sum(), inputs)
    with host_must_not_wait():
        torch.autograd.grad(FUNCTIONS[name](*inputs).sum(), inputs)


@pytest.mark.identity
@every_function
def test_same_bits_in_100_runs(name):
    inputs = (
        values_of(name, 4, 5000).to(DEVICE).requires_grad_(),
        random_boxes(5000, seed=1).to(DEVICE).requires_grad_(),
    )

    def step():
        result = FUNCTIONS[name](*inputs)
        return result.detach(), *torch.autograd.grad(result.sum(), inputs)

    expected = step()
    other_work, stream = torch.zeros(32 << 20, device=DEVICE), torch.cuda.Stream()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(stream):
                other_work.add_(1)
        for one, other in zip(step(), expected, strict=True):
            assert torch.equal(one, other)
    torch.cuda.synchronize()


@pytest.mark.large
@every_function
def test_more_than_2_31_numbers(name):
    rows = 2**31 // 4 + 1000
    free, _ = torch.cuda.mem_get_info()
    needed = 3 * 16 * rows + (2 << 30)
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, and {free / 1e9:.0f} GB are free")
    values = values_of(name, 1000).to(DEVICE).repeat(rows // 1000 + 1, 1)[:rows]
    anchors = random_boxes(1, seed=1).to(DEVICE)
    result = FUNCTIONS[name](values, anchors)
    assert result.numel() > 2**31
    expected = FUNCTIONS[name](values[:1000], anchors)
    for first in (0, rows // 2000 * 1000, rows // 1000 * 1000 - 1000):
        assert torch.equal(result[first : first + 1000], expected)


@pytest.mark.sanitizer
@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_calls_of_every_kernel(name, dtype):
    """For compute-sanitizer: partial blocks, broadcast dimensions, strides, gradients of both and of one."""
    inputs = [
        values_of(name, 2, 301, dtype=dtype).to(DEVICE).requires_grad_(),
        random_boxes(301, seed=1, dtype=dtype).to(DEVICE).requires_grad_(),
    ]
    torch.autograd.grad(FUNCTIONS[name](*inputs).sum(), inputs)
    torch.autograd.grad(FUNCTIONS[name](inputs[0][:, ::3], inputs[1].detach()[::3]).sum(), inputs[0])
