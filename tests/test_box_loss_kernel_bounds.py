"""The box regression loss's CUDA kernel at the edges of what a vector, a warp, a batch and a tile hold, run by the
emulator.

Sizes one short of, at and one beyond an edge, with foreground in the first and last place. Any bound of the kernel that
is off by one fails here or under the sanitizers: `python tests/mutate_kernels.py` proves it (docs/testing.md).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WARP = 32


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_box_loss_emulator")


def make_level(batch: int, cells: int, anchors: int, dtype: torch.dtype) -> torch.Tensor:
    """Deltas in anchor order, [B, H*W, 4A]."""
    return torch.randn(batch, cells, 4 * anchors).to(dtype)


def run(emulator, levels: list[torch.Tensor], planes: bool, matched: torch.Tensor, task: str, **options):
    """Anchors of side 1 and boxes of side 2 at the same corner: every coordinate of an encoded box is 1/2 or log 2."""
    dtype, batch = levels[0].dtype, len(matched)
    compute = np.float64 if dtype == torch.float64 else np.float32
    entries = []
    for level in levels:
        _, cells, channels = level.shape
        memory = (level.transpose(1, 2) if planes else level).contiguous().flatten()
        strides = (cells * channels, cells, 1, 1) if planes else (cells * channels, 1, channels, channels)
        array = memory.view(torch.uint16).numpy() if dtype.itemsize == 2 else memory.numpy()
        entries.append((array, strides, channels // 4, cells, 1, planes))
    anchors = np.tile(np.array([0, 0, 1, 1], compute), (matched.shape[1], 1))
    boxes = [np.tile(np.array([0, 0, 2, 2], compute), (3, 1))] * batch
    name = next(name for name, value in DTYPES.items() if value == dtype)
    result = emulator.box_loss(name, entries, anchors, boxes, matched.numpy(), task=task, **options)
    return result if task == "sum" else [torch.from_numpy(one).view(dtype) for one in result]


def assert_right(emulator, levels: list[torch.Tensor], planes: bool, matched: torch.Tensor, **options) -> None:
    """The l1 loss: its gradients are signs, exact in every dtype, and zero wherever there is no foreground."""
    expected, first = 0.0, 0
    gradients = run(emulator, levels, planes, matched, "gradient", **options)
    for level, gradient in zip(levels, gradients, strict=True):
        batch, cells, channels = level.shape
        rows = level.double().view(batch, -1, 4)
        difference = rows - torch.tensor([0.5, 0.5, math.log(2), math.log(2)], dtype=torch.float64)
        foreground = matched[:, first : first + rows.shape[1], None] >= 0
        first += rows.shape[1]
        expected += torch.where(foreground, difference.abs(), 0).sum().item()
        wanted = torch.where(foreground, difference.sign(), 0).view(batch, cells, channels)
        wanted = (wanted.transpose(1, 2) if planes else wanted).flatten()
        assert torch.equal(gradient.double(), wanted)
    # every distance is rounded once or twice before they are added in float64
    relative = 4 * torch.finfo(torch.float32 if levels[0].dtype != torch.float64 else torch.float64).eps
    assert run(emulator, levels, planes, matched, "sum", **options) == pytest.approx(expected, rel=relative, abs=1e-6)


def background(batch: int, anchors: int) -> torch.Tensor:
    return torch.full((batch, anchors), -1, dtype=torch.int32)


def dense(batch: int, anchors: int, share: float) -> torch.Tensor:
    """Foreground with a probability of `share`, and always at both ends."""
    matched = torch.where(torch.rand(batch, anchors) < share, torch.randint(0, 3, (batch, anchors)), -2).int()
    matched[:, 0] = matched[:, -1] = 1
    return matched


def around(*edges: int) -> list[int]:
    return sorted({edge + more for edge in edges for more in (-1, 0, 1) if edge + more > 0})


@pytest.mark.parametrize(
    ("anchors", "cells", "cells_per_tile"),
    [
        *((1, cells, 2048) for cells in (1, 2047, 2048, 2049, 4096, 4097)),
        *((9, cells, 224) for cells in (1, 223, 224, 225)),
        *((anchors, 100, 32) for anchors in (43, 64)),
        *((anchors, 100, 16) for anchors in (65, 127, 128, 129, 5000)),
    ],
)
def test_tiles_of_a_level(emulator, anchors, cells, cells_per_tile):
    assert (emulator.batch, emulator.cell_step) == (2048, 16)
    per_image = -(-cells // cells_per_tile)
    assert emulator.tiling(anchors, cells, 1, 3, 7) == (cells_per_tile, per_image, 7 + 3 * per_image)
    assert emulator.tiling(anchors, 1, cells, 3, 7) == (cells_per_tile, per_image, 7 + 3 * per_image)


def test_levels_that_are_too_large_to_count(emulator):
    most = 1 << 28
    assert emulator.tiling(1, most, 1, 1, 0) is not None
    assert emulator.tiling(1, most + 1, 1, 1, 0) is None
    assert emulator.tiling(most, 1, 1, 1, 0) is not None
    assert emulator.tiling(most + 1, 1, 1, 1, 0) is None
    assert emulator.tiling(1 << 62, 1, 1, 1, 0) is None
    assert emulator.tiling(3, most // 3, 1, 1, 0) is not None
    assert emulator.tiling(3, most // 3 + 1, 1, 1, 0) is None
    assert emulator.tiling(1, 1, 1, 1, most - 1) is not None
    assert emulator.tiling(1, 1, 1, 1, most) is None
    assert emulator.tiling(1, 1, 1, 2, most - 2) is not None
    assert emulator.tiling(1, 1, 1, 2, most - 1) is None


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("planes", [True, False])
def test_zeros_before_in_and_behind_whole_vectors(emulator, planes, dtype):
    """Planes and images that begin anywhere in a vector, and hold none, one, or more than a warp's or a block's."""
    vector = 16 // dtype.itemsize
    few = range(1, 2 * vector + 2)
    many = around(WARP * vector, 2 * WARP * vector) if planes else around(64 * vector, 128 * vector)
    for cells in few:
        for batch, anchors in ((2, 1), (1, 3)):
            assert_right(
                emulator, [make_level(batch, cells, anchors, dtype)], planes, dense(batch, cells * anchors, 0.3)
            )
    for cells in many:
        assert_right(emulator, [make_level(2, cells, 1, dtype)], planes, background(2, cells), blocks=1)
        assert_right(emulator, [make_level(1, cells, 1, dtype)], planes, dense(1, cells, 0.05), blocks=1)


@pytest.mark.parametrize("anchors", [1, 2, 7, 8, 9, 17])
def test_channels_of_planes(emulator, anchors):
    """Eight warps share four times as many planes as there are anchors a cell."""
    assert_right(emulator, [make_level(1, 5, anchors, torch.float32)], True, dense(1, 5 * anchors, 0.5))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_foreground_of_a_batch_is_shared_out_once(emulator, share):
    for count in around(WARP, emulator.threads, 2 * emulator.threads, emulator.batch):
        assert_right(emulator, [make_level(1, count, 1, torch.float32)], False, dense(1, count, share), blocks=1)


@pytest.mark.parametrize("others", [0, 1, 30, 31, 32, 33, 63, 64])
def test_as_much_foreground_as_a_warp_has_lanes(emulator, others):
    """All of it in one warp, spread over a thread's matches or in one of them."""
    level = make_level(1, emulator.batch, 1, torch.float32)
    for start, step in ((0, 1), (0, emulator.threads), (224, 1), (255, emulator.threads)):
        matched = background(1, emulator.batch)
        lanes = (
            torch.arange(start, start + WARP)
            if step == 1
            else torch.arange(start // WARP * WARP, start // WARP * WARP + WARP)
        )
        places = torch.cat([lanes + u * emulator.threads for u in range(8)])
        matched[0, places[torch.randperm(len(places))[: others + 1]]] = 2
        matched[0, places[0 if start == 0 else -1]] = 0
        assert_right(emulator, [level], False, matched, blocks=1)


def test_a_single_foreground_anchor_in_every_place_of_a_warp(emulator):
    level = make_level(1, 64, 1, torch.float32)
    for place in range(64):
        matched = background(1, 64)
        matched[0, place] = 1
        assert_right(emulator, [level], False, matched, blocks=1)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("anchors", [127, 128, 129])
def test_cells_of_a_tile_and_anchors_of_a_batch(emulator, anchors, planes):
    """Sixteen cells a tile; of 129 anchors a cell they are more than a batch."""
    for cells in (15, 16, 17, 33):
        matched = background(1, cells * anchors)
        edges = [0, anchors - 1, 16 * anchors - 1, 16 * anchors, 32 * anchors, emulator.batch - 1, emulator.batch]
        for edge in [*edges, cells * anchors - 1]:
            if edge < cells * anchors:
                matched[0, edge] = 1
        assert_right(emulator, [make_level(1, cells, anchors, torch.bfloat16)], planes, matched)


@pytest.mark.parametrize(("cells", "anchors"), [(16, 256), (16, 300), (3, 683), (1, 2049)])
def test_several_batches_of_one_tile(emulator, cells, anchors):
    """The zeros are written once, before the first foreground."""
    assert_right(emulator, [make_level(1, cells, anchors, torch.float32)], True, dense(1, cells * anchors, 0.1))


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 3, 20])
def test_tiles_of_levels_and_images(emulator, blocks, planes):
    """Levels of one tile and of several, each image's: every tile is found in its own level and image, once."""
    anchors = 128
    levels = [make_level(2, cells, anchors, torch.bfloat16) for cells in (33, 16, 17, 1, 1)]
    count = sum(level.shape[1] for level in levels) * anchors
    assert_right(emulator, levels, planes, dense(2, count, 0.01), blocks=blocks)


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 513])
def test_the_second_stage_adds_every_block_once(emulator, blocks):
    sums = np.arange(1, blocks + 1, dtype=np.float64) ** 2
    for order in ("forward", "backward", "random"):
        found = emulator.finish(sums, None, 1, 1.0, order=order)
        assert found == np.float32(sums.sum())


@pytest.mark.parametrize("factors", [1, 255, 256, 257, 513])
def test_the_second_stage_looks_at_every_normalizer(emulator, factors):
    sums = np.float64([3.0])
    normalizer = np.ones(factors, np.float32)
    assert emulator.finish(sums, normalizer, factors, 2.0) == 3
    for place in {0, 1, 255, 256, factors - 1} & set(range(factors)):
        normalizer[:] = 1
        normalizer[place] = 0
        assert math.isnan(emulator.finish(sums, normalizer, factors, 2.0))
    assert emulator.finish(sums, normalizer, 0, math.inf) == 3
    assert math.isnan(emulator.finish(sums, None, 1, math.inf))
