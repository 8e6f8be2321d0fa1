"""What the commands of `retinanet-ext` do with their arguments; each returns the exit status."""

import argparse
import shlex
import sys

from retinanet_ext.data import open_dataset
from retinanet_ext.data.extras import require, require_all

from . import demo
from .checkpoint import load_model
from .config import TrainConfig, resolve_amp, resolve_device, resolve_workers, resume_config
from .evaluate import evaluate, format_metrics
from .predict import find_images, predict_files
from .run_folder import RunFolder, new_run_dir, write_json
from .train import EXTRAS, Training, report_problems

# What --resume lets change.
_RESUME_CHANGES = ("epochs", "device", "workers")


def run_train(arguments: argparse.Namespace) -> int:
    """Train, or go on with a run."""
    if arguments.resume is not None:
        if arguments.data is not None or arguments.run_dir is not None:
            raise ValueError("--resume takes DATA and --run-dir from the run: leave them out")
        _refuse_changes(arguments)
        changes = {name: getattr(arguments, name) for name in _RESUME_CHANGES}
        training = Training(resume_config(arguments.resume, **changes), arguments.resume, resume=True)
    else:
        if arguments.data is None:
            raise ValueError("DATA is missing: name a data set, or a run to go on with (--resume RUN)")
        config = TrainConfig(
            data=arguments.data,
            images=arguments.images,
            split=arguments.split,
            val_data=arguments.val_data,
            val_images=arguments.val_images,
            val_split=arguments.val_split,
            validate_every=0 if arguments.no_val else arguments.val_every,
            arch=arguments.arch,
            norm=arguments.norm,
            min_size=tuple(arguments.min_size),
            max_size=arguments.max_size,
            anchor_sizes=tuple(arguments.anchor_sizes),
            aspect_ratios=tuple(arguments.aspect_ratios),
            epochs=12 if arguments.epochs is None else arguments.epochs,
            batch_size=arguments.batch_size,
            optimizer=arguments.optimizer,
            lr=arguments.lr,
            weight_decay=arguments.weight_decay,
            schedule=arguments.schedule,
            warmup_steps=arguments.warmup_steps,
            clip_grad_norm=arguments.clip_grad_norm,
            hflip=arguments.hflip,
            vflip=arguments.vflip,
            seed=arguments.seed,
            workers=arguments.workers,
            device=arguments.device or "auto",
            amp=arguments.amp,
            channels_last=arguments.channels_last,
            verify=arguments.check_images,
            strict=arguments.strict,
        )
        with new_run_dir(arguments.run_dir, "train") as folder:
            training = Training(config, folder)
    run_dir = training.run.root
    try:
        result = training.fit()
    except KeyboardInterrupt:
        print(f"\ninterrupted: go on with: retinanet-ext train --resume {shlex.quote(str(run_dir))}", file=sys.stderr)
        return 130
    if result is not None:
        print(format_metrics(result))
    print(f"weights: {training.run.best}\nlogs and plots: {run_dir}")
    return 0


def _refuse_changes(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options of `train` that a resumed run, which has its own, would not follow."""
    from retinanet_ext.cli import make_parser

    free = {"command", "resume", *_RESUME_CHANGES}
    defaults = vars(make_parser().parse_args(["train"]))
    changed = [name for name, value in vars(arguments).items() if name not in free and value != defaults[name]]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        free_options = ", ".join(f"--{name}" for name in _RESUME_CHANGES)
        raise ValueError(f"--resume goes on as the run began: {options} cannot be changed (only {free_options})")


def run_val(arguments: argparse.Namespace) -> int:
    """Evaluate a checkpoint on a data set."""
    require_all(*EXTRAS)
    with new_run_dir(arguments.run_dir, "val") as folder:
        return _val(arguments, RunFolder(folder))


def _val(arguments: argparse.Namespace, run: RunFolder) -> int:
    run.check_empty()
    device = resolve_device(arguments.device or "auto")
    model, class_names, _ = load_model(arguments.weights, device)
    dataset = open_dataset(
        arguments.data,
        arguments.split,
        images=arguments.images,
        class_names=class_names,
        verify="decode" if arguments.strict else arguments.check_images,
    )
    run.problems.unlink(missing_ok=True)
    report_problems(dataset, run, print, arguments.strict)
    result = evaluate(
        model,
        dataset,
        batch_size=arguments.batch_size,
        device=device,
        workers=resolve_workers(arguments.workers, device),
        amp=resolve_amp(arguments.amp, device),
        progress=lambda batches: require("tqdm").tqdm(batches, unit="batch", disable=None),
    )
    run.add_problems(result.problems)
    for problem in result.problems:
        print(f"skipped: {problem}")
    run.write_evaluation(result)
    print(format_metrics(result))
    each = result.seconds / max(1, result.images)
    print(f"{result.images} images, {each:.3f} s an image; results: {run.root}")
    return 0


def run_predict(arguments: argparse.Namespace) -> int:
    """Detect objects in image files."""
    require_all("PIL.Image", "tqdm")
    with new_run_dir(arguments.run_dir, "predict") as folder:
        return _predict(arguments, RunFolder(folder))


def _predict(arguments: argparse.Namespace, run: RunFolder) -> int:
    run.check_empty()
    device = resolve_device(arguments.device or "auto")
    model, class_names, _ = load_model(arguments.weights, device, score_thresh=arguments.min_score)
    paths, problems = find_images(arguments.sources)
    result = predict_files(
        model,
        class_names,
        paths,
        device=device,
        score=arguments.score,
        picture_folder=None if arguments.no_pictures else run.root / "pictures",
        amp=resolve_amp(arguments.amp, device),
        progress=lambda items: require("tqdm").tqdm(items, unit="image", disable=None),
    )
    problems += result.problems
    run.problems.unlink(missing_ok=True)
    run.add_problems(problems)
    write_json(run.root / "detections.json", result.content, indent=None)
    found = len(result.content["annotations"])
    print(f"{len(result.content['images'])} images, {found} detections; results: {run.root}")
    if problems:
        print(f"{len(problems)} problems, first: {problems[0]}; all in {run.problems}", file=sys.stderr)
        return 1
    return 0


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration and say what came of it."""
    with new_run_dir(arguments.run_dir, "demo") as run_dir:
        result = demo.run_demo(run_dir, device=arguments.device, seed=arguments.seed)
    weights = run_dir / "weights" / "best.pt"
    print(f"\nAP {result.ap:.3f}, AP50 {result.ap50:.3f} on held-out images; {result.seconds:.0f} s in all")
    for picture in result.pictures:
        print(f"  {picture}")
    print(
        "next:\n"
        f"  retinanet-ext predict {weights} {run_dir / 'data' / 'val'}\n"
        f"  retinanet-ext val {weights} {run_dir / 'data'}\n"
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
