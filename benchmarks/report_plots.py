"""Plots of how an operator's time and memory grow, from the results of bench_scaling.py: log axes, the peers beside
ours."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIGEST = "Data SHA-256"
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def curves(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results that belong to a curve, by its title, from the smallest to the largest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        if "curve" in result["details"]:
            found.setdefault(result["details"]["curve"], []).append(result)
    return {title: sorted(points, key=lambda point: point["details"]["x"]) for title, points in found.items()}


def medians(point: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by side."""
    return {name: timing["median"] for name, timing in {"ours": point["ours"], **point["peers"]}.items()}


def mebibytes(point: dict[str, Any]) -> dict[str, float]:
    """The most that a call holds, by side; at least 1: a process's pages are not counted exactly, and log axes have no
    zero."""
    held = point.get("peak_bytes", {})
    return {name: max(1.0, count / 2**20) for name, count in held.items() if count is not None}


PANELS = {"milliseconds, median": medians, "memory, MiB, at least 1": mebibytes}


def digest(title: str, points: list[dict[str, Any]], caption: str) -> str:
    """Of all that a plot shows; it stands in the picture's file."""
    shown = [
        [point["details"]["axis"], point["details"]["x"], {label: figures(point) for label, figures in PANELS.items()}]
        for point in points
    ]
    return hashlib.sha256(json.dumps([title, caption, shown], sort_keys=True).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """What a picture was drawn from, by its file (PNG: length, kind, content and checksum of each chunk); None where it
    does not say."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    place = 8
    while place + 8 <= len(content):
        length, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        name, _, value = content[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and name == DIGEST.encode():
            return value.decode("latin-1")
        place += 12 + length
    return None


def draw_curve(title: str, points: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Time, and beside it memory where the results say it."""
    from matplotlib.figure import Figure

    panels = {label: figures for label, figures in PANELS.items() if any(figures(point) for point in points)}
    figure = Figure(figsize=(5.2 * len(panels), 4.2), dpi=110, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, figures) in zip(all_axes, panels.items(), strict=True):
        draw_panel(axes, points, figures)
        axes.set(xscale="log", yscale="log", xlabel=points[0]["details"]["axis"], ylabel=label)
        axes.grid(which="major", alpha=0.4)
        axes.grid(which="minor", alpha=0.12)
    all_axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(caption, 85 * len(panels)), fontsize=7, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None, DIGEST: digest(title, points, caption)})


def draw_panel(axes: Any, points: list[dict[str, Any]], figures: Callable[[dict[str, Any]], dict[str, float]]) -> None:
    """A line a side."""
    last = points[-1]["details"]["x"]
    peers = dict.fromkeys(peer for point in points for peer in point["peers"])
    for index, side in enumerate(["ours", *peers]):
        places = [(point["details"]["x"], figures(point)[side]) for point in points if side in figures(point)]
        color = COLORS[index % len(COLORS)]
        label = "retinanet_ext" if side == "ours" else side
        axes.plot([x for x, _ in places], [value for _, value in places], "o-", color=color, label=label, ms=4)
        # What is missing at the right end was left out for a reason, which the page gives.
        if places and places[-1][0] != last:
            axes.plot(*[[value] for value in places[-1]], "x", color=color, ms=11, mew=2)
