"""The box regression loss's CUDA kernel, run by the emulator: the real code, in several orders of its threads.

RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under AddressSanitizer and
UndefinedBehaviorSanitizer: see docs/testing.md. Each anchor's loss and gradient are the CPU operator's to the bit, the
mathematics being one source; test_box_loss.py compares that operator with the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from retinanet_ext import reference

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LOSSES = ("l1", "smooth_l1", "giou")
LAYOUTS = ("contiguous", "channels_last", "rows", "slices", "mixed")
# All legal on a GPU; a result that differs between two of them depends on the order of threads.
SCHEDULES = [
    {"order": "forward"},
    {"order": "backward", "live_blocks": 2},
    {"order": "random", "seed": 1, "live_blocks": 3},
    {"order": "random", "seed": 2},
]
SIZES = ((9, 13), (3, 5), (1, 1))
A = 3


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_box_loss_emulator")


@dataclass
class Case:
    """The arguments of one call."""

    levels: list[torch.Tensor]
    anchors: torch.Tensor
    gt_boxes: list[torch.Tensor]
    matched: torch.Tensor
    gt_offsets: torch.Tensor | None = None
    options: dict = field(default_factory=dict)

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.levels[0].dtype == torch.float64 else torch.float32


def random_boxes(count: int, dtype=torch.float32) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=dtype) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, dtype=dtype) * 40], dim=1)


def laid_out(level: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, 4A, H, W] numbers as a head may leave them; NaN lies beside every view: reading it would show."""
    if layout == "channels_last":
        return level.contiguous(memory_format=torch.channels_last)
    if layout == "rows":
        return reference.focal_loss.anchor_rows(level, 4).contiguous()
    if layout == "slices":
        return torch.nn.functional.pad(level, (1, 2, 1, 0, 1, 1), value=math.nan)[:, 1:-1, 1:, 1:-2]
    return level


def make_case(layout="contiguous", dtype=torch.float32, batch=3, sizes=SIZES, anchors=A, every=4, **options) -> Case:
    """One anchor in `every` is foreground; the second image has neither boxes nor foreground."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    levels = []
    for i, (height, width) in enumerate(sizes):
        form = LAYOUTS[i % 4] if layout == "mixed" else layout
        levels.append(laid_out(torch.randn(batch, 4 * anchors, height, width).to(dtype), form))
    count = anchors * sum(height * width for height, width in sizes)
    gt_boxes = [random_boxes((5, 0, 8)[i % 3], compute) for i in range(batch)]
    matched = torch.randint(-2, 0, (batch, count), dtype=torch.int32)
    for image, boxes in enumerate(gt_boxes):
        if len(boxes) > 0:
            drawn = torch.randint(0, len(boxes), (count,), dtype=torch.int32)
            matched[image] = torch.where(torch.rand(count) < 1 / every, drawn, matched[image])
    return Case(levels, random_boxes(count, compute), gt_boxes, matched, None, options)


def packed(case: Case, spare: int = 3) -> Case:
    """Boxes of all images in one tensor, with NaN behind the last."""
    counts = torch.tensor([0] + [len(boxes) for boxes in case.gt_boxes])
    rest = torch.full((spare, 4), math.nan, dtype=case.compute)
    return replace(case, gt_boxes=[torch.cat([*case.gt_boxes, rest])], gt_offsets=counts.cumsum(0).int())


def storage_of(level: torch.Tensor) -> np.ndarray:
    """The level's memory from its first element to its last; halves as their bit patterns."""
    if level.numel() == 0:
        flat = level.flatten()
    else:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(level.shape, level.stride(), strict=True))
        flat = level.as_strided((extent,), (1,))
    flat = flat.clone()
    return flat.view(torch.uint16).numpy() if flat.element_size() == 2 else flat.numpy()


def is_channels_last(level: torch.Tensor) -> bool:
    return level.dim() == 4 and level.numel() > 0 and level.is_contiguous(memory_format=torch.channels_last)


def entry(level: torch.Tensor) -> tuple:
    if level.dim() == 3:
        image, row, channel = level.stride()
        return storage_of(level), (image, channel, row, 0), 1, level.shape[1], 1, False
    _, channels, height, width = level.shape
    return storage_of(level), level.stride(), channels // 4, height, width, not is_channels_last(level)


def run(emulator, case: Case, task="sum", schedule=None, **options):
    """The sum, or each level's gradient, flat and in its own layout."""
    values = case.options | options
    name = next(name for name, dtype in DTYPES.items() if dtype == case.levels[0].dtype)
    if values.get("normalizer") is not None:
        values["normalizer"] = values["normalizer"].to(case.compute).numpy()
    values["loss"] = LOSSES.index(values.get("loss", "l1"))
    result = emulator.box_loss(
        name,
        [entry(level) for level in case.levels],
        case.anchors.numpy(),
        [boxes.numpy() for boxes in case.gt_boxes],
        case.matched.numpy(),
        gt_offsets=None if case.gt_offsets is None else case.gt_offsets.numpy(),
        task=task,
        **values,
        **(schedule or {}),
    )
    if task == "sum":
        return result
    return [torch.from_numpy(gradient).view(level.dtype) for gradient, level in zip(result, case.levels, strict=True)]


def cpu_operator(case: Case, grad=1.0, **options):
    """The CPU operator's sum, and each level's gradient, flat and in its own layout."""
    values = case.options | options
    weights = values.get("weights", (1.0, 1.0, 1.0, 1.0))
    normalizer = values.get("normalizer")
    arguments = (
        case.levels,
        case.anchors,
        case.gt_boxes,
        case.gt_offsets,
        case.matched,
        None if normalizer is None else normalizer.to(case.compute),
        LOSSES.index(values.get("loss", "l1")),
        values.get("beta", 1.0),
        *weights,
        values.get("scale", 1.0),
    )
    loss = torch.ops.retinanet_ext.box_regression_loss(*arguments)
    upstream = torch.tensor(grad, dtype=case.compute)
    gradients = torch.ops.retinanet_ext.box_regression_loss_backward(upstream, *arguments)
    flat = [(g.permute(0, 2, 3, 1) if is_channels_last(g) else g).flatten() for g in gradients]
    return loss.item(), flat


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_gradients(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(bits(one), bits(other))


def assert_same_sum(case: Case, found: float, expected: float) -> None:
    """Sums of the same numbers in another order: float64 roundings, and the one of the result."""
    assert found == pytest.approx(expected, rel=2 * torch.finfo(case.compute).eps, abs=1e-300)


def assert_right(emulator, case: Case, grad=1.0, schedules=SCHEDULES, **options):
    """The CPU operator's loss and gradients, in every order; the same bits of the loss in all of them."""
    expected, expected_gradients = cpu_operator(case, grad)
    sums = [run(emulator, case, "sum", schedule, **options) for schedule in schedules]
    assert len({np.float64(value).tobytes() for value in sums}) == 1
    assert_same_sum(case, sums[0], expected)
    for schedule in schedules:
        found = run(emulator, case, "gradient", schedule, grad=grad, **options)
        assert_same_gradients(found, expected_gradients)
    return sums[0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_layout_dtype_and_loss(emulator, loss, layout, dtype):
    case = make_case(layout, dtype, loss=loss, beta=0.3, weights=(10.0, 9.0, 5.0, 4.0))
    assert_right(
        emulator, case, schedules=SCHEDULES if layout == "mixed" and dtype == torch.float32 else SCHEDULES[2:3]
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_giou_of_sizes_at_and_beyond_the_limit_of_the_exponent(emulator, dtype):
    case = make_case("mixed", dtype, loss="giou")
    growth = torch.tensor([math.log(1000 / 16), 4.0, 4.13, 4.14, 5.0, 50.0, 1e4, -3.0], dtype=torch.float64)
    for level in case.levels:
        for channel in (2, 3):
            sizes = level[..., channel] if level.dim() == 3 else level[:, channel::4]
            sizes.copy_(growth[torch.randint(len(growth), sizes.shape)])
    assert_right(emulator, case)


@pytest.mark.parametrize("loss", LOSSES)
def test_against_the_reference(emulator, loss):
    """Independently of the CPU operator: in float64 to its rounding."""
    case = make_case("mixed", torch.float64, loss=loss)
    leaves = [level.detach().requires_grad_() for level in case.levels]
    normalizer = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    arguments = (case.anchors, case.gt_boxes, case.matched, loss, 0.3)
    total = reference.box_regression_loss(leaves, *arguments, normalizer=normalizer)
    found = run(emulator, case, beta=0.3, normalizer=normalizer)
    assert found == pytest.approx(total.item(), rel=1e-12)
    gradients = run(emulator, case, "gradient", beta=0.3, normalizer=normalizer)
    for one, other, level in zip(gradients, torch.autograd.grad(total, leaves), case.levels, strict=True):
        flat = (other.permute(0, 2, 3, 1) if is_channels_last(level) else other).flatten()
        torch.testing.assert_close(one, flat, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_matches_of_64_bits_packed_boxes_and_anchors_of_each_image(emulator, layout):
    case = make_case(layout)
    images = torch.stack([case.anchors, random_boxes(len(case.anchors)), case.anchors + 1])
    expected = run(emulator, case)
    for other in (replace(case, matched=case.matched.long()), packed(case), packed(case, spare=0)):
        assert assert_right(emulator, other, schedules=SCHEDULES[2:3]) == expected
    assert assert_right(emulator, replace(case, anchors=images), schedules=SCHEDULES[2:3]) != expected


@pytest.mark.parametrize("normalizer", [[5.0], [2.0, 9.0, 3.0]], ids=str)
def test_normalizer_scale_and_upstream_gradient(emulator, normalizer):
    case = make_case("mixed", normalizer=torch.tensor(normalizer), scale=0.25)
    assert_right(emulator, case, grad=-1.5)


@pytest.mark.parametrize("scale", [0.25, math.inf])
@pytest.mark.parametrize("normalizer", [None, [0.0], [math.nan], [2.0, 0.0, 3.0], [2.0, 3.0, 0.0]], ids=str)
def test_a_normalizer_of_zero_is_never_silent(emulator, normalizer, scale):
    """Infinite or NaN, also where the image has no foreground."""
    case = make_case(normalizer=None if normalizer is None else torch.tensor(normalizer), scale=scale)
    if normalizer is None and scale == 0.25:
        assert math.isfinite(run(emulator, case))
    else:
        assert not math.isfinite(run(emulator, case))
    case = replace(case, matched=torch.full_like(case.matched, -1))
    assert (run(emulator, case) == 0) == (normalizer is None and scale == 0.25)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_foreground_is_touched(emulator, layout, loss):
    """The gradient of every other row is +0 whatever it holds, and whatever comes from above."""
    case = make_case(layout, loss=loss)
    foreground = case.matched >= 0
    expected = run(emulator, case)
    expected_gradients = run(emulator, case, "gradient")
    poisoned, first = [], 0
    for level in case.levels:
        rows = reference.focal_loss.anchor_rows(level, 4)
        keep = foreground[:, first : first + rows.shape[1], None]
        first += rows.shape[1]
        poison = torch.where(keep, rows, math.nan)
        copy = level.clone(memory_format=torch.preserve_format)
        if level.dim() == 4:
            batch, channels, height, width = level.shape
            copy.copy_(poison.view(batch, height, width, channels).permute(0, 3, 1, 2))
        else:
            copy.copy_(poison)
        poisoned.append(copy)
    case = replace(case, levels=poisoned)
    assert run(emulator, case) == expected
    assert_same_gradients(run(emulator, case, "gradient"), expected_gradients)
    for upstream in (math.nan, math.inf):
        for level, one in zip(case.levels, run(emulator, case, "gradient", grad=upstream), strict=True):
            zero = (one == 0) & ~one.signbit()
            order = (level.permute(0, 2, 3, 1) if is_channels_last(level) else level).flatten()
            assert torch.equal(zero, order.isnan() | zero)
            assert zero[order.isnan()].all()


def test_nan_of_a_foreground_prediction_shows(emulator):
    case = make_case(batch=1, loss="smooth_l1")
    row = int((case.matched[0] >= 0).nonzero()[0])
    case.levels[0][0, 4 * (row % A), row // A // 13, row // A % 13] = math.nan
    assert math.isnan(run(emulator, case))
    gradients = run(emulator, case, "gradient")
    assert gradients[0].isnan().sum() == 1
    assert not any(gradient.isnan().any() for gradient in gradients[1:])


@pytest.mark.parametrize("beyond", [0, 1, 2**31 - 10, 2**40, 2**62])
@pytest.mark.parametrize("spare", [None, 0, 1, 3])
def test_matches_that_name_no_row_are_background(emulator, spare, beyond):
    """Not the next image's row either, nor the spare ones of packed boxes."""
    case = make_case(batch=3)
    assert len(case.gt_boxes[1]) == 0
    wild = case.matched.long() if beyond > 2**32 else case.matched.clone()
    tame = wild.clone()
    for image, boxes in enumerate(case.gt_boxes):
        wild[image, image::7] = len(boxes) + beyond
        tame[image, image::7] = -1
    case, truth = replace(case, matched=wild), replace(case, matched=tame)
    if spare is not None:
        case, truth = packed(case, spare), packed(truth, spare)
    assert run(emulator, case) == run(emulator, truth)
    assert_same_gradients(run(emulator, case, "gradient"), run(emulator, truth, "gradient"))


@pytest.mark.parametrize(
    "offsets",
    [
        [-3, 0, 0, 8],
        [0, 5, 5, 99],
        [0, 5, 2**31 - 1, 2**31 - 1],
        [13, 5, 2, 0],
        [-1, 5, 5, 13],
        [-(2**31), 2**31 - 1, 0, 0],
    ],
)
def test_wrong_offsets_read_nothing_outside(emulator, offsets):
    """The sanitizer sees it; here, that all which is read is rows there are, and others count as background."""
    case = packed(make_case(batch=3), spare=0)
    case = replace(case, gt_offsets=torch.tensor(offsets, dtype=torch.int32))
    capacity = len(case.gt_boxes[0])
    tame = case.matched.clone()
    lists = []
    for image in range(3):
        first, last = offsets[image], min(offsets[image + 1], capacity)
        boxes = case.gt_boxes[0][first:last] if 0 <= first <= last else case.gt_boxes[0][:0]
        lists.append(boxes)
        tame[image][tame[image] >= len(boxes)] = -1
    truth = Case(case.levels, case.anchors, lists, tame)
    assert run(emulator, case) == run(emulator, truth)
    assert_same_gradients(run(emulator, case, "gradient"), run(emulator, truth, "gradient"))


def test_as_many_levels_and_images_as_one_launch_takes(emulator):
    sizes = tuple((1, width) for width in range(1, emulator.max_levels + 1))
    assert_right(emulator, make_case("mixed", batch=2, sizes=sizes), schedules=SCHEDULES[2:3])
    case = make_case("contiguous", batch=emulator.max_images, sizes=((2, 2), (1, 1)))
    assert_right(emulator, case, schedules=SCHEDULES[2:3])


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_images_in_several_launches(emulator, images):
    normalizer = torch.tensor([2.0, 3.0, 5.0, 7.0])
    for pack in (False, True):
        case = make_case("mixed", batch=4, sizes=((6, 7), (1, 2)), normalizer=normalizer)
        case = packed(case) if pack else case
        anchors = torch.stack([random_boxes(len(case.anchors)) for _ in range(4)])
        assert_right(emulator, replace(case, anchors=anchors), schedules=SCHEDULES[2:3], images_per_launch=images)


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_the_number_of_blocks_changes_no_gradient(emulator, blocks):
    case = make_case("mixed", batch=2, sizes=((40, 20), (5, 5)))
    assert_right(emulator, case, schedules=SCHEDULES[1:3], blocks=blocks)


def test_an_empty_batch(emulator):
    case = make_case(batch=0)
    assert run(emulator, case, normalizer=torch.ones(0)) == 0
    assert run(emulator, case, normalizer=torch.zeros(1)) == 0
    assert [len(gradient) for gradient in run(emulator, case, "gradient")] == [0] * len(SIZES)
