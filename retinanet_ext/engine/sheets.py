"""Sheets of pictures with boxes: annotated, detected, and as the network gets them in training."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet_ext.data import Batch, DetectionDataset, UnreadableImageError
from retinanet_ext.data.dataset import read_image
from retinanet_ext.data.extras import require

from .drawing import Box, contact_sheet, draw_boxes, save_picture

# The longer side of one picture of a sheet, in pixels, and how many pictures a sheet has.
CELL = 420
PICTURES = 9
# Detections of less score are not drawn on sheets of a validation.
SCORE = 0.3


def spread(size: int, count: int) -> list[int]:
    """`count` indices spread evenly over `range(size)`, all of them if there are fewer."""
    count = min(size, count)
    return [index * size // count for index in range(count)]


def annotated_boxes(boxes, labels, ignore, class_names: Sequence[str]) -> list[Box]:
    """Boxes [M, 4], labels [M] and marks [M] (ignored: dashed) as boxes to draw."""
    rows = zip(boxes.tolist(), labels.tolist(), ignore.tolist(), strict=True)
    return [Box(xyxy, label, class_names[label], dashed=dashed) for xyxy, label, dashed in rows]


def write_annotations(dataset: DetectionDataset, indices: Iterable[int], path: Path) -> None:
    """A sheet of the images `indices` with their annotated boxes; ignored ones dashed."""
    boxes_of = [(index, dataset.records[index]) for index in indices]
    _write(
        dataset,
        [(index, annotated_boxes(r.boxes, r.labels, r.ignore, dataset.class_names)) for index, r in boxes_of],
        path,
    )


def write_detections(
    dataset: DetectionDataset,
    indices: Iterable[int],
    detections: Sequence[dict[str, Any]],
    path: Path,
    *,
    score: float = SCORE,
) -> None:
    """A sheet of the images `indices` with those of `detections` (COCO results) that have at least `score`."""
    boxes: dict[int, list[Box]] = {dataset.records[index].image_id: [] for index in indices}
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    for detection in detections:
        if detection["score"] >= score and detection["image_id"] in boxes:
            x, y, width, height = detection["bbox"]
            label = label_of[detection["category_id"]]
            box = Box((x, y, x + width, y + height), label, dataset.class_names[label], detection["score"])
            boxes[detection["image_id"]].append(box)
    _write(dataset, [(dataset.index_of[image_id], found) for image_id, found in boxes.items()], path)


def write_validation(dataset: DetectionDataset, detections: Sequence[dict[str, Any]], folder: Path) -> None:
    """val_batch{0,1,2}_labels.jpg and ..._pred.jpg: images spread over the set, annotated and detected."""
    indices = spread(len(dataset), 3 * PICTURES)
    for number, start in enumerate(range(0, len(indices), PICTURES)):
        shown = indices[start : start + PICTURES]
        write_annotations(dataset, shown, folder / f"val_batch{number}_labels.jpg")
        write_detections(dataset, shown, detections, folder / f"val_batch{number}_pred.jpg")


def with_pictures(
    batches: Iterable[Batch], folder: Path, class_names: Sequence[str], count: int = 3
) -> Iterator[Batch]:
    """`batches`, unchanged; the first `count` with images are drawn too, as train_batch{0,1,2}.jpg."""
    number = 0
    for batch in batches:
        if number < count and batch.images:
            write_batch(batch, folder / f"train_batch{number}.jpg", class_names)
            number += 1
        yield batch


def write_batch(batch: Batch, path: Path, class_names: Sequence[str], pictures: int = 16) -> None:
    """A sheet of the images of a training batch as they are after every augmentation, with their boxes."""
    pil = require("PIL.Image")
    shown = batch._replace(images=batch.images[:pictures], targets=batch.targets[:pictures])
    drawn = []
    for image, target in zip(shown.images_on("cpu"), shown.targets, strict=True):
        pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        ignore = target["ignore"] if "ignore" in target else np.zeros(len(target["boxes"]), bool)
        boxes = annotated_boxes(target["boxes"], target["labels"], ignore, class_names)
        drawn.append(draw_boxes(pil.fromarray(pixels), boxes, side=CELL))
    _save(drawn, path)


def _write(dataset: DetectionDataset, boxes: Iterable[tuple[int, list[Box]]], path: Path) -> None:
    """Images by their index, each with its boxes; those that cannot be read are left out."""
    drawn = []
    for index, of_image in boxes:
        record = dataset.records[index]
        try:
            picture = read_image(record.path, upright=record.upright)
        except UnreadableImageError:
            continue
        drawn.append(draw_boxes(picture, of_image, side=CELL))
    _save(drawn, path)


def _save(drawn: list, path: Path) -> None:
    if drawn:
        save_picture(contact_sheet(drawn, math.ceil(math.sqrt(len(drawn))), CELL), path)
