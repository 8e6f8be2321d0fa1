"""The CUDA kernels of non-maximum suppression at the edges of what a tile, a band, a chunk and a list hold, run by the
emulator.

Sizes one short of, at and one beyond an edge. Any bound of the kernels that is off by one fails here, in
test_nms_kernel.py or under the sanitizers: `python tests/mutate_kernels.py` proves it (docs/testing.md).
"""

from __future__ import annotations

import numpy as np
import pytest

TILE = 64  # of a band, and of the walk
FILL = -0x5A5A5A5A5A5A5A5B  # an int64 of the pattern that the emulator fills memory with


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_nms_emulator")


def boxes_apart(count):
    """[count, 4]: no two of them touch."""
    return (np.arange(count)[:, None] * [30.0, 0.0, 30.0, 0.0] + [0.0, 0.0, 10.0, 10.0]).astype(np.float32)


def falling(count):
    """[count] scores: the first row is the best."""
    return (1 - np.arange(count) / count).astype(np.float32)


def nms(emulator, boxes, **options):
    return emulator.nms(boxes[None], falling(len(boxes))[None], None, 0.5, **options).tolist()


def padded(emulator, boxes, scores, most, num_valid=None, threshold=0.5, labels=None):
    """Rows that are kept of each image, [B, D], and their numbers."""
    labels = np.zeros(scores.shape, np.int64) if labels is None else labels
    num_valid = None if num_valid is None else np.array(num_valid, np.int32)
    return emulator.batched_nms_padded(boxes, scores, labels, threshold, most, num_valid=num_valid)


@pytest.mark.parametrize("count", [1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1])
def test_room_for_one_more_than_there_are(emulator, count):
    """All are kept, and the last place stays empty; a list without that place holds all but the last."""
    boxes, scores = boxes_apart(count), falling(count)
    for most in (count + 1, count, count - 1):
        indices, counts = padded(emulator, boxes[None], scores[None], most)
        kept = min(most, count)
        assert indices[0].tolist() == [*range(kept), *[-1] * (most - kept)]
        assert counts.tolist() == [kept]


@pytest.mark.parametrize("first", [0, 30, 31, 32, 33, 61, 62])
@pytest.mark.parametrize("tile", [0, 1])
def test_each_place_of_a_tile_suppresses_alone(emulator, tile, first):
    """One pair of equal boxes, side by side; the others are apart. In the first tile and in the last."""
    boxes = boxes_apart(2 * TILE)
    place = tile * TILE + first
    boxes[place + 1] = boxes[place]
    expected = [row for row in range(2 * TILE) if row != place + 1]
    assert nms(emulator, boxes) == expected
    indices, counts = padded(emulator, boxes[None], falling(2 * TILE)[None], 2 * TILE)
    assert indices[0].tolist() == [*expected, -1]
    assert counts.tolist() == [len(expected)]


@pytest.mark.parametrize("valid", [-1, 0, 70, 71])
def test_rows_at_the_ends_of_what_can_be(emulator, valid):
    """One below none and one above all of them; the other image's rows stay its own."""
    boxes = np.stack([boxes_apart(70), boxes_apart(70) + 1])
    scores = np.stack([falling(70), falling(70)])
    for num_valid in ([valid, 70], [70, valid]):
        indices, counts = padded(emulator, boxes, scores, 80, num_valid)
        expected = [min(max(rows, 0), 70) for rows in num_valid]
        assert counts.tolist() == expected
        for image, rows in enumerate(expected):
            assert indices[image].tolist() == [*range(rows), *[-1] * (80 - rows)]


def test_behind_the_kept_boxes_nothing_is_read(emulator):
    """A box of the label, and with a threshold of the coordinates, that suppressed if that memory were a kept box."""
    labels = np.full((1, 3), FILL, np.int64)
    indices, counts = padded(emulator, boxes_apart(3)[None], falling(3)[None], 3, threshold=-0.5, labels=labels)
    assert indices.tolist() == [[0, -1, -1]]
    assert counts.tolist() == [1]


@pytest.mark.parametrize("distance", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2])
def test_sorted_runs_of_any_length(emulator, chunks, distance):
    """Rows around whole chunks, of which the first three and the last, which are suppressed by the best, come last."""
    count = chunks * emulator.sort_chunk + distance
    scores = np.arange(count, dtype=np.float32)
    got = padded(emulator, np.tile(boxes_apart(1), (1, count, 1)), scores[None], 3, labels=np.arange(count)[None] // 2)
    pairs = [count - 1, (count - 1) // 2 * 2 - 1, (count - 1) // 2 * 2 - 3]
    assert got[0].tolist() == [pairs]
    # The rows that do not count have the best scores.
    scores = np.concatenate([np.zeros(count), np.ones(7)]).astype(np.float32)
    boxes = np.tile(boxes_apart(1), (1, count + 7, 1))
    labels = np.arange(count + 7)[None]
    indices, counts = padded(emulator, boxes, scores[None], 5, [count], labels=labels)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]
    assert counts.tolist() == [5]


def test_equal_scores_on_both_sides_of_a_chunk(emulator):
    """All keys are next to each other, in order; everything is one label's and equal, or no two are."""
    count = emulator.sort_chunk + 2
    boxes, scores = np.tile(boxes_apart(1), (1, count, 1)), np.zeros((1, count), np.float32)
    indices, _ = padded(emulator, boxes, scores, count, labels=np.arange(count)[None])
    assert indices[0].tolist() == list(range(count))


@pytest.mark.parametrize("kept", [1, 255, 256, 257])
def test_sweep_of_whole_tiles_of_kept_boxes(emulator, kept):
    """All boxes of a band are kept; the last of them suppresses one box behind the band."""
    boxes = boxes_apart(kept + 3)
    boxes[kept + 1] = boxes[kept - 1]
    expected = [row for row in range(kept + 3) if row != kept + 1]
    assert nms(emulator, boxes, band=kept) == expected


@pytest.mark.parametrize("equal", [1, 2])
def test_bands_of_one_box(emulator, equal):
    """What the first band suppresses stays so in the second; rows are appended to those of earlier bands."""
    boxes = boxes_apart(4)
    boxes[equal] = boxes[3] = boxes[0]
    assert nms(emulator, boxes, band=1) == [0, 3 - equal]


def test_words_of_a_band(emulator):
    words = emulator.band_boxes // TILE
    counts = [1, TILE - 1, TILE, TILE + 1, emulator.band_boxes - 1, emulator.band_boxes]
    assert [emulator.band_words(count) for count in counts] == [1, 1, 1, 2, words, words]


def test_a_whole_band_is_settled(emulator):
    """Each tile's first box would suppress the last box of the next one, and the band's first the band's last."""
    count = emulator.band_boxes
    words = count // TILE
    masks = np.zeros((count, words), np.uint64)
    for tile in range(words - 1):
        masks[tile * TILE, tile + 1] = 1 << (TILE - 1)
    masks[0, words - 1] |= np.uint64(1 << 5)
    out = {(tile + 2) * TILE - 1 for tile in range(words - 1)} | {(words - 1) * TILE + 5}
    assert emulator.settle(masks, count).tolist() == [row for row in range(count) if row not in out]
