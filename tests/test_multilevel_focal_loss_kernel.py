"""The multi-level focal loss's CUDA kernel, run by the emulator: the real code, in several orders of its threads.

RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under AddressSanitizer and
UndefinedBehaviorSanitizer: see docs/testing.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from retinanet_ext import reference

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# All legal on a GPU; a result that differs between two of them depends on the order of threads.
SCHEDULES = [
    {"order": "forward"},
    {"order": "backward", "live_blocks": 2},
    {"order": "random", "seed": 1, "live_blocks": 3},
    {"order": "random", "seed": 2},
]


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_multilevel_focal_loss_emulator")


@dataclass
class Level:
    """One level's logits in anchor order, and how the kernel is to find them."""

    rows: torch.Tensor  # [B, H*W*A, K]
    anchors: int
    planes: bool
    gap: int = 0  # elements between one image and the next

    def storage(self) -> np.ndarray:
        """The level's memory; halves as their bit patterns, which NumPy can hold. Gaps are NaN."""
        images = self.to_layout(self.rows).flatten(1)
        if self.gap:
            images = torch.nn.functional.pad(images, (0, self.gap), value=float("nan"))
        flat = images.flatten()[: images.numel() - self.gap].contiguous()
        return flat.view(torch.uint16).numpy() if flat.element_size() == 2 else flat.numpy()

    def to_layout(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.planes:
            return rows
        batch, count, classes = rows.shape
        return rows.view(batch, count // self.anchors, self.anchors, classes).permute(0, 2, 3, 1).contiguous()

    def entry(self) -> tuple:
        return (self.storage(), self.planes, self.anchors, self.rows.shape[1] // self.anchors, self.gap, 0, 0)


def make_levels(form, dtype, classes, cells=(1032, 200, 37, 5), batch=2, anchors=3):
    """Levels of aligned and unaligned images and planes. Targets hold every kind of anchor, and stretches of none."""
    generator = torch.Generator().manual_seed(0)
    levels = []
    for i, count in enumerate(cells):
        planes = {"planes": True, "rows": False, "mixed": i % 2 == 0}[form]
        logits = torch.randn(batch, count * anchors, classes, generator=generator, dtype=torch.float64) * 4 - 1
        levels.append(Level(logits.to(dtype), anchors, planes))
    total = sum(cells) * anchors
    targets = torch.full((batch, total), -1)
    targets[0, ::97] = torch.randint(0, classes, (len(targets[0, ::97]),), generator=generator)
    targets[0, 5::211] = -2
    targets[1, 11::503] = classes + 3
    targets[1, -20::7] = classes - 1
    targets[1, -1] = -2
    return levels, targets


def run(emulator, levels, targets, *, schedule=None, **options):
    dtype = levels[0].rows.dtype
    name = next(name for name, value in DTYPES.items() if value == dtype)
    return emulator.multilevel_focal_loss(
        name,
        [level.entry() for level in levels],
        targets.numpy(),
        levels[0].rows.shape[-1],
        **(schedule or {}),
        **options,
    )


def bits(arrays) -> list[np.ndarray]:
    return [array.view(np.uint8) for array in arrays]


def assert_same_in_every_order(emulator, *args, **options):
    total, gradients, note = run(emulator, *args, schedule=SCHEDULES[0], **options)
    for schedule in SCHEDULES[1:]:
        other_total, other_gradients, other_note = run(emulator, *args, schedule=schedule, **options)
        assert (other_total, other_note) == (total, note), schedule
        for one, other in zip(bits(gradients), bits(other_gradients), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=str(schedule))
    return total, gradients


def truth(levels, targets, **options):
    """The loss and each level's gradient in float64."""
    rows = [level.rows.clone().double().requires_grad_() for level in levels]
    loss = torch.zeros((), dtype=torch.float64)
    gamma, alpha = options.pop("gamma", 2.0), options.pop("alpha", 0.25)
    normalizer = torch.as_tensor(options.pop("normalizer", 1.0), dtype=torch.float64)
    per_image = reference.focal_loss.class_index_loss(torch.cat(rows, 1), targets, alpha, gamma, None, 0.0, -2).sum(
        dim=(1, 2)
    )
    loss = (per_image / normalizer).sum() * options.pop("scale", 1.0)
    return loss.item(), torch.autograd.grad(loss, rows)


def assert_gradients_close(levels, gradients, expected, factor=1.0):
    """Within the operator's relative error, and for halves half a unit in the last place on top."""
    for level, gradient, rows in zip(levels, gradients, expected, strict=True):
        dtype = level.rows.dtype
        actual = torch.from_numpy(gradient)
        actual = (actual.view(dtype) if actual.dtype == torch.uint16 else actual).double()
        info = torch.finfo(dtype)
        relative = {64: 1e-12, 32: 2e-5, 16: 2e-5 + info.eps / 2}[info.bits]
        absolute = max(info.tiny * info.eps, 1e-30)
        torch.testing.assert_close(actual, level.to_layout(rows).flatten() * factor, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", ["planes", "rows", "mixed"])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_sum(emulator, dtype, form, gamma):
    levels, targets = make_levels(form, dtype, 10)
    actual, _ = assert_same_in_every_order(emulator, levels, targets, gamma=gamma)
    np.testing.assert_allclose(actual, truth(levels, targets, gamma=gamma)[0], rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", ["planes", "rows", "mixed"])
@pytest.mark.parametrize("classes", [1, 7, 10, 35])
def test_gradient(emulator, dtype, form, classes):
    levels, targets = make_levels(form, dtype, classes, cells=(264, 37, 5))
    for index in (targets, targets.int()):
        _, gradients = assert_same_in_every_order(emulator, levels, index, task="gradient", grad=3.0)
        assert_gradients_close(levels, gradients, truth(levels, targets)[1], factor=3.0)


@pytest.mark.parametrize("form", ["planes", "rows"])
def test_more_planes_and_rows_than_a_block_takes_at_once(emulator, form):
    levels, targets = make_levels(form, torch.bfloat16, 300, cells=(40, 3))
    total, gradients = assert_same_in_every_order(emulator, levels, targets, task="sum+gradient")
    expected_loss, expected = truth(levels, targets)
    np.testing.assert_allclose(total, expected_loss, rtol=2e-6)
    assert_gradients_close(levels, gradients, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", ["planes", "rows", "mixed"])
@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_one_pass_has_the_bits_of_two(emulator, dtype, form, gamma):
    levels, targets = make_levels(form, dtype, 10, cells=(264, 37, 5))
    normalizer = np.float32([3.0, 7.0])
    options = {"gamma": gamma, "normalizer": normalizer, "scale": 0.5}
    total, gradients = assert_same_in_every_order(emulator, levels, targets, task="sum+gradient", **options)
    assert total == run(emulator, levels, targets, **options)[0]
    _, expected, _ = run(emulator, levels, targets, task="gradient", **options)
    for one, other in zip(bits(gradients), bits(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", ["planes", "rows"])
@pytest.mark.parametrize("normalizer", [[5.0], [2.0, 9.0]], ids=str)
def test_normalizer_and_scale(emulator, form, normalizer):
    levels, targets = make_levels(form, torch.float32, 7, cells=(264, 37))
    options = {"normalizer": np.float32(normalizer), "scale": 0.25}
    total, gradients = assert_same_in_every_order(emulator, levels, targets, task="sum+gradient", **options)
    expected_loss, expected = truth(levels, targets, normalizer=normalizer, scale=0.25)
    np.testing.assert_allclose(total, expected_loss, rtol=2e-6)
    assert_gradients_close(levels, gradients, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", ["planes", "rows"])
@pytest.mark.parametrize("gap", [3, 16])
def test_images_with_gaps_between_them(emulator, dtype, form, gap):
    """What lies in a gap, NaN here, is not read; gradients have no gaps."""
    levels, targets = make_levels(form, dtype, 10, cells=(136, 24))
    for level in levels:
        level.gap = gap
    total, gradients = assert_same_in_every_order(emulator, levels, targets, task="sum+gradient")
    expected_loss, expected = truth(levels, targets)
    np.testing.assert_allclose(total, expected_loss, rtol=2e-6)
    assert_gradients_close(levels, gradients, expected)


@pytest.mark.parametrize("form", ["planes", "rows"])
@pytest.mark.parametrize("upstream", [1.0, np.inf, np.nan])
def test_ignored_anchors_hide_anything(emulator, form, upstream):
    levels, targets = make_levels(form, torch.float32, 7, cells=(64, 5))
    ignored = (targets == -2).split([level.rows.shape[1] for level in levels], dim=1)
    expected, _ = run(emulator, levels, targets)[:2]
    for level, mask in zip(levels, ignored, strict=True):
        level.rows[mask] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0, 1, 2])
    total, gradients, _ = run(emulator, levels, targets, task="sum+gradient")
    assert total == expected
    _, scaled, _ = run(emulator, levels, targets, task="gradient", grad=upstream)
    for results in (gradients, scaled):
        for level, result, mask in zip(levels, results, ignored, strict=True):
            assert mask.any()
            masked = level.to_layout(mask.unsqueeze(-1).expand_as(level.rows)).flatten()
            assert (torch.from_numpy(result)[masked] == 0).all()


@pytest.mark.parametrize("form", ["planes", "rows"])
def test_nan_stays_where_it_is(emulator, form):
    levels, targets = make_levels(form, torch.float32, 7, cells=(64, 5))
    anchor = int((targets[0] == -1).nonzero()[3])
    levels[0].rows[0, anchor, 2] = torch.nan
    total, gradients, _ = run(emulator, levels, targets, task="sum+gradient")
    assert np.isnan(total)
    marked = torch.zeros_like(levels[0].rows)
    marked[0, anchor, 2] = 1
    np.testing.assert_array_equal(np.isnan(gradients[0]), levels[0].to_layout(marked).flatten().bool().numpy())
    assert not np.isnan(gradients[1]).any()


@pytest.mark.parametrize("form", ["planes", "rows"])
def test_gradients_that_are_there_are_left_alone_when_one_comes_from_above(emulator, form):
    levels, targets = make_levels(form, torch.float32, 7, cells=(64, 5))
    filled = [np.arange(level.rows.numel(), dtype=np.float32) for level in levels]
    for schedule in SCHEDULES:
        _, left, note = run(emulator, levels, targets, task="gradient", filled=filled, schedule=schedule)
        assert note == 1
        for one, other in zip(left, filled, strict=True):
            np.testing.assert_array_equal(one, other)
        options = {"task": "gradient", "grad": 2.0}
        _, anew, note = run(emulator, levels, targets, filled=filled, schedule=schedule, **options)
        assert note == 0
        for one, other in zip(anew, run(emulator, levels, targets, **options)[1], strict=True):
            np.testing.assert_array_equal(one, other)


def test_as_many_levels_as_one_launch_takes(emulator):
    count = emulator.max_levels
    levels, targets = make_levels("mixed", torch.float32, 3, cells=tuple(range(1, count + 1)))
    total, gradients = assert_same_in_every_order(emulator, levels, targets, task="sum+gradient")
    expected_loss, expected = truth(levels, targets)
    np.testing.assert_allclose(total, expected_loss, rtol=2e-6)
    assert_gradients_close(levels, gradients, expected)


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_the_number_of_blocks_changes_no_gradient(emulator, blocks):
    levels, targets = make_levels("mixed", torch.bfloat16, 10, cells=(264, 37))
    total, gradients, _ = run(emulator, levels, targets, task="sum+gradient", blocks=blocks)
    expected_total, expected, _ = run(emulator, levels, targets, task="sum+gradient")
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    for one, other in zip(bits(gradients), bits(expected), strict=True):
        np.testing.assert_array_equal(one, other)
