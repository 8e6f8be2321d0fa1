"""box_iou, encode_boxes and decode_boxes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet_ext import box_iou, decode_boxes, encode_boxes


def random_boxes(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 300
    size = 1 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 80
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def same_bits(a, b):
    """Equal, with NaN equal to NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("fmt", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_box_iou_is_torchvisions_to_the_bit(dtype, fmt):
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision")
    for shape1, shape2 in (((200,), (300,)), ((2, 3, 5), (2, 3, 7)), ((0,), (4,)), ((4,), (0,))):
        boxes1, boxes2 = (
            random_boxes(*shape1, seed=1, dtype=dtype),
            random_boxes(*shape2, seed=2, dtype=dtype),
        )
        assert same_bits(box_iou(boxes1, boxes2, fmt), tv_ops.box_iou(boxes1, boxes2, fmt))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(width=32), min_size=4, max_size=4), min_size=1, max_size=6))
def test_box_iou_of_any_float_is_torchvisions(rows):
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision")
    boxes = torch.tensor(rows, dtype=torch.float32)
    assert same_bits(box_iou(boxes, boxes), tv_ops.box_iou(boxes, boxes))


def test_box_iou_of_known_boxes():
    boxes1 = torch.tensor([[0.0, 0, 10, 10], [0, 0, 0, 0]])
    boxes2 = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30], [0, 0, 0, 0]])
    iou = box_iou(boxes1, boxes2)
    assert torch.equal(iou[0], torch.tensor([1.0, 25 / 175, 0.0, 0.0]))
    assert iou[1, :3].tolist() == [0.0, 0.0, 0.0]
    assert iou[1, 3].isnan()
    assert box_iou(boxes1.long(), boxes2.long())[0, 1] == torch.tensor(25.0) / 175
    centred = torch.tensor([[5.0, 5, 10, 10]])
    assert torch.equal(box_iou(centred, torch.tensor([[10.0, 10, 10, 10]]), "cxcywh"), iou[:1, 1:2])
    assert torch.equal(box_iou(boxes1[:1], torch.tensor([[5.0, 5, 10, 10]]), "xywh"), iou[:1, 1:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_box_iou_of_halves_is_computed_in_float32(dtype):
    boxes = random_boxes(20, dtype=dtype)
    assert same_bits(box_iou(boxes, boxes), box_iou(boxes.float(), boxes.float()))


def test_box_iou_gradient():
    boxes1 = random_boxes(3, seed=3, dtype=torch.float64).requires_grad_()
    boxes2 = (random_boxes(3, seed=3, dtype=torch.float64) + 7).requires_grad_()
    assert torch.autograd.gradcheck(box_iou, (boxes1, boxes2))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1], torch.zeros(1, 4)), TypeError, "box_iou: boxes1: expected a tensor of real numbers, got list"),
        ((torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool)), TypeError, "boxes2: .*torch.bool"),
        ((torch.zeros(4), torch.zeros(1, 4)), ValueError, r"boxes1: expected shape \[..., n, 4\], got \[4\]"),
        ((torch.zeros(1, 4), torch.zeros(1, 5)), ValueError, r"boxes2: expected shape"),
        ((torch.zeros(1, 4), torch.zeros(1, 4, device="meta")), ValueError, "boxes2: .*one device"),
        ((torch.zeros(1, 4), torch.zeros(1, 4), "xxyy"), ValueError, "fmt: expected one of .*got 'xxyy'"),
    ],
)
def test_box_iou_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        box_iou(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coder_is_torchvisions_to_the_bit(weights, dtype):
    utils = pytest.importorskip("torchvision.models.detection._utils", reason="compares with torchvision")
    coder = utils.BoxCoder(weights)
    gt_boxes, anchors = random_boxes(500, seed=1, dtype=dtype), random_boxes(500, seed=2, dtype=dtype)
    deltas = torch.randn(500, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype) * 3
    assert same_bits(encode_boxes(gt_boxes, anchors, weights), coder.encode_single(gt_boxes, anchors))
    assert same_bits(decode_boxes(deltas, anchors, weights), coder.decode_single(deltas, anchors))


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


def test_coder_gradients():
    anchors = random_boxes(3, seed=10, dtype=torch.float64).requires_grad_()
    gt_boxes = random_boxes(3, seed=11, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(encode_boxes, (gt_boxes, anchors))
    deltas = (torch.arange(12, dtype=torch.float64).reshape(3, 4) / 10).requires_grad_()
    assert torch.autograd.gradcheck(decode_boxes, (deltas, anchors))


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
