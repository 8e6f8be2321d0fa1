"""Predictions on files: detections as COCO json, pictures with boxes drawn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retinanet_ext.data import Problem, UnreadableImageError
from retinanet_ext.data.dataset import read_image, to_tensor, to_unit
from retinanet_ext.data.voc import IMAGE_SUFFIXES

from .drawing import Box, draw_boxes, save_picture


@dataclass
class Prediction:
    """What `predict_files` did. `content`: a COCO dictionary whose annotations carry `score`."""

    content: dict[str, Any]
    pictures: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_images(sources: Iterable[str | Path]) -> tuple[list[Path], list[Problem]]:
    """The image files of `sources`: files as they are, folders by the suffixes of images, sorted; text files
    (`.txt`) as lists with one path a line, relative to the list. What is empty or no list is a Problem."""
    paths: list[Path] = []
    problems: list[Problem] = []
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                hint = f"; the images of a VOC folder are in {voc}" if (voc := source / "JPEGImages").is_dir() else ""
                problems.append(Problem(str(source), "", f"empty folder: no image in it{hint}"))
            paths.extend(found)
        elif source.suffix.lower() == ".txt" and source.is_file():
            try:
                listed = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
            except UnicodeDecodeError as error:
                problems.append(Problem(str(source), "", f"broken list: not a text file in UTF-8 ({error})"))
                continue
            found = [source.parent / line for line in listed if line]
            if not found:
                problems.append(Problem(str(source), "", "empty list: no image in it"))
            paths.extend(found)
        else:
            paths.append(source)
    return paths, problems


@torch.no_grad()
def predict_files(
    model: nn.Module,
    class_names: Sequence[str],
    paths: Sequence[Path],
    *,
    device: str | torch.device = "cpu",
    score: float = 0.5,
    picture_folder: Path | None = None,
    amp: bool = False,
    progress=None,
    say: Callable[[str], None] = print,
) -> Prediction:
    """Run `model` on image files, one at a time, upright by their EXIF orientation.

    Every detection goes into the json; those with at least `score` are drawn, where `picture_folder` is
    given. An image that cannot be read is reported and passed over. Image ids count from 1 in the order of
    `paths`; category ids are labels + 1.
    """
    model.eval()
    device = torch.device(device)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    result = Prediction(
        {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(class_names)],
        }
    )
    taken: set[str] = set()
    for number, path in enumerate(paths if progress is None else progress(paths), start=1):
        try:
            picture = read_image(path, upright=True)
        except UnreadableImageError as error:
            result.problems.append(error.problem)
            say(f"skipped: {error.problem}")
            continue
        tensor = to_tensor(picture)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            output = model([to_unit(tensor.to(device))])[0]
        images.append({"id": number, "file_name": str(path), "width": tensor.shape[2], "height": tensor.shape[1]})
        boxes = detected_boxes(output, class_names)
        for box in boxes:
            x1, y1, x2, y2 = box.xyxy
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": box.label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": box.score,
                }
            )
        if picture_folder is not None:
            target = picture_folder / _free_name(path, taken)
            save_picture(draw_boxes(picture, [box for box in boxes if box.score >= score]), target)
            result.pictures.append(target)
    return result


def detected_boxes(output: dict[str, Any], class_names: Sequence[str]) -> list[Box]:
    """One image's `boxes`, `scores`, `labels` as boxes to draw, best first."""
    return [
        Box(xyxy, label, class_names[label], score)
        for xyxy, score, label in zip(
            output["boxes"].float().tolist(),
            output["scores"].float().tolist(),
            output["labels"].tolist(),
            strict=True,
        )
    ]


def _free_name(path: Path, taken: set[str]) -> str:
    """A file name for the picture of `path`: its stem, numbered where another folder had the same."""
    name, number = f"{path.stem}.jpg", 1
    while name.lower() in taken:
        number += 1
        name = f"{path.stem}_{number}.jpg"
    taken.add(name.lower())
    return name
