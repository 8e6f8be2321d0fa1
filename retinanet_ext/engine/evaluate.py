"""COCO evaluation of a model on any data set, overall and for each class, and the validation loss.

faster_coco_eval scores: pycocotools' figures but for the last bit of a precision, several times sooner.

Data sets that are not COCO's are turned into a COCO dictionary in memory. Crowd regions follow COCO's rules;
objects marked difficult (VOC) count neither when found nor when missed. Images whose pixels turn out to be
broken are left out of the evaluation and reported.
"""

import contextlib
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from retinanet_ext.data import DetectionDataset, Problem, make_loader
from retinanet_ext.data.extras import require

from .validation_loss import MeanLosses, detect_with_losses

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class Evaluation:
    """Results of one evaluation. A figure that has no ground truth to rest on is NaN.

    `metrics`: COCO's twelve, by the names of METRICS. `per_class`: one dictionary a class: name,
    images, objects, AP, AP50, AP75, AR100. `precision50` float64 [101, K]: precision at IoU 0.5 at recall 0,
    0.01, ..., 1; None where the evaluation was read back from files. `detections`: COCO results (image_id,
    category_id, bbox xywh, score, file_name). `losses`: validation loss, by the names of `validation_loss.NAMES`;
    empty where the model has none. `image_ids`: of the images seen. `seconds`: predicting alone.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    precision50: np.ndarray | None
    detections: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    image_ids: list[int] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0


@torch.no_grad()
def predict_dataset(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    workers: int = 0,
    amp: bool = False,
    progress=None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[list[dict[str, Any]], list[int], list[Problem], MeanLosses]:
    """COCO results of `model` on every readable image: (detections, ids of the images seen, problems, losses).

    `progress` wraps the iterable of batches (tqdm, for instance). Process `rank` of `world_size` takes its share of the
    batches. The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    device = torch.device(device)
    loader = make_loader(
        dataset,
        batch_size,
        train=False,
        workers=workers,
        pin_memory=device.type == "cuda",
        as_bytes=True,
        rank=rank,
        world_size=world_size,
    )
    detections: list[dict[str, Any]] = []
    seen: list[int] = []
    problems: list[Problem] = []
    losses = MeanLosses()
    for batch in loader if progress is None else progress(loader):
        problems.extend(batch.problems)
        if not batch.images:
            continue
        images = batch.images_on(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            outputs, of_batch = detect_with_losses(model, images, batch.targets)
        losses.add(of_batch, len(images), model)
        for output, target in zip(outputs, batch.targets, strict=True):
            seen.append(target["image_id"])
            detections.extend(coco_results(output, target["image_id"], dataset))
    model.train(was_training)
    return detections, seen, problems, losses.on_host()


def coco_results(output: dict[str, Any], image_id: int, dataset: DetectionDataset) -> list[dict[str, Any]]:
    """One image's `boxes`, `scores`, `labels` as COCO results, best first."""
    file_name = dataset.records[dataset.index_of[image_id]].path.name
    boxes = output["boxes"].float().cpu().double()
    return [
        {
            "image_id": image_id,
            "category_id": dataset.category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "file_name": file_name,
        }
        for (x1, y1, x2, y2), score, label in zip(
            boxes.tolist(), output["scores"].float().tolist(), output["labels"].tolist(), strict=True
        )
    ]


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    workers: int = 0,
    amp: bool = False,
    progress=None,
) -> Evaluation:
    """Run `model` over `dataset` and score what it finds."""
    start = time.perf_counter()
    detections, seen, problems, losses = predict_dataset(
        model, dataset, batch_size=batch_size, device=device, workers=workers, amp=amp, progress=progress
    )
    seconds = time.perf_counter() - start
    result = score_detections(dataset.to_coco(seen), detections)
    result.problems, result.losses, result.image_ids = problems, losses.result(), seen
    result.images = len(seen)
    result.seconds = seconds
    return result


def score_detections(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> Evaluation:
    """COCO's bounding-box metrics of `detections` (COCO results) against a COCO dictionary.

    Annotations with `ignore` 1 and `iscrowd` 0 are difficult objects: they match as objects do, and neither a
    match nor a miss counts. No detections at all is a result (AP 0), no ground truth too (NaN).
    """
    precision, recall = precisions_and_recalls(ground_truth, detections)
    categories = ground_truth["categories"]
    metrics = {
        "AP": _mean(precision[:, :, :, 0, 2]),
        "AP50": _mean(precision[0, :, :, 0, 2]),
        "AP75": _mean(precision[5, :, :, 0, 2]),
        "APs": _mean(precision[:, :, :, 1, 2]),
        "APm": _mean(precision[:, :, :, 2, 2]),
        "APl": _mean(precision[:, :, :, 3, 2]),
        "AR1": _mean(recall[:, :, 0, 0]),
        "AR10": _mean(recall[:, :, 0, 1]),
        "AR100": _mean(recall[:, :, 0, 2]),
        "ARs": _mean(recall[:, :, 1, 2]),
        "ARm": _mean(recall[:, :, 2, 2]),
        "ARl": _mean(recall[:, :, 3, 2]),
    }
    images_of: dict[int, list[int]] = {category["id"]: [] for category in categories}
    for annotation in ground_truth["annotations"]:
        if not (annotation.get("iscrowd") or annotation.get("ignore")):
            images_of[annotation["category_id"]].append(annotation["image_id"])
    per_class = [
        {
            "class": category["name"],
            "images": len(set(images_of[category["id"]])),
            "objects": len(images_of[category["id"]]),
            "AP": _mean(precision[:, :, k, 0, 2]),
            "AP50": _mean(precision[0, :, k, 0, 2]),
            "AP75": _mean(precision[5, :, k, 0, 2]),
            "AR100": _mean(recall[:, k, 0, 2]),
        }
        for k, category in enumerate(categories)
    ]
    return Evaluation(metrics, per_class, precision[0, :, :, 0, 2].copy(), list(detections))


def precisions_and_recalls(
    ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """COCO's precisions, float64 [IoU 10, recall 101, K, area 4, limit 3], and recalls, float64 [IoU 10, K, area 4,
    limit 3]; -1 where there is no ground truth.

    IoUs 0.5, 0.55, ..., 0.95; recalls 0, 0.01, ..., 1; the K classes in the order of `categories`; areas all, small,
    medium and large; limits of 1, 10 and 100 detections an image and class. Arguments: see `score_detections`.
    """
    coco = require("faster_coco_eval.core.coco")
    truth, found = coco.COCO(), coco.COCO()
    # The scorer writes into the annotations.
    annotations = [dict(annotation) for annotation in ground_truth["annotations"]]
    truth.dataset = {"info": {}, **ground_truth, "annotations": annotations}
    found.dataset = {
        "info": {},
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": [
            {**detection, "id": index + 1, "area": detection["bbox"][2] * detection["bbox"][3], "iscrowd": 0}
            for index, detection in enumerate(detections)
        ],
    }
    categories = ground_truth["categories"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        scorer = _scorer_class()(truth, found, "bbox")
        scorer.difficult = {a["id"] for a in annotations if a.get("ignore") and not a.get("iscrowd")}
        scorer.params.catIds = [category["id"] for category in categories]
        scorer.params.imgIds = sorted(image["id"] for image in ground_truth["images"])
        scorer.evaluate()
        scorer.accumulate()
    # The scorer sorts the classes by their ids; here they are in the order of the labels.
    ids = [category["id"] for category in categories]
    order = np.searchsorted(sorted(ids), ids)
    return scorer.eval["precision"][:, :, order], scorer.eval["recall"][:, order]


def format_metrics(result: Evaluation) -> str:
    """The overall figures and a line a class, as a table."""
    figures = [f"{name} {_figure(result.metrics[name])}" for name in METRICS]
    lines = ["  ".join(figures[:6]), "  ".join(figures[6:])]
    width = max([len("class"), *(len(row["class"]) for row in result.per_class)])
    lines.append(f"{'class':<{width}}  images  objects     AP   AP50   AP75  AR100")
    for row in result.per_class:
        figures = "  ".join(_figure(row[name]) for name in ("AP", "AP50", "AP75", "AR100"))
        lines.append(f"{row['class']:<{width}}  {row['images']:>6}  {row['objects']:>7}  {figures}")
    if result.losses:
        lines.append("loss  " + "  ".join(f"{name} {value:.4f}" for name, value in result.losses.items()))
    return "\n".join(lines)


def format_best(result: Evaluation, epoch: int, epochs: int) -> str:
    """`format_metrics` of the epoch whose weights are kept as best.pt, headed by which that is."""
    return f"validation of epoch {epoch} of {epochs}, whose weights best.pt holds:\n{format_metrics(result)}"


def _scorer_class():
    """COCO's scorer, which overwrites the mark of objects marked `ignore`, with that mark set again."""

    class Scorer(require("faster_coco_eval.core.faster_eval_api").COCOeval_faster):
        def _prepare(self):
            super()._prepare()
            for annotation_id in self.difficult:
                self.cocoGt.anns[annotation_id]["ignore"] = 1

    return Scorer


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan


def _figure(value: float) -> str:
    return f"{value:5.3f}" if not math.isnan(value) else "  -  "
