"""box_iou against its reference and torchvision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from started_anew import on_instruction_sets

from retinanet_ext import box_iou, reference

OPS = torch.ops.retinanet_ext
FORMATS = ("xyxy", "xywh", "cxcywh")


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


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.floats(width=32), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from(FORMATS),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_box_iou_of_any_float_is_torchvisions(rows, fmt, dtype):
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision")
    boxes = torch.tensor(rows, dtype=dtype)
    assert same_bits(box_iou(boxes, boxes, fmt), tv_ops.box_iou(boxes, boxes, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_box_iou_of_numbers_that_are_not_finite(dtype, fmt):
    """Every meeting of infinities, NaN, signed zeros and numbers that overflow, along one axis and both."""
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan, largest, -largest], dtype=dtype)
    spans = torch.cartesian_prod(values, values)
    one_axis = torch.stack([spans[:, 0], torch.zeros(81), spans[:, 1], torch.full((81,), 3.0)], dim=1).to(dtype)
    both_axes = torch.stack([spans[:, 0], spans[:, 0].flip(0), spans[:, 1], spans[:, 1].flip(0)], dim=1)
    boxes = torch.cat((one_axis, both_axes, one_axis[:, [1, 0, 3, 2]]))
    iou = box_iou(boxes, boxes, fmt)
    assert same_bits(iou, reference.box_iou(boxes, boxes, fmt))
    assert iou.isnan().any()
    assert (iou == 0).any()


# Rows of the result that are shorter than a vector, as long, longer; runs of boxes that are not full, full, several.
SHAPES = [(1, 1), (3, 15), (700, 15), (512, 1), (513, 2), (5, 16), (70, 17), (3, 511), (3, 512), (40, 513), (9, 1100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_box_iou_of_every_shape(dtype, shape):
    boxes1, boxes2 = random_boxes(shape[0], seed=1, dtype=dtype), random_boxes(shape[1], seed=2, dtype=dtype)
    boxes1[::7] = boxes2[-1]  # some of IoU 1
    for fmt in FORMATS:
        assert same_bits(box_iou(boxes1, boxes2, fmt), reference.box_iou(boxes1, boxes2, fmt))


def test_box_iou_of_large_results():
    """Results that ask for large pages; and tasks of several threads."""
    boxes1, boxes2 = random_boxes(1100, seed=1), random_boxes(1030, seed=2)
    assert same_bits(box_iou(boxes1, boxes2), reference.box_iou(boxes1, boxes2))
    assert same_bits(box_iou(boxes1.double(), boxes2.double()), reference.box_iou(boxes1.double(), boxes2.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_box_iou_larger_than_the_cache_has_the_bits_of_its_parts(dtype):
    """Large results are written around the caches."""
    columns = 48 * 2**20 // (1031 * dtype.itemsize)
    boxes1, boxes2 = random_boxes(1031, seed=1).to(dtype), random_boxes(columns, seed=2).to(dtype)
    parts = [box_iou(boxes1[i : i + 97], boxes2) for i in range(0, 1031, 97)]
    assert same_bits(box_iou(boxes1, boxes2), torch.cat(parts))


def test_box_iou_of_any_strides():
    boxes1, boxes2 = random_boxes(30, seed=1), random_boxes(40, seed=2)
    expected = reference.box_iou(boxes1, boxes2)
    wide = torch.full((30, 7), torch.nan)
    wide[:, 3:] = boxes1
    assert same_bits(box_iou(wide[:, 3:], boxes2), expected)
    assert same_bits(box_iou(boxes1.flip(0).contiguous().flip(0), boxes2.T.contiguous().T), expected)
    assert same_bits(box_iou(boxes1[::3], boxes2[1::2]), expected[::3, 1::2])
    shifted = torch.empty(121)[1:].view(30, 4).copy_(boxes1)
    assert same_bits(box_iou(shifted, boxes2[:1].expand(40, 4)), expected[:, :1].expand(30, 40))


@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [
        ((2, 6), (9,)),
        ((6,), (2, 9)),
        ((3, 1, 6), (1, 5, 9)),
        ((3, 1, 2, 6), (5, 1, 9)),
        ((1, 6), (4, 9)),
        ((2, 3, 6), (2, 3, 9)),
        ((0, 6), (1, 9)),
        ((2, 0), (2, 9)),
        ((2, 3), (2, 0)),
    ],
    ids=str,
)
def test_box_iou_of_batches_that_broadcast(shape1, shape2):
    boxes1, boxes2 = random_boxes(*shape1, seed=1), random_boxes(*shape2, seed=2)
    assert same_bits(box_iou(boxes1, boxes2), reference.box_iou(boxes1, boxes2))
    moved = random_boxes(*reversed(shape1), seed=3).permute(*reversed(range(len(shape1))), -1)
    assert same_bits(box_iou(moved, boxes2, "cxcywh"), reference.box_iou(moved, boxes2, "cxcywh"))


def test_box_iou_of_more_dimensions_than_can_be_walked():
    boxes = random_boxes(*(2,) * 9, 3, seed=1)
    each_second = torch.cat((boxes, boxes), dim=-2)[..., ::2, :]
    assert same_bits(box_iou(boxes, boxes[..., 1:, :]), reference.box_iou(boxes, boxes[..., 1:, :]))
    shuffled = each_second.permute(*reversed(range(9)), 9, 10)
    with pytest.raises(RuntimeError, match="at most 8 leading dimensions can be walked without a copy"):
        box_iou(shuffled, boxes)
    assert same_bits(box_iou(shuffled.contiguous(), boxes), reference.box_iou(shuffled, boxes))


def test_box_iou_of_any_number_of_threads(num_threads):
    for shape in ((1500, 1200), (20000, 3)):
        boxes1, boxes2 = random_boxes(shape[0], seed=1), random_boxes(shape[1], seed=2)
        results = []
        for threads in (1, 2, 3, 7):
            num_threads(threads)
            results.append(box_iou(boxes1, boxes2))
        assert all(same_bits(result, results[0]) for result in results)


def pairs_of_all_types():
    return [
        (random_boxes(40, seed=1, dtype=dtype), random_boxes(count, seed=2, dtype=dtype))
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        for count in (9, 70)
    ]


def overlaps_in_all_formats():
    return [box_iou(*pair, fmt) for pair in pairs_of_all_types() for fmt in FORMATS]


def test_box_iou_of_every_instruction_set(tmp_path):
    expected = [reference.box_iou(*pair, fmt) for pair in pairs_of_all_types() for fmt in FORMATS]
    for isa, results in on_instruction_sets(overlaps_in_all_formats, tmp_path).items():
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True)), isa


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.float16, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.int64, torch.float32),
        (torch.int32, torch.float64),
        (torch.uint8, torch.int16),
    ],
    ids=str,
)
def test_box_iou_of_two_types(dtypes):
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision")
    boxes1, boxes2 = (random_boxes(30, seed=seed).clamp(max=250).to(dtype) for seed, dtype in enumerate(dtypes))
    for pair in ((boxes1, boxes2), (boxes2, boxes1)):
        # torchvision computes the areas of two halves in float32 and their overlap in halves
        expected = [
            boxes.float() if boxes.element_size() == 2 and boxes.is_floating_point() else boxes for boxes in pair
        ]
        assert same_bits(box_iou(*pair), tv_ops.box_iou(*expected))


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


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1], torch.zeros(1, 4)), TypeError, "box_iou: boxes1: expected a tensor of real numbers, got list"),
        ((torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool)), TypeError, "boxes2: .*torch.bool"),
        ((torch.zeros(4), torch.zeros(1, 4)), ValueError, r"boxes1: expected shape \[..., n, 4\], got \[4\]"),
        ((torch.zeros(1, 4), torch.zeros(1, 5)), ValueError, r"boxes2: expected shape"),
        ((torch.zeros(1, 4), torch.zeros(1, 4, device="meta")), ValueError, "boxes2: .*one device"),
        (
            (torch.zeros(2, 1, 4), torch.zeros(3, 1, 4)),
            ValueError,
            r"boxes2: .*broadcast.*\[2, 1, 4\], got \[3, 1, 4\]",
        ),
        ((torch.zeros(1, 4), torch.zeros(1, 4), "xxyy"), ValueError, "fmt: expected one of .*got 'xxyy'"),
    ],
)
def test_box_iou_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        box_iou(*arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(4), torch.zeros(1, 4), 0), r"of shape \[..., n, 4\], and are float32 of shape \[4\]"),
        ((torch.zeros(1, 4), torch.zeros(1, 3), 0), r"of shape \[..., n, 4\], and are float32 of shape \[1, 3\]"),
        ((torch.zeros(1, 4).long(), torch.zeros(1, 4), 0), "boxes must be floating, .* and are int64"),
        (
            (torch.zeros(1, 4).double(), torch.zeros(1, 4), 0),
            "both boxes must be float64, or neither; .* float64",
        ),
        ((torch.zeros(1, 4), torch.zeros(1, 4), 3), r"fmt must be 0 \(xyxy\), 1 \(xywh\) or 2 \(cxcywh\), and is 3"),
        ((torch.zeros(2, 1, 4), torch.zeros(3, 1, 4), 0), r"shapes \[2, 1, 4\] and \[3, 1, 4\] do not broadcast"),
    ],
)
def test_raw_errors(arguments, text):
    with pytest.raises(RuntimeError, match="box_iou: .*" + text):
        OPS.box_iou(*arguments)
