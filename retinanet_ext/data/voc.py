"""Pascal VOC folders: `Annotations/NAME.xml`, `JPEGImages/NAME.jpg`, `ImageSets/Main/SPLIT.txt`.

Pixel convention: xmin, ymin, xmax, ymax are taken as they stand, as absolute pixel coordinates of the
corners, as torchvision's and ultralytics' converters do. (The VOC development kit writes 1-based inclusive
pixels; most labelling tools that write this format do not. The difference is at most one pixel, and the same
for training and evaluation.)
"""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .classes import check_classes
from .dataset import DatasetError, DetectionDataset, Problem, RawObject, Track, add_objects, check_images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class VocDataset(DetectionDataset):
    """The images of one split of a VOC folder.

    `root`: the folder. `split`: the name of a list in ImageSets/Main, without `.txt`. `class_names`: the
    classes, in the order of the labels; without it, the names found in the split's annotations, sorted.
    Objects of another class are left out and reported. `difficult` objects are marked `ignore`. Image ids are
    the line numbers of the list. `verify`: "header" or "decode", `progress`: see `data.dataset.check_images`.

    Raises DatasetError where the folder or the list is missing, no image is usable, or no object is of one of
    `class_names`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        class_names: Sequence[str] | None = None,
        verify: str = "header",
        progress: Track | None = None,
    ):
        root = Path(root)
        problems: list[Problem] = []
        names = _read_split(root, split, problems)
        annotations = {name: _read_xml(root / "Annotations" / f"{name}.xml", problems) for name in names}
        annotations = {name: tree for name, tree in annotations.items() if tree is not None}
        found = {_child_text(item, "name") for tree in annotations.values() for item in tree.findall("object")}
        if class_names is None:
            class_names = sorted(found - {""})
        check_classes(f"{root} [{split}]", class_names, sorted(found - {""}))
        label_of = {name: label for label, name in enumerate(class_names)}

        candidates = []
        for name, tree in annotations.items():
            path = _find_image(root / "JPEGImages", name, _child_text(tree, "filename"))
            size = tree.find("size")
            width, height = (None, None) if size is None else (_size(size, "width"), _size(size, "height"))
            candidates.append((path, names[name], width, height))
        records = check_images(candidates, verify, problems, progress=progress)
        for record, (name, tree) in zip(records, annotations.items(), strict=True):
            if record is not None:
                file = str(root / "Annotations" / f"{name}.xml")
                items = enumerate(tree.findall("object"))
                objects = [_raw_object(i, item, label_of, file, problems) for i, item in items]
                add_objects(record, objects, file, problems)
        super().__init__(
            f"{root} [{split}]",
            class_names,
            range(1, len(class_names) + 1),
            [record for record in records if record is not None],
            problems,
        )


def _read_split(root: Path, split: str, problems: list[Problem]) -> dict[str, int]:
    """The names of a split with their line numbers (from 1); a name listed again is reported."""
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        splits = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise DatasetError(f"{path}: no such split; there are {', '.join(splits) or 'none'} in {path.parent}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file ({error})") from None
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name, _, membership = line.strip().partition(" ")
        # Lists of one class hold "NAME 1" or "NAME -1"; -1 says that the class is absent from the image, no
        # more.
        if not name:
            continue
        if membership.strip() not in ("", "1", "-1", "0"):
            name = line.strip()
        if name in names:
            problems.append(
                Problem(str(path), f"line {number}", f"duplicate id: {name!r} is on line {names[name]} too")
            )
        else:
            names[name] = number
    return names


def _read_xml(path: Path, problems: list[Problem]) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        problems.append(Problem(str(path), "", "missing annotation: no such file; the image is left out"))
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError, LookupError, OSError) as error:
        problems.append(Problem(str(path), "", f"broken annotation: {error}; the image is left out"))
    return None


def _find_image(folder: Path, name: str, filename: str) -> Path:
    """The image file of `name`: NAME with a known suffix, or the file the annotation names."""
    for suffix in IMAGE_SUFFIXES:
        for path in (folder / f"{name}{suffix}", folder / f"{name}{suffix.upper()}"):
            if path.is_file():
                return path
    named = folder / Path(filename).name if filename else None
    return named if named is not None and named.is_file() else folder / f"{name}.jpg"


def _raw_object(
    index: int, item: ElementTree.Element, label_of: dict[str, int], file: str, problems: list[Problem]
) -> RawObject:
    class_name = _child_text(item, "name")
    bndbox = item.find("bndbox")
    corners = ["" if bndbox is None else _child_text(bndbox, tag) for tag in ("xmin", "ymin", "xmax", "ymax")]
    name = f"object {index + 1} ({class_name or 'without a name'})"
    difficult = _child_text(item, "difficult")
    if difficult.lower() not in ("", "0", "1", "false", "true"):
        problems.append(Problem(file, name, f"difficult is not 0 or 1: {difficult!r}; taken as 0"))
    return RawObject(
        name=name,
        box=corners,
        label=label_of.get(class_name),
        class_name=class_name,
        difficult=difficult.lower() in ("1", "true"),
    )


def _child_text(element: ElementTree.Element, tag: str) -> str:
    child = element.find(tag)
    return (child.text or "").strip() if child is not None else ""


def _size(size: ElementTree.Element, tag: str) -> str | None:
    return _child_text(size, tag) or None
