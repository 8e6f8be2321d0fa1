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
    ScaleJitter,
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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("jitter", [False, True])
def test_images_of_bytes_are_the_same_images(shapes, workers, jitter):
    transforms = [RandomHorizontalFlip(), RandomVerticalFlip(), *[ScaleJitter(0.5, 1.5)] * jitter]
    options = {"train": True, "transform": Compose(transforms), "seed": 5}
    loaders = make_loader(shapes, 2, **options), make_loader(shapes, 2, **options, workers=workers, as_bytes=True)
    for plain, batch in zip(*loaders, strict=True):
        assert {image.dtype for image in plain.images} == {torch.float32}
        assert {image.dtype for image in batch.images} == {torch.float32 if jitter else torch.uint8}
        for mine, right in zip(batch.images_on("cpu"), plain.images, strict=True):
            assert mine.max() > 0.5
            assert torch.equal(mine, right)


def test_transforms_see_bytes_only_where_they_say_so(shapes):
    seen = []

    def stranger(image, target, rng):
        seen.append(image.dtype)
        return image, target

    next(iter(make_loader(shapes, 1, train=False, transform=stranger, as_bytes=True)))
    stranger.takes_bytes = True
    next(iter(make_loader(shapes, 1, train=False, transform=stranger, as_bytes=True)))
    assert seen == [torch.float32, torch.uint8]
    assert {image.dtype for image in next(iter(make_loader(shapes, 1, train=False, as_bytes=True))).images} == {
        torch.uint8
    }


def test_a_data_set_s_own_samples_are_asked_for(shapes):
    class Cut(type(shapes)):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image[:, :20], target

    shapes.__class__ = Cut
    (image,) = next(iter(make_loader(shapes, 1, train=False, as_bytes=True))).images
    assert image.shape == (3, 20, 48)
    assert image.dtype == torch.float32


def test_processes_share_every_training_batch(shapes):
    whole = make_loader(shapes, 3, train=True, seed=5)
    shares = [make_loader(shapes, 3, train=True, seed=5, rank=rank, world_size=2) for rank in range(2)]
    for epoch in (0, 1):
        for loader in (whole, *shares):
            loader.set_epoch(epoch)
        for batch, first, second in zip(whole, *shares, strict=True):
            ids = [[target["image_id"] for target in part.targets] for part in (batch, first, second)]
            assert ids[0][::2] == ids[1]
            assert ids[0][1::2] == ids[2]
    # One batch of seven images for nine processes: two have none, and nobody waits.
    sizes = [
        [len(batch.images) for batch in make_loader(shapes, 9, train=True, rank=rank, world_size=9)]
        for rank in range(9)
    ]
    assert sizes == [[1]] * 7 + [[0]] * 2
    with pytest.raises(ValueError, match=r"rank: expected an integer in \[0, world_size\), \[0, 2\), got 2"):
        make_loader(shapes, 3, train=True, rank=2, world_size=2)


def test_processes_evaluate_whole_batches_of_every_image_once(shapes):
    shares = [make_loader(shapes, 2, train=False, rank=rank, world_size=3) for rank in range(3)]
    ids = [[[target["image_id"] for target in batch.targets] for batch in loader] for loader in shares]
    assert ids == [[[1, 2], [7]], [[3, 4]], [[5, 6]]]
    assert [len(loader) for loader in shares] == [2, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_begins_where_it_is_told(shapes, workers):
    loader = make_loader(shapes, 2, train=True, transform=Compose([RandomHorizontalFlip()]), workers=workers)
    loader.set_epoch(3)
    whole = flat(loader)
    loader.set_epoch(3, first_batch=2)
    rest = flat(loader)
    assert len(rest) == 2
    for mine, right in zip(rest, whole[4:], strict=True):
        assert mine[0] == right[0]
        assert torch.equal(mine[1], right[1])
    assert len(loader) == 3


def test_workers_stay_from_epoch_to_epoch(shapes):
    loader = make_loader(shapes, 2, train=True, workers=1)
    passes = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        ids = [target["image_id"] for batch in loader for target in batch.targets]
        passes.append((ids, [worker.pid for worker in loader.loader._iterator._workers]))
    assert passes[0][1] == passes[1][1]
    assert passes[0][0] != passes[1][0]


def test_loading_leaves_the_global_generator_alone(shapes):
    state = torch.get_rng_state()
    list(make_loader(shapes, 2, train=True, workers=0))
    assert torch.equal(torch.get_rng_state(), state)


def painted(height=40, width=60):
    """Two rectangles of their own colours, and their boxes."""
    image = torch.zeros(3, height, width)
    boxes = [[6.0, 4.0, 26.0, 24.0], [40.0, 20.0, 56.0, 36.0]]
    for channel, (x1, y1, x2, y2) in enumerate(boxes):
        image[channel, int(y1) : int(y2), int(x1) : int(x2)] = 1.0
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor([5, 7]), "ignore": torch.tensor([False, True])}
    return image, {**target, "image_id": 3}


class Draws:
    """In the place of a generator: these numbers, then a place."""

    def __init__(self, scale, *place):
        self.numbers = [scale, np.array(place)]

    def random(self, size=None):
        return self.numbers.pop(0)


def extent(channel):
    """The box of what is painted."""
    rows, columns = (channel > 0.9).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.25), (0.999, 0.999)])
def test_zooming_out_puts_the_image_on_a_canvas(place):
    image, target = painted()
    jitter = ScaleJitter(0.5, 0.5, fill=(0.1, 0.2, 0.3))
    changed, moved = jitter(image, target, Draws(0.3, *place))
    assert changed.shape == (3, 80, 120)
    assert [extent(changed[channel]) for channel in (0, 1)] == moved["boxes"].int().tolist()
    assert (moved["boxes"][:, 2:] - moved["boxes"][:, :2]).tolist() == [[20, 20], [16, 16]]
    assert moved["labels"].tolist() == [5, 7]
    assert changed.sum() == pytest.approx((image.sum() + 0.6 * (80 * 120 - 40 * 60)).item(), rel=1e-5)
    assert target["boxes"][0].tolist() == [6, 4, 26, 24]


def test_a_canvas_is_no_larger_than_the_model_would_have_it():
    image, target = painted()
    changed, moved = ScaleJitter(0.1, 0.1, limit=120)(image, target, Draws(0.0, 0.5, 0.5))
    assert changed.shape == (3, 80, 120)
    # The image is 12 x 8 there.
    torch.testing.assert_close(moved["boxes"][:, 2:] - moved["boxes"][:, :2], torch.tensor([[4.0, 4], [3.2, 3.2]]))


def test_zooming_in_cuts_a_window_and_what_is_outside_is_gone():
    image, target = painted()
    jitter = ScaleJitter(2.0, 2.0)
    upper_left, kept = jitter(image, target, Draws(0.0, 0.0, 0.0))
    assert torch.equal(upper_left, image[:, :20, :30])
    assert kept["boxes"].tolist() == [[6, 4, 26, 20]]
    assert (kept["labels"].tolist(), kept["ignore"].tolist(), kept["image_id"]) == ([5], [False], 3)
    lower_right, kept = jitter(image, target, Draws(0.0, 0.999, 0.999))
    assert torch.equal(lower_right, image[:, 20:, 30:])
    assert kept["boxes"].tolist() == [[10, 0, 26, 16]]
    assert kept["labels"].tolist() == [7]
    # Half a pixel of it is left: no box to train on.
    sliver = {**target, "boxes": torch.tensor([[0.0, 0, 30.5, 20], [0, 0, 31, 40]])}
    assert jitter(image, sliver, Draws(0.0, 0.0, 0.999))[1]["boxes"].tolist() == [[0, 0, 1, 20]]


def test_scales_are_uniform_and_scale_one_changes_nothing():
    image, target = painted()
    same, unchanged = ScaleJitter(1.0, 1.0)(image, target, sample_rng(0, 0, 0))
    assert torch.equal(same, image)
    assert torch.equal(unchanged["boxes"], target["boxes"])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    widths = [60 / ScaleJitter(0.5, 2.0)(image, empty, sample_rng(0, 0, i))[0].shape[2] for i in range(300)]
    assert min(widths) == pytest.approx(0.5, abs=0.03)
    assert max(widths) == pytest.approx(2.0, abs=0.05)
    # Five standard errors of a mean of 300.
    assert sum(widths) / 300 == pytest.approx(1.25, abs=5 * 1.5 / 12**0.5 / 300**0.5 + 0.02)


@pytest.mark.parametrize("arguments", [(0.0, 1.0), (1.0, 0.5), (1.0, float("inf")), (float("nan"), 1.0)])
def test_scales_that_are_none(arguments):
    with pytest.raises(ValueError, match="low, high: expected finite scales with 0 < low <= high"):
        ScaleJitter(*arguments)
    with pytest.raises(ValueError, match="limit: expected a number of pixels >= 1, got 0"):
        ScaleJitter(limit=0)


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
