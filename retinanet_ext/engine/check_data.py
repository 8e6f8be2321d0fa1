"""A whole data set looked through: every image decoded, every bad box named, what there is counted and drawn."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from retinanet_ext.data import DatasetError, DetectionDataset, Problem, open_dataset, summarise

from .plots_labels import plot_labels
from .progress import reading
from .run_folder import RunFolder
from .sheets import spread, write_annotations

# So many findings of a kind are printed; problems.txt has all.
SHOWN = 20
# Samples of each split that are drawn.
SAMPLES = 16


def check_data(
    source: str | Path,
    splits: Sequence[str],
    run: RunFolder,
    *,
    images: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Problem]:
    """Read the splits of a data set in full, say what is in them, and write to the run's folder of each split
    SPLIT_labels.png and SPLIT_samples.jpg, and problems.txt. All problems found, those between the splits last.

    The classes are the first split's: objects of other classes in another split are problems.
    """
    sets: dict[str, DetectionDataset] = {}
    problems: list[Problem] = []
    for split in splits:
        class_names = next(iter(sets.values())).class_names if sets else None
        try:
            dataset = open_dataset(
                source, split, images=images, class_names=class_names, verify="decode", progress=reading
            )
        except DatasetError as error:
            raise DatasetError(f"split {split}: {error}") from None
        sets[split] = dataset
        problems += dataset.problems
        say(dataset.describe())
        say(class_table(dataset))
        run.root.mkdir(parents=True, exist_ok=True)
        plot_labels(dataset, run.root / f"{split}_labels.png")
        write_annotations(dataset, spread(len(dataset), SAMPLES), run.root / f"{split}_samples.jpg")
    problems += repeated_images(sets)
    run.add_problems(problems)
    for line in summarise(problems, examples=SHOWN):
        say(line)
    return problems


def class_table(dataset: DetectionDataset) -> str:
    """A line a class: images and objects, and how many of these are crowds or difficult; rare ones are visible."""
    images, objects, ignored = Counter(), Counter(), Counter()
    for record in dataset.records:
        images.update(set(record.labels.tolist()))
        objects.update(record.labels.tolist())
        ignored.update(record.labels[record.ignore].tolist())
    width = max(len("class"), *map(len, dataset.class_names))
    lines = [f"  {'class':<{width}}  images  objects  crowd or difficult"]
    for label, name in enumerate(dataset.class_names):
        lines.append(f"  {name:<{width}}  {images[label]:>6}  {objects[label]:>7}  {ignored[label]:>18}")
    return "\n".join(lines)


def repeated_images(sets: dict[str, DetectionDataset]) -> list[Problem]:
    """A problem for each image whose file has the very bytes of an earlier one, in its own split or another."""
    by_size: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for split, dataset in sets.items():
        for path in dict.fromkeys(record.path for record in dataset.records):
            by_size[path.stat().st_size].append((split, path))
    problems = []
    for candidates in by_size.values():
        if len(candidates) == 1:
            continue
        first: dict[bytes, tuple[str, Path]] = {}
        for split, path in candidates:
            digest = hashlib.blake2b(path.read_bytes()).digest()
            other_split, other = first.setdefault(digest, (split, path))
            if other_split != split:
                problems.append(Problem(str(path), split, f"image in two splits: it is {other} of {other_split} too"))
            elif other != path:
                problems.append(Problem(str(path), split, f"repeated image: it is {other} too"))
    return problems
