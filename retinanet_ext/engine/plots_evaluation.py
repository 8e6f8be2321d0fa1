"""Pictures of one evaluation: precision over recall, confusion matrix, scores of right and wrong detections."""

import math
from pathlib import Path

import numpy as np

from .evaluate import Evaluation
from .matches import Matches
from .plots import new_figure, save_figure

# More classes than this are drawn in grey, with the mean over them.
MAX_NAMED_CLASSES = 12
# A confusion matrix of more classes than this has colours alone, no counts.
MAX_COUNTED_CLASSES = 20
# At most so many names stand beside a confusion matrix.
MAX_TICKS = 60


def plot_precision_recall(result: Evaluation, path: Path) -> None:
    """Precision over recall at IoU 0.5: a curve a class, and their mean."""
    figure, axes = new_figure(8.5, 5)
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
        figure.legend(title="class  AP50", loc="outside right upper", frameon=False)
    else:
        axes.text(0.5, 0.5, "no objects in the ground truth", ha="center", va="center")
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1.03),
        xlabel="recall",
        ylabel="precision",
        title="Precision and recall, IoU 0.5",
    )
    save_figure(figure, path)


def plot_confusion_matrix(matches: Matches, path: Path) -> None:
    """Objects by class (rows) and what was detected in their place (columns); a row's colours add up to one."""
    counts = matches.confusion
    size = len(counts)
    inches = min(16.0, max(6.0, 0.55 * size + 2.5))
    figure, axes = new_figure(inches + 0.8, inches)
    axes.grid(visible=False)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, shrink=0.8, label="part of the row")
    names = [*matches.class_names, "nothing"]
    ticks = range(0, size, math.ceil(size / MAX_TICKS))
    axes.set_xticks(
        list(ticks), [names[i] for i in ticks], rotation=45 if size <= 8 else 90, ha="right" if size <= 8 else "center"
    )
    axes.set_yticks(list(ticks), [names[i] for i in ticks])
    if size <= MAX_COUNTED_CLASSES + 1:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.55 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=9)
    axes.axhline(size - 1.5, color="0.4", linewidth=1)
    axes.axvline(size - 1.5, color="0.4", linewidth=1)
    axes.set(
        xlabel="detected", ylabel="annotated", title=f"Confusion, score ≥ {matches.score:g}, IoU ≥ {matches.iou:g}"
    )
    save_figure(figure, path)


def plot_scores(matches: Matches, path: Path) -> None:
    """How many right and wrong detections there are at each score."""
    figure, axes = new_figure(7.5, 4.5)
    edges = np.linspace(0.0, 1.0, 51)
    right, wrong = matches.scores[matches.right], matches.scores[~matches.right]
    style = {"bins": edges, "histtype": "stepfilled", "alpha": 0.55}
    axes.hist(wrong, color="tab:red", label=f"wrong  {len(wrong)}", **style)
    axes.hist(right, color="tab:green", label=f"right  {len(right)}", **style)
    axes.axvline(matches.score, color="0.4", linewidth=1, linestyle="--", label=f"drawn from {matches.score:g}")
    if len(matches.scores):
        axes.set_yscale("log")
    axes.set(
        xlim=(0, 1), xlabel="score", ylabel="detections", title=f"Scores of detections, right at IoU ≥ {matches.iou:g}"
    )
    axes.legend(frameon=False)
    save_figure(figure, path)
