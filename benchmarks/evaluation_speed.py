"""How long scoring 5,000 images with 100 detections each takes, beside pycocotools, and that the precisions at IoU 0.5
are the same.

    python benchmarks/evaluation_speed.py                  # 5,000 images x 100 detections, 80 classes
    python benchmarks/evaluation_speed.py --images 500 --output out.json

The set is generated: 7.3 objects an image in three classes, one in a hundred a crowd; detections near them, six each,
and the rest anywhere. Timed are `score_detections` (every figure of an evaluation) and `match_detections` (what the
confusion matrix and the score histogram count); pycocotools over the same work as `score_detections`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np
from results_file import origin, write_results

from retinanet_ext.engine.evaluate import score_detections
from retinanet_ext.engine.matches import match_detections

WIDTH, HEIGHT = 640, 480


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """xywh boxes of 10 to 300 pixels, float64 [count, 4]."""
    sides = np.exp(rng.uniform(np.log(10), np.log(300), (count, 2)))
    return np.concatenate([rng.random((count, 2)) * np.maximum([WIDTH, HEIGHT] - sides, 1), sides], axis=1)


def generate(images: int, detections: int, classes: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """A COCO dictionary, and COCO results for it."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        objects = random_boxes(rng, rng.poisson(7.3))
        labels = rng.integers(1, classes + 1, 3)[rng.integers(0, 3, len(objects))]
        for box, label in zip(objects.tolist(), labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.01),
                    "ignore": 0,
                }
            )
        near = np.repeat(objects, 6, axis=0)[:detections]
        near = near + rng.normal(0, 0.12, near.shape) * np.tile(near[:, 2:], 2)
        near[:, 2:] = np.maximum(near[:, 2:], 2)
        rest = detections - len(near)
        boxes = np.concatenate([near, random_boxes(rng, rest)])
        kinds = np.concatenate([np.repeat(labels, 6)[:detections], rng.integers(1, classes + 1, rest)])
        for box, label, score in zip(boxes.tolist(), kinds.tolist(), rng.random(detections).tolist(), strict=True):
            results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    listed = [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(1, images + 1)]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)]
    return {"images": listed, "annotations": annotations, "categories": categories}, results


def pycocotools_precision(truth: dict, results: list[dict]) -> np.ndarray:
    """pycocotools' precision, float64 [10, 101, K, 4, 3]."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **truth}
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(results), "bbox")
        scorer.evaluate()
        scorer.accumulate()
    return scorer.eval["precision"]


def difference_at_half(ours, theirs: np.ndarray) -> float:
    """The largest difference of a precision at IoU 0.5, over recalls and classes."""
    return float(np.abs(ours.precision50 - theirs[0, :, :, 0, 2]).max())


def same_precision(ours, theirs: np.ndarray) -> bool:
    """But for the last bit: pycocotools adds 2^-52 to the number of detections that it divides by."""
    return difference_at_half(ours, theirs) <= 2.5e-16


def timed(call) -> tuple[object, dict[str, float]]:
    wall, own = time.perf_counter(), time.process_time()
    result = call()
    return result, {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - own, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--without-pycocotools", action="store_true", help="time our side alone")
    parser.add_argument("--output", type=Path, help="also write the json here")
    arguments = parser.parse_args()
    truth, results = generate(arguments.images, arguments.detections, arguments.classes)
    report = {
        **origin(),
        "load_at_start": os.getloadavg()[0],
        "images": arguments.images,
        "detections": len(results),
        "objects": len(truth["annotations"]),
        "classes": arguments.classes,
    }
    ours, report["score_detections"] = timed(lambda: score_detections(truth, results))
    _, report["match_detections"] = timed(lambda: match_detections(truth, results))
    if not arguments.without_pycocotools:
        theirs, report["pycocotools"] = timed(lambda: pycocotools_precision(truth, results))
        report["largest_difference"] = difference_at_half(ours, theirs)
        if not same_precision(ours, theirs):
            raise SystemExit(f"the precisions differ from pycocotools' by {report['largest_difference']:g}")
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        write_results(arguments.output, report)


if __name__ == "__main__":
    main()
