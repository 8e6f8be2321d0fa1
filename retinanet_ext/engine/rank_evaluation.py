"""Evaluation by several processes: each predicts its share of the images, and the main one scores them all."""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from retinanet_ext.data import DetectionDataset

from .distributed import World
from .evaluate import Evaluation, evaluate, predict_dataset, score_detections


def evaluate_together(
    world: World, model: nn.Module, dataset: DetectionDataset, *, batch_size: int, **options
) -> Evaluation:
    """`evaluate`, its images spread over the processes; the same figures on every one of them.

    `batch_size`: images at once over all processes. An image is in the same batch whichever process predicts it, so the
    detections are those of one process with the same batches. The main process alone has them.
    """
    if world.size == 1:
        return evaluate(model, dataset, batch_size=batch_size, **options)
    start = time.perf_counter()
    own = -(-batch_size // world.size)
    detections, seen, problems, losses = predict_dataset(
        model, dataset, batch_size=own, rank=world.rank, world_size=world.size, **options
    )
    shares = world.gather((seen, problems, losses))
    found = world.gather_on_main(detections)
    result = figures = None
    if world.is_main:
        seconds = time.perf_counter() - start
        images = sorted((image for seen, _, _ in shares for image in seen), key=dataset.index_of.__getitem__)
        together = sorted((d for share in found for d in share), key=lambda d: dataset.index_of[d["image_id"]])
        result = score_detections(dataset.to_coco(images), together)
        result.image_ids, result.images, result.seconds = images, len(images), seconds
        result.problems = [problem for _, share, _ in shares for problem in share]
        result.losses = mean_losses([(losses, len(seen)) for seen, _, losses in shares if losses])
        figures = replace(result, detections=[])
    figures = world.share(figures)
    return result or figures


def mean_losses(shares: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """The means over all images, from those of each process over so many; empty where the model has no losses."""
    if not shares:
        return {}
    images = sum(count for _, count in shares)
    return {name: sum(losses[name] * count for losses, count in shares) / images for name in shares[0][0]}
