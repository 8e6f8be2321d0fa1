"""encode_boxes and decode_boxes against their reference and torchvision."""

import itertools
import math

import pytest
import torch
from started_anew import on_instruction_sets

from retinanet_ext import decode_boxes, encode_boxes, reference

OPS = torch.ops.retinanet_ext


def random_boxes(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 300
    size = 1 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 80
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def same_bits(a, b):
    """Equal, with NaN equal to NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (0.3, 7.0, 1e-3, 2.0)])
def test_coder_is_torchvisions(weights, dtype):
    """To the bit where only + - * / are; exp and log are rounded differently, by a unit in the last place at most."""
    utils = pytest.importorskip("torchvision.models.detection._utils", reason="compares with torchvision")
    coder = utils.BoxCoder(weights)
    eps = torch.finfo(dtype).eps
    gt_boxes, anchors = random_boxes(5000, seed=1, dtype=dtype), random_boxes(5000, seed=2, dtype=dtype)
    deltas = torch.randn(5000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype) * 3

    encoded, peer = encode_boxes(gt_boxes, anchors, weights), coder.encode_single(gt_boxes, anchors)
    assert same_bits(encoded[:, :2], peer[:, :2])
    # a unit of the logarithm, and that the product with the weight then rounds to the next number
    assert ((encoded - peer).abs()[:, 2:] <= 2 * eps * peer.abs()[:, 2:]).all()

    decoded, peer = decode_boxes(deltas, anchors, weights), coder.decode_single(deltas, anchors)
    half = (peer[:, 2:] - peer[:, :2]).repeat(1, 2) / 2
    assert ((decoded - peer).abs() <= 2 * eps * half + eps * peer.abs()).all()
    deltas[:, 2:] = deltas[:, 2:].abs()  # clipped to 0: exp(0) is 1 for everybody
    clipped = utils.BoxCoder(weights, bbox_xform_clip=0.0)
    assert same_bits(decode_boxes(deltas, anchors, weights, clip=0.0), clipped.decode_single(deltas, anchors))


@pytest.mark.parametrize("function", [encode_boxes, decode_boxes])
def test_coder_in_float32_rounds_as_often_as_the_reference(function):
    """Error against float64 at most twice that of the reference in float32."""
    values, anchors = random_boxes(5000, seed=1), random_boxes(5000, seed=2)
    if function is decode_boxes:
        values = torch.randn(5000, 4) * 2
    peer = getattr(reference, function.__name__)
    truth = peer(values.double(), anchors.double())
    error, peer_error = ((one(values, anchors) - truth).abs() for one in (function, peer))
    assert (error.amax(0) <= 2 * peer_error.amax(0)).all()


@pytest.mark.parametrize(("operator", "inputs"), [(encode_boxes, 2), (decode_boxes, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coder_of_numbers_that_are_not_finite(dtype, operator, inputs):
    special = torch.tensor([0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    values = torch.cartesian_prod(*[special] * 4)
    anchors = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]
    found, right = operator(values, anchors), getattr(reference, operator.__name__)(values, anchors)
    torch.testing.assert_close(found, right, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    assert found.isnan().any()
    assert found.isinf().any()


@pytest.mark.parametrize("count", [1, 127, 128, 129, 4096, 4097, 20000])
@pytest.mark.parametrize("function", [encode_boxes, decode_boxes])
def test_coder_of_every_size_and_number_of_threads(function, count, num_threads):
    """Every row has the bits that it has alone."""
    values, anchors = random_boxes(count, seed=1) / 100, random_boxes(count, seed=2)
    results = []
    for threads in (1, 2, 5):
        num_threads(threads)
        results.append(function(values, anchors))
    assert all(same_bits(result, results[0]) for result in results)
    for row in {0, count // 2, count - 1}:
        assert same_bits(results[0][row], function(values[row], anchors[row]))


@pytest.mark.parametrize("function", [encode_boxes, decode_boxes])
def test_coder_of_any_strides(function):
    values, anchors = random_boxes(30, seed=1) / 50, random_boxes(30, seed=2)
    expected = function(values, anchors)
    wide = torch.full((30, 7), torch.nan)
    wide[:, 3:] = values
    shifted = torch.empty(121)[1:].view(30, 4).copy_(anchors)
    assert same_bits(function(wide[:, 3:], anchors.T.contiguous().T), expected)
    assert same_bits(function(values[::3], shifted[::3]), expected[::3])


SHAPES = [
    ((2, 300), (300,)),
    ((300,), (2, 300)),
    ((3, 1, 2, 5), (4, 1, 5)),
    ((), (7,)),
    ((7,), ()),
    ((), ()),
    ((5, 1), (1, 6)),
    ((0, 3), (3,)),
    ((4, 1), (4, 0)),
    ((200, 3), (1, 3)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("function", [encode_boxes, decode_boxes])
def test_coder_of_shapes_that_broadcast(function, shapes):
    values, anchors = random_boxes(*shapes[0], seed=1) / 50, random_boxes(*shapes[1], seed=2)
    shape = torch.broadcast_shapes(values.shape, anchors.shape)
    expected = function(values.expand(shape).contiguous(), anchors.expand(shape).contiguous())
    assert expected.shape == shape
    assert same_bits(function(values, anchors), expected)


def coded():
    """Results and gradients of all types."""
    results = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        values, anchors = random_boxes(2, 300, seed=1, dtype=dtype), random_boxes(300, seed=2, dtype=dtype)
        for function, scale in ((encode_boxes, 1), (decode_boxes, 60)):
            inputs = [(values / scale).requires_grad_(), anchors.clone().requires_grad_()]
            result = function(*inputs)
            results += [result.detach(), *torch.autograd.grad(result.float().square().sum(), inputs)]
    return results


def test_coder_of_every_instruction_set(tmp_path):
    expected = coded()
    for isa, results in on_instruction_sets(coded, tmp_path).items():
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True)), isa


def test_coder_by_its_formula():
    gt_box, anchor = torch.tensor([10.0, 20, 50, 40]), torch.tensor([0.0, 0, 20, 40])
    expected = [(30 - 10) / 20, (30 - 20) / 40, math.log(40 / 20), math.log(20 / 40)]
    deltas = encode_boxes(gt_box.double(), anchor.double(), (2.0, 3.0, 4.0, 5.0))
    assert deltas.tolist() == pytest.approx([w * d for w, d in zip((2, 3, 4, 5), expected, strict=True)], rel=1e-15)
    assert decode_boxes(deltas, anchor.double(), (2.0, 3.0, 4.0, 5.0)).tolist() == pytest.approx(gt_box.tolist())


def test_decode_inverts_encode():
    gt_boxes, anchors = random_boxes(1000, seed=4), random_boxes(1000, seed=5)
    decoded = decode_boxes(encode_boxes(gt_boxes, anchors), anchors, clip=math.log(100))  # sides differ by 81 at most
    # a handful of float32 roundings of coordinates below 512, whose ulp is 2^-15 at most
    assert (decoded - gt_boxes).abs().max() <= 8 * 2**-15


def test_decode_clips_growth_only():
    anchor = torch.tensor([0.0, 0, 16, 16])
    wide = decode_boxes(torch.tensor([0.0, 0, 100, 100]), anchor)
    assert (wide[2] - wide[0]).item() == pytest.approx(1000, rel=1e-6)
    narrow = decode_boxes(torch.tensor([0.0, 0, -100, 0]), anchor)
    assert (narrow[2] - narrow[0]).item() == 0
    doubled = decode_boxes(torch.tensor([0.0, 0, 9, 9]), anchor, clip=math.log(2))
    assert (doubled[3] - doubled[1]).item() == pytest.approx(32, rel=1e-6)
    assert decode_boxes(torch.full((4,), float("nan")), anchor).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coder_of_halves_rounds_once(dtype):
    gt_boxes, anchors = random_boxes(50, seed=6, dtype=dtype), random_boxes(50, seed=7, dtype=dtype)
    encoded = encode_boxes(gt_boxes, anchors)
    assert same_bits(encoded, encode_boxes(gt_boxes.float(), anchors.float()).to(dtype))
    assert same_bits(decode_boxes(encoded, anchors), decode_boxes(encoded.float(), anchors.float()).to(dtype))
    # half predictions of full-precision anchors give full-precision boxes
    assert decode_boxes(encoded, anchors.float()).dtype == torch.float32


def test_coder_broadcasts_and_takes_empty_inputs():
    anchors = random_boxes(6, seed=8)
    deltas = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(9))
    each = torch.stack([decode_boxes(deltas[0], anchors), decode_boxes(deltas[1], anchors)])
    assert torch.equal(decode_boxes(deltas, anchors), each)
    assert encode_boxes(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(("op", "name"), [(encode_boxes, "gt_boxes"), (decode_boxes, "deltas")])
def test_coder_errors(op, name):
    boxes = torch.zeros(2, 4)
    for values, anchors in itertools.product([boxes, boxes.long()], repeat=2):
        if values.dtype == anchors.dtype == torch.float32:
            continue
        with pytest.raises(TypeError, match=f"{op.__name__}: .*expected a floating tensor, got .*int64"):
            op(values, anchors)
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[\.\.\., 4\], got \[2, 3\]"):
        op(boxes[:, :3], boxes)
    with pytest.raises(ValueError, match=r"anchors: expected a shape that broadcasts with \[2, 4\], got \[3, 4\]"):
        op(boxes, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="weights: expected four positive numbers"):
        op(boxes, boxes, (1.0, 1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="anchors: expected all tensors on one device"):
        op(boxes, boxes.to("meta"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), r"of shape \[\.\.\., 4\], and one is float32 of shape \[2, 3\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4).long()), "must be floating, .* and one is int64"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), r"shapes \[2, 4\] and \[3, 4\] do not broadcast"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), 0.0), "weights must be positive, and are 0, 1, 1, 1"),
    ],
)
def test_raw_errors(arguments, text):
    values, anchors, *first = arguments
    weights = (*(first or [1.0]), 1.0, 1.0, 1.0)
    grad = torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="encode_boxes: .*" + text):
        OPS.encode_boxes(values, anchors, *weights)
    with pytest.raises(RuntimeError, match="decode_boxes: .*" + text):
        OPS.decode_boxes(values, anchors, *weights, 4.0)
    with pytest.raises(RuntimeError, match="encode_boxes_backward: .*" + text):
        OPS.encode_boxes_backward(grad, values, anchors, *weights, True, True)
    with pytest.raises(RuntimeError, match="decode_boxes_backward: .*" + text):
        OPS.decode_boxes_backward(grad, values, anchors, *weights, 4.0, True, True)


@pytest.mark.parametrize("grad", [torch.zeros(3, 4), torch.zeros(2, 4).double(), torch.zeros(8)], ids=str)
def test_raw_gradients_of_another_shape_or_type(grad):
    boxes = torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="encode_boxes_backward: grad must be float32 of the result's shape"):
        OPS.encode_boxes_backward(grad, boxes, boxes, 1.0, 1.0, 1.0, 1.0, True, True)
