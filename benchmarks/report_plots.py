"""Plots of how the cost of an operator grows, from the results of bench_scaling.py: log axes, the peers beside ours."""

from __future__ import annotations

import hashlib
import json
import textwrap
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


def digest(title: str, points: list[dict[str, Any]], caption: str) -> str:
    """Of all that a plot shows; it stands in the picture's file."""
    shown = [
        [
            point["details"]["axis"],
            point["details"]["x"],
            {name: timing["median"] for name, timing in {"ours": point["ours"], **point["peers"]}.items()},
        ]
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    peers = list(dict.fromkeys(peer for point in points for peer in point["peers"]))
    for index, side in enumerate(["ours", *peers]):
        timed = [
            (point["details"]["x"], point["ours"] if side == "ours" else point["peers"].get(side)) for point in points
        ]
        places = [(x, timing) for x, timing in timed if timing is not None]
        color = COLORS[index % len(COLORS)]
        label = "retinanet_ext" if side == "ours" else side
        axes.plot([x for x, _ in places], [t["median"] for _, t in places], "o-", color=color, label=label, ms=4)
        # What is missing at the right end was left out for a reason, which the page gives.
        if places and places[-1][0] != points[-1]["details"]["x"]:
            axes.plot(*[[value] for value in (places[-1][0], places[-1][1]["median"])], "x", color=color, ms=11, mew=2)
    axes.set(
        xscale="log", yscale="log", xlabel=points[0]["details"]["axis"], ylabel="milliseconds, median", title=title
    )
    axes.grid(which="major", alpha=0.4)
    axes.grid(which="minor", alpha=0.12)
    axes.legend(frameon=False)
    figure.supxlabel(textwrap.fill(caption, 110), fontsize=7, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None, DIGEST: digest(title, points, caption)})
