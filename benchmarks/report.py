"""Writes the tables and plots of docs/performance.md from json alone: no figure in them is typed by hand.

    python -m benchmarks.report            # writes docs/performance.md, and docs/images/scaling-*.png
    python -m benchmarks.report --check    # exit status 1 where page or plots do not say what the results files say

The page holds blocks, whose first line says what belongs into them; everything else on it is prose. FILE is a name in
benchmarks/results (of rates and predictions in benchmarks/predictions), without `.json`; a pattern is a shell pattern
of case names.

    <!-- cases FILE: PATTERN, PATTERN ... -->     a row a case: ours, each peer with its factor; who is absent and why
    <!-- memory FILE: PATTERN, PATTERN ... -->    a row a case: the most that a call of each side holds at a time
    <!-- images FILE: PATTERN, PATTERN ... -->    a row a case of bench_loading.py: images a second
    <!-- runs FILE, FILE ...: CASE -->            a row a run: one case in each of them, and what the machine copied
    <!-- goals FILE: CASE >= 20; FILE: ... -->    a row a case: the factor on torchvision that was aimed at, and it
    <!-- machine FILE -->                         what it was measured on, and when
    <!-- pairs FILE -->                           anchor_match_pairs.py: shares of the pairs that are looked at
    <!-- rates FILE -->                           what a GPU is taken to do in a picosecond
    <!-- predictions FILE: TABLE -->              one of the tables of a GPU's predicted times
    <!-- training FILE, FILE ... -->              a row a run of train_vs_torchvision.py
    <!-- differences FILE, FILE ... -->          train_vs_torchvision.py: ours less torchvision's, over those runs
    <!-- twins FILE -->                           a row a side of a whole run of train_vs_torchvision.py --twins
    <!-- lockstep FILE, FILE ... -->              train_vs_torchvision.py --lockstep: how far apart its sides are
    <!-- gradients FILE -->                       train_vs_torchvision.py --same-weights
    <!-- reference FILE -->                       train_vs_reference.py
    <!-- profile FILE -->                         profile_step.py: the parts, by hooks
    <!-- operators FILE -->                       profile_step.py --profiler: shares by kind of operator
    <!-- evaluation FILE -->                      evaluation_speed.py
    <!-- scaling FILE -->                         plots of bench_scaling.py, time and memory, an image a curve
    ...
    <!-- end -->

It reads json and writes text: it imports neither retinanet_ext nor PyTorch, and matplotlib for the plots alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .report_models import (
    differences,
    evaluation,
    gradients,
    lockstep,
    operators,
    profile,
    reference,
    training,
    twins,
)
from .report_predictions import predictions, rates
from .report_tables import ReportError, link, number, read, table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
IMAGES = HERE.parent / "docs" / "images"
BLOCK = re.compile(r"^<!-- (?P<kind>[a-z]+) (?P<what>[^\n]*?) -->\n(?P<body>.*?)^<!-- end -->$", re.M | re.S)


def chosen(report: dict[str, Any], patterns: Sequence[str], name: str) -> list[dict[str, Any]]:
    """The cases that match, in the order of the patterns and then of the file."""
    rows: list[dict[str, Any]] = []
    for pattern in patterns:
        found = [result for result in report["results"] if fnmatch.fnmatchcase(result["case"], pattern)]
        if not found:
            raise ReportError(f"{name}: no case matches {pattern!r}")
        rows += [result for result in found if result not in rows]
    return rows


# What operators were called in results that were written before.
EARLIER_NAMES = {
    "multilevel focal": "multilevel_focal_loss",
    "focal": "sigmoid_focal_loss",
}


def labelled(case: str) -> str:
    """The case with its operator, if it is one's, in code type."""
    for earlier, name in EARLIER_NAMES.items():
        if case.startswith(f"{earlier} "):
            case = name + case.removeprefix(earlier)
    operator, _, rest = case.partition(" ")
    return case if operator in ("training", "inference") else f"`{operator}` {rest}"


def listed(what: str, folder: Path) -> list[dict[str, Any]]:
    """The cases that a block names."""
    name, _, patterns = what.partition(":")
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()] or ["*"]
    return chosen(read(name.strip(), folder), wanted, name)


def with_factor(value: float | None, own: float) -> str:
    """A peer's figure and how many times ours it is, which of what was too little to be counted would say nothing."""
    if value is None:
        return ""
    return number(value) + (f" ({number(value / own)}×)" if own else "")


def beside_ours(results: Sequence[dict[str, Any]], unit: str, figures: Callable[[dict[str, Any]], dict]) -> str:
    """A row a case: `figures` of ours, and of each peer with its factor."""
    peers = list(dict.fromkeys(peer for result in results for peer in result["peers"]))
    rows = []
    for result in results:
        sides = figures(result)
        own = sides["ours"]
        cells = [number(own)]
        cells += [with_factor(sides.get(peer), own) for peer in peers]
        rows.append([labelled(result["case"]), *cells])
    return table([f"case, {unit}", "ours", *peers], rows)


def absent(results: Sequence[dict[str, Any]]) -> str:
    """A line for each reason why a peer is not beside ours, with the operators unless it is that of all."""

    def names(those: Sequence[dict[str, Any]]) -> list[str]:
        return list(dict.fromkeys(labelled(result["case"]).split(" ")[0] for result in those))

    without: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        for pair in result["skipped"].items():
            without.setdefault(pair, []).append(result)
    lines = []
    for (peer, reason), those in sorted(without.items(), key=lambda item: item[0]):
        where = "" if names(those) == names(results) else f" ({', '.join(names(those))})"
        lines.append(f"- {peer}{where}: {reason.removeprefix(f'{peer} is ')}\n")
    return f"\nNot beside ours:\n\n{''.join(lines)}" if lines else ""


def cases(what: str, folder: Path) -> str:
    def medians(result: dict[str, Any]) -> dict[str, float]:
        return {name: timing["median"] for name, timing in {"ours": result["ours"], **result["peers"]}.items()}

    results = listed(what, folder)
    return beside_ours(results, "milliseconds", medians) + absent(results)


def memory(what: str, folder: Path) -> str:
    results = [result for result in listed(what, folder) if result.get("peak_bytes", {}).get("ours") is not None]
    if not results:
        raise ReportError(f"{what}: these results say nothing of memory")

    def megabytes(result: dict[str, Any]) -> dict[str, float]:
        """Whole ones: a process's pages are not counted exactly."""
        return {name: round(count / 2**20) for name, count in result["peak_bytes"].items()}

    return beside_ours(results, "MiB", megabytes)


def pairs(what: str, folder: Path) -> str:
    """Shares of the pairs of an anchor and a box, a row an image and number of boxes."""
    name = what.strip()
    counted = read(name, folder)["pairs"]
    kinds = list(counted[0]["shares"])
    rows = [
        [
            f"{row['image'][0]}×{row['image'][1]}, {row['anchors']:,} anchors",
            f"{row['boxes']}",
            *(f"{100 * row['shares'][kind]:.1f} %" for kind in kinds),
        ]
        for row in counted
    ]
    return (
        table(["image", "boxes", f"of all pairs: {kinds[0]}", *kinds[1:]], rows)
        + f"\nCounted, not timed: {link(name)}.\n"
    )


def images(what: str, folder: Path) -> str:
    rows = [
        [result["case"], number(1e3 * result["details"]["images"] / result["ours"]["median"])]
        for result in listed(what, folder)
    ]
    return table(["", "images a second"], rows)


def one_case(name: str, case: str, folder: Path) -> dict[str, Any]:
    """The result of one case in one file."""
    found = [result for result in read(name, folder)["results"] if labelled(result["case"]) == labelled(case)]
    if len(found) != 1:
        raise ReportError(f"{name}: {len(found)} cases are called {case!r}")
    return found[0]


def runs(what: str, folder: Path) -> str:
    names, _, case = what.partition(":")
    rows = []
    for name in (name.strip() for name in names.split(",")):
        rows.append((name, read(name, folder)["machine"]["processor"], one_case(name, case.strip(), folder)))
    peers = list(dict.fromkeys(peer for *_, result in rows for peer in result["peers"]))
    lines = []
    for name, processor, result in rows:
        own = result["ours"]["median"]
        others = [result["peers"].get(peer, {}).get("median") for peer in peers]
        lines.append(
            [
                f"[{name}](../benchmarks/results/{name}.json)",
                processor,
                f"{result['copy_gb_per_s']:.0f}",
                number(own),
                *(with_factor(other, own) for other in others),
            ]
        )
    return table(["run", "processor", "copy, GB/s", "ours, milliseconds", *peers], lines)


def goals(what: str, folder: Path) -> str:
    rows = []
    for entry in what.split(";"):
        name, _, rest = entry.strip().partition(":")
        case, _, goal = rest.rpartition(">=")
        try:
            wanted = float(goal)
        except ValueError:
            raise ReportError(f"goals: expected FILE: CASE >= NUMBER, got {entry.strip()!r}") from None
        result = one_case(name.strip(), case.strip(), folder)
        if "torchvision" not in result["peers"]:
            raise ReportError(f"{name.strip()}: {case.strip()!r} was not timed beside torchvision")
        own, its = result["ours"]["median"], result["peers"]["torchvision"]["median"]
        met = "met" if its / own >= wanted else "missed"
        rows.append(
            [labelled(case.strip()), f"{wanted:g}×", number(own), with_factor(its, own), met, link(name.strip())]
        )
    return table(["case, milliseconds", "goal", "ours", "torchvision", "", "run"], rows)


def machine(what: str, folder: Path) -> str:
    name = what.strip()
    report = read(name, folder)
    facts = report["machine"]
    packages = ("torch", "torchvision", "mmcv", "apex", "fvcore", "detectron2")
    versions = [f"{package} {facts[package]}" for package in packages if package in facts]
    device = f"{facts['gpu']}, driver {facts['driver']}" if "gpu" in facts else facts["processor"]
    threads = facts["torch_threads"]
    commit = f"commit {facts['commit'][:9]}{' with changes' if facts['uncommitted_changes'] else ''}"
    medians = ""
    if "results" in report or "rounds" in report:
        rounds = [row["ours"]["rounds"] for row in report.get("results", ())] or [report["rounds"]]
        counted = f"{min(rounds)} to {max(rounds)}" if min(rounds) < max(rounds) else f"{rounds[0]}"
        medians = f"medians of {counted} rounds, the sides in turns; "
    return (
        f"{device}; {facts['processors']} cores, {threads} thread{'s' if threads > 1 else ''}; {', '.join(versions)}; "
        f"{report['date'][:10]}, {commit}; {medians}{link(name)}.\n"
    )


def scaling(what: str, folder: Path) -> str:
    from .report_plots import curves

    name = what.strip()
    report = read(name, folder)
    parts = []
    for title, points in curves(report).items():
        notes = sorted({f"{peer}: {reason}" for point in points for peer, reason in point["skipped"].items()})
        notes += timed_once(points)
        parts.append(f"![{title}](images/{plot_file(title)})\n" + "".join(f"\n- {note}\n" for note in notes))
    return "\n".join(parts)


def timed_once(points: Sequence[dict[str, Any]]) -> list[str]:
    """Where on a curve a peer was called too long to be called again, a line a peer."""
    places: dict[str, list[str]] = {}
    for point in points:
        for peer, timing in point["peers"].items():
            if timing["rounds"] == 1:
                places.setdefault(peer, []).append(f"{point['details']['x']:,}")
    axis = points[0]["details"]["axis"]
    return [f"{peer}: timed once at {axis} = {' and '.join(values)}" for peer, values in places.items()]


def plot_file(title: str) -> str:
    return f"scaling-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.png"


KINDS: dict[str, Callable[[str, Path], str]] = {
    "cases": cases,
    "memory": memory,
    "images": images,
    "machine": machine,
    "pairs": pairs,
    "rates": rates,
    "predictions": predictions,
    "goals": goals,
    "runs": runs,
    "training": training,
    "differences": differences,
    "twins": twins,
    "lockstep": lockstep,
    "gradients": gradients,
    "reference": reference,
    "profile": profile,
    "operators": operators,
    "evaluation": evaluation,
    "scaling": scaling,
}


def fill(page: str, folder: Path) -> str:
    """The page with its blocks written anew."""

    def block(match: re.Match[str]) -> str:
        kind, what = match["kind"], match["what"]
        if kind not in KINDS:
            raise ReportError(f"<!-- {kind} {what} -->: expected one of {', '.join(KINDS)}")
        return f"<!-- {kind} {what} -->\n{KINDS[kind](what, folder)}<!-- end -->"

    filled, count = BLOCK.subn(block, page)
    begun = len(re.findall(r"^<!-- (?!end)", page, re.M))
    if begun != count:
        raise ReportError(f"{begun} blocks begin, and {count} end with <!-- end -->")
    by_hand = re.search(r"^\|.*$", BLOCK.sub("", page), re.M)
    if by_hand:
        raise ReportError(f"a table in no block: {by_hand[0]}")
    return filled


def plots(page: str, folder: Path, images: Path) -> Iterator[tuple[Path, str, list[dict[str, Any]], str]]:
    """The plots that the page shows: file, title, points, caption."""
    from .report_plots import curves

    for match in BLOCK.finditer(page):
        if match["kind"] == "scaling":
            name = match["what"].strip()
            caption = machine(name, folder).split("; medians")[0]
            for title, points in curves(read(name, folder)).items():
                yield images / plot_file(title), title, points, caption


def stale(page: str, folder: Path, images: Path) -> list[Path]:
    """Plots that are missing, or were not drawn from these results."""
    from .report_plots import digest, digest_in

    return [
        path
        for path, title, points, caption in plots(page, folder, images)
        if digest_in(path) != digest(title, points, caption)
    ]


def draw(page: str, folder: Path, images: Path) -> list[Path]:
    """Draws the plots that the page shows."""
    from .report_plots import draw_curve

    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("matplotlib, which draws the plots, is not installed: pip install matplotlib")
    drawn = []
    for path, title, points, caption in plots(page, folder, images):
        draw_curve(title, points, caption, path)
        drawn.append(path)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Writes the tables and plots of docs/performance.md from benchmarks/results.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where page or plots are not current"
    )
    options = parser.parse_args(arguments)
    page = PAGE.read_text()
    try:
        filled = fill(page, RESULTS)
        if options.check:
            wrong = [PAGE] * (filled != page) + stale(page, RESULTS, IMAGES)
            for path in wrong:
                print(f"{path}: not what the results files say: run python -m benchmarks.report", file=sys.stderr)
            return int(bool(wrong))
        drawn = draw(page, RESULTS, IMAGES)
    except ReportError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 1
    PAGE.write_text(filled)
    for path in (PAGE, *drawn):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
