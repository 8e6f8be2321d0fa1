"""The multi-level focal loss's CUDA kernel at the edges of what a thread, a tile and a pass hold, run by the emulator.

Sizes one short of, at and one beyond an edge, with anchors in the first and last place. Any bound of the kernel that is
off by one fails here or under the sanitizers: `python tests/mutate_kernels.py` proves it (docs/testing.md).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retinanet_ext import reference

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
THREADS = 256
WARP = 32
IGNORED = -2


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_multilevel_focal_loss_emulator")


def width(dtype: torch.dtype) -> int:
    """Elements of a 16-byte vector."""
    return 16 // dtype.itemsize


def tile_rows(classes: int, dtype: torch.dtype) -> int:
    """Rows of a tile of the rows layout: four vectors a thread, in whole vectors."""
    return max(4 * THREADS * width(dtype) // classes // width(dtype), 1) * width(dtype)


def make_level(
    batch: int, cells: int, anchors: int, classes: int, dtype: torch.dtype, scale: float = 3
) -> torch.Tensor:
    """Logits in anchor order, [B, H*W, A, K]."""
    return (torch.randn(batch, cells, anchors, classes, dtype=torch.float64) * scale - 1).to(dtype)


def to_layout(level: torch.Tensor, planes: bool) -> torch.Tensor:
    """The level's elements as the kernel finds them: [B, H*W, A, K] or [B, A, K, H*W]."""
    return level.permute(0, 2, 3, 1).contiguous() if planes else level


def run(
    emulator,
    levels: list[torch.Tensor],
    planes: bool,
    targets: torch.Tensor,
    task="sum+gradient",
    starts=(0, 0),
    **options,
):
    """The sum and the gradients, flat. `starts`: elements before the logits and the gradient of each level."""
    dtype = levels[0].dtype
    entries = []
    for level in levels:
        flat = to_layout(level, planes).flatten()
        array = flat.view(torch.uint16).numpy() if dtype.itemsize == 2 else flat.numpy()
        array = np.concatenate([np.zeros(starts[0], array.dtype), array])
        entries.append((array, planes, level.shape[2], level.shape[1], 0, *starts))
    name = next(name for name, value in DTYPES.items() if value == dtype)
    total, gradients, note = emulator.multilevel_focal_loss(
        name, entries, targets.numpy(), levels[0].shape[-1], task=task, **options
    )
    return total, [torch.from_numpy(gradient).view(dtype) for gradient in gradients], note


def assert_right(emulator, levels: list[torch.Tensor], planes: bool, targets: torch.Tensor, **options) -> None:
    """Sum and gradients, against the reference in float64."""
    x = [level.clone().double().requires_grad_() for level in levels]
    rows = torch.cat([level.flatten(1, 2) for level in x], dim=1)
    loss = reference.sigmoid_focal_loss(rows, targets, reduction="sum")
    total, gradients, _ = run(emulator, levels, planes, targets, **options)
    np.testing.assert_allclose(total, loss.item(), rtol=2e-5)
    dtype = levels[0].dtype
    info = torch.finfo(dtype)
    relative = {64: 1e-12, 32: 2e-5, 16: 2e-5 + info.eps / 2}[info.bits]
    for gradient, wanted in zip(gradients, torch.autograd.grad(loss, x), strict=True):
        wanted = to_layout(wanted, planes).flatten()
        torch.testing.assert_close(gradient.double(), wanted, rtol=relative, atol=1e-30)


def background(batch: int, anchors: int) -> torch.Tensor:
    return torch.full((batch, anchors), -1)


def dense(batch: int, anchors: int, classes: int) -> torch.Tensor:
    """Every kind of anchor beside every other; the last one's class is the first that is none."""
    kinds = torch.randint(0, 4, (batch, anchors))
    targets = torch.randint(0, classes, (batch, anchors))
    targets[kinds == 0] = -1
    targets[kinds == 1] = IGNORED
    targets[:, -1] = classes
    return targets


def assert_right_of_both_kinds(emulator, level: torch.Tensor, planes: bool) -> None:
    batch, cells, anchors, classes = level.shape
    assert_right(emulator, [level], planes, background(batch, cells * anchors))
    assert_right(emulator, [level], planes, dense(batch, cells * anchors, classes))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_cells_of_planes(emulator, batch, dtype):
    """Around a vector, a warp and a tile; whole vectors are read as such, and the others element by element."""
    vector = width(dtype)
    tile = WARP * vector
    edges = (1, vector, WARP, tile, 2 * tile)
    for cells in sorted({edge + more for edge in edges for more in (-vector, -1, 0, 1, vector)}):
        if cells > 0:
            assert_right_of_both_kinds(emulator, make_level(batch, cells, 2, 9, dtype), planes=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 7, 8, 9, 31, 32, 33, 64, 65])
def test_planes_of_cells(emulator, classes, dtype):
    """Around what eight warps take at a time, one plane each or four."""
    for cells in (width(dtype), width(dtype) + 1, 40):
        assert_right_of_both_kinds(emulator, make_level(1, cells, 1, classes, dtype), planes=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("planes", [True, False])
def test_memory_that_begins_anywhere(emulator, planes, dtype):
    """Vectors are loaded and stored on 16-byte boundaries alone, which the sanitizer watches."""
    level = make_level(2, 2 * width(dtype), 2, 4, dtype)
    count = level.shape[1] * level.shape[2]
    for starts in ((0, 0), (1, 0), (0, 1), (1, 1), (width(dtype), width(dtype))):
        for targets in (background(2, count), dense(2, count, 4)):
            assert_right(emulator, [level], planes, targets, starts=starts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_levels_are_read_by_vectors_wherever_they_can_be(emulator, dtype):
    vector = width(DTYPES[dtype])
    level = {"cells": 2 * vector, "classes": 3, "image_stride": 6 * vector}

    def aligned(**options):
        return emulator.add_level(dtype, **{**level, **options})[1]

    for planes in (True, False):
        assert aligned(planes=planes)
        assert aligned(planes=planes, batch=2)
        assert not aligned(planes=planes, logits=8)
        assert not aligned(planes=planes, gradient=8)
        assert aligned(planes=planes, image_stride=6 * vector + 1)  # of one image
        assert not aligned(planes=planes, batch=2, image_stride=6 * vector + 1)
        assert not aligned(planes=planes, batch=2, image_stride=6 * vector - 1)
    odd = {"cells": 2 * vector + 1, "image_stride": 8 * vector}
    assert not aligned(planes=True, **odd)
    assert aligned(planes=False, **odd)
    assert not aligned(planes=False, batch=2, **odd)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_levels_have_no_tile_too_many(emulator, dtype):
    tile = WARP * width(DTYPES[dtype])
    for cells, tiles in ((1, 1), (tile - 1, 1), (tile, 1), (tile + 1, 2), (2 * tile, 2), (2 * tile + 1, 3)):
        assert emulator.add_level(dtype, cells=cells, anchors=3, batch=5)[0] == 15 * tiles
    rows = tile_rows(1001, DTYPES[dtype])
    for cells, tiles in ((1, 1), (rows - 1, 1), (rows, 1), (rows + 1, 2), (2 * rows, 2), (2 * rows + 1, 3)):
        assert emulator.add_level(dtype, cells=cells, classes=1001, planes=False, batch=5)[0] == 5 * tiles


def test_levels_too_large_to_be_counted_are_refused(emulator):
    """Anchors of an image, planes of an image and tiles are counted up to 2^30."""
    most, more = 1 << 30, 25 * 42949673
    assert more == most + 1
    for planes in (True, False):
        assert emulator.add_level("float32", planes=planes, cells=most) is not None
        assert emulator.add_level("float32", planes=planes, cells=more) is None
        assert emulator.add_level("float32", planes=planes, batch=most)[0] == most
        assert emulator.add_level("float32", planes=planes, batch=more) is None
    assert emulator.add_level("float32", anchors=1 << 15, classes=1 << 15) is not None
    assert emulator.add_level("float32", anchors=25, classes=more // 25) is None


def row_sizes(dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Rows and classes, by the edge they lie at."""
    vector = width(dtype)
    rows = tile_rows(1001, dtype)  # a vector's width: a tile of few rows that do not end with vectors
    short = tile_rows(3, dtype)
    step = THREADS * vector
    sizes = {"one element": (1, 1), "more rows than threads": (257, 3), "short rows, tile + row": (short + 1, 3)}
    for name, elements in {
        "vector": vector,
        "threads": THREADS,
        "step": step,
        "pass": 4 * step,
        "passes": 8 * step,
    }.items():
        sizes |= {f"{name} {more:+d}": (1, elements + more) for more in (-1, 0, 1)}
    sizes |= {f"tile {more:+d} rows": (rows + more, 1001) for more in (-1, 0, 1, rows - 1, rows)}
    return sizes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_rows(emulator, batch, dtype):
    """One image's rows are read by whole vectors; those of two, element by element unless whole vectors divide them."""
    for rows, classes in row_sizes(dtype).values():
        assert_right_of_both_kinds(emulator, make_level(batch, rows, 1, classes, dtype), planes=False)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_that_begin_and_end_within_vectors(emulator, dtype, classes):
    for _ in range(3):
        assert_right_of_both_kinds(emulator, make_level(1, 61, 1, classes, dtype), planes=False)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("target", [0, 4, IGNORED])
@pytest.mark.parametrize("odd", [0, 1])
def test_one_anchor_among_background(emulator, odd, target, planes):
    """In the first, the last or any other place of a tile, and of a thread's rows, it sends the tile down its path."""
    classes, anchors = 5, 2
    tile = WARP * 4 if planes else tile_rows(classes, torch.float32) // anchors
    cells = tile + 152 + odd
    level = make_level(1, cells, anchors, classes, torch.float32)
    edges = {0, 1, 31, 32, 127, 128, tile - 1, tile, tile + 127, tile + 128, cells - 1}
    for anchor in {cell * anchors + last for cell in edges for last in (0, anchors - 1)}:
        targets = background(1, cells * anchors)
        targets[0, anchor] = target
        assert_right(emulator, [level], planes, targets)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("target", [0, 4, IGNORED])
def test_tiles_without_background(emulator, target, planes):
    """Every anchor of the same kind: no other one sends the tile down its path."""
    cells = WARP * 4
    assert_right(emulator, [make_level(1, cells, 2, 5, torch.float32)], planes, torch.full((1, cells * 2), target))


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("positives", [0, 1])
@pytest.mark.parametrize("cells", [40, 41])
def test_every_code_of_background_takes_one_path(emulator, cells, positives, index_dtype, planes):
    """-1, the class behind the last and all beyond: the same bits, which another path's roundings would not leave."""
    classes = 9
    level = make_level(1, cells, 3, classes, torch.float32)
    results = {}
    for code in (-1, -3, classes, classes + 1, 2**31 - 1, -(2**31)):
        targets = torch.full((1, cells * 3), code, dtype=index_dtype)
        targets[0, :positives] = 2
        total, gradients, _ = run(emulator, [level], planes, targets, normalizer=np.float32([3.0]))
        results[code] = np.float64(total).tobytes() + gradients[0].numpy().tobytes()
    assert len(set(results.values())) == 1, {code: hash(bits) for code, bits in results.items()}


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 3, 40])
def test_tiles_of_levels_and_images(emulator, blocks, planes):
    """Levels of one tile and of several, each image's: every tile is found in its own level and image, once."""
    dtype, anchors, classes = torch.bfloat16, 2, 1001 if not planes else 3
    tile = WARP * width(dtype) if planes else tile_rows(classes, dtype) // anchors
    levels = [make_level(2, cells, anchors, classes, dtype) for cells in (2 * tile, tile, tile + 1, 1, 1)]
    count = sum(level.shape[1] * anchors for level in levels)
    assert_right(emulator, levels, planes, dense(2, count, classes), blocks=blocks)
    assert_right(emulator, levels, planes, background(2, count), blocks=blocks)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("cells", [8, 21, 32, 200])
def test_a_normalizer_of_zero_makes_infinity(emulator, cells, start, planes):
    """Losses are positive; a thread that has no element adds nothing, and not the NaN of 0 * inf."""
    level = torch.randn(1, cells, 1, 1)
    for targets in (background(1, cells), dense(1, cells, 1)):
        total, *_ = run(emulator, [level], planes, targets, normalizer=np.float32([0.0]), starts=(start, start))
        assert total == np.inf


@pytest.mark.parametrize("blocks", [1, 2])
def test_whether_one_came_from_above_is_noted_by_the_first_block(emulator, blocks):
    level = make_level(1, 3, 1, 4, torch.float32)
    for grad, noted in ((1.0, 1), (2.0, 0)):
        options = {"task": "gradient", "grad": grad, "filled": [np.zeros(12, np.float32)], "blocks": blocks}
        assert run(emulator, [level], False, background(1, 3), **options)[2] == noted
