"""Evaluation by several processes: each predicts its share of the images, and the main one scores them all."""

import time
from dataclasses import replace

from torch import nn

from retinanet_ext.data import DetectionDataset

from .distributed import World
from .evaluate import Evaluation, evaluate, predict_dataset, score_detections
from .validation_loss import MeanLosses

# Without gradients so many images need less memory than a few in training, also where each of many processes trains
# with few.
AT_ONCE = 8


def evaluate_together(
    world: World, model: nn.Module, dataset: DetectionDataset, *, batch_size: int, **options
) -> Evaluation:
    """`evaluate`, its images spread over the processes; the same figures on every one of them.

    `batch_size`: images at once in each process, at most AT_ONCE. An image is in the same batch, and so padded alike,
    however many processes there are: detections and losses are those of one. The main process alone has the detections.
    """
    batch_size = min(batch_size, AT_ONCE)
    if world.size == 1:
        return evaluate(model, dataset, batch_size=batch_size, **options)
    start = time.perf_counter()
    detections, seen, problems, losses = predict_dataset(
        model, dataset, batch_size=batch_size, rank=world.rank, world_size=world.size, **options
    )
    shares = world.gather((seen, problems, losses))
    found = world.gather_on_main(detections)
    result = figures = None
    if world.is_main:
        seconds = time.perf_counter() - start
        images = sorted((image for seen, _, _ in shares for image in seen), key=dataset.index_of.__getitem__)
        ordered = sorted((d for share in found for d in share), key=lambda d: dataset.index_of[d["image_id"]])
        result = score_detections(dataset.to_coco(images), ordered)
        result.image_ids, result.images, result.seconds = images, len(images), seconds
        result.problems = [problem for _, share, _ in shares for problem in share]
        together = MeanLosses()
        for _, _, losses in shares:
            together.join(losses)
        result.losses = together.result()
        figures = replace(result, detections=[])
    figures = world.share(figures)
    return result or figures
