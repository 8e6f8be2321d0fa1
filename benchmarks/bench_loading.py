"""Images a second of the loader alone and of the training step alone: whichever is less is what a run gets.

The loader reads, decodes and augments JPEG files of 640 x 640, several batches a case; the step is a whole one (copy,
resize, forward, losses, backward, update) of a ResNet-18 on a batch that is in memory already. Neither has a peer, so
that the workers of one have the processor to themselves.
"""

from __future__ import annotations

import itertools

import pytest
import torch

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.data import (  # noqa: E402
    Compose,
    RandomHorizontalFlip,
    ScaleJitter,
    generate_shapes,
    make_loader,
    open_dataset,
)
from retinanet_ext.engine.checkpoint import build_model  # noqa: E402
from retinanet_ext.engine.config import octaves, resolve_amp  # noqa: E402
from retinanet_ext.engine.schedule import make_optimizer, make_scheduler  # noqa: E402
from retinanet_ext.engine.stepper import Stepper  # noqa: E402

BATCH, BATCHES = 4, 8
SIZE, SMOKE_SIZE = 640, 64
# Worker processes, transforms.
LOADERS = {
    "no workers": (0, [RandomHorizontalFlip()]),
    "2 workers": (2, [RandomHorizontalFlip()]),
    "2 workers, scale jitter": (2, [ScaleJitter(0.5, 1.5), RandomHorizontalFlip()]),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, timed):
    folder = tmp_path_factory.mktemp("data")
    count, size = (128, SIZE) if timed else (BATCH, SMOKE_SIZE)
    return open_dataset(generate_shapes(folder, train_images=count, val_images=1, image_size=size))


def endless(loader):
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def pixel_bytes(batch):
    return sum(image.numel() * image.element_size() for image in batch.images)


@pytest.mark.parametrize("case", LOADERS)
def test_loader(compare, device, timed, shapes, case):
    workers, transforms = LOADERS[case]
    loader = make_loader(
        shapes,
        BATCH,
        train=True,
        transform=Compose(transforms),
        workers=workers if timed else 0,
        pin_memory=device.type == "cuda",
        as_bytes=True,
    )
    batches = endless(loader)
    count = BATCHES if timed else 1

    def load():
        return list(itertools.islice(batches, count))

    images = sum(len(batch.images) for batch in load())
    assert images == BATCH * count
    compare(
        f"loader, {case}",
        load,
        {},
        lambda mine, theirs: None,
        elements=images,
        bytes=sum(map(pixel_bytes, load())),
        images=images,
    )


def test_step(compare, device, timed, shapes):
    size = SIZE if timed else SMOKE_SIZE
    torch.manual_seed(0)
    anchors = octaves((16, 32, 64, 128, 256))
    config = {"arch": "resnet18", "num_classes": 4, "min_size": size, "max_size": size, "anchor_sizes": anchors}
    model = build_model(config).to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, "sgd", 1e-4)
    scheduler = make_scheduler(optimizer, 10**6, 0, "cosine")
    stepper = Stepper(model, optimizer, scheduler, device, amp=resolve_amp(None, device))
    batch = next(iter(make_loader(shapes, BATCH, train=True)))

    def step():
        return stepper.take([batch]).values

    assert step().isfinite().all()
    compare(
        f"step, ResNet-18, {size} x {size}",
        step,
        {},
        lambda mine, theirs: None,
        elements=BATCH,
        bytes=pixel_bytes(batch),
        images=BATCH,
    )
