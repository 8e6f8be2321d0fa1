"""The CUDA kernel of the box coder, run by the emulator: the real code, in several orders of its threads.

It is compared, to the bit, with the CPU operators, which share its mathematics and are compared with the reference in
test_box_coder.py. RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under
AddressSanitizer and UndefinedBehaviorSanitizer: see docs/testing.md.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import retinanet_ext  # noqa: F401 - registers the operators

OPS = torch.ops.retinanet_ext
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
TASKS = ("encode", "decode", "encode gradient", "decode gradient")
# All legal on a GPU; a result that differs between two of them depends on the order of threads.
SCHEDULES = [{"order": "forward"}, {"order": "random", "seed": 1, "live_blocks": 3}]
WEIGHTS = (10.0, 9.0, 5.0, 4.0)


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_box_coder_emulator")


def name_of(dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def random_boxes(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 90
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * 40 + 1], dim=-1).to(dtype)


def values_of(task, *shape, dtype=torch.float32):
    """Ground-truth boxes; or deltas of which some are clipped."""
    if task.startswith("encode"):
        return random_boxes(*shape, seed=3, dtype=dtype)
    return (torch.randn(*shape, 4, generator=torch.Generator().manual_seed(4)) * 6).to(dtype)


def rows(tensor, *, whole=True, first=0, number_stride=1):
    flat = tensor.flatten()
    memory = flat.view(torch.uint16).numpy() if flat.element_size() == 2 else flat.numpy()
    return name_of(tensor.dtype), memory, first, number_stride, whole


def operator(task, upstream, values, anchors, clip, wanted=(True, True)):
    """The results of the CPU operator, in a list."""
    last = (clip,) if task.startswith("decode") else ()
    if "gradient" not in task:
        return [getattr(OPS, f"{task}_boxes")(values, anchors, *WEIGHTS, *last)]
    backward = getattr(OPS, f"{task.split()[0]}_boxes_backward")
    return list(backward(upstream, values, anchors, *WEIGHTS, *last, *wanted))


def check(emulator, task, values, anchors, dims=None, *, memory=None, wanted=(True, True), clip=4.0, **options):
    """The kernel's bits are the CPU operator's. `memory`: how the arguments lie, other than contiguous."""
    shape = torch.broadcast_shapes(values.shape, anchors.shape)
    dtype = torch.promote_types(values.dtype, anchors.dtype)
    upstream = None
    if "gradient" in task:
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected = operator(task, upstream, values, anchors, clip, wanted)
    result_types = [name_of(one.dtype) if asked else "" for one, asked in zip(expected, wanted, strict=False)]
    expected = [one for one, asked in zip(expected, wanted, strict=False) if asked]
    dims = dims or ([math.prod(shape[:-1])], [4], [4])
    memory = memory or (rows(values), rows(anchors))
    above = None if upstream is None else rows(upstream)
    for schedule in SCHEDULES:
        results = emulator.run(
            task, above, *memory, result_types, *dims, weights=WEIGHTS, clip=clip, **options, **schedule
        )
        for one, right in zip(results, expected, strict=True):
            one = torch.frombuffer(bytearray(one), dtype=right.dtype) if right.numel() else right.flatten()
            np.testing.assert_array_equal(bits_of(one), bits_of(right))
    return expected


def bits_of(values):
    """NaN has one sign here: IEEE 754 leaves it open, and compilers differ."""
    return values.where(~values.isnan(), torch.nan).flatten().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_every_task_and_type(emulator, task, dtype, count):
    expected = check(emulator, task, values_of(task, count, dtype=dtype), random_boxes(count, seed=1, dtype=dtype))
    assert all(one.isfinite().all() for one in expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.float32)],
    ids=str,
)
def test_two_types(emulator, task, dtypes):
    check(emulator, task, values_of(task, 50, dtype=dtypes[0]), random_boxes(50, seed=1, dtype=dtypes[1]))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_that_walk_many_rows(emulator, task, blocks):
    check(emulator, task, values_of(task, 1500), random_boxes(1500, seed=1), blocks=blocks)


@pytest.mark.parametrize("task", TASKS)
def test_batches_that_broadcast(emulator, task):
    """[3, 1, 2, 50, 4] with [5, 1, 50, 4]; and one box with many."""
    values, anchors = values_of(task, 3, 1, 2, 50), random_boxes(5, 1, 50, seed=1)
    check(emulator, task, values, anchors, ([3, 5, 2, 50], [400, 0, 200, 4], [0, 200, 0, 4]))
    check(emulator, task, values_of(task, 1), random_boxes(70, seed=1), ([70], [0], [4]))
    check(emulator, task, values_of(task), random_boxes(seed=1), ([], [], []))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strides(emulator, task, dtype):
    """Values inside wider rows, from an odd place on; anchors with one number of all after the other."""
    values, anchors = values_of(task, 60, dtype=dtype), random_boxes(60, seed=1, dtype=dtype)
    wide = torch.full((60, 7), torch.nan, dtype=dtype)
    wide[:, 3:] = values
    memory = rows(wide, whole=False, first=3), rows(anchors.T.contiguous(), whole=False, number_stride=60)
    check(emulator, task, values, anchors, ([60], [7], [1]), memory=memory)


@pytest.mark.parametrize("task", TASKS[2:])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
def test_one_gradient_alone(emulator, task, wanted):
    check(emulator, task, values_of(task, 300), random_boxes(300, seed=1), wanted=wanted)


@pytest.mark.parametrize("task", TASKS)
def test_numbers_that_are_not_finite(emulator, task):
    special = torch.tensor([0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan])
    values = torch.cartesian_prod(special, special, special, special)[::5]
    anchors = values.flip(0).contiguous()
    expected = check(emulator, task, values, anchors)
    assert all(one.isnan().any() for one in expected)
    check(emulator, task, values, random_boxes(len(values), seed=1))


def test_offsets_beyond_32_bits(emulator):
    sizes, strides1, strides2 = [3, 2**33 + 5, 7], [1, 0, 4], [0, 8, 2**20]
    for index in (0, 6, 7, 2**32 - 1, 2**32, 7 * (2**33 + 4) + 6, 7 * (2**33 + 5), 3 * 7 * (2**33 + 5) - 1):
        places = index // 7 // sizes[1], index // 7 % sizes[1], index % 7
        expected = tuple(
            sum(place * stride for place, stride in zip(places, strides, strict=True))
            for strides in (strides1, strides2)
        )
        assert emulator.offsets(sizes, strides1, strides2, index) == expected
    assert emulator.offsets([2**32, 2**32 - 1], [1, 0], [0, 1], 2**32 - 1) == (1, 0)
    assert emulator.offsets([], [], [], 0) == (0, 0)
