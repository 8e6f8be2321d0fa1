"""The focal loss's CUDA kernels at the edges of what a thread, a tile and a pass hold, run by the emulator.

Sizes one short of, at and one beyond an edge, with rows in the first and last place. Any bound of the kernels that is
off by one fails here or under the sanitizers: `python tests/mutate_kernels.py` proves it (docs/testing.md).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retinanet_ext import reference

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 1024  # vectors of a block's pass: four a thread
IGNORED = -2


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_focal_loss_emulator")


def width(dtype: torch.dtype) -> int:
    """Elements of a 16-byte vector."""
    return 16 // dtype.itemsize


def tile_rows(classes: int, dtype: torch.dtype) -> int:
    """Rows of a tile: a pass's worth of elements, in whole vectors."""
    return max(BATCH * width(dtype) // classes // width(dtype), 1) * width(dtype)


def storage(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def computed(dtype: torch.dtype) -> torch.dtype:
    """What elements of a dtype are computed in, and the widest that an upstream gradient or a soft target may be."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(emulator, logits: torch.Tensor, targets: torch.Tensor, task: str, **options) -> torch.Tensor:
    """A loss or a sum, in float32, or a gradient, in the logits' dtype; tensors among the options as arrays."""
    name = next(name for name, dtype in DTYPES.items() if dtype == logits.dtype)
    options = {key: storage(value) if torch.is_tensor(value) else value for key, value in options.items()}
    options |= {"task": task, "wide_result": task == "loss", "soft": targets.is_floating_point()}
    (result,) = emulator.focal_loss(name, storage(logits), storage(targets), logits.shape[-1], **options)
    result = torch.from_numpy(result)
    result = result.view(logits.dtype) if result.dtype == torch.uint16 else result
    return result if task in ("sum", "mean") else result.view(logits.shape)


def expected(logits, targets, *, reduction="none", grad=None, **options) -> torch.Tensor:
    """The reference's loss, or with `grad` its gradient, in float64."""
    options = {key: value.double() if torch.is_tensor(value) else value for key, value in options.items()}
    options["alpha"] = options.pop("class_alpha", 0.25)
    x = logits.double().detach().clone().requires_grad_()
    t = targets.double() if targets.is_floating_point() else targets
    loss = reference.sigmoid_focal_loss(x, t, reduction=reduction, **options)
    if grad is None:
        return loss.detach()
    loss.backward(grad.double().expand_as(loss))
    return x.grad


def assert_close(actual: torch.Tensor, wanted: torch.Tensor, absolute: float = 0.0) -> None:
    """Within the operator's relative error, and half a unit in the last place of a half; `absolute`: of the largest."""
    info = torch.finfo(actual.dtype)
    relative = {64: 1e-12, 32: 2e-5, 16: 2e-5 + info.eps / 2}[info.bits]
    absolute = absolute * wanted.abs().max().item() + 1e-30
    torch.testing.assert_close(actual.double(), wanted.view(actual.shape), rtol=relative, atol=absolute)


def assert_right(emulator, logits: torch.Tensor, targets: torch.Tensor, blocks: int = 2, **options) -> None:
    """Loss, sum, mean, and gradients for one upstream gradient and for one an element, against the reference.

    `options`: of the operator. Gradients with them have zero crossings, where only the absolute error is small.
    """
    crosses_zero = options or targets.is_floating_point()
    absolute = (1e-12 if logits.dtype == torch.float64 else 2e-6) if crosses_zero else 0.0
    how = {"blocks": blocks, **options}
    assert_close(run(emulator, logits, targets, task="loss", **how), expected(logits, targets, **options))
    for task in ("sum",) if targets.is_floating_point() else ("sum", "mean"):
        actual = run(emulator, logits, targets, task=task, **how)
        assert_close(actual, expected(logits, targets, reduction=task, **options))
    one = torch.tensor(0.3, dtype=computed(logits.dtype))
    assert_close(
        run(emulator, logits, targets, task="gradient", grad=one, **how),
        expected(logits, targets, reduction="sum", grad=one, **options),
        absolute,
    )
    for dtype in {logits.dtype, computed(logits.dtype)}:
        each = torch.randn(logits.shape, dtype=torch.float64).to(dtype)
        if each.numel() > 1:  # one element would be one upstream gradient for all
            actual = run(emulator, logits, targets, task="gradient", grad=each, **how)
            assert_close(actual, expected(logits, targets, grad=each, **options), absolute)


def sizes(dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Rows and classes, by the edge they lie at."""
    vector = width(dtype)
    rows = tile_rows(1001, dtype)  # a vector's width: a tile of few rows that do not end with vectors
    short = tile_rows(3, dtype)
    return {
        "one element": (1, 1),
        "vector - 1": (1, vector - 1),
        "vector": (1, vector),
        "vector + 1": (1, vector + 1),
        "tile - row": (rows - 1, 1001),
        "tile": (rows, 1001),
        "tile + row": (rows + 1, 1001),
        "two tiles - row": (2 * rows - 1, 1001),
        "more rows than threads": (257, 3),
        "short rows, tile + row": (short + 1, 3),
        "pass - element": (1, BATCH * vector - 1),
        "pass": (vector, BATCH),
        "pass + element": (1, BATCH * vector + 1),
        "two passes + element": (1, 2 * BATCH * vector + 1),
    }


def background(rows: int) -> torch.Tensor:
    return torch.full((rows,), -1)


def dense(rows: int, classes: int) -> torch.Tensor:
    """Every kind of row beside every other; the last one's class is the first that is none."""
    kinds = torch.randint(0, 4, (rows,))
    targets = torch.randint(0, classes, (rows,))
    targets[kinds == 0] = -1
    targets[kinds == 1] = IGNORED
    targets[-1] = classes
    return targets


@pytest.mark.parametrize("size", sizes(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["background", "dense"])
def test_sizes(emulator, kind, dtype, size):
    rows, classes = sizes(dtype)[size]
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3 - 1).to(dtype)
    assert_right(emulator, logits, background(rows) if kind == "background" else dense(rows, classes))


@pytest.mark.parametrize("classes", [7, 12])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sizes_with_options_by_class(emulator, dtype, classes):
    """Weights and balances have one element a class: none beyond is read, of absent elements or of no class."""
    for rows in (1, 5, 41):
        logits = (torch.randn(rows, classes, dtype=torch.float64) * 3 - 1).to(dtype)
        options = {"gamma": 1.5, "class_alpha": torch.rand(classes), "weight": torch.rand(classes) + 0.5}
        for last in (-1, 0, classes - 1, classes, IGNORED):
            targets = dense(rows + 1, classes)[:-1]
            targets[-1] = last
            if (targets != IGNORED).any():
                assert_right(emulator, logits, targets, **options)


@pytest.mark.parametrize("size", sizes(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sizes_of_soft_targets(emulator, dtype, size):
    """A tile is one pass here, so that the passes' sizes are several tiles."""
    rows, classes = sizes(dtype)[size]
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3 - 1).to(dtype)
    assert_right(emulator, logits, torch.rand(rows, classes, dtype=torch.float64).to(dtype))
    assert_right(
        emulator,
        logits,
        torch.rand(rows, classes, dtype=torch.float64).to(computed(dtype)),
        class_alpha=torch.rand(classes),
    )


@pytest.mark.parametrize("target", [0, 4, IGNORED])
def test_one_row_among_background(emulator, target):
    """In the first, the last or any other place of a tile, and of a thread's rows, it sends the tile down its path."""
    classes = 5
    rows_per_tile = tile_rows(classes, torch.float32)
    rows = rows_per_tile + 300
    logits = torch.randn(rows, classes) * 3 - 1
    for row in (0, 1, 254, 255, 256, rows_per_tile - 1, rows_per_tile, rows_per_tile + 255, rows - 1):
        targets = background(rows)
        targets[row] = target
        assert_close(run(emulator, logits, targets, task="loss"), expected(logits, targets))
        mean = run(emulator, logits, targets, task="mean")
        assert_close(mean, expected(logits, targets, reduction="mean"))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 255, 256, 257, 511, 512, 513, 900])
def test_ignored_rows_are_counted_once(emulator, rows, index_dtype):
    """Every row but one is ignored, wherever it lies: tiles and threads neither share a row nor leave one out."""
    classes = 1001  # tiles of four rows
    logits = torch.full((rows, classes), 0.5)
    for kept in {0, rows // 2, rows - 1}:
        targets = torch.full((rows,), IGNORED, dtype=index_dtype)
        targets[kept] = -1
        gradient = run(emulator, logits, targets, task="gradient", mean=True, grad=torch.ones(()))
        assert_close(gradient, expected(logits, targets, reduction="mean", grad=torch.ones(())))
        if rows <= 33:
            actual = run(emulator, logits, targets, task="mean", blocks=3)
            assert_close(actual, expected(logits, targets, reduction="mean"))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("positives", [0, 1])
@pytest.mark.parametrize("classes", [1, 9])
def test_every_code_of_background_takes_one_path(emulator, classes, positives, index_dtype):
    """-1, the class behind the last and all beyond: the same bits, which another path's roundings would not leave.

    One class alone: vectors of many rows, which a tile with a positive row takes element by element.
    """
    rows = 360 // classes
    logits = torch.randn(rows, classes) * 3 - 1
    results = {}
    for code in (-1, -3, classes, classes + 1, 2**31 - 1, -(2**31)):
        targets = torch.full((rows,), code, dtype=index_dtype)
        targets[:positives] = 0
        gradient = run(emulator, logits, targets, task="gradient", grad=torch.tensor(0.3))
        results[code] = storage(gradient).tobytes() + storage(run(emulator, logits, targets, task="sum")).tobytes()
    assert len(set(results.values())) == 1, {code: hash(bits) for code, bits in results.items()}


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_blocks_without_tiles_and_tiles_without_blocks(emulator, blocks):
    """Five tiles for one to seven blocks: each tile once, and nothing from a block that has none."""
    rows = 4 * tile_rows(1001, torch.float32) + 1
    logits = torch.randn(rows, 1001) * 3 - 1
    assert_right(emulator, logits, dense(rows, 1001), blocks=blocks)
    assert_right(emulator, logits, torch.rand(rows, 1001), blocks=blocks)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [3, 4, 5, 9, 12])
def test_background_beside_a_positive_row_has_the_same_bits(emulator, classes, dtype):
    """A vector that holds no more than two rows, both background, takes the same arithmetic in every tile."""
    rows = 40
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3 - 1).to(dtype)
    vectors = torch.arange(rows * classes).view(-1, width(dtype))
    first, last = vectors[:, 0] // classes, vectors[:, -1] // classes
    grad = torch.tensor(0.3, dtype=computed(dtype))
    alone, *among = (
        storage(run(emulator, logits, targets, task="gradient", grad=grad)).reshape(vectors.shape)
        for targets in [background(rows), *(background(rows).scatter(0, torch.tensor(row), 1) for row in range(rows))]
    )
    for row, gradient in enumerate(among):
        same = ((last < row) | (first > row)) & (last - first <= 1)
        np.testing.assert_array_equal(gradient[same], alone[same], err_msg=f"row {row}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 7])
def test_the_one_element_that_is_positive(emulator, classes, dtype):
    """Also where a vector holds two rows of background and one element of the third row."""
    rows = 16
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3 - 1).to(dtype)
    for row in range(rows):
        targets = background(rows).scatter(0, torch.tensor(row), 0)
        assert_close(run(emulator, logits, targets, task="loss"), expected(logits, targets))


def test_what_counts_as_the_start_of_a_vector(emulator):
    assert [address for address in range(64) if emulator.is_vector_aligned(address)] == [0, 16, 32, 48]


def test_the_last_row_of_a_tile_of_one_element_is_counted(emulator):
    rows = tile_rows(1, torch.float32) + 1
    logits = torch.zeros(rows, 1)
    targets = background(rows)
    targets[-1] = IGNORED
    assert_close(run(emulator, logits, targets, task="mean"), expected(logits, targets, reduction="mean"))


@pytest.mark.parametrize("blocks", [1, 2])
def test_whether_one_came_from_above_is_noted_by_the_first_block(emulator, blocks):
    logits = torch.zeros(3, 4)
    for grad, noted in ((1.0, 1), (2.0, 0)):
        options = {"task": "gradient", "grad": np.float32([grad]), "filled": np.zeros(12, np.float32), "blocks": blocks}
        assert emulator.focal_loss("float32", storage(logits), storage(background(3)), 4, **options)[1] == noted
