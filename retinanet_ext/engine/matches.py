"""Which detections are right, and what the wrong ones took for what: at one IoU, for pictures and counts.

COCO's figures come from `evaluate`; here each detection has one verdict, which they do not give.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Matches:
    """Verdicts on the detections of a data set.

    `scores` float64 [D], `right` bool [D]: of every detection that counts. `confusion` int64 [K + 1, K + 1]: objects
    by their class (rows, the last one: no object) and by what was detected in their place (columns, the last one:
    nothing), from detections of at least `score`. What lies on crowds and difficult objects is in neither.
    """

    scores: np.ndarray
    right: np.ndarray
    confusion: np.ndarray
    class_names: list[str]
    score: float
    iou: float


@dataclass
class _Objects:
    """Boxes of one image: xywh float64 [M, 4], labels int64 [M], and their scores or marks [M]."""

    boxes: np.ndarray
    labels: np.ndarray
    marks: np.ndarray


def match_detections(
    ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]], *, score: float = 0.3, iou: float = 0.5
) -> Matches:
    """Hold COCO results against a COCO dictionary.

    In the order of their scores detections take the object of their class that they overlap most, if that is by at
    least `iou` and no better detection has it: these are right. Those left over of at least `score` then take objects
    left over of any class: these are confused.
    """
    categories = ground_truth["categories"]
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    background = len(categories)
    confusion = np.zeros((background + 1, background + 1), np.int64)
    objects = _by_image(ground_truth["annotations"], label_of, _mark)
    found = _by_image(detections, label_of, lambda detection: detection["score"])
    nothing = _Objects(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    scores, right = [], []
    for image in ground_truth["images"]:
        truth, dets = objects.get(image["id"], nothing), found.get(image["id"], nothing)
        order = np.argsort(-dets.marks, kind="stable")
        dets = _Objects(dets.boxes[order], dets.labels[order], dets.marks[order])
        overlaps = _overlaps(dets.boxes, truth.boxes, truth.marks == _CROWD)
        overlaps[overlaps < iou] = 0.0
        taken = _match(overlaps, dets.labels, truth.labels, truth.marks == _OBJECT)
        # A crowd or difficult object excuses a detection of its class; below, of any class.
        excused = (overlaps * (dets.labels[:, None] == truth.labels) * (truth.marks != _OBJECT)).any(axis=1)
        counts = (taken >= 0) | ~excused
        scores.append(dets.marks[counts])
        right.append(taken[counts] >= 0)
        confident = int((dets.marks >= score).sum())
        excused = (overlaps[:confident] * (truth.marks != _OBJECT)).any(axis=1)
        _count(confusion, overlaps[:confident], taken[:confident], excused, dets.labels, truth)
    names = [category["name"] for category in categories]
    return Matches(np.concatenate(scores or [[]]), np.concatenate(right or [[]]) > 0, confusion, names, score, iou)


_OBJECT, _CROWD, _DIFFICULT = 0, 1, 2


def _mark(annotation: dict[str, Any]) -> int:
    if annotation.get("iscrowd"):
        return _CROWD
    return _DIFFICULT if annotation.get("ignore") else _OBJECT


def _by_image(entries: Sequence[dict[str, Any]], label_of: dict[int, int], mark) -> dict[int, _Objects]:
    grouped: dict[int, list] = defaultdict(list)
    for entry in entries:
        grouped[entry["image_id"]].append((*entry["bbox"], label_of[entry["category_id"]], mark(entry)))
    tables = {image_id: np.array(rows, np.float64) for image_id, rows in grouped.items()}
    return {i: _Objects(table[:, :4], table[:, 4].astype(np.int64), table[:, 5]) for i, table in tables.items()}


def _overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of xywh boxes [D, 4] and [M, 4]; with a crowd, the part of the box that lies on it. float64 [D, M]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (others[:, :2] + others[:, 2:])[None])
    shared = np.maximum(high - low, 0.0).prod(axis=2)
    area, other_area = boxes[:, 2:].prod(axis=1)[:, None], others[:, 2:].prod(axis=1)[None]
    whole = np.where(crowd, area, area + other_area - shared)
    return shared / np.maximum(whole, 1e-12)


def _match(
    overlaps: np.ndarray, labels: np.ndarray, truth_labels: np.ndarray, free: np.ndarray, any_class: bool = False
) -> np.ndarray:
    """For each detection, best first, the free object it takes, -1 for none. int64 [D]."""
    taken = np.full(len(overlaps), -1, np.int64)
    allowed = overlaps * free
    if not any_class:
        allowed = allowed * (labels[: len(overlaps), None] == truth_labels)
    for detection in np.flatnonzero(allowed.any(axis=1)):
        best = int(allowed[detection].argmax())
        if allowed[detection, best] > 0:
            taken[detection] = best
            allowed[:, best] = 0.0
    return taken


def _count(
    confusion: np.ndarray,
    overlaps: np.ndarray,
    taken: np.ndarray,
    excused: np.ndarray,
    labels: np.ndarray,
    truth: _Objects,
) -> None:
    """Add one image's confident detections to `confusion`."""
    background = len(confusion) - 1
    labels = labels[: len(taken)]
    free = truth.marks == _OBJECT
    hit = taken >= 0
    np.add.at(confusion, (truth.labels[taken[hit]], labels[hit]), 1)
    free[taken[hit]] = False
    confused = _match(overlaps * ~hit[:, None], labels, truth.labels, free, any_class=True)
    mistaken = confused >= 0
    np.add.at(confusion, (truth.labels[confused[mistaken]], labels[mistaken]), 1)
    free[confused[mistaken]] = False
    np.add.at(confusion, (truth.labels[free], background), 1)
    np.add.at(confusion, (background, labels[~hit & ~mistaken & ~excused]), 1)
