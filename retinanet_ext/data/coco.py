"""COCO json files with an image folder.

Boxes (x, y, width, height) become (x1, y1, x2, y2) in absolute pixels. Category ids, whatever they are,
become labels 0..K-1 in ascending order of the ids; the names and ids are kept (`class_names`,
`category_ids`).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .classes import check_classes
from .dataset import DatasetError, DetectionDataset, Problem, RawObject, Track, add_objects, check_images


class CocoDataset(DetectionDataset):
    """The images of a COCO json ("images", "annotations", "categories").

    `annotation_file`: the json. `image_folder`: where each image's `file_name` lies. `class_names`: the
    classes, in the order of the labels, matched by name; without it, the json's own categories. `iscrowd`
    objects are marked `ignore`. `verify`: "header" or "decode", `progress`: see `data.dataset.check_images`.

    An image id or category id that comes again is reported and its second use left out; an annotation id that
    comes again is reported, and left out if the annotation is the same. Categories of one name are reported and
    merged: one class, which keeps the lowest of their ids. Raises DatasetError where the json is
    missing, broken or not of this form, no image is usable, or no category is one of `class_names`.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_folder: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        verify: str = "header",
        progress: Track | None = None,
    ):
        annotation_file, image_folder = Path(annotation_file), Path(image_folder)
        content = _read_json(annotation_file)
        if not image_folder.is_dir():
            raise DatasetError(f"{image_folder}: no such image folder (for {annotation_file})")
        file = str(annotation_file)
        problems: list[Problem] = []
        categories = _read_categories(content["categories"], file, problems)
        if class_names is None:
            class_names = list(dict.fromkeys(categories[category_id] for category_id in sorted(categories)))
        check_classes(file, class_names, categories.values())
        label_of_name = {name: label for label, name in enumerate(class_names)}
        label_of_id = {i: label_of_name[name] for i, name in categories.items() if name in label_of_name}
        category_ids = _ids_for(class_names, categories)

        images = _read_images(content["images"], file, problems)
        candidates = [
            (image_folder / entry["file_name"], image_id, entry.get("width"), entry.get("height"))
            for image_id, entry in images.items()
        ]
        records = check_images(candidates, verify, problems, progress=progress)
        objects = _read_objects(content["annotations"], images, categories, label_of_id, file, problems)
        for record in records:
            if record is not None:
                add_objects(record, objects.get(record.image_id, []), file, problems)
        super().__init__(
            file, class_names, category_ids, [record for record in records if record is not None], problems
        )


def _read_json(path: Path) -> dict[str, list]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not a json file ({error})") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: not a COCO data set: expected an object, got {type(content).__name__}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DatasetError(f'{path}: not a COCO data set: it holds no list "{key}"')
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_categories(entries: list, file: str, problems: list[Problem]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"category {index + 1} of the list"
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            problems.append(Problem(file, where, f"broken category: no integer id in {_short(entry)}"))
        elif entry["id"] in categories:
            problems.append(Problem(file, where, f"duplicate id: category {entry['id']} is there already; left out"))
        else:
            name = str(entry.get("name", entry["id"]))
            first = next((i for i, known in categories.items() if known == name), None)
            if first is not None:
                message = (
                    f"duplicate category name: {name!r} has the ids {first} and {entry['id']}; merged into one class"
                )
                problems.append(Problem(file, where, message))
            categories[entry["id"]] = name
    return categories


def _ids_for(class_names: Sequence[str], categories: dict[int, str]) -> list[int]:
    """A category id for each class: the json's own, and unused ones for the classes it does not know."""
    by_name: dict[str, int] = {}
    for category_id in sorted(categories):
        by_name.setdefault(categories[category_id], category_id)
    free = max(categories, default=0) + 1
    ids = []
    for name in class_names:
        ids.append(by_name.get(name, free))
        free += name not in by_name
    return ids


def _read_images(entries: list, file: str, problems: list[Problem]) -> dict[int, dict]:
    images: dict[int, dict] = {}
    by_file: dict[str, int] = {}
    for index, entry in enumerate(entries):
        where = f"image {index + 1} of the list"
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            problems.append(Problem(file, where, f"broken image entry: no integer id in {_short(entry)}"))
            continue
        image_id, name = entry["id"], entry.get("file_name")
        if not isinstance(name, str) or not name:
            problems.append(Problem(file, f"image {image_id}", "broken image entry: it has no file_name"))
        elif image_id in images:
            problems.append(
                Problem(
                    file,
                    f"image {image_id}",
                    f"duplicate id: {name!r} has the id of {images[image_id]['file_name']!r}; left out",
                )
            )
        else:
            if name in by_file:
                problems.append(
                    Problem(
                        file,
                        f"image {image_id}",
                        f"duplicate file name: {name!r} is image {by_file[name]} too; both are kept",
                    )
                )
            images[image_id] = entry
            by_file.setdefault(name, image_id)
    return images


def _read_objects(
    entries: list,
    images: dict[int, dict],
    categories: dict[int, str],
    label_of_id: dict[int, int],
    file: str,
    problems: list[Problem],
) -> dict[int, list[RawObject]]:
    """The annotations of each image, unchecked; what cannot be attributed to an image is reported here."""
    objects: dict[int, list[RawObject]] = {}
    seen: dict[Any, dict] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.append(Problem(file, f"annotation {index + 1} of the list", "broken annotation: not an object"))
            continue
        annotation_id, image_id, category_id = (_key(entry.get(key)) for key in ("id", "image_id", "category_id"))
        where = f"annotation {annotation_id}" if annotation_id is not None else f"annotation number {index + 1}"
        if annotation_id is not None and annotation_id in seen:
            same = seen[annotation_id] == entry
            problems.append(
                Problem(
                    file,
                    where,
                    "duplicate id: the same annotation again; left out"
                    if same
                    else "duplicate id: another annotation has it too; both are kept",
                )
            )
            if same:
                continue
        seen.setdefault(annotation_id, entry)
        if image_id not in images:
            problems.append(Problem(file, where, f"unknown image: no image has the id {image_id!r}; left out"))
            continue
        box = entry.get("bbox")
        numbers = [_number(value) for value in box] if isinstance(box, list) else []
        if len(numbers) == 4 and None not in numbers:
            x, y, width, height = numbers
            box = (x, y, x + width, y + height)
        else:
            box = (box,)
        name = f"{where} (image {images[image_id]['file_name']})"
        area = _number(entry.get("area"))
        if area is None or not (area > 0 and math.isfinite(area)):
            area = None
            if entry.get("area") is not None:
                message = f"no usable area: {_short(entry['area'])}; the box's own is used"
                problems.append(Problem(file, name, message))
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            problems.append(Problem(file, name, f"iscrowd is not 0 or 1: {_short(crowd)}; taken as 0"))
        objects.setdefault(image_id, []).append(
            RawObject(
                name=name,
                box=box,
                label=label_of_id.get(category_id),
                class_name=categories.get(category_id, f"category id {category_id}"),
                crowd=crowd == 1,
                area=area,
            )
        )
    return objects


def _number(value: Any) -> float | None:
    """A json number as a float, infinite where a float cannot hold it; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _key(value: Any) -> Any:
    """An id as a dictionary key: ids that are lists or objects become their text."""
    return value if isinstance(value, int | float | str) or value is None else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
