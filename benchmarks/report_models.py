"""The blocks of report.py about whole models: training runs, steps and their parts, evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report_tables import ReportError, link, number, read, table


def training(what: str, folder: Path) -> str:
    runs = [(name.strip(), read(name.strip(), folder)) for name in what.split(",")]
    sides = ("retinanet_ext", "torchvision")
    figures = ("AP", "AP50", "seconds_per_step_median")
    # Runs of before say neither what they trained, which was a ResNet-18, nor how much memory they held.
    with_memory = any(run[side].get("peak_bytes") is not None for _, run in runs for side in sides)

    def label(name: str, run: dict[str, Any]) -> str:
        arch = run["recipe"].get("arch")
        return f"{run['recipe']['seed']} ({f'{arch}, ' if arch else ''}{link(name)})"

    def mebibytes(run: dict[str, Any]) -> list[str]:
        peaks = [run[side].get("peak_bytes") for side in sides]
        return ["" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks] if with_memory else []

    rows = [
        [label(name, run), *(f"{run[side][key]:.3f}" for key in figures for side in sides), *mebibytes(run)]
        for name, run in runs
    ]
    if len(runs) > 1:
        columns = [[run[side][key] for _, run in runs] for key in figures for side in sides]
        empty = [""] * (2 * with_memory)
        rows.append(["mean", *(f"{statistics.mean(values):.3f}" for values in columns), *empty])
        rows.append(["lowest to highest", *(f"{min(values):.3f} to {max(values):.3f}" for values in columns), *empty])
    header = [
        "seed",
        "AP ours",
        "torchvision",
        "AP50 ours",
        "torchvision",
        "seconds a step, median, ours",
        "torchvision",
        *(["peak memory, MiB, ours", "torchvision"] if with_memory else []),
    ]
    return "\n".join([table(header, rows), *swapped_weights([run for _, run in runs], sides)])


def swapped_weights(runs: list[dict[str, Any]], sides: Sequence[str]) -> list[str]:
    """A sentence on what each side's weights score in the other side's model, of the runs that have tried it."""
    swapped = [(run, run["weights_in_the_other_model"]) for run in runs if "weights_in_the_other_model" in run]
    tried = [(run[side], others[side]) for run, others in swapped for side in sides]
    if not tried:
        return []
    largest = max(abs(own[key] - other[key]) for own, other in tried for key in ("AP", "AP50"))
    return [f"Each side's weights scored in the other side's model: AP and AP50 differ by {largest:.4f} at most.\n"]


def differences(what: str, folder: Path) -> str:
    """Ours less torchvision's, over pairs of runs that began with the same weights."""
    runs = [read(name.strip(), folder) for name in what.split(",")]
    if len(runs) < 2:
        raise ReportError(f"differences {what}: expected at least two runs")
    rows = []
    for key in ("AP", "AP50"):
        values = [run["retinanet_ext"][key] - run["torchvision"][key] for run in runs]
        mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
        counts = [sum(value < 0 for value in values), sum(value > 0 for value in values)]
        extent = f"{min(values):+.3f} to {max(values):+.3f}"
        rows.append([key, f"{mean:+.4f}", f"{error:.4f}", extent, *map(str, counts)])
    header = ["mean", "its standard error", "lowest to highest", "ours lower", "ours higher"]
    return table([f"ours less torchvision's, {len(runs)} pairs", *header], rows)


def twins(what: str, folder: Path) -> str:
    """How far two whole runs of one model end apart."""
    report = read(what.strip(), folder)
    figures = ("AP", "AP50", "AP75")
    sides = {name: value for name, value in report.items() if isinstance(value, dict) and "AP" in value}
    rows = [[name, *(f"{side[key]:.3f}" for key in figures)] for name, side in sides.items()]
    return table([f"seed {report['recipe']['seed']}", *figures], rows)


def lockstep(what: str, folder: Path) -> str:
    """How far two runs are apart after some of the steps: weights, and running statistics of files that have them."""
    header, columns = ["after step"], []
    for report in (read(name.strip(), folder) for name in what.split(",")):
        run = f"{' and '.join(report['sides'])}, {report['precision']}"
        for held in ("weights", "running_statistics"):
            key = f"difference_of_the_{held}_over_their_change"
            if key in report["lockstep"][0]:
                header.append(f"{run}: {held.replace('_', ' ')}")
                columns.append({row["step"]: row[key] for row in report["lockstep"]})
    shown = [step for step in (1, 2, 5, 10, 20, 50, 100) if any(step in column for column in columns)]
    rows = [[f"{step}", *(f"{column[step]:.1e}" if step in column else "" for column in columns)] for step in shown]
    return table(header, rows)


def gradients(what: str, folder: Path) -> str:
    """How far losses and gradients of one batch are apart at the same weights: median and most over the steps."""
    steps = read(what.strip(), folder)["at_the_same_weights"]
    by_loss = [step["relative_difference_of_the_losses"] for step in steps]
    differences = {f"`{name}`": [values[name] for values in by_loss] for name in by_loss[0]}
    differences["gradient, of its norm"] = [step["difference_of_the_gradients_over_their_norm"] for step in steps]
    differences["norm of the gradient"] = [abs(step["ratio_of_the_norms_less_one"]) for step in steps]
    if "difference_of_the_steps_over_their_size" in steps[0]:
        differences["step of AdamW, of its size"] = [step["difference_of_the_steps_over_their_size"] for step in steps]
    for side in steps[0].get("distance_to_the_gradient_in_float64", {}):
        distances = [step["distance_to_the_gradient_in_float64"][side] for step in steps]
        differences[f"gradient of {side} to that in float64"] = distances
    rows = [[name, f"{statistics.median(values):.1e}", f"{max(values):.1e}"] for name, values in differences.items()]
    return table([f"relative difference, {len(steps)} steps", "median", "most"], rows)


def reference(what: str, folder: Path) -> str:
    report = read(what.strip(), folder)
    steps, images = report["training"], report["prediction"]

    def beside(label: str, seconds: dict[str, float]) -> list[str]:
        own, plain = (1e3 * seconds[side] for side in ("operators", "reference"))
        return [label, f"{number(own)} ms", f"{number(plain)} ms ({number(plain / own)}×)"]

    same = images["images_with_the_same_labels_in_the_same_order"]
    differences = [
        f"{images[key]:.1e}" for key in ("largest_difference_of_a_coordinate", "largest_difference_of_a_score")
    ]
    timed = {
        "matching and both losses of a batch, forward, median": steps["loss_forward_seconds_median"],
        "their backward pass, median": steps["loss_backward_seconds_median"],
        "a whole training step, median": steps["step_seconds_median"],
    }
    rows = [
        *(beside(label, seconds) for label, seconds in timed.items()),
        beside("post-processing of an image, median", images["postprocess_seconds_median"]),
        [
            f"largest relative difference of a loss over the {steps['steps']} steps",
            f"{steps['largest_relative_difference_of_a_loss']:.1e}",
            "",
        ],
        [
            "images with the same detections in the same order",
            f"{same} of {images['images']} ({images['detections']:,} detections)",
            "",
        ],
        ["largest difference of a coordinate, of a score", f"{differences[0]} pixels, {differences[1]}", ""],
    ]
    return table(["", "operators", "plain PyTorch"], rows)


def profile(what: str, folder: Path) -> str:
    """A table of the parts of a training step, and one of those of an inference."""
    report = read(what.strip(), folder)

    def parts(title: str, sides: dict[str, dict[str, float]]) -> str:
        rows = [[part, *(number(times[part]) for times in sides.values())] for part in next(iter(sides.values()))]
        return table([f"{title}, milliseconds", *sides], rows)

    return parts("training step", report["training"]) + "\n" + parts("inference", report["inference"])


def operators(what: str, folder: Path) -> str:
    """Shares by kind of operator: a table of a training step, and one of an inference."""
    name = what.strip()
    report = read(name, folder)
    if "operators" not in report:
        raise ReportError(f"{name}: measured without --profiler")

    def shares(title: str, sides: dict[str, dict[str, float]]) -> str:
        kinds = list(dict.fromkeys(kind for times in sides.values() for kind in times))
        totals = {side: sum(times.values()) for side, times in sides.items()}
        rows = [
            [kind, *(f"{100 * times.get(kind, 0) / totals[side]:.1f} %" for side, times in sides.items())]
            for kind in kinds
        ]
        rows.append(["all, milliseconds", *(number(total) for total in totals.values())])
        return table([title, *sides], rows)

    parts = report["operators"]
    return shares("training step", parts["training"]) + "\n" + shares("inference", parts["inference"])


def evaluation(what: str, folder: Path) -> str:
    report = read(what.strip(), folder)
    sides = [(f"`{name}`", report[name]) for name in ("score_detections", "match_detections")]
    if "pycocotools" in report:
        sides.append((f"pycocotools {report['machine']['pycocotools']}", report["pycocotools"]))
    rows = [[name, number(side["seconds"]), number(side["processor_seconds"])] for name, side in sides]
    size = f"{report['images']:,} images, {report['detections']:,} detections, {report['objects']:,} objects"
    return table([f"{size}, {report['classes']} classes", "seconds", "of the processor"], rows)
