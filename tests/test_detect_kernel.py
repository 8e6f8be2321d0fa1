"""The post-processing CUDA kernels, run by the emulator: the real code, in several orders of its threads.

RETINANET_EXT_SANITIZE=1, with the sanitizer's runtime preloaded, runs the same under AddressSanitizer and
UndefinedBehaviorSanitizer: see docs/testing.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logit_kinds import LOGIT_KINDS, logits_of_kind

from retinanet_ext import reference

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULES = [
    {"order": "forward"},
    {"order": "backward", "live_blocks": 2},
    {"order": "random", "seed": 1, "live_blocks": 3},
]
A, K = 9, 7
GRIDS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of an image of 64 x 96
SIZES = [(60.0, 90.0), (64.0, 33.0)]


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_detect_emulator")


def make_case(dtype="float32", spread=2.0, seed=0, batch=2, grids=GRIDS):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, A * K, *grid, generator=generator) * spread - 1 for grid in grids]
    deltas = [torch.randn(batch, A * 4, *grid, generator=generator) * 0.3 for grid in grids]
    as_given = [[level.to(DTYPES[dtype]) for level in levels] for levels in (logits, deltas)]
    count = A * sum(height * width for height, width in grids)
    corner = torch.rand(count, 2, generator=generator) * 90 - 20
    size = torch.rand(count, 2, generator=generator) * 60 + 4
    return *as_given, torch.cat((corner, corner + size), dim=1)


def storage(tensor):
    """NumPy array of the memory's elements: numbers, or the bits of halves."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()


def level_of(emulator, logits, deltas, layout):
    """A level [B, A * K, H, W], [B, 4 * A, H, W] as a kernel finds it in memory."""
    _, channels, height, width = deltas.shape
    anchors = channels // 4
    if layout == "planes":
        strides = (channels * height * width, height * width, width, 1)
        memory = (storage(logits), storage(deltas))
    else:
        strides = (channels * height * width, 1, width * channels, channels)
        memory = (storage(logits.permute(0, 2, 3, 1)), storage(deltas.permute(0, 2, 3, 1)))
    return emulator.Level(*memory, strides, anchors, height, width, layout == "planes")


def assert_same(found, expected, message=""):
    """What is found is the same; boxes and scores but for the roundings of two exponentials."""
    for name in ("labels", "indices", "counts"):
        np.testing.assert_array_equal(found[expected._fields.index(name)], getattr(expected, name), err_msg=message)
    eps = torch.finfo(expected.boxes.dtype).eps
    np.testing.assert_allclose(found[0], expected.boxes.numpy(), rtol=0, atol=4 * 512 * eps, err_msg=message)
    eps = torch.finfo(expected.scores.dtype).eps
    np.testing.assert_allclose(found[1], expected.scores.numpy(), rtol=2 * eps, atol=0, err_msg=message)


def check(emulator, logits, deltas, anchors, sizes=SIZES, layout="planes", schedules=SCHEDULES, classes=K, **options):
    """The kernels' results are the reference's, in every order of the threads."""
    own = {name: options.pop(name) for name in ("wanted_parts", "shift", "sizes_as_list", "images_per_launch")
           if name in options}  # fmt: skip
    expected = reference.detect(logits, deltas, anchors, sizes, **options)
    levels = [level_of(emulator, *level, layout) for level in zip(logits, deltas, strict=True)]
    box_type = expected.boxes.dtype
    names = {dtype: name for name, dtype in DTYPES.items()}
    for schedule in schedules:
        got = emulator.detect(
            levels,
            anchors.to(box_type).numpy(),
            torch.tensor(sizes, dtype=box_type).reshape(-1, 2).numpy(),
            logit_type=names[logits[0].dtype],
            delta_type=names[deltas[0].dtype],
            classes=classes,
            score_thresh=options.get("score_thresh", 0.05),
            topk=options.get("topk_per_level", 1000),
            nms_thresh=options.get("nms_thresh", 0.5),
            most=options.get("max_detections", 300),
            clip_before_nms=options.get("clip_before_nms", True),
            **own,
            **schedule,
        )
        assert_same(got, expected, f"{schedule}")
    return expected


GROWTH = torch.tensor([4.135166556742356, 4.0, 4.13, 4.14, 5.0, 50.0, 1e4, float("inf")])  # the first is the limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_at_and_beyond_the_limit_of_the_exponent(emulator, dtype):
    """Of small anchors within the image, so that its sides hold nothing."""
    logits, deltas, anchors = make_case(dtype)
    anchors = 250 + (anchors - anchors[:, :2].repeat(1, 2)) / 10
    for level in deltas:
        for channel in (2, 3):
            sizes = level[:, channel::4]
            sizes.copy_(GROWTH[torch.randint(len(GROWTH), sizes.shape)])
    check(emulator, logits, deltas, anchors, sizes=[(512.0, 512.0)] * 2, nms_thresh=0.9)


@pytest.mark.parametrize("clip_before_nms", [True, False])
def test_deltas_and_anchors_that_are_no_numbers(emulator, clip_before_nms):
    logits, deltas, anchors = make_case()
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
    for level in deltas:
        places = torch.rand(level.shape) < 0.1
        level[places] = odd[torch.randint(len(odd), (int(places.sum()),))]
    anchors[::50, 0], anchors[7::50, 2], anchors[9::50] = odd[0], odd[1], odd[2]
    check(emulator, logits, deltas, anchors, clip_before_nms=clip_before_nms, max_detections=500)


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_layouts(emulator, dtype, layout):
    expected = check(emulator, *make_case(dtype), layout=layout, topk_per_level=50)
    assert (expected.counts > 20).all()


@pytest.mark.parametrize("boxes", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_deltas_and_anchors_of_other_types(emulator, dtype, boxes):
    logits, deltas, anchors = make_case(dtype)
    deltas = [level.to(DTYPES[boxes]) for level in deltas]
    check(emulator, logits, deltas, anchors, topk_per_level=50, schedules=SCHEDULES[1:2])
    check(emulator, logits, deltas, anchors.double(), topk_per_level=50, schedules=SCHEDULES[:1])


@pytest.mark.parametrize("shift", [1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_anywhere_in_memory(emulator, dtype, shift):
    """The first and the last vector of an image are cut; images follow each other at odd distances."""
    case = make_case(dtype, grids=((3, 5), (1, 1)))
    check(emulator, *case, shift=shift, score_thresh=0.0, schedules=SCHEDULES[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cells", [1, 2, 63, 64, 65, 66, 67, 129, 130, 131])
def test_parts_and_tiles_that_end_anywhere(emulator, cells, dtype):
    """One anchor and class in 64 channels: the level ends one to three logits before and behind tiles and parts."""
    generator = torch.Generator().manual_seed(cells)
    logits = [torch.randn(1, 64, 1, cells, generator=generator).to(DTYPES[dtype])]
    deltas = [torch.randn(1, 64 * 4, 1, cells, generator=generator) * 0.1]
    anchors = torch.tensor([0.0, 0.0, 10.0, 10.0]) + 20 * torch.arange(64 * cells)[:, None]
    options = {"topk_per_level": 40, "max_detections": 40, "classes": 1, "wanted_parts": 4}
    check(emulator, logits, deltas, anchors, [(1e6, 1e6)], schedules=SCHEDULES[:1], score_thresh=0.0, **options)
    logits[0].fill_(-9.0)
    logits[0].view(-1)[[0, -1]] = 3.0
    expected = check(emulator, logits, deltas, anchors, [(1e6, 1e6)], schedules=SCHEDULES[:1], **options)
    assert expected.counts.item() == 2


@pytest.mark.parametrize("logits_of", LOGIT_KINDS)
@pytest.mark.parametrize("topk", [1, 30, 600])
@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_more_candidates_than_a_buffer_holds(emulator, layout, topk, logits_of):
    """6,048 of a level in one part: its buffer is thinned out again and again; of equal ones the lower index stays."""
    logits, deltas, anchors = make_case()
    logits = logits_of_kind(logits_of, logits)
    options = {"score_thresh": 0.01, "topk_per_level": topk, "max_detections": 400}
    check(emulator, logits, deltas, anchors, layout=layout, wanted_parts=1, schedules=SCHEDULES[1:], **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lists_longer_than_a_chunk_of_the_sort(emulator, dtype):
    """5,000 of a level: sorted in three chunks, merged in two rounds; and more than there are."""
    case = make_case(dtype)
    for topk in (emulator.sort_chunk, emulator.sort_chunk + 1, 5000, 10**9):
        options = {"score_thresh": -1.0, "topk_per_level": topk, "max_detections": 50}
        check(emulator, *case, schedules=SCHEDULES[2:], **options)


@pytest.mark.parametrize(("spread", "score_thresh"), [(4.0, 0.999), (1.0, 0.6), (0.0, 0.0)])
@pytest.mark.parametrize("topk", [300, 3000])
def test_more_parts_than_a_block_selects_from(emulator, topk, spread, score_thresh):
    """66 parts of 2,048 in the larger level, two groups of them, and one in the smaller; few candidates, many, and all
    of equal logits. Their best are selected group by group first."""
    generator = torch.Generator().manual_seed(topk)
    shapes = ((64, 3, 700), (64, 1, 9))  # a cell's anchors, of one class
    sizes = [channels * height * width for channels, height, width in shapes]
    plan = emulator.plan(sizes, 1, topk, 16, 2048, 1000)
    assert [level["groups"] for level in plan["levels"]] == [2, 1]
    logits = [torch.randn(1, *shape, generator=generator).double() * spread for shape in shapes]
    deltas = [torch.randn(1, 4 * shape[0], *shape[1:], generator=generator) * 0.1 for shape in shapes]
    anchors = torch.tensor([0.0, 0.0, 10.0, 10.0]) + 20 * torch.arange(sum(sizes))[:, None]
    options = {"topk_per_level": topk, "max_detections": 300, "classes": 1, "wanted_parts": 1000}
    options["score_thresh"] = score_thresh
    check(emulator, logits, deltas, anchors, [(1e7, 1e7)], schedules=SCHEDULES[2:], **options)


def test_groups_of_several_images(emulator):
    """Two images of one level, each of 65 parts: groups lie image by image."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 64, 1, 2050, generator=generator).double() * 3 - 9]
    deltas = [torch.zeros(2, 256, 1, 2050)]
    anchors = torch.tensor([0.0, 0.0, 10.0, 10.0]) + 20 * torch.arange(64 * 2050)[:, None]
    options = {"topk_per_level": 100, "classes": 1, "wanted_parts": 1000}
    expected = check(emulator, logits, deltas, anchors, [(1e7, 1e7)] * 2, schedules=SCHEDULES[1:2], **options)
    assert expected.counts.tolist() == [100, 100]


@pytest.mark.parametrize("score_thresh", [-1.0, 0.0, 1e-30, 0.05, 0.5, 0.999999, 1.0, 2.0, float("nan")])
def test_thresholds(emulator, score_thresh):
    logits, deltas, anchors = make_case(spread=40.0)
    logits[0][0, 0, 0, :3] = torch.tensor([float("-inf"), -200.0, float("inf")])
    check(emulator, logits, deltas, anchors, score_thresh=score_thresh, topk_per_level=300, schedules=SCHEDULES[:1])


@pytest.mark.parametrize("logit", [float("-inf"), -3e38, -1e-45, 0.0, 3e38, float("inf")])
def test_all_logits_at_an_end_of_the_numbers(emulator, logit):
    """A cut-off below which nothing lies, or above: the buffer overflows with equal logits."""
    logits, deltas, anchors = make_case(batch=1)
    logits = [torch.full_like(level, logit) for level in logits]
    options = {"score_thresh": -1.0, "topk_per_level": 100, "wanted_parts": 1}
    check(emulator, logits, deltas, anchors, SIZES[:1], schedules=SCHEDULES[1:2], **options)


@pytest.mark.parametrize("clip_before_nms", [True, False])
@pytest.mark.parametrize("sizes_as_list", [True, False])
@pytest.mark.parametrize("images_per_launch", [1, 2, 64])
def test_image_sizes(emulator, images_per_launch, sizes_as_list, clip_before_nms):
    """Three images in one, two and three launches, each clipped to its own size."""
    sizes = [(60.0, 90.0), (64.0, 33.0), (20.0, 21.0)]
    check(
        emulator,
        *make_case(batch=3),
        sizes,
        topk_per_level=60,
        clip_before_nms=clip_before_nms,
        sizes_as_list=sizes_as_list,
        images_per_launch=images_per_launch,
        schedules=SCHEDULES[:2],
    )


def test_anchors_of_each_image(emulator):
    logits, deltas, anchors = make_case()
    check(emulator, logits, deltas, torch.stack((anchors, anchors + 3.5)), topk_per_level=60)


def test_empty_levels(emulator):
    """Before, between and behind others."""
    logits, deltas, anchors = make_case(grids=GRIDS[1:4])
    for place in (0, 1, 3):
        none = [torch.zeros(2, A * channels, 0, 5) for channels in (K, 4)]
        more = [[*levels[:place], empty, *levels[place:]] for levels, empty in zip((logits, deltas), none, strict=True)]
        check(emulator, *more, anchors, topk_per_level=60, schedules=SCHEDULES[:1])


@pytest.mark.parametrize("max_detections", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("topk", [0, 1, 60])
def test_limits(emulator, topk, max_detections):
    check(emulator, *make_case(), topk_per_level=topk, max_detections=max_detections, schedules=SCHEDULES[:1])


def test_one_class_and_one_anchor_that_matters(emulator):
    """One candidate in all, in the last place; the padding behind it."""
    logits, deltas, anchors = make_case()
    logits = [torch.full_like(level, -20.0) for level in logits]
    assert check(emulator, logits, deltas, anchors, schedules=SCHEDULES[:1]).counts.tolist() == [0, 0]
    logits[-1][1, -1, -1, -1] = 2.0
    expected = check(emulator, logits, deltas, anchors, max_detections=3)
    assert expected.indices[1].tolist() == [len(anchors) * K - 1, -1, -1]


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("classes", [1, 80, 264])
@pytest.mark.parametrize("topk", [0, 1, 1000, 100_000, 10**12])
@pytest.mark.parametrize("key_bytes", [8, 16])
def test_workspace_follows_the_candidates(emulator, key_bytes, topk, classes, batch):
    """Whatever the logits: all buffers together take 64 MB and one buffer a level and image at most; every part has one
    and parts cover the level; a buffer that its part can overflow has room to be thinned out."""
    sizes = [rows * 9 * classes for rows in (168 * 100, 84 * 50, 42 * 25, 21 * 13, 11 * 7)]
    tile, wanted = 8192, 16 * 132
    plan = emulator.plan(sizes, batch, topk, key_bytes, tile, wanted)
    most = [min(topk + max(topk, emulator.fewest_freed), size) for size in sizes]
    assert plan["slots"] * key_bytes <= emulator.buffer_bytes + batch * sum(most) * key_bytes
    assert plan["part"] % tile == 0
    assert plan["parts"] <= wanted + batch * len(sizes)
    assert plan["room"] == sum(min(topk, size) for size in sizes)
    for level, size in zip(plan["levels"], sizes, strict=True):
        assert level["most"] == min(topk, size)
        if topk > 0:
            assert (level["parts"] - 1) * plan["part"] < size <= level["parts"] * plan["part"]
        if level["capacity"] < min(plan["part"], size):
            assert level["capacity"] >= topk + emulator.fewest_freed
        assert level["groups"] == (0 if plan["groups"] == 0 else -(-level["parts"] // emulator.select_lists))
    left = max(min(topk, max(sizes)), emulator.select_room)
    assert plan["group_slots"] <= (plan["parts"] // emulator.select_lists + batch * len(sizes)) * left
