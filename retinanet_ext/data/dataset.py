"""What every reader yields, and the checks every annotated image goes through when a data set is opened.

Nothing is dropped or changed silently: each finding is a `Problem` that names the file and the object. Image
files are opened for their header (size, format) when the set is opened; `verify="decode"` decodes the pixels
too. An image whose pixels turn out to be broken only when it is read raises `UnreadableImageError`;
`data.loader` turns that into a reported, skipped sample, so an epoch goes on.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .extras import MissingExtraError, require

# Annotation files round coordinates to two decimals, so a box may stick out of its image by that much.
ROUNDING = 0.02
_EXIF_ORIENTATION = 0x0112


class DatasetError(ValueError):
    """A data set that cannot be used at all: its folder, list or json is missing, broken or empty."""


@dataclass(frozen=True)
class Problem:
    """One finding about a data set. `message` opens with its kind, up to the first colon."""

    file: str
    object: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.object + ': ' if self.object else ''}{self.message}"


class UnreadableImageError(OSError):
    """An image whose pixels cannot be decoded; `problem` names the file."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem

    def __reduce__(self):
        return UnreadableImageError, (self.problem,)


def summarise(problems: Sequence[Problem], examples: int = 2) -> list[str]:
    """One line a kind of problem, with its count, each followed by its first `examples` findings."""
    kinds = Counter(problem.message.split(":")[0] for problem in problems)
    lines = []
    for kind, count in kinds.most_common():
        lines.append(f"{count} x {kind}")
        found = [problem for problem in problems if problem.message.split(":")[0] == kind]
        lines.extend(f"    {problem}" for problem in found[:examples])
    return lines


# Hands out what it is given one by one, and says how far it is.
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass
class ImageRecord:
    """An image and its objects, as the annotations have them after the checks.

    `boxes` float32 [M, 4] (x1, y1, x2, y2) in absolute pixels, `labels` int64 [M] in [0, K), `ignore` bool
    [M] (crowd or difficult: neither object nor background), `crowd` bool [M] (the part of `ignore` that is a
    crowd region), `area` float64 [M] in pixels (the annotation's own where it has one, for the size classes
    of COCO).
    """

    path: Path
    image_id: int
    width: int
    height: int
    upright: bool = False
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ignore: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    area: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float64))


@dataclass
class RawObject:
    """An object as annotated, before the checks. `box` (x1, y1, x2, y2) in pixels; `label` None: unknown
    class."""

    name: str
    box: Sequence[Any]
    label: int | None
    class_name: str
    crowd: bool = False
    difficult: bool = False
    area: float | None = None


class DetectionDataset(Dataset):
    """Images with boxes. Yields `(image, target)`: image float32 [3, H, W] in 0..1, target a dict of

    `boxes` float32 [M, 4] absolute pixels, `labels` int64 [M] in [0, K), `ignore` bool [M], `image_id` int
    and `orig_size` (height, width). An image without objects has M = 0.

    Attributes: `class_names` (K strings), `category_ids` (K integers, the ids of COCO results), `records`,
    `problems` (everything found when the set was opened), `name`.
    Raises UnreadableImageError for pixels that cannot be decoded.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        records: Sequence[ImageRecord],
        problems: Sequence[Problem],
    ):
        if not records:
            found = "".join(f"\n    {line}" for line in summarise(problems)) or " it lists none."
            raise DatasetError(f"{name}: no usable image:{found}")
        self.name = name
        self.class_names = list(class_names)
        self.category_ids = list(category_ids)
        self.records = list(records)
        self.problems = list(problems)
        self.index_of = {record.image_id: index for index, record in enumerate(self.records)}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image, target = self.read(index)
        return to_unit(image), target

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """`self[index]`, but that the image is uint8 where its file holds bytes."""
        record = self.records[index]
        image = to_tensor(read_image(record.path, upright=record.upright))
        if tuple(image.shape[1:]) != (record.height, record.width):
            raise UnreadableImageError(
                Problem(
                    str(record.path),
                    "",
                    f"image changed: {image.shape[2]}x{image.shape[1]} pixels now, "
                    f"{record.width}x{record.height} when the set was opened",
                )
            )
        target = {
            "boxes": torch.from_numpy(record.boxes.copy()),
            "labels": torch.from_numpy(record.labels.copy()),
            "ignore": torch.from_numpy(record.ignore.copy()),
            "image_id": record.image_id,
            "orig_size": (record.height, record.width),
        }
        return image, target

    def file_of(self, image_id: int) -> str:
        """The path of the image with this id."""
        return str(self.records[self.index_of[image_id]].path)

    @property
    def num_objects(self) -> int:
        """Objects over all images, ignored ones included."""
        return sum(len(record.labels) for record in self.records)

    def describe(self) -> str:
        """One line: images, objects, classes."""
        empty = sum(len(record.labels) == 0 for record in self.records)
        return (
            f"{self.name}: {len(self)} images ({empty} without objects), {self.num_objects} objects, "
            f"{len(self.class_names)} classes ({', '.join(self.class_names[:8])}"
            f"{', ...' if len(self.class_names) > 8 else ''}), {len(self.problems)} problems"
        )

    def to_coco(self, image_ids: Iterable[int] | None = None) -> dict[str, Any]:
        """The set as a COCO dictionary (ids of annotations from 1), all images or those of `image_ids`.

        Crowd regions carry `iscrowd` 1; difficult objects `ignore` 1, which `engine.evaluate` honours.
        """
        wanted = None if image_ids is None else set(image_ids)
        images, annotations = [], []
        for record in self.records:
            if wanted is not None and record.image_id not in wanted:
                continue
            images.append(
                {
                    "id": record.image_id,
                    "file_name": record.path.name,
                    "width": record.width,
                    "height": record.height,
                }
            )
            for box, label, ignore, crowd, area in zip(
                record.boxes.astype(np.float64),
                record.labels,
                record.ignore,
                record.crowd,
                record.area,
                strict=True,
            ):
                x1, y1, x2, y2 = box.tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record.image_id,
                        "category_id": self.category_ids[label],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": float(area),
                        "iscrowd": int(crowd),
                        "ignore": int(ignore),
                    }
                )
        categories = [
            {"id": category_id, "name": name}
            for category_id, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}


def read_image(path: Path | str, upright: bool | None = False):
    """Decode an image file to a Pillow image, RGB (or "F" in 0..255 for grey of more than 8 bits).

    Integer grey of 16 or 32 bits is 0..65535, float grey 0..1; what lies outside is refused, not clipped. `upright`
    applies the EXIF orientation: False leaves the pixels as stored, as COCO's and VOC's tools do.
    Raises UnreadableImageError, whatever is wrong with the file.
    """
    pil = require("PIL.Image")
    try:
        with pil.open(path) as image:
            image.load()
            if upright:
                image = require("PIL.ImageOps").exif_transpose(image)
            return pil.fromarray(_deep_grey(image)) if image.mode[0] in "IF" else image.convert("RGB")
    except (MemoryError, MissingExtraError):
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError(Problem(str(path), "", "missing image: no such file")) from error
    except Exception as error:  # of a damaged file Pillow's decoders raise nearly anything
        raise UnreadableImageError(Problem(str(path), "", f"broken image: {_reason(error)}")) from error


def _deep_grey(image) -> np.ndarray:
    """The pixels of a Pillow image of mode "I", "I;16" or "F" as float32 in 0..255; ValueError beyond their range."""
    pixels = np.asarray(image, dtype=np.float64)
    kind, top = ("float", 1) if image.mode == "F" else ("integer", 65535)
    if not (pixels.min() >= 0 and pixels.max() <= top):
        raise ValueError(f"{kind} pixels from {pixels.min():g} to {pixels.max():g}, expected 0 to {top}")
    return (pixels * (255.0 / top)).astype(np.float32)


def to_tensor(image) -> Tensor:
    """A Pillow image as a tensor [3, H, W] (grey is repeated): uint8, or of mode "F" float32 in 0..1."""
    pixels = np.array(image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return pixels.div_(255.0) if pixels.is_floating_point() else pixels


def to_unit(image: Tensor) -> Tensor:
    """A uint8 image as float32 in 0..1; a floating one as it is."""
    if image.is_floating_point():
        return image
    # By a tensor: CUDA divides by a number of the host through its reciprocal, to other last bits than the CPU.
    return image.to(torch.float32).div_(torch.full((), 255.0, device=image.device))


def check_images(
    candidates: Sequence[tuple[Path, int, Any, Any]],
    verify: str,
    problems: list[Problem],
    sizes: bool = True,
    progress: Track | None = None,
) -> list[ImageRecord | None]:
    """Open every image file and hold its size against the annotation; None where the image is left out.

    `candidates`: (path, image_id, annotated width, annotated height), the sizes None where not given.
    `verify`: "header" reads the size only, "decode" all pixels. An image whose size is not the annotated one
    is left out, since its boxes mean nothing then; one that agrees once turned upright by its EXIF tag is
    read upright. `sizes` False: these annotations have none, and speak of every image as it is upright.
    `progress` wraps the images that are waited for (tqdm, for instance).
    """
    if verify not in ("header", "decode"):
        raise ValueError(f'verify: expected "header" or "decode", got {verify!r}')
    require("PIL.Image")
    with ThreadPoolExecutor(max_workers=8) as pool:
        checked = [pool.submit(_check_image, *candidate, verify, sizes) for candidate in candidates]
        try:
            results = [one.result() for one in (checked if progress is None else progress(checked))]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # not one image more
            raise
    for _, problem in results:
        if problem is not None:
            problems.append(problem)
    return [record for record, _ in results]


def _check_image(path: Path, image_id: int, annotated_width, annotated_height, verify: str, sizes: bool):
    pil = require("PIL.Image")
    try:
        if not path.is_file():
            return None, Problem(str(path), "", "missing image: no such file; the image is left out")
        with pil.open(path) as image:
            width, height = image.size
            if verify == "decode":
                image.load()
                if image.mode[0] in "IF":
                    _deep_grey(image)
            # Only where it may explain the size: of some formats the tag is found by decoding the whole file.
            turned = (_as_size(annotated_width), _as_size(annotated_height)) == (height, width) != (width, height)
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if turned or not sizes else 1
    except (MemoryError, MissingExtraError):
        raise
    except Exception as error:  # as in read_image
        return None, Problem(str(path), "", f"broken image: {_reason(error)}; the image is left out")
    record = ImageRecord(path, image_id, width, height)
    if not sizes:
        if orientation in (5, 6, 7, 8):
            record.width, record.height = height, width
        record.upright = orientation in range(2, 9)
        return record, None
    annotated = (_as_size(annotated_width), _as_size(annotated_height))
    if annotated == (width, height):
        return record, None
    if None in annotated:
        return record, Problem(
            str(path),
            "",
            f"no usable size in the annotation: {annotated_width!r} x {annotated_height!r}; "
            f"the image's own {width}x{height} is used",
        )
    if annotated == (height, width) and orientation in (5, 6, 7, 8):
        record.width, record.height, record.upright = height, width, True
        return record, Problem(
            str(path),
            "",
            f"EXIF orientation: {width}x{height} stored, {height}x{width} annotated; read upright",
        )
    return None, Problem(
        str(path),
        "",
        f"size differs: the image is {width}x{height}, the annotation says {annotated[0]}x{annotated[1]}; "
        "the image is left out",
    )


def add_objects(record: ImageRecord, objects: Sequence[RawObject], file: str, problems: list[Problem]) -> None:
    """Check `objects` against the image and put the usable ones into `record`.

    Left out and reported: unknown class, box not finite or not four numbers, degenerate box (a side <= 0,
    before or after clipping), box wholly outside. Clipped and reported: box partly outside by more than
    rounding.
    """
    boxes, kept, areas = [], [], []
    for item in objects:
        clean, message = _clean_box(item, record.width, record.height)
        if message:
            problems.append(Problem(file, item.name, message))
        if clean is None:
            continue
        box_area = (clean[2] - clean[0]) * (clean[3] - clean[1])
        # A clipped box keeps no more area than is left of it.
        area = box_area if item.area is None else (min(item.area, box_area) if message else item.area)
        boxes.append(clean)
        kept.append(item)
        areas.append(area)
    record.boxes = np.array(boxes, np.float32).reshape(-1, 4)
    record.labels = np.array([item.label for item in kept], np.int64)
    record.crowd = np.array([item.crowd for item in kept], bool)
    record.ignore = np.array([item.crowd or item.difficult for item in kept], bool)
    record.area = np.array(areas, np.float64)


def _clean_box(item: RawObject, width: int, height: int) -> tuple[list[float] | None, str]:
    """The box clipped to the image, or None; and what there is to report, or an empty string."""
    if item.label is None:
        return None, f"unknown class: {item.class_name!r}; the object is left out"
    try:
        box = [float(value) for value in item.box]
    except (TypeError, ValueError, OverflowError):
        return None, f"box is not four numbers: {item.box!r}; the object is left out"
    if len(box) != 4:
        return None, f"box is not four numbers: {item.box!r}; the object is left out"
    if not np.isfinite(box).all():
        return None, f"box is not finite: {_text(box)}; the object is left out"
    if box[2] <= box[0] or box[3] <= box[1]:
        return (
            None,
            f"degenerate box: {_text(box)} has width {box[2] - box[0]:g} and height {box[3] - box[1]:g}; "
            "the object is left out",
        )
    clipped = [
        min(max(box[0], 0.0), float(width)),
        min(max(box[1], 0.0), float(height)),
        min(max(box[2], 0.0), float(width)),
        min(max(box[3], 0.0), float(height)),
    ]
    as_stored = np.asarray(clipped, np.float32)
    if as_stored[2] <= as_stored[0] or as_stored[3] <= as_stored[1]:
        return None, f"box outside the image: {_text(box)} in {width}x{height}; the object is left out"
    if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > ROUNDING:
        return (
            clipped,
            f"box partly outside the image: {_text(box)} in {width}x{height}; clipped to {_text(clipped)}",
        )
    return clipped, ""


def _as_size(value: Any) -> int | None:
    try:
        return int(value) if int(value) > 0 else None
    except (TypeError, ValueError, OverflowError):
        return None


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]


def _text(box: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"
