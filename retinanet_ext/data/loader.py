"""From a data set to batches: order, augmentation, and what happens to an image that turns out to be broken.

A sample whose pixels cannot be decoded is left out of its batch and travels with it as a `Problem`, so that
the loop that reads the batches reports it; a batch may therefore hold fewer images than asked for, or none.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .dataset import DetectionDataset, Problem, UnreadableImageError
from .transforms import Transform, order_rng, sample_rng


class Batch(NamedTuple):
    """Images [3, H, W] of any sizes with their targets, and the problems of the samples that are missing."""

    images: list[Tensor]
    targets: list[dict[str, Any]]
    problems: list[Problem]


class SampleView(Dataset):
    """A data set with transforms drawn from (seed, epoch, index); a broken image gives its Problem."""

    def __init__(self, dataset: DetectionDataset, transform: Transform | None = None, seed: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]] | Problem:
        try:
            image, target = self.dataset[index]
        except UnreadableImageError as error:
            return error.problem
        if self.transform is None:
            return image, target
        return self.transform(image, target, sample_rng(self.seed, self.epoch, index))


class EpochShuffle(Sampler):
    """All indices in an order drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(order_rng(self.seed, self.epoch).permutation(self.size).tolist())


class EpochLoader:
    """Batches of one epoch after another; `set_epoch` fixes the order and the augmentation of the next
    pass."""

    def __init__(self, view: SampleView, loader: DataLoader, shuffle: EpochShuffle | None):
        self.view = view
        self.loader = loader
        self.shuffle = shuffle

    def set_epoch(self, epoch: int) -> None:
        # Workers are started anew for each pass and take the view as it is then.
        self.view.epoch = epoch
        if self.shuffle is not None:
            self.shuffle.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


def collate(samples: Sequence[tuple[Tensor, dict[str, Any]] | Problem]) -> Batch:
    """Samples as a Batch, images as a list since their sizes differ."""
    good = [sample for sample in samples if not isinstance(sample, Problem)]
    return Batch(
        [image for image, _ in good],
        [target for _, target in good],
        [sample for sample in samples if isinstance(sample, Problem)],
    )


def make_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    train: bool,
    transform: Transform | None = None,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> EpochLoader:
    """Batches of `dataset`. `train` shuffles, and drops the last batch of an epoch if it is not full.

    (With fewer images than `batch_size` the one short batch is kept.)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    view = SampleView(dataset, transform, seed)
    shuffle = EpochShuffle(len(dataset), seed) if train else None
    loader = DataLoader(
        view,
        batch_size=batch_size,
        sampler=shuffle,
        drop_last=train and len(dataset) >= batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_single_threaded if workers else None,
    )
    return EpochLoader(view, loader, shuffle)


def _single_threaded(worker: int) -> None:
    torch.set_num_threads(1)
