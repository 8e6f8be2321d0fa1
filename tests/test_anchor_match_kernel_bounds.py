"""The anchor matching CUDA kernels at the edges of what a lane, a warp and a tile hold, run by the emulator.

Each place of a tile, of a warp's boxes and of a lane's anchors counts alone. Any bound of the kernels that is off by
one fails here, in test_anchor_match_kernel.py or under the sanitizers: `python tests/mutate_kernels.py` proves it
(docs/testing.md).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

WARP = 32


@pytest.fixture(scope="session")
def emulator(test_module):
    return test_module("_anchor_match_emulator")


def boxes_apart(count: int) -> torch.Tensor:
    """[count, 4]: no two of them touch."""
    return torch.arange(count)[:, None] * torch.tensor([30.0, 0.0, 30.0, 0.0]) + torch.tensor([0.0, 0.0, 10.0, 10.0])


def match(emulator, anchors, boxes, **options):
    """Labels, matched rows and numbers of foreground anchors; the label of a box is 100 and its row."""
    labels = [100 + np.arange(len(image)) for image in boxes]
    return emulator.match(anchors.numpy(), [image.numpy() for image in boxes], labels=labels, **options)


@pytest.mark.parametrize("low_quality", [True, False])
def test_every_anchor_counts_in_the_bounds_of_its_tile(emulator, low_quality):
    """In each image another anchor is the only one far from the others, where the only box is."""
    images = emulator.tile // 2
    for first in (0, images):
        anchors = torch.tensor([0.0, 0.0, 10.0, 10.0]).repeat(images, emulator.tile, 1)
        places = first + np.arange(images)
        anchors[np.arange(images), places] += 500.0
        box = torch.tensor([[500.0, 500.0, 510.0, 510.0]])
        labels, matched, foreground = match(emulator, anchors, [box] * images, low_quality=low_quality)
        expected = np.full((images, emulator.tile), -1)
        expected[np.arange(images), places] = 0
        np.testing.assert_array_equal(matched, expected)
        np.testing.assert_array_equal(labels, np.where(expected == 0, 100, -1))
        assert foreground.tolist() == [1] * images


@pytest.mark.parametrize("policy", [1, 2])  # torchvision, mmdet
def test_first_box_alone_restores_every_anchor(emulator, policy):
    """It overlaps none of them, and no other box is near."""
    far = torch.tensor([[5000.0, 5000.0, 5010.0, 5010.0]])
    anchors = boxes_apart(emulator.tile + 1)
    labels, matched, foreground = match(emulator, anchors, [far], policy=policy)
    assert (matched == 0).all()
    assert (labels == 100).all()
    assert foreground.tolist() == [len(anchors)]


@pytest.mark.parametrize("count", [WARP - 1, WARP, WARP + 1, 2 * WARP])
def test_every_box_of_a_warp_counts(emulator, count):
    """Each box has one anchor, at which it is; each anchor of a whole tile has one box."""
    boxes = boxes_apart(count)
    anchors = boxes_apart(emulator.tile + 1)
    matched = match(emulator, anchors, [boxes.flip(0)])[1]
    expected = np.full(len(anchors), -1)
    expected[:count] = np.arange(count)[::-1]
    np.testing.assert_array_equal(matched[0], expected)
