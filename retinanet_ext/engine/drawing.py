"""Boxes on pictures, readable on small images and in crowds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retinanet_ext.data.extras import require

# Small images are enlarged to this short side before anything is drawn, so that labels have room.
MIN_SHORT_SIDE = 480
# ... but never beyond this long side.
MAX_LONG_SIDE = 1920
# Colours that differ in hue and in lightness, so that neighbours differ on any background.
PALETTE = (
    (230, 57, 70),
    (29, 128, 221),
    (34, 160, 80),
    (244, 152, 20),
    (145, 70, 210),
    (0, 172, 178),
    (233, 70, 160),
    (140, 110, 40),
    (90, 98, 240),
    (120, 190, 30),
)


@dataclass(frozen=True)
class Box:
    """One box to draw: (x1, y1, x2, y2) in the picture's pixels, its class, and a score unless it is
    annotated."""

    xyxy: Sequence[float]
    label: int
    name: str
    score: float | None = None
    dashed: bool = False


def enlargement(width: int, height: int) -> float:
    """The factor by which a picture is enlarged before drawing, 1 or more."""
    return max(1.0, min(MIN_SHORT_SIDE / min(width, height), MAX_LONG_SIDE / max(width, height)))


def draw_boxes(image, boxes: Sequence[Box], title: str = "", side: int | None = None):
    """A copy of a Pillow image with `boxes` drawn on it; `title` goes on a bar above it.

    The copy is enlarged if it is small; with `side`, its longer side has that many pixels, whatever the image's. What
    is drawn is not scaled with it: it has the size that can be read.
    """
    pil = require("PIL.Image")
    draw_module = require("PIL.ImageDraw")
    scale = enlargement(*image.size) if side is None else side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    filtering = pil.Resampling.BICUBIC if scale > 1 else pil.Resampling.LANCZOS
    picture = image.convert("RGB").resize(size, filtering) if size != image.size else image.convert("RGB")
    short = min(picture.size)
    font = _font(max(12, min(28, round(short / 38))))
    line = max(2, round(short / 260))
    draw = draw_module.Draw(picture)
    taken: list[tuple[float, float, float, float]] = []
    # Boxes first, best last, so that neither boxes nor weak detections cover a label.
    ordered = sorted(boxes, key=lambda box: 2.0 if box.score is None else box.score)
    scaled = [(box, [value * scale for value in box.xyxy]) for box in ordered]
    for box, corners in scaled:
        _rectangle(draw, corners, PALETTE[box.label % len(PALETTE)], line, box.dashed)
    for box, corners in reversed(scaled):
        text = box.name if box.score is None else f"{box.name} {box.score:.2f}"
        place = _label_place(draw, text, font, corners, picture.size, taken)
        colour = PALETTE[box.label % len(PALETTE)]
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + 3, (place[1] + place[3]) / 2), text, font=font, fill=_ink(colour), anchor="lm")
        taken.append(place)
    return _with_title(picture, title, font) if title else picture


def contact_sheet(pictures: Sequence, columns: int = 4, cell: int = 360):
    """Several Pillow pictures in rows, each fitted into a square of `cell` pixels."""
    pil = require("PIL.Image")
    columns = max(1, min(columns, len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    fitted = []
    for picture in pictures:
        scale = cell / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        fitted.append(picture if size == picture.size else picture.resize(size, pil.Resampling.LANCZOS))
    gap = 8
    height = max(p.height for p in fitted)
    width = max(p.width for p in fitted)
    sheet = pil.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (250, 250, 250))
    for index, picture in enumerate(fitted):
        row, column = divmod(index, columns)
        sheet.paste(picture, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def save_picture(picture, path: Path) -> None:
    """Write a Pillow picture; JPEG in good quality where the suffix says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 92, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    picture.save(path, **options)


def _rectangle(draw, corners, colour, line: int, dashed: bool) -> None:
    x1, y1, x2, y2 = corners
    if not dashed:
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
        return
    dash = 4 * line
    for start, end in (
        ((x1, y1), (x2, y1)),
        ((x2, y1), (x2, y2)),
        ((x2, y2), (x1, y2)),
        ((x1, y2), (x1, y1)),
    ):
        length = math.dist(start, end)
        for step in range(math.ceil(length / (2 * dash))):
            a, b = step * 2 * dash / length, min(1.0, (step * 2 + 1) * dash / length)
            points = [(start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t) for t in (a, b)]
            draw.line(points, fill=colour, width=line)


def _label_place(draw, text, font, corners, size, taken) -> tuple[float, float, float, float]:
    """Where a label goes: above its box, else inside its top, below, or at its right; the least covered of
    them."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    _, line_top, _, line_bottom = draw.textbbox((0, 0), "Ag", font=font)
    width, height = right - left + 7, max(bottom - top, line_bottom - line_top) + 5
    x1, y1, x2, y2 = corners
    places = [(x1, y1 - height), (x1, y1), (x2 - width, y1 - height), (x1, y2), (x1, y2 - height), (x2, y1)]
    best, least = None, math.inf
    for order, (x, y) in enumerate(places):
        x_in = min(max(x, 0.0), max(0.0, size[0] - width))
        y_in = min(max(y, 0.0), max(0.0, size[1] - height))
        place = (x_in, y_in, x_in + width, y_in + height)
        covered = sum(_overlap(place, other) for other in taken)
        cost = covered / (width * height) + 0.02 * order + 0.01 * (abs(x - x_in) + abs(y - y_in)) / height
        if cost < least:
            best, least = place, cost
    return best


def _overlap(a, b) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (20, 20, 20) if luminance > 150 else (255, 255, 255)


def _font(size: int):
    return require("PIL.ImageFont").load_default(size=size)


def _with_title(picture, title: str, font):
    pil, draw_module = require("PIL.Image"), require("PIL.ImageDraw")
    bar = round(font.size * 1.7)
    framed = pil.new("RGB", (picture.width, picture.height + bar), (32, 34, 40))
    framed.paste(picture, (0, bar))
    draw_module.Draw(framed).text((8, bar / 2), title, font=font, fill=(240, 240, 240), anchor="lm")
    return framed
