"""How well anchors cover a data set's boxes, by size and by class, and anchors that cover them better.

An anchor covers a box where their IoU reaches the threshold of a positive (0.5); a box without one is trained through
its best anchor alone, if that reaches anything at all. Only boxes matter, so no image is read.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retinanet_ext.data import DetectionDataset
from retinanet_ext.models.anchors import AnchorGenerator

from .config import TrainConfig

STRIDES = (8, 16, 32, 64, 128)
# COCO's limits between small, medium and large, as sides of squares in pixels of the original image.
SIZE_LIMITS = (32, 96)
# The search looks at so many boxes; more change the result by less than its steps.
_SAMPLE = 4000
# A proposal must cover at least this much more of the boxes to be made.
_WORTHWHILE = 0.01


@dataclass(frozen=True)
class Boxes:
    """Boxes of a set as the network meets them. `xyxy` float64 [M, 4] in pixels of the resized images, `padded` int64
    [M, 2] (height, width of the padded images), `labels` [M], `sizes` [M] (sqrt of the area in the original image)."""

    xyxy: np.ndarray
    padded: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Boxes":
        return Boxes(self.xyxy[rows], self.padded[rows], self.labels[rows], self.sizes[rows])


@dataclass(frozen=True)
class Anchors:
    """What `train` takes: the smallest size of each of the five levels, height / width, and whose conventions."""

    sizes: tuple[float, ...]
    ratios: tuple[float, ...]
    preset: str | None = None

    def options(self) -> str:
        preset = "" if self.preset is None else f"--preset {self.preset} "
        sizes, ratios = (" ".join(f"{value:g}" for value in values) for values in (self.sizes, self.ratios))
        return f"{preset}--anchor-sizes {sizes} --aspect-ratios {ratios}"

    def generator(self) -> AnchorGenerator:
        """That of the model that `train` builds."""
        settings = TrainConfig("", preset=self.preset, anchor_sizes=self.sizes, aspect_ratios=self.ratios)
        config = settings.model_config(num_classes=1)
        return AnchorGenerator(
            config["anchor_sizes"],
            config["aspect_ratios"],
            strides=config["anchor_strides"],
            rounding=config["anchor_rounding"],
            offset=config["anchor_offset"],
        )


def resized_boxes(dataset: DetectionDataset, min_size: int, max_size: int) -> Boxes:
    """The boxes that count (no crowds, no difficult ones), resized as the model resizes an image of its own batch."""
    boxes, padded, labels, sizes = [], [], [], []
    for record in dataset.records:
        keep = ~record.ignore
        scale = min(min_size / min(record.height, record.width), max_size / max(record.height, record.width))
        resized = (max(1, math.floor(side * scale)) for side in (record.height, record.width))
        own = record.boxes[keep].astype(np.float64)
        boxes.append(own * scale)
        padded.append(np.tile([math.ceil(side / 32) * 32 for side in resized], (len(own), 1)))
        labels.append(record.labels[keep])
        sizes.append(np.sqrt((own[:, 2:] - own[:, :2]).prod(axis=1)))
    return Boxes(*(np.concatenate(values) for values in (boxes, padded, labels, sizes)))


def best_overlaps(boxes: Boxes, anchors: Anchors) -> np.ndarray:
    """The IoU of each box with the best of all anchors of its image, float64 [M].

    Of the anchors of one level and shape, the one whose centre is nearest along each axis is the best.
    """
    best = np.zeros(len(boxes.xyxy))
    centres = (boxes.xyxy[:, :2] + boxes.xyxy[:, 2:]) / 2
    area = (boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]).prod(axis=1)
    generator = anchors.generator()
    for index, (level, shapes) in enumerate(zip(STRIDES, generator.cell_anchors(), strict=True)):
        # As the generator lays them out: without strides of its own, the input's side divided by the grid's.
        grid = -(-boxes.padded[:, ::-1] // level)
        stride = boxes.padded[:, ::-1] // grid if generator.strides is None else generator.strides[index]
        nearest = np.clip(np.round(centres / stride - generator.offset), 0, grid - 1)
        cell = (nearest + generator.offset) * stride
        for shape in shapes.double().numpy():
            anchor = np.concatenate([cell, cell], axis=1) + shape
            low = np.maximum(anchor[:, :2], boxes.xyxy[:, :2])
            high = np.minimum(anchor[:, 2:], boxes.xyxy[:, 2:])
            shared = np.maximum(high - low, 0.0).prod(axis=1)
            anchor_area = (shape[2] - shape[0]) * (shape[3] - shape[1])
            np.maximum(best, shared / (area + anchor_area - shared), out=best)
    return best


def propose_anchors(boxes: Boxes, current: Anchors, threshold: float = 0.5) -> Anchors | None:
    """Anchors that cover clearly more of the boxes than `current` at the same cost (as many ratios), or None.

    Half of the weight is the boxes', half the classes', so that a rare class counts. Sizes are searched as one octave
    a level first, with ratios at quantiles of the boxes' own and around 1, then each size for itself.
    """
    if not len(boxes.xyxy):
        return None
    if len(boxes.xyxy) > _SAMPLE:
        boxes = boxes[np.random.default_rng(0).choice(len(boxes.xyxy), _SAMPLE, replace=False)]

    _, label, count = np.unique(boxes.labels, return_inverse=True, return_counts=True)
    weights = 0.5 / len(label) + 0.5 / (len(count) * count[label])

    def score(anchors: Anchors) -> tuple[float, float]:
        overlaps = best_overlaps(boxes, anchors)
        covered = float(weights @ (overlaps >= threshold))
        return covered + 0.5 * float(weights @ overlaps), covered

    sides = boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]
    choices = _ratio_choices(np.log(sides[:, 1] / sides[:, 0]), current.ratios)
    starts = [4.0 * 2 ** (step / 3) for step in range(16)]
    tried = [
        current,
        *(replace(current, sizes=_rounded(s * 2.0**i for i in range(5)), ratios=r) for s in starts for r in choices),
    ]
    scores = [score(anchors) for anchors in tried]
    first = max(range(len(tried)), key=lambda index: scores[index][0])
    best, reached = tried[first], scores[first]
    improved = True
    while improved:
        improved = False
        for level in range(5):
            for factor in (0.8, 0.9, 1.1, 1.25):
                sizes = list(best.sizes)
                sizes[level] *= factor
                candidate = replace(best, sizes=_rounded(sorted(sizes)))
                if min(candidate.sizes) >= 4 and (value := score(candidate))[0] > reached[0] + 1e-3:
                    best, reached, improved = candidate, value, True
    return best if reached[1] - scores[0][1] >= _WORTHWHILE else None


def _ratio_choices(log_ratios: np.ndarray, current: Sequence[float]) -> list[tuple[float, ...]]:
    """Sets of as many ratios as `current` has: itself, quantiles of the boxes' own, and steps around their middle."""
    count = len(current)
    quantiles = np.exp(np.quantile(log_ratios, (np.arange(count) + 0.5) / count))
    middle = float(np.exp(np.median(log_ratios)))
    steps = np.arange(count) - (count - 1) / 2
    around = [centre * factor**steps for centre in {1.0, middle} for factor in (1.5, 2.0, 3.0)]
    sets = [tuple(current), *(tuple(float(f"{ratio:.2g}") for ratio in ratios) for ratios in (quantiles, *around))]
    return list(dict.fromkeys(sets))


def _rounded(sizes) -> tuple[float, ...]:
    return tuple(float(round(size)) for size in sizes)


def coverage_table(boxes: Boxes, overlaps: np.ndarray, class_names: Sequence[str], threshold: float = 0.5) -> str:
    """Lines for all objects, each size and each class: how many, how many are covered, their best IoU on average."""
    small, large = SIZE_LIMITS
    groups = [
        ("all", np.ones(len(overlaps), bool)),
        (f"small  (< {small} px)", boxes.sizes < small),
        (f"medium ({small} to {large} px)", (boxes.sizes >= small) & (boxes.sizes < large)),
        (f"large  (from {large} px)", boxes.sizes >= large),
        *((name, boxes.labels == label) for label, name in enumerate(class_names)),
    ]
    width = max(len(name) for name, _ in groups)
    lines = [f"{'':<{width}}  objects  IoU >= {threshold:g}  below 0.4  mean IoU"]
    for name, rows in groups:
        of_group = overlaps[rows]
        if not len(of_group):
            lines.append(f"{name:<{width}}  {0:>7}")
            continue
        covered, poor = (of_group >= threshold).mean(), (of_group < 0.4).mean()
        lines.append(f"{name:<{width}}  {len(of_group):>7}  {covered:>10.1%}  {poor:>9.1%}  {of_group.mean():>8.3f}")
    return "\n".join(lines)


def report_anchors(dataset: DetectionDataset, config: TrainConfig) -> str:
    """What `retinanet-ext anchors` prints: the coverage of the configured anchors, and of better ones if there are."""
    current = Anchors(config.anchor_sizes, config.aspect_ratios, config.preset)
    boxes = resized_boxes(dataset, config.min_size[-1], config.max_size)
    resized = f"images resized to {config.min_size[-1]}, at most {config.max_size}"
    names = dataset.class_names
    parts = [f"{current.options()}, {resized}:", coverage_table(boxes, best_overlaps(boxes, current), names)]
    data = shlex.quote(config.data) + ("" if config.images is None else f" --images {shlex.quote(config.images)}")
    if not len(boxes.xyxy):
        return f"{dataset.name}: no object counts: there is nothing to cover\nnext: retinanet-ext check-data {data}"
    better = propose_anchors(boxes, current)
    if better is None:
        parts.append("no sizes and ratios of the same number cover clearly more: keep them")
    else:
        parts += [
            f"\n{better.options()}, at the same cost:",
            coverage_table(boxes, best_overlaps(boxes, better), names),
        ]
    sizes = f"--min-size {config.min_size[-1]} --max-size {config.max_size}"
    parts.append(f"next: retinanet-ext train {data} {sizes} {(better or current).options()}")
    return "\n".join(parts)
