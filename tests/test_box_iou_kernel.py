"""The CUDA kernel of box_iou, run by the emulator: the real code, in several orders of its threads.

RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under AddressSanitizer and
UndefinedBehaviorSanitizer: see docs/testing.md.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retinanet_ext import reference

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
FORMATS = ("xyxy", "xywh", "cxcywh")
# All legal on a GPU; a result that differs between two of them depends on the order of threads.
SCHEDULES = [
    {"order": "forward"},
    {"order": "backward", "live_blocks": 2},
    {"order": "random", "seed": 1, "live_blocks": 3},
]


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_box_iou_emulator")


def random_boxes(*shape, seed=0, dtype=torch.float32):
    """Small whole numbers and a half: exact in every type, many overlaps, some boxes inverted or without area."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 24, (*shape, 2), generator=generator)
    size = torch.randint(-2, 12, (*shape, 2), generator=generator)
    return (torch.cat([corner, corner + size], dim=-1) / 2).to(dtype)


def memory(boxes: torch.Tensor) -> np.ndarray:
    """A tensor's elements in memory order; halves as bit patterns."""
    flat = boxes.flatten()
    return flat.view(torch.uint16).numpy() if flat.element_size() == 2 else flat.numpy()


def side(boxes: torch.Tensor, *, whole=True, first=0, row_stride=4, number_stride=1, count=None) -> tuple:
    name = next(name for name, dtype in DTYPES.items() if dtype == boxes.dtype)
    return name, memory(boxes), boxes.shape[-2] if count is None else count, first, row_stride, number_stride, whole


def assert_iou(emulator, side1, side2, expected, dims=((), (), ()), schedules=SCHEDULES, **options):
    """The kernel's bits are the reference's, in every order of the threads; NaN is NaN."""
    for schedule in schedules:
        actual = emulator.box_iou(side1, side2, *dims, **options, **schedule)
        np.testing.assert_array_equal(actual, expected.reshape(actual.shape).numpy(), err_msg=str(schedule))


# Rows that few threads, half of them, and all lie along; one thread more than that; more than one tile of columns.
COLUMNS = [1, 8, 9, 33, 255, 256, 257, 1024, 1025]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_shape_of_tile(emulator, dtype, columns):
    boxes1, boxes2 = (
        random_boxes(45, seed=1, dtype=DTYPES[dtype]),
        random_boxes(columns, seed=2, dtype=DTYPES[dtype]),
    )
    assert_iou(emulator, side(boxes1), side(boxes2), reference.box_iou(boxes1, boxes2))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_formats(emulator, dtype, fmt):
    boxes1, boxes2 = random_boxes(19, seed=3, dtype=DTYPES[dtype]), random_boxes(21, seed=4, dtype=DTYPES[dtype])
    expected = reference.box_iou(boxes1, boxes2, fmt)
    assert ((expected > 0) & (expected < 1)).any()
    assert_iou(emulator, side(boxes1), side(boxes2), expected, format=FORMATS.index(fmt))


def test_two_types(emulator):
    boxes1, boxes2 = random_boxes(19, seed=3, dtype=torch.float16), random_boxes(300, seed=4, dtype=torch.float32)
    assert_iou(emulator, side(boxes1), side(boxes2), reference.box_iou(boxes1, boxes2))


@pytest.mark.parametrize("columns", [21, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(emulator, dtype, columns):
    """Boxes inside wider rows, from an odd place on; and one number of all boxes after the other."""
    boxes1, boxes2 = random_boxes(37, seed=5, dtype=DTYPES[dtype]), random_boxes(columns, seed=6, dtype=DTYPES[dtype])
    expected = reference.box_iou(boxes1, boxes2)
    wide = torch.full((37, 7), torch.nan, dtype=boxes1.dtype)
    wide[:, 3:] = boxes1
    side1 = side(wide, whole=False, first=3, row_stride=7)
    side2 = side(boxes2.T.contiguous(), whole=False, row_stride=1, number_stride=columns, count=columns)
    assert_iou(emulator, side1, side2, expected)


@pytest.mark.parametrize("columns", [5, 270])
def test_batches_that_broadcast(emulator, columns):
    """[3, 1, 2, 6, 4] with [5, 1, columns, 4]."""
    boxes1, boxes2 = random_boxes(3, 1, 2, 6, seed=7), random_boxes(5, 1, columns, seed=8)
    dims = ([3, 5, 2], [48, 0, 24], [0, 4 * columns, 0])
    assert_iou(emulator, side(boxes1), side(boxes2), reference.box_iou(boxes1, boxes2), dims)


@pytest.mark.parametrize(("rows", "columns"), [(600, 5), (100, 70), (70, 1100)])
@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_blocks_that_walk_many_tiles(emulator, rows, columns, blocks):
    boxes1, boxes2 = random_boxes(2, rows, seed=9), random_boxes(2, columns, seed=10)
    dims = ([2], [4 * rows], [4 * columns])
    expected = reference.box_iou(boxes1, boxes2)
    assert_iou(emulator, side(boxes1), side(boxes2), expected, dims, blocks=blocks, wanted=50)


@pytest.mark.parametrize(("rows", "columns"), [(511, 3), (512, 3), (513, 3), (1025, 3)])
def test_as_many_rows_as_a_tile_takes(emulator, rows, columns):
    boxes1, boxes2 = random_boxes(rows, seed=11), random_boxes(columns, seed=12)
    assert_iou(emulator, side(boxes1), side(boxes2), reference.box_iou(boxes1, boxes2))


@pytest.mark.parametrize("fmt", FORMATS)
def test_numbers_that_are_not_finite(emulator, fmt):
    values = torch.tensor([0.0, 1.0, 3.0, -2.0, torch.inf, -torch.inf, torch.nan, 3e38])
    boxes = torch.cartesian_prod(values[:7], values[[0, 2, 4, 6, 7]], values[:7], values[[1, 3, 4, 7]])[::3]
    others = boxes[::29]
    expected = reference.box_iou(boxes, others, fmt)
    assert (expected == 0).any()
    assert expected.isnan().any()
    assert_iou(emulator, side(boxes), side(others), expected, format=FORMATS.index(fmt), schedules=SCHEDULES[:1])
    assert_iou(emulator, side(others), side(boxes), expected.T, format=FORMATS.index(fmt), schedules=SCHEDULES[:1])


@pytest.mark.parametrize("columns", [1, 8, 9, 16, 17, 127, 128, 129, 255, 256, 257, 1024, 1025, 5000, 200_000])
@pytest.mark.parametrize("rows", [1, 7, 300, 5000, 10**10])
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_cover_the_matrix_and_are_as_many_as_wanted(emulator, batch, rows, columns):
    def cut(wanted):
        return emulator.tiling(batch, rows, columns, wanted)

    threads, thread_columns, largest, *_ = cut(1)
    assert threads == min(256, max(8, 2 ** math.ceil(math.log2(columns))))
    assert thread_columns == (4 if columns > 256 else 1)
    row_threads = emulator.threads // threads
    assert largest == 16 * row_threads <= emulator.tile_rows
    for wanted in (1, 2, 100, 528, 10**9):
        *same, tile_rows, row_tiles, column_tiles, tiles = cut(wanted)
        assert same == [threads, thread_columns]
        width = threads * thread_columns
        assert (row_tiles - 1) * tile_rows < rows <= row_tiles * tile_rows
        assert (column_tiles - 1) * width < columns <= column_tiles * width
        assert tiles == batch * row_tiles * column_tiles
        # as large as may be: with tiles of twice the rows there would be too few
        assert tiles >= wanted or tile_rows == row_threads
        assert tile_rows == largest or batch * column_tiles * -(-rows // (2 * tile_rows)) < wanted
    *_, exact = cut(1)
    assert cut(exact)[2] == largest
    assert cut(exact + 1)[2] < largest
