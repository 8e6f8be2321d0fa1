"""From a data set to batches: order, augmentation, and what happens to an image that turns out to be broken.

A sample whose pixels cannot be decoded is left out of its batch and travels with it as a `Problem`, so that
the loop that reads the batches reports it; a batch may therefore hold fewer images than asked for, or none.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .dataset import DetectionDataset, Problem, UnreadableImageError, to_unit
from .transforms import Transform, order_rng, sample_rng, takes_bytes

# Batches that each worker has ready or at work: one slow image holds nothing up.
PREFETCH = 3

# What a worker is asked for: the epoch, which the augmentation is drawn from, and the index in the data set. The epoch
# travels with each request, so that workers live on from one epoch to the next.
Key = tuple[int, int]


class Batch(NamedTuple):
    """Images [3, H, W] of any sizes with their targets, and the problems of the samples that are missing.

    Images are float32 in 0..1; of a loader with `as_bytes` uint8, where file and transform need no more.
    """

    images: list[Tensor]
    targets: list[dict[str, Any]]
    problems: list[Problem]

    def images_on(self, device: torch.device | str) -> list[Tensor]:
        """The images on `device`, in 0..1; they cross as they are."""
        return [to_unit(image.to(device, non_blocking=True)) for image in self.images]


class SampleView(Dataset):
    """A data set with transforms drawn from (seed, epoch, index); a broken image gives its Problem.

    With `as_bytes` images stay as `DetectionDataset.read` has them, unless the transform wants them in 0..1.
    """

    def __init__(
        self, dataset: DetectionDataset, transform: Transform | None = None, seed: int = 0, as_bytes: bool = False
    ):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # Where a subclass has samples of its own, they are asked for.
        reads = getattr(type(dataset), "__getitem__", None) is DetectionDataset.__getitem__
        self.as_bytes = as_bytes and reads and (transform is None or takes_bytes(transform))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, dict[str, Any]] | Problem:
        epoch, index = key
        try:
            image, target = self.dataset.read(index) if self.as_bytes else self.dataset[index]
        except UnreadableImageError as error:
            return error.problem
        if self.transform is None:
            return image, target
        return self.transform(image, target, sample_rng(self.seed, epoch, index))


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


class TrainBatches(Sampler):
    """The keys of each batch of an epoch, from batch `first` on; the last is dropped if it is not full.

    Of several processes each gets its share of every batch, so that together they see the batches that one alone would.
    A share may be empty where a batch has fewer images than there are processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.shuffle = EpochShuffle(size, seed)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.first = 0

    def __len__(self) -> int:
        # With fewer images than a batch wants the one short batch is kept.
        return max(1, len(self.shuffle) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(self.shuffle)
        for number in range(self.first, len(self)):
            batch = order[number * self.batch_size :][: self.batch_size]
            yield [(self.shuffle.epoch, index) for index in batch[self.rank :: self.world_size]]


class EvaluationBatches(Sampler):
    """The keys of all images in order, the last batch as short as it comes.

    Of several processes each gets whole batches, so that an image has the neighbours, and thus the padding, that it has
    with one.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.starts = range(0, size, batch_size)[rank::world_size]
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in self.starts:
            yield [(0, index) for index in range(start, min(start + self.batch_size, self.size))]


class EpochLoader:
    """Batches of one epoch after another; `set_epoch` fixes the order, the augmentation and the first batch of the next
    pass."""

    def __init__(self, loader: DataLoader, batches: TrainBatches | EvaluationBatches):
        self.loader = loader
        self.batches = batches

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.batches.shuffle.epoch = epoch
        self.batches.first = first_batch

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return len(self.batches)

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
    as_bytes: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> EpochLoader:
    """Batches of `dataset`. `train` shuffles, and drops the last batch of an epoch if it is not full.

    (With fewer images than `batch_size` the one short batch is kept.) Process `rank` of `world_size` gets its share:
    in training, of every batch of `batch_size` images; in evaluation, every `world_size`-th batch. Workers stay for all
    passes of a training loader. `as_bytes` leaves images uint8, a quarter of the memory that workers write and devices
    are sent, where every transform takes them (flips do, scale jitter does not): `Batch.images_on` has them in 0..1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected an integer in [0, world_size), [0, {world_size}), got {rank!r}")
    if train:
        batches = TrainBatches(len(dataset), batch_size, seed, rank, world_size)
    else:
        batches = EvaluationBatches(len(dataset), batch_size, rank, world_size)
    loader = DataLoader(
        SampleView(dataset, transform, seed, as_bytes),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=train and workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_single_threaded if workers else None,
        # Its own: a pass draws a number, and torch's global generator is the training's.
        generator=torch.Generator().manual_seed(seed),
    )
    return EpochLoader(loader, batches)


def _single_threaded(worker: int) -> None:
    torch.set_num_threads(1)
