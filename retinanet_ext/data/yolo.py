"""YOLO data sets: a yaml file that names folders of images, and a text file of boxes for each image.

A line of a label file is `class cx cy width height`, centre and size as parts of the image's; a line with more pairs is
the outline of an object, which becomes its box. Labels lie where YOLO's tools put them: the last folder `images` of an
image's path replaced by `labels`, or beside the image where there is no such folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .classes import check_classes
from .dataset import DatasetError, DetectionDataset, Problem, RawObject, Track, add_objects, check_images
from .extras import require
from .voc import IMAGE_SUFFIXES

YAML_SUFFIXES = (".yaml", ".yml")
# Larger values than this are pixels, not parts of an image.
_LARGEST_PART = 1.5


class YoloDataset(DetectionDataset):
    """The images of one split of a YOLO yaml.

    `yaml_file`: has `names` (a list, or numbers with names) and for each split a folder of images, a text file with a
    path a line, or a list of these; relative to `path`, which is relative to the yaml's folder. `split`: "train", "val"
    or another key. `class_names`: the classes, in the order of the labels, matched by name; without it, the yaml's.
    Image ids count from 1 in the order of the paths. `verify`: "header" or "decode", `progress`: see
    `data.dataset.check_images`.

    An image without a label file has no objects; problems name the label file and the line. Raises DatasetError where
    the yaml or the split is missing or not of this form, no image is usable, no image has a label file, or no class is
    one of `class_names`.
    """

    def __init__(
        self,
        yaml_file: str | Path,
        split: str,
        *,
        class_names: Sequence[str] | None = None,
        verify: str = "header",
        progress: Track | None = None,
    ):
        yaml_file = Path(yaml_file)
        name = f"{yaml_file} [{split}]"
        problems: list[Problem] = []
        content = _read_yaml(yaml_file)
        names = _read_names(content, yaml_file, problems)
        paths = _find_images(content, split, yaml_file, problems)
        if class_names is None:
            class_names = list(names.values())
        check_classes(name, class_names, names.values())
        label_of_name = {class_name: label for label, class_name in enumerate(class_names)}
        label_of = {number: label_of_name.get(class_name) for number, class_name in names.items()}

        labels = [_label_file(path) for path in paths]
        if paths and not any(label.is_file() for label in labels):
            raise DatasetError(
                f"{name}: none of its {len(paths)} images has a label file; the first would be {labels[0]}"
            )
        candidates = [(path, number, None, None) for number, path in enumerate(paths, start=1)]
        records = check_images(candidates, verify, problems, sizes=False, progress=progress)
        for record, label in zip(records, labels, strict=True):
            if record is not None:
                objects = _read_labels(label, record.width, record.height, names, label_of, problems)
                add_objects(record, objects, str(label), problems)
        super().__init__(
            name,
            class_names,
            range(1, len(class_names) + 1),
            [record for record in records if record is not None],
            problems,
        )


def splits_of_yaml(yaml_file: str | Path) -> list[str]:
    """The splits that a YOLO yaml names, of train, val and test."""
    content = _read_yaml(Path(yaml_file))
    return [split for split in ("train", "val", "test") if content.get(split)]


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml")
    try:
        with open(path, encoding="utf-8-sig") as stream:
            content = yaml.safe_load(stream)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a yaml file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or "names" not in content:
        raise DatasetError(f"{path}: not a YOLO data set: expected the keys names, train and val")
    return content


def _read_names(content: dict[str, Any], path: Path, problems: list[Problem]) -> dict[int, str]:
    """Class numbers with their names, in ascending order."""
    entries = content["names"]
    pairs = list(entries.items()) if isinstance(entries, dict) else list(enumerate(entries or []))
    try:
        names = {int(number): str(name) for number, name in sorted(pairs, key=lambda pair: int(pair[0]))}
    except (TypeError, ValueError):
        raise DatasetError(f"{path}: names: expected a list of names, or numbers with names, got {entries!r}") from None
    if not names:
        raise DatasetError(f"{path}: names: expected at least one class")
    if len(set(names.values())) < len(names):
        raise DatasetError(f"{path}: names: expected names that differ, got {', '.join(names.values())}")
    if content.get("nc", len(names)) != len(names):
        problems.append(Problem(str(path), "nc", f"number of classes: nc is {content['nc']!r}, names has {len(names)}"))
    return names


def _find_images(content: dict[str, Any], split: str, yaml_file: Path, problems: list[Problem]) -> list[Path]:
    if not content.get(split):
        there = ", ".join(key for key in ("train", "val", "test") if content.get(key)) or "none"
        raise DatasetError(f"{yaml_file}: no such split: {split}; there are {there}")
    sources = content[split] if isinstance(content[split], list) else [content[split]]
    root = yaml_file.parent / str(content.get("path") or "")
    paths: dict[Path, None] = {}
    for source in sources:
        for path in _images_of(_locate(root, str(source), yaml_file, split), problems):
            if path in paths:
                problems.append(Problem(str(yaml_file), split, f"duplicate image: {path} is listed again; left out"))
            paths[path] = None
    return list(paths)


def _locate(root: Path, source: str, yaml_file: Path, split: str) -> Path:
    """Where a split lies. Some tools write `../train/images` and mean the folder beside the yaml."""
    beside = source
    while beside.startswith("../"):
        beside = beside[3:]
    for place in (root / source, root / beside, yaml_file.parent / beside):
        if place.exists():
            return place
    raise DatasetError(f"{yaml_file}: {split}: no such file or folder: {root / source}")


def _images_of(source: Path, problems: list[Problem]) -> list[Path]:
    """The images of a folder and the folders in it, or those of a list."""
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        problems.append(Problem(str(source), "", f"broken list: not a text file in UTF-8 ({error})"))
        return []
    return [source.parent / line.strip() for line in lines if line.strip()]


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    folders = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(
    path: Path,
    width: int,
    height: int,
    names: dict[int, str],
    label_of: dict[int, int | None],
    problems: list[Problem],
) -> list[RawObject]:
    """The objects of one label file, boxes in pixels; lines that are none are reported here."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, OSError) as error:
        problems.append(Problem(str(path), "", f"broken label file: {error}; its objects are left out"))
        return []
    objects: list[RawObject] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = " ".join(line.split())
        if not text:
            continue
        if text in seen:
            message = f"duplicate line: it is line {seen[text]} too; left out"
            problems.append(Problem(str(path), f"line {number}", message))
            continue
        seen[text] = number
        try:
            class_number, box = _parse(text)
        except ValueError as error:
            problems.append(Problem(str(path), f"line {number}", f"broken label: {error}; the object is left out"))
            continue
        scale = (width, height, width, height)
        name = names.get(class_number, f"class {class_number}")
        objects.append(
            RawObject(
                name=f"line {number} ({name})",
                box=[value * side for value, side in zip(box, scale, strict=True)],
                label=label_of.get(class_number),
                class_name=name,
            )
        )
    return objects


def _parse(text: str) -> tuple[int, tuple[float, float, float, float]]:
    """Class number and box (x1, y1, x2, y2) as parts of the image; ValueError says what is wrong."""
    fields = text.split()
    if len(fields) != 5 and not (len(fields) >= 7 and len(fields) % 2):
        raise ValueError(f"expected class cx cy width height, or class and 3 or more points, got {text[:80]!r}")
    try:
        number, values = float(fields[0]), [float(field) for field in fields[1:]]
    except ValueError:
        raise ValueError(f"expected numbers, got {text[:80]!r}") from None
    if not number.is_integer():
        raise ValueError(f"expected a whole class number, got {fields[0]!r}")
    if max(values) > _LARGEST_PART:
        raise ValueError(f"expected parts of the image from 0 to 1, got {text[:80]!r}")
    if len(values) == 4:
        cx, cy, width, height = values
        return int(number), (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    xs, ys = values[0::2], values[1::2]
    return int(number), (min(xs), min(ys), max(xs), max(ys))
