"""Curves of a run, drawn with matplotlib without a display."""

import csv
import math
from pathlib import Path

import numpy as np

from retinanet_ext.data.extras import require

from .checkpoint import write_atomically

# Losses that span more than this factor are drawn on a logarithmic axis.
LOGARITHMIC = 4.0


def plot_results(results_csv: Path, steps_csv: Path, path: Path) -> None:
    """Losses, foreground anchors, learning rate and validation of a run, from its csv files."""
    steps, epochs = _columns(steps_csv), _columns(results_csv)
    figure, axes = new_figure(13, 7, rows=2, columns=3)
    _plot_loss(axes[0, 0], steps, epochs, "classification", "tab:blue")
    _plot_loss(axes[0, 1], steps, epochs, "bbox_regression", "tab:orange")
    _plot_validation(axes[0, 2], epochs, "AP by IoU", ("AP", "AP50", "AP75"))
    axes[1, 0].plot(steps["step"], steps["foreground"], color="tab:green", alpha=0.3, linewidth=0.8)
    axes[1, 0].plot(*_running_mean(steps["step"], steps["foreground"]), color="tab:green")
    axes[1, 0].set(title="foreground anchors an image", xlabel="step", ylim=(0, None))
    axes[1, 1].plot(steps["step"], steps["lr"], color="tab:red")
    axes[1, 1].set(title="learning rate", xlabel="step", ylim=(0, None))
    axes[1, 1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _plot_validation(axes[1, 2], epochs, "AP by object size, and recall", ("APs", "APm", "APl", "AR100"))
    save_figure(figure, path)


def _plot_loss(axes, steps: dict[str, np.ndarray], epochs: dict[str, np.ndarray], name: str, colour: str) -> None:
    """One loss: each training step faintly, their running mean, and the validation after each epoch."""
    axes.plot(steps["step"], steps[name], color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(*_running_mean(steps["step"], steps[name]), color=colour, label="training")
    validation = epochs.get(f"val_{name}", np.zeros(0))
    known = np.flatnonzero(~np.isnan(validation))
    if known.size:
        style = {"color": "black", "marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.plot(epochs["step"][known], validation[known], label="validation", **style)
    axes.set(title=f"{name} loss", xlabel="step")
    shown = np.concatenate([steps[name], validation])
    shown = shown[shown > 0]
    # Over a narrow range a logarithmic axis has one labelled tick or none.
    if shown.size and shown.max() > LOGARITHMIC * shown.min():
        ticker = require("matplotlib.ticker")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    _legend_below(axes, 2)


def _plot_validation(axes, epochs: dict[str, np.ndarray], title: str, names: tuple[str, ...]) -> None:
    """Figures of the validation over the epochs, and the last of each."""
    for name, marker in zip(names, "os^d", strict=False):
        known = np.flatnonzero(~np.isnan(epochs[name]))
        last = f"  {epochs[name][known[-1]]:.3f}" if known.size else "  -"
        axes.plot(epochs["epoch"][known], epochs[name][known], marker=marker, markersize=4, label=name + last)
    end = max(1.0, epochs["epoch"].max(initial=1.0))
    axes.set(title=f"{title} (below: last)", xlabel="epoch", xlim=(0.5, end + 0.5), ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend_below(axes, len(names))


def _legend_below(axes, columns: int) -> None:
    """A legend below the axes: over curves that end anywhere no corner is free."""
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "borderaxespad": 0, "ncols": columns}
    axes.legend(frameon=False, fontsize="small", handlelength=1.5, columnspacing=1, **below)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    require("matplotlib")
    figure_module = require("matplotlib.figure")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for each in np.atleast_1d(axes).flat:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path: Path) -> None:
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
