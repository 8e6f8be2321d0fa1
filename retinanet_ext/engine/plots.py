"""Curves of a run, drawn with matplotlib without a display."""

import csv
import math
from pathlib import Path

import numpy as np

from retinanet_ext.data.extras import require

from .checkpoint import write_atomically
from .evaluate import Evaluation

# More classes than this are drawn in grey, with the mean over them.
MAX_NAMED_CLASSES = 12


def plot_precision_recall(result: Evaluation, path: Path) -> None:
    """Precision over recall at IoU 0.5: a curve a class, and their mean."""
    figure, axes = _figure(7.5, 5)
    recall = np.linspace(0.0, 1.0, result.precision50.shape[0])
    known = [k for k, row in enumerate(result.per_class) if not math.isnan(row["AP50"])]
    named = len(known) <= MAX_NAMED_CLASSES
    for k in known:
        row = result.per_class[k]
        style = {"label": f"{row['class']}  {row['AP50']:.3f}"} if named else {"color": "0.8"}
        axes.plot(recall, result.precision50[:, k], linewidth=1.4, **style)
    if known:
        mean = result.precision50[:, known].mean(axis=1)
        axes.plot(recall, mean, color="black", linewidth=2.4, label=f"all  {result.metrics['AP50']:.3f}")
        axes.legend(title="class  AP50", loc="lower left", frameon=False)
    else:
        axes.text(0.5, 0.5, "no objects in the ground truth", ha="center", va="center")
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1.03),
        xlabel="recall",
        ylabel="precision",
        title="Precision and recall, IoU 0.5",
    )
    _save(figure, path)


def plot_results(results_csv: Path, steps_csv: Path, path: Path) -> None:
    """Losses, foreground anchors, learning rate and validation AP of a run, from its csv files."""
    steps, epochs = _columns(steps_csv), _columns(results_csv)
    figure, axes = _figure(11, 6.5, rows=2, columns=2)
    at = steps["step"]
    for name, colour in (("classification", "tab:blue"), ("bbox_regression", "tab:orange")):
        axes[0, 0].plot(at, steps[name], color=colour, alpha=0.25, linewidth=0.8)
        axes[0, 0].plot(*_running_mean(at, steps[name]), color=colour, label=name)
    axes[0, 0].set(title="loss", xlabel="step", yscale="log")
    axes[0, 0].legend(frameon=False)
    axes[0, 1].plot(at, steps["foreground"], color="tab:green", alpha=0.35, linewidth=0.8)
    axes[0, 1].plot(*_running_mean(at, steps["foreground"]), color="tab:green")
    axes[0, 1].set(title="foreground anchors an image", xlabel="step")
    axes[1, 0].plot(at, steps["lr"], color="tab:red")
    axes[1, 0].set(title="learning rate", xlabel="step")
    axes[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for name, marker in (("AP", "o"), ("AP50", "s"), ("AP75", "^")):
        values = epochs[name]
        evaluated = ~np.isnan(values)
        axes[1, 1].plot(epochs["epoch"][evaluated], values[evaluated], marker=marker, markersize=4, label=name)
    last = max(1.0, epochs["epoch"].max(initial=1.0))
    axes[1, 1].set(title="validation", xlabel="epoch", xlim=(0.5, last + 0.5), ylim=(0, 1))
    axes[1, 1].xaxis.get_major_locator().set_params(integer=True)
    axes[1, 1].legend(frameon=False)
    _save(figure, path)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    require("matplotlib")
    figure_module = require("matplotlib.figure")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for each in np.atleast_1d(axes).flat:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=120))


def _columns(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    return {
        name: np.array([float(row[name]) if row[name] else math.nan for row in rows])
        for name in reader.fieldnames or []
    }


def _running_mean(at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each window of a twentieth of the run, and the middle of each window."""
    window = max(1, len(values) // 20)
    if len(values) < window:
        return at, values
    kernel = np.ones(window) / window
    return np.convolve(at, kernel, "valid"), np.convolve(values, kernel, "valid")
