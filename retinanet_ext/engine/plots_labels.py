"""What a data set holds, as one picture: classes, sizes, shapes and places of its objects."""

from pathlib import Path

import numpy as np

from retinanet_ext.data import DetectionDataset

from .plots import new_figure, save_figure

# The most frequent classes have a bar; the title says how many are left out.
MAX_BARS = 25
# COCO's limits between small, medium and large objects: sides of squares in pixels.
SIZE_LIMITS = (32, 96)


def plot_labels(dataset: DetectionDataset, path: Path) -> None:
    """Objects by class, size, aspect ratio and place, and objects an image. Ignored objects count too."""
    records = dataset.records
    boxes = np.concatenate([record.boxes for record in records]).astype(np.float64)
    labels = np.concatenate([record.labels for record in records])
    images = np.concatenate([np.tile([[r.width, r.height]], (len(r.boxes), 1)) for r in records]).astype(np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    figure, axes = new_figure(14, 7.5, rows=2, columns=3)
    _plot_classes(axes[0, 0], labels, dataset.class_names)
    _plot_sizes(axes[0, 1], np.sqrt(sides.prod(axis=1)))
    _plot_ratios(axes[0, 2], sides[:, 1] / sides[:, 0])
    _plot_density(axes[1, 0], (boxes[:, :2] + boxes[:, 2:]) / 2 / images, "centres", ("x", "y"), "linear")
    axes[1, 0].invert_yaxis()
    _plot_density(axes[1, 1], sides / images, "sides as parts of the image", ("width", "height"), "log")
    per_image = np.array([len(record.labels) for record in records])
    axes[1, 2].hist(per_image, bins=np.arange(per_image.max() + 2) - 0.5, color="tab:purple")
    axes[1, 2].set(title=f"objects an image (mean {per_image.mean():.1f})", xlabel="objects", ylabel="images")
    axes[1, 2].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{dataset.name}: {len(records)} images, {len(labels)} objects", fontsize=11)
    save_figure(figure, path)


def _plot_classes(axes, labels: np.ndarray, names: list[str]) -> None:
    counts = np.bincount(labels, minlength=len(names))
    shown = np.argsort(-counts, kind="stable")[:MAX_BARS][::-1]
    bars = axes.barh(range(len(shown)), counts[shown], color="tab:blue")
    axes.bar_label(bars, padding=3, fontsize=8)
    axes.set_yticks(range(len(shown)), [names[i] for i in shown], fontsize=8 if len(shown) > 12 else 10)
    axes.margins(x=0.15)
    more = f", the {len(shown)} most frequent of {len(names)}" if len(names) > len(shown) else ""
    axes.set(title=f"objects by class{more}", xlabel="objects")


def _plot_sizes(axes, sizes: np.ndarray) -> None:
    if len(sizes):
        low, high = max(1.0, sizes.min() * 0.9), max(2.0, sizes.max() * 1.1)
        axes.hist(sizes, bins=np.geomspace(low, high, 41), color="tab:orange")
    axes.set_xscale("log", base=2)
    for limit in SIZE_LIMITS:
        axes.axvline(limit, color="0.4", linewidth=1, linestyle="--")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(title="size, and COCO's small | medium | large", xlabel="√(width × height) in pixels", ylabel="objects")


def _plot_ratios(axes, ratios: np.ndarray) -> None:
    axes.hist(ratios.clip(1 / 8, 8), bins=np.geomspace(1 / 8, 8, 49), color="tab:green")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(title="aspect ratio", xlabel="height / width", ylabel="objects")


def _plot_density(axes, points: np.ndarray, title: str, names: tuple[str, str], norm: str) -> None:
    """Where points of the unit square are frequent."""
    counts, *_ = np.histogram2d(points[:, 1], points[:, 0], bins=25, range=((0, 1), (0, 1)))
    axes.imshow(counts, origin="lower", extent=(0, 1, 0, 1), cmap="viridis", aspect="equal", norm=norm)
    axes.grid(visible=False)
    axes.set(title=title, xlabel=names[0], ylabel=names[1])
