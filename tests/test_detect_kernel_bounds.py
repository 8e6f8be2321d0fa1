"""The post-processing CUDA kernels at the edges of what a vector, a tile, a part, a buffer and a list hold, run by the
emulator.

One anchor, one class and boxes that are apart: what is found are the best logits, in order. Any bound of the kernels
that is off by one fails here, in test_detect_kernel.py or under the sanitizers: `python tests/mutate_kernels.py` proves
it (docs/testing.md).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
WIDTHS = {"float32": 4, "float64": 2, "bfloat16": 8}  # logits of a vector
TILE_VECTORS = 1024  # 4 of each of 256 threads
LOW = -9.0  # a logit below the threshold, whose score is 0.5


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_detect_emulator")


def detect(emulator, levels, topk, dtype="float32", most=None, **options):
    """Indices of what is found, image by image. levels: logits [B, size] each; every one above 0 is a candidate."""
    entries = []
    for logits in levels:
        batch, size = logits.shape
        memory = logits.to(DTYPES[dtype]).view(batch, 1, 1, size)
        array = (memory.view(torch.uint16) if memory.element_size() == 2 else memory).numpy()
        deltas = np.zeros((batch, 4, 1, size), np.float32)
        entries.append(emulator.Level(array, deltas, (4 * size, size, size, 1), 1, 1, size, True))
    total = sum(logits.shape[1] for logits in levels)
    anchors = np.arange(total)[:, None] * 20.0 + np.array([0.0, 0.0, 10.0, 10.0])
    boxes, scores, labels, indices, counts = emulator.detect(
        entries,
        anchors,
        np.full((batch, 2), 1e9),
        logit_type=dtype,
        delta_type="float32",
        classes=1,
        score_thresh=0.5,
        topk=topk,
        nms_thresh=0.5,
        most=len(levels) * topk if most is None else most,
        **options,
    )
    for image, count in enumerate(counts):
        found = indices[image, :count]
        np.testing.assert_array_equal(boxes[image, :count, 0], 20.0 * found)
        assert (labels[image, :count] == 0).all()
        assert (indices[image, count:] == -1).all()
        assert (labels[image, count:] == -1).all()
        assert (scores[image, count:] == 0).all()
        assert (boxes[image, count:] == 0).all()
    return [indices[image, :count].tolist() for image, count in enumerate(counts)]


def best(logits, topk):
    """Indices of the best candidates of one image, of equal ones the first."""
    order = np.argsort(-logits.double().numpy(), kind="stable")[:topk]
    return [int(index) for index in order if logits[index] > 0]


def shuffled(count, seed=0):
    """[count] logits above 0, all different."""
    return (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) + 1) / count


@pytest.mark.parametrize("shift", [0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_place_of_a_vector_alone(emulator, dtype, shift):
    """Every image has one candidate, among the first logits or the last; images begin and end anywhere in a vector."""
    for size in (33, 35, 40):
        logits = torch.full((40, size), LOW)
        places = [place if image < 20 else size - 1 - place for image, place in enumerate([*range(20), *range(20)])]
        logits[torch.arange(40), places] = 1.0
        assert detect(emulator, [logits], 1, dtype, shift=shift) == [[place] for place in places]


@pytest.mark.parametrize("distance", [-3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_parts_of_any_size(emulator, dtype, distance):
    """The last logit alone, the one before it alone, all: in one part of one or two tiles, and in two parts."""
    tile = TILE_VECTORS * WIDTHS[dtype]
    for tiles, parts in ((1, 1), (2, 1), (2, 2)):
        size = tiles * tile + distance
        logits = torch.full((3, size), LOW)
        logits[0, -1] = logits[1, -2] = logits[2, 0] = 1.0
        assert detect(emulator, [logits], 5, dtype, wanted_parts=3 * parts) == [[size - 1], [size - 2], [0]]
        logits = shuffled(size)[None].to(DTYPES[dtype])
        assert detect(emulator, [logits], 9, dtype, wanted_parts=parts) == [best(logits[0], 9)]


@pytest.mark.parametrize("parts", [31, 32, 33, 63, 64, 65, 127, 129])
def test_candidates_in_the_last_of_many_parts(emulator, parts):
    tile = TILE_VECTORS * WIDTHS["float64"]
    logits = torch.full((1, parts * tile), LOW)
    logits[0, -1] = 1.0
    assert detect(emulator, [logits], 2, "float64", wanted_parts=parts) == [[parts * tile - 1]]
    logits[0, ::tile] = 2.0
    expected = [tile * part for part in range(parts)]
    assert detect(emulator, [logits], parts, "float64", wanted_parts=parts) == [expected]


@pytest.mark.parametrize("place", [0, 1, 36, 70])
def test_one_candidate_more_or_less_than_wanted(emulator, place):
    """The worst or the best in any place; and another level behind this one."""
    logits = shuffled(71)
    at = int(logits.argmin())
    for extreme in (0.001, 2.0):
        moved = logits.clone()
        moved[at], moved[place] = moved[place].item(), extreme
        for topk in (69, 70, 71, 72):
            found = detect(emulator, [moved[None], shuffled(3)[None] + 5], topk)
            last = [71 + index for index in best(shuffled(3), 3)]
            assert found == [last + best(moved, topk)]


@pytest.mark.parametrize("schedule", [{}, {"order": "backward"}, {"order": "random", "seed": 3}])
@pytest.mark.parametrize("topk", [1, 2, 257])
def test_best_logit_anywhere_in_a_full_buffer(emulator, topk, schedule):
    """A level of one part, whose candidates do not fit into its buffer of `topk` and 1024 keys; in the order of threads
    the best one has the buffer's last slot, or is beside it."""
    size = TILE_VECTORS * WIDTHS["float32"]
    thread, place = divmod(topk + emulator.fewest_freed - 1, 16)  # 16 logits a thread
    vector, component = divmod(place, 4)
    last = (vector * 256 + thread) * 4 + component
    for best_place in (0, last - 1, last, last + 1, size - 1):
        logits = shuffled(size)
        logits[best_place] = 2.0
        assert detect(emulator, [logits[None]], topk, wanted_parts=1, **schedule) == [best(logits, topk)]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("distance", [-1, 0, 1])
def test_lists_of_whole_chunks_of_the_sort(emulator, chunks, distance):
    """One list alone, so that nothing lies behind it; of as many candidates, one less and more."""
    topk = chunks * emulator.sort_chunk + distance
    for size, equal in ((topk, False), (topk - 1, False), (topk + 1, False), (topk + 500, True)):
        logits = torch.ones(size) if equal else shuffled(max(size, topk))
        logits[size:] = LOW
        found = detect(emulator, [logits[None]], topk, most=min(size, topk), order="random", seed=size)
        assert found == [best(logits, topk)]


@pytest.mark.parametrize("topk", [255, 256, 257])
def test_the_last_of_equal_logits_that_a_thinned_buffer_keeps(emulator, topk):
    """Of equal logits the first 256 have all keys up to a bound that is itself the last one's key."""
    for size in (4096, 9000):
        assert detect(emulator, [torch.ones(1, size)], topk, wanted_parts=1) == [list(range(topk))]
