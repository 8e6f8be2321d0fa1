"""A small detection data set made on the spot: coloured shapes on textured backgrounds, in COCO format.

It is easy enough to be learned from random weights in minutes on a CPU, and real enough to show every part at
work: several classes, a fivefold range of areas, objects that overlap, images without any object.
"""

import colorsys
import json
import math
from pathlib import Path

import numpy as np

from .extras import require

SHAPE_NAMES = ("disc", "square", "triangle", "star")
# The middle of each shape's hues, on a colour circle of length 1; hues vary by 0.06 to both sides.
_HUES = (0.0, 0.36, 0.62, 0.15)
# Shapes are drawn this many times larger and reduced, for smooth edges.
_OVERSAMPLING = 4
# A shape may hide at most this part of another one's box.
_MAX_HIDDEN = 0.2


def generate_shapes(
    root: str | Path,
    *,
    train_images: int = 800,
    val_images: int = 100,
    image_size: int = 96,
    max_objects: int = 6,
    empty_fraction: float = 0.08,
    seed: int = 0,
) -> Path:
    """Write a data set under `root` and return it as a Path.

    `root/annotations/instances_{train,val}.json` and `root/{train,val}/NNNNNN.jpg`, `image_size` pixels
    square, a third of `max_objects` to `max_objects` shapes an image, sides of 17 to 38 % of the image;
    `empty_fraction` of the images are empty. The same arguments make the same files. Raises ValueError for
    sizes that make no sense.
    """
    if image_size < 32:
        raise ValueError(f"image_size: expected at least 32 pixels, got {image_size!r}")
    if train_images < 1 or val_images < 1 or max_objects < 1:
        raise ValueError(
            "train_images, val_images, max_objects: expected at least 1 of each, got "
            f"{train_images!r}, {val_images!r}, {max_objects!r}"
        )
    root = Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, (split, count) in enumerate((("train", train_images), ("val", val_images))):
        (root / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            rng = np.random.default_rng([seed, part, index])
            objects = (
                0 if rng.random() < empty_fraction else int(rng.integers(max(1, max_objects // 3), max_objects + 1))
            )
            picture, shapes = draw_image(rng, image_size, objects)
            name = f"{index + 1:06d}.jpg"
            picture.save(root / split / name, quality=92)
            images.append({"id": index + 1, "file_name": name, "width": image_size, "height": image_size})
            for label, box, area in shapes:
                x1, y1, x2, y2 = box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": area,
                        "iscrowd": 0,
                    }
                )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(SHAPE_NAMES)],
        }
        with open(root / "annotations" / f"instances_{split}.json", "w", encoding="utf-8") as stream:
            json.dump(content, stream)
    return root


def draw_image(rng: np.random.Generator, size: int, objects: int):
    """One picture: a Pillow image of `size` pixels square, and its shapes as (label, (x1, y1, x2, y2), area)
    tuples."""
    pil = require("PIL.Image")
    canvas = _background(rng, size)
    shapes: list[tuple[int, tuple[int, int, int, int], int]] = []
    for _ in range(objects):
        for _attempt in range(20):
            label = int(rng.integers(len(SHAPE_NAMES)))
            side = size * math.exp(rng.uniform(math.log(0.17), math.log(0.38)))
            mask = _shape_mask(rng, SHAPE_NAMES[label], size, side)
            ys, xs = np.nonzero(mask > 0.5)
            box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
            if all(_hidden(old, box) <= _MAX_HIDDEN and _hidden(box, old) <= 0.8 for _, old, _ in shapes):
                _paint(rng, canvas, mask, label)
                shapes.append((label, box, len(xs)))
                break
    canvas += rng.normal(0.0, 0.02, canvas.shape)
    return pil.fromarray((np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)), shapes


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise of two scales with stripes over it, float [size, size, 3], muted so that shapes stand
    out."""
    base = rng.uniform(0.3, 0.7) + rng.uniform(-0.06, 0.06, 3)
    canvas = np.broadcast_to(base, (size, size, 3)).copy()
    for cells, strength, tint in ((4, 0.14, 0.05), (16, 0.10, 0.03)):
        canvas += _smooth_noise(rng, size, cells, 1) * strength + _smooth_noise(rng, size, cells, 3) * tint
    angle = rng.uniform(0.0, math.pi)
    y, x = np.mgrid[0:size, 0:size] / size
    wave = np.sin(2.0 * math.pi * rng.uniform(3.0, 12.0) * (x * math.cos(angle) + y * math.sin(angle)))
    return canvas + rng.uniform(0.0, 0.07) * wave[:, :, None]


def _smooth_noise(rng: np.random.Generator, size: int, cells: int, channels: int) -> np.ndarray:
    """Random values of a grid of `cells` x `cells`, enlarged smoothly, float32 [size, size, channels] in
    about -1..1."""
    pil = require("PIL.Image")
    layers = [
        np.asarray(
            pil.fromarray(rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32)).resize(
                (size, size), pil.Resampling.BICUBIC
            )
        )
        for _ in range(channels)
    ]
    return np.stack(layers, axis=2)


def _shape_mask(rng: np.random.Generator, name: str, size: int, side: float) -> np.ndarray:
    """Coverage 0..1 of one shape at a random place inside the picture, float32 [size, size]."""
    pil, draw = require("PIL.Image"), require("PIL.ImageDraw")
    points = _outline(rng, name)
    points = points * (side / np.ptp(points, axis=0).max())
    low, high = points.min(axis=0), points.max(axis=0)
    place = rng.uniform(1.0 - low, np.maximum(size - 1.0 - high, 1.0 - low))
    mask = pil.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING), 0)
    draw.Draw(mask).polygon([tuple(p) for p in ((points + place) * _OVERSAMPLING).tolist()], fill=255)
    return np.asarray(mask.resize((size, size), pil.Resampling.BOX), np.float32) / 255.0


def _outline(rng: np.random.Generator, name: str) -> np.ndarray:
    """The corners of a shape around 0, upright but for a tilt of up to 20 degrees, float [P, 2]."""
    corners, upright = {"disc": (48, 0.0), "square": (4, 0.25), "triangle": (3, -0.5), "star": (10, -0.5)}[name]
    tilt = math.radians(rng.uniform(-20.0, 20.0))
    angles = 2.0 * math.pi * np.arange(corners) / corners + upright * math.pi + tilt
    radii = np.where(np.arange(corners) % 2 == 0, 1.0, 0.42) if name == "star" else np.ones(corners)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, label: int) -> None:
    """Blend a shape of class `label` into `canvas` [size, size, 3] in place, in a strong colour of its
    class."""
    hue = (_HUES[label] + rng.uniform(-0.06, 0.06)) % 1.0
    colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.65, 0.95), rng.uniform(0.75, 1.0)))
    shade = 1.0 + 0.12 * _smooth_noise(rng, canvas.shape[0], 6, 1)
    canvas += mask[:, :, None] * (colour * shade - canvas)


def _hidden(box: tuple[int, int, int, int], by: tuple[int, int, int, int]) -> float:
    """The part of `box` that `by` covers."""
    width = min(box[2], by[2]) - max(box[0], by[0])
    height = min(box[3], by[3]) - max(box[1], by[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))
