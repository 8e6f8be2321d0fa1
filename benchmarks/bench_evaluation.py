"""Scoring generated detections beside pycocotools: `evaluation_speed.py`, which times 5,000 images once, over fewer."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

for module in ("faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from evaluation_speed import generate, pycocotools_precision, same_precision  # noqa: E402

from retinanet_ext.engine.evaluate import score_detections  # noqa: E402

IMAGES, SMOKE_IMAGES = 100, 5
DETECTIONS, CLASSES = 100, 80


def test_score_detections(compare, device, timed):
    if device.type != "cpu":
        pytest.skip("evaluation is the processor's work")
    images = IMAGES if timed else SMOKE_IMAGES
    truth, results = generate(images, DETECTIONS, CLASSES)
    peers = {"pycocotools": "pycocotools is not installed"}
    if importlib.util.find_spec("pycocotools") is not None:
        peers["pycocotools"] = lambda: pycocotools_precision(truth, results)

    def agree(mine, theirs: np.ndarray) -> None:
        assert same_precision(mine, theirs)

    compare(
        f"score_detections {images} images x {DETECTIONS}",
        lambda: score_detections(truth, results),
        peers,
        agree,
        elements=len(results),
        bytes=len(results) * 6 * 8,
        images=images,
    )
