"""Flips, randomness by (seed, epoch, index), order, batches, and images that break after opening."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL.Image", reason="Pillow is not installed")

from retinanet_ext.data import (
    Compose,
    EpochShuffle,
    RandomHorizontalFlip,
    RandomVerticalFlip,
    generate_shapes,
    make_loader,
    open_dataset,
    sample_rng,
)
from retinanet_ext.data.transforms import horizontal_flip, vertical_flip


@pytest.fixture
def shapes(tmp_path):
    return open_dataset(generate_shapes(tmp_path, train_images=7, val_images=1, image_size=48))


def test_flips_move_the_boxes_with_the_pixels():
    image = torch.zeros(3, 20, 30)
    image[:, 4:9, 2:12] = 1.0
    target = {"boxes": torch.tensor([[2.0, 4.0, 12.0, 9.0]]), "labels": torch.tensor([1])}
    for flip in (horizontal_flip, vertical_flip):
        flipped, changed = flip(image, target)
        x1, y1, x2, y2 = changed["boxes"][0].int().tolist()
        assert x1 < x2
        assert y1 < y2
        assert flipped.sum() == image.sum() == flipped[:, y1:y2, x1:x2].sum()
        assert target["boxes"].tolist() == [[2, 4, 12, 9]]
        again, twice = flip(flipped, changed)
        assert torch.equal(again, image)
        assert torch.equal(twice["boxes"], target["boxes"])
    assert horizontal_flip(image, target)[1]["boxes"].tolist() == [[18, 4, 28, 9]]
    assert vertical_flip(image, target)[1]["boxes"].tolist() == [[2, 11, 12, 16]]


def test_flip_of_no_boxes():
    _, target = horizontal_flip(torch.rand(3, 4, 5), {"boxes": torch.zeros(0, 4)})
    assert target["boxes"].shape == (0, 4)


def test_flip_probability():
    image, target = torch.arange(6.0).reshape(1, 2, 3), {"boxes": torch.zeros(0, 4)}
    for transform, dim in ((RandomHorizontalFlip, -1), (RandomVerticalFlip, -2)):
        assert torch.equal(transform(0.0)(image, target, sample_rng(0, 0, 0))[0], image)
        assert torch.equal(transform(1.0)(image, target, sample_rng(0, 0, 0))[0], image.flip(dim))
        flips = [not torch.equal(transform(0.5)(image, target, sample_rng(0, 0, i))[0], image) for i in range(400)]
        # Five standard deviations of a fair coin thrown 400 times.
        assert abs(sum(flips) - 200) < 50
        with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\], got 1.5"):
            transform(1.5)


def test_generators_differ_by_each_of_seed_epoch_index():
    draws = [sample_rng(*key).random() for key in np.ndindex(3, 3, 3)]
    assert len(set(draws)) == 27
    assert sample_rng(1, 2, 0).random() == sample_rng(1, 2, 0).random()


def test_order_depends_on_seed_and_epoch_alone():
    shuffle = EpochShuffle(50, seed=1)
    first = list(shuffle)
    assert sorted(first) == list(range(50))
    assert list(shuffle) == first
    shuffle.epoch = 1
    assert list(shuffle) != first
    assert list(EpochShuffle(50, seed=2)) != first


def flat(loader):
    return [
        (target["image_id"], image, target["boxes"])
        for batch in loader
        for image, target in zip(batch.images, batch.targets, strict=True)
    ]


def test_samples_do_not_depend_on_workers(shapes):
    transform = Compose([RandomHorizontalFlip(), RandomVerticalFlip()])
    passes = []
    for workers in (0, 2):
        loader = make_loader(shapes, 2, train=True, transform=transform, seed=5, workers=workers)
        epochs = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            epochs.append(flat(loader))
        passes.append(epochs)
    for epoch in (0, 1):
        for a, b in zip(passes[0][epoch], passes[1][epoch], strict=True):
            assert a[0] == b[0]
            assert torch.equal(a[1], b[1])
            assert torch.equal(a[2], b[2])
    assert [a[0] for a in passes[0][0]] != [a[0] for a in passes[0][1]]


def test_training_batches_are_full_and_evaluation_is_complete(shapes):
    assert [len(batch.images) for batch in make_loader(shapes, 3, train=True)] == [3, 3]
    assert [len(batch.images) for batch in make_loader(shapes, 3, train=False)] == [3, 3, 1]
    assert [len(batch.images) for batch in make_loader(shapes, 30, train=True)] == [7]
    assert [sample[0] for sample in flat(make_loader(shapes, 3, train=False))] == list(range(1, 8))
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        make_loader(shapes, 0, train=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_reported_and_left_out(shapes, workers):
    shapes.records[1].path.write_bytes(b"gone bad")
    shapes.records[4].path.unlink()
    batches = list(make_loader(shapes, 2, train=False, workers=workers))
    assert [len(batch.images) for batch in batches] == [1, 2, 1, 1]
    assert [len(batch.problems) for batch in batches] == [1, 0, 1, 0]
    assert "000002.jpg" in str(batches[0].problems[0])
    assert "broken image" in str(batches[0].problems[0])
    assert "000005.jpg" in str(batches[2].problems[0])


def test_an_image_that_changes_size_later_is_reported(shapes):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    Image.new("RGB", (10, 10)).save(shapes.records[0].path)
    batch = next(iter(make_loader(shapes, 1, train=False)))
    assert "image changed: 10x10 pixels now, 48x48" in str(batch.problems[0])
