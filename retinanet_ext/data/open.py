"""One argument for any data set: which reader, which files."""

from collections.abc import Sequence
from pathlib import Path

from .coco import CocoDataset
from .dataset import DatasetError, DetectionDataset, Track
from .voc import VocDataset
from .yolo import YAML_SUFFIXES, YoloDataset, splits_of_yaml

SPLITS = ("train", "val", "test")


def open_dataset(
    source: str | Path,
    split: str = "train",
    *,
    images: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    verify: str = "header",
    progress: Track | None = None,
) -> DetectionDataset:
    """Open a data set, whatever its form.

    `source` is one of
    - a Pascal VOC folder (with `Annotations` and `ImageSets/Main/SPLIT.txt`),
    - a COCO json file; its images lie in `images`, or beside it (see below),
    - a folder with `annotations/SPLIT.json`, `annotations/instances_SPLIT.json` or `..._SPLIT2017.json`,
    - a YOLO yaml, or a folder with a `data.yaml`.
    Without `images`, the image folder of a json is the first of `SPLIT`, `images/SPLIT`, `SPLIT2017`,
    `images`, in the json's folder or the one above, that exists; the json's own folder otherwise.

    `verify`: "header" or "decode", what is read of each image now. `progress` wraps the images that are waited for
    (tqdm, for instance). Raises DatasetError where `source` is none of these.
    """
    source = Path(source)
    if source.is_file() and names_splits(source):
        return YoloDataset(source, split, class_names=class_names, verify=verify, progress=progress)
    if source.is_file():
        return CocoDataset(
            source,
            images or _guess_images(source, split),
            class_names=class_names,
            verify=verify,
            progress=progress,
        )
    if not source.exists():
        raise DatasetError(f"{source}: no such file or folder")
    if (source / "ImageSets" / "Main").is_dir():
        return VocDataset(source, split, class_names=class_names, verify=verify, progress=progress)
    names = _json_names(split)
    for name in names:
        json_file = source / "annotations" / name
        if json_file.is_file():
            return CocoDataset(
                json_file,
                images or _guess_images(json_file, split),
                class_names=class_names,
                verify=verify,
                progress=progress,
            )
    if (source / "data.yaml").is_file():
        return YoloDataset(source / "data.yaml", split, class_names=class_names, verify=verify, progress=progress)
    raise DatasetError(
        f"{source}: not a data set: expected a COCO json file, a folder with annotations/{names[0]} "
        f"(or {names[1]}), a VOC folder with ImageSets/Main/{split}.txt, or a YOLO yaml"
    )


def find_splits(source: str | Path) -> list[str]:
    """Those of train, val and test that a data set has; of a COCO json, which is one split, its images' likely name.

    Empty where `source` is no data set, or has splits of other names alone.
    """
    source = Path(source)
    if source.is_file():
        usual = [split for split in SPLITS if split in source.stem]
        return splits_of_yaml(source) if names_splits(source) else (usual or ["train"])[:1]
    if (source / "data.yaml").is_file() and not (source / "ImageSets" / "Main").is_dir():
        return splits_of_yaml(source / "data.yaml")
    lists = {split: [source / "ImageSets" / "Main" / f"{split}.txt"] for split in SPLITS}
    jsons = {split: [source / "annotations" / name for name in _json_names(split)] for split in SPLITS}
    return [split for split in SPLITS if any(path.is_file() for path in (*lists[split], *jsons[split]))]


def _json_names(split: str) -> tuple[str, ...]:
    return (f"{split}.json", f"instances_{split}.json", f"instances_{split}2017.json")


def names_splits(file: str | Path) -> bool:
    """Whether a data set's file names its splits, as a YOLO yaml does and a COCO json does not."""
    return Path(file).suffix.lower() in YAML_SUFFIXES


def _guess_images(json_file: Path, split: str) -> Path:
    for base in (json_file.parent, json_file.parent.parent):
        for name in (split, f"images/{split}", f"{split}2017", "images"):
            if (base / name).is_dir():
                return base / name
    return json_file.parent
