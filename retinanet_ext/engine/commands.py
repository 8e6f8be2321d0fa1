"""What the commands of `retinanet-ext` do with their arguments; each returns the exit status."""

import argparse
import shlex
import sys
from contextlib import nullcontext
from typing import Any

import torch

from retinanet_ext.data import DatasetError, find_splits, open_dataset
from retinanet_ext.data.extras import require_all
from retinanet_ext.models import fold_batch_norm

from . import demo
from .allocator import keep_freed_memory
from .anchor_report import report_anchors
from .check_data import check_data
from .checkpoint import load_checkpoint, load_model
from .config import TrainConfig, resolve_amp, resolve_device, resolve_workers, resume_config
from .distributed import World, joined, started_world
from .evaluate import evaluate, format_best, format_metrics
from .export import export
from .predict import find_images, predict_files
from .progress import reading, track
from .run_folder import RunFolder, new_run_dir, write_json
from .settings import SettingError, UsageError, check_count, check_probability
from .train import EXTRAS, Training, report_problems

# What --resume lets change.
_RESUME_CHANGES = ("epochs", "device", "workers", "lr", "clip_grad_norm", "amp", "patience", "save_every")


def run_train(arguments: argparse.Namespace) -> int:
    """Train, or go on with a run, as one process or as one of those that torchrun has started."""
    world = started_world()
    with joined(world):
        return _train(arguments, world)


def _train(arguments: argparse.Namespace, world: World) -> int:
    training = (_begin if arguments.resume is None else _resume)(arguments, world)
    _prepare(training.device)
    try:
        training.fit()
    except KeyboardInterrupt:
        go_on = f"retinanet-ext train --resume {_quoted(training.run.root)}"
        if world.is_main:
            print(f"\ninterrupted: go on with: {go_on}", file=sys.stderr)
        return 130
    if world.is_main:
        print(_summary(training.run, training.config.epochs))
    return 0


def _prepare(device: torch.device) -> None:
    if device.type == "cpu":
        keep_freed_memory()


def _typed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `train` that were typed: its parser gives no others, so that TrainConfig alone has the
    defaults, and a resumed run sees what it was asked to change."""
    return {name: value for name, value in vars(arguments).items() if name not in ("command", "resume", "run_dir")}


def _begin(arguments: argparse.Namespace, world: World) -> Training:
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in _typed(arguments).items()}
    if "data" not in settings:
        raise UsageError("DATA is missing: name a data set, or a run to go on with (--resume RUN)")
    if settings.pop("no_val", False):
        settings["validate_every"] = 0
    config = TrainConfig(**settings)
    # The main process names the folder, which it alone writes to.
    with new_run_dir(arguments.run_dir, "train") if world.is_main else nullcontext() as folder:
        return Training(config, world.share(folder), world=world)


def _resume(arguments: argparse.Namespace, world: World) -> Training:
    typed = _typed(arguments)
    if "data" in typed or arguments.run_dir is not None:
        raise UsageError("--resume takes DATA and --run-dir from the run: leave them out")
    if refused := [name for name in typed if name not in _RESUME_CHANGES]:
        free = ", ".join(f"--{name.replace('_', '-')}" for name in _RESUME_CHANGES)
        raise SettingError(refused, f"cannot be changed: --resume goes on as the run began (only {free} may be given)")
    config = world.share(resume_config(arguments.resume, **typed) if world.is_main else None)
    return Training(config, arguments.resume, resume=True, world=world)


def _summary(run: RunFolder, epochs: int) -> str:
    """What a finished run has to show: the validation of the epoch whose weights best.pt holds, and where things are.

    Read from the files: the best epoch may be one from before the run was resumed.
    """
    lines, of_epoch = [], ""
    if run.best.exists():
        epoch = load_checkpoint(run.best)["epoch"]
        of_epoch = f" (epoch {epoch})"
        if (result := run.read_evaluation()) is not None:
            lines.append(format_best(result, epoch, epochs))
    where = [f"weights: {run.best}{of_epoch}", f"logs and plots: {run.root}"]
    return "\n".join([*lines, *where, f"next: retinanet-ext predict {_quoted(run.root)} IMAGES"])


def run_val(arguments: argparse.Namespace) -> int:
    """Evaluate a checkpoint on a data set."""
    check_count("batch_size", arguments.batch_size)
    require_all(*EXTRAS)
    with new_run_dir(arguments.run_dir, "val") as folder:
        return _val(arguments, RunFolder(folder))


def _val(arguments: argparse.Namespace, run: RunFolder) -> int:
    run.check_empty()
    device = resolve_device(arguments.device or "auto")
    workers = resolve_workers(arguments.workers, device)
    _prepare(device)
    model, class_names, _ = load_model(arguments.weights, device)
    model.to(memory_format=torch.channels_last)
    dataset = open_dataset(
        arguments.data,
        arguments.split,
        images=arguments.images,
        class_names=class_names,
        verify="decode" if arguments.strict else arguments.verify,
        progress=reading,
    )
    run.problems.unlink(missing_ok=True)
    report_problems(dataset, run, print, arguments.strict)
    result = evaluate(
        model,
        dataset,
        batch_size=arguments.batch_size,
        device=device,
        workers=workers,
        amp=resolve_amp(arguments.amp, device),
        progress=lambda batches: track(batches, "batch"),
    )
    run.add_problems(result.problems)
    for problem in result.problems:
        print(f"skipped: {problem}")
    if not result.images:
        raise DatasetError(f"{dataset.name}: no image could be read; all problems are in {run.problems}")
    run.write_evaluation(result, dataset)
    print(format_metrics(result))
    each = result.seconds / result.images
    print(f"{result.images} images, {each:.3f} s an image; results: {run.root}")
    scores = run.root / "scores.png"
    print(f"next: retinanet-ext predict {_quoted(arguments.weights)} IMAGES; {scores} shows where --score should lie")
    return 0


def run_predict(arguments: argparse.Namespace) -> int:
    """Detect objects in image files."""
    for name in ("score", "min_score"):
        check_probability(name, getattr(arguments, name), "a score")
    require_all("PIL.Image", "tqdm")
    with new_run_dir(arguments.run_dir, "predict") as folder:
        return _predict(arguments, RunFolder(folder))


def _predict(arguments: argparse.Namespace, run: RunFolder) -> int:
    run.check_empty()
    device = resolve_device(arguments.device or "auto")
    _prepare(device)
    model, class_names, _ = load_model(arguments.weights, device, score_thresh=arguments.min_score)
    fold_batch_norm(model).to(memory_format=torch.channels_last)
    paths, problems = find_images(arguments.sources)
    result = predict_files(
        model,
        class_names,
        paths,
        device=device,
        score=arguments.score,
        picture_folder=None if arguments.no_pictures else run.root / "pictures",
        amp=resolve_amp(arguments.amp, device),
        progress=lambda items: track(items, "image"),
    )
    problems += result.problems
    run.problems.unlink(missing_ok=True)
    run.add_problems(problems)
    write_json(run.root / "detections.json", result.content, indent=None)
    scores = [annotation["score"] for annotation in result.content["annotations"]]
    confident = f"{sum(score >= arguments.score for score in scores)} of score {arguments.score:g} or more"
    print(f"{len(result.content['images'])} images, {len(scores)} detections, {confident}; results: {run.root}")
    if result.content["images"]:
        print(f"next: {_after_predict(arguments, scores)}")
    if problems:
        first = f"{len(problems)} problems, first: {problems[0]}"
        print(f"{first}; all in {run.problems}: mend these files, or leave them out", file=sys.stderr)
        return 1
    return 0


def _after_predict(arguments: argparse.Namespace, scores: list[float]) -> str:
    """What to do with detections of such scores."""
    if not scores:
        return f"nothing scores more than --min-score {arguments.min_score:g}: try a lower one, or train longer"
    if max(scores) < arguments.score:
        best = f"the best is {max(scores):.2f}"
        return f"no score reaches --score {arguments.score:g}; {best}: draw more with a lower one"
    return f"retinanet-ext export {_quoted(arguments.weights)} --format onnx --output detector.onnx"


def run_export(arguments: argparse.Namespace) -> int:
    """Write a trained model in another format and say how it is used."""
    settings = {name: value for name, value in vars(arguments).items() if name != "command"}
    print(export(**settings))
    return 0


def run_anchors(arguments: argparse.Namespace) -> int:
    """Report how well anchors cover a data set, and propose better ones."""
    config = TrainConfig(
        arguments.data,
        images=arguments.images,
        preset=arguments.preset,
        min_size=(arguments.min_size,),
        max_size=arguments.max_size,
        anchor_sizes=tuple(arguments.anchor_sizes),
        aspect_ratios=tuple(arguments.aspect_ratios),
    )
    dataset = open_dataset(arguments.data, arguments.split, images=arguments.images, progress=reading)
    print(dataset.describe())
    print(report_anchors(dataset, config))
    return 0


def run_check_data(arguments: argparse.Namespace) -> int:
    """Read a data set in full and say what is wrong with it."""
    require_all("PIL.Image", "matplotlib.figure", "tqdm")
    splits = arguments.split or find_splits(arguments.data) or ["train"]
    with new_run_dir(arguments.run_dir, "check") as folder:
        run = RunFolder(folder)
        run.check_empty()
        run.problems.unlink(missing_ok=True)
        problems = check_data(arguments.data, splits, run, images=arguments.images)
    print(f"{len(problems)} problems; pictures: {run.root}")
    if problems:
        print(
            f"retinanet-ext check-data: {len(problems)} problems, all in {run.problems}: mend the files; training "
            "leaves out what is named there",
            file=sys.stderr,
        )
        return 1
    images = "" if arguments.images is None else f" --images {_quoted(arguments.images)}"
    print(f"next: retinanet-ext anchors {_quoted(arguments.data)}{images}")
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """Time the operators and a small model here."""
    from .bench import run_bench as bench

    return bench(resolve_device(arguments.device), seconds=arguments.seconds)


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration and say what came of it."""
    with new_run_dir(arguments.run_dir, "demo") as run_dir:
        _prepare(resolve_device(arguments.device))
        result = demo.run_demo(run_dir, device=arguments.device, seed=arguments.seed)
    weights = run_dir / "weights" / "best.pt"
    print(f"\nAP {result.ap:.3f}, AP50 {result.ap50:.3f} on held-out images; {result.seconds:.0f} s in all")
    for picture in result.pictures:
        print(f"  {picture}")
    print(
        "next:\n"
        f"  retinanet-ext predict {_quoted(weights)} {_quoted(run_dir / 'data' / 'val')}\n"
        f"  retinanet-ext val {_quoted(weights)} {_quoted(run_dir / 'data')}\n"
        "  retinanet-ext train --help"
    )
    if not result.ap50 >= demo.EXPECTED_AP50:
        print(
            f"retinanet-ext demo: error: AP50 {result.ap50:.3f} is below the {demo.EXPECTED_AP50} that a "
            "working installation reaches; please run retinanet-ext env and report both",
            file=sys.stderr,
        )
        return 1
    return 0


def run_env(arguments: argparse.Namespace) -> int:
    """Print the environment's report, then what is wrong with it."""
    from retinanet_ext import diagnostics

    return diagnostics.print_report()


def _quoted(path: Any) -> str:
    """A path as it is typed in a shell."""
    return shlex.quote(str(path))
