"""The command `retinanet-ext`: train, val, predict, export, demo, env.

Exit status: 0 done; 1 the command failed, with the reason on standard error; 2 arguments that are missing,
contradict each other or have a wrong value, before anything is written; 130 interrupted. The extras of training
are imported by the commands that use them, so `--help` and `env` need none.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

_DATA_HELP = (
    "the data set: a Pascal VOC folder, a COCO json file, or a folder with annotations/instances_SPLIT.json "
    "and images in SPLIT/"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. What argparse itself refuses raises SystemExit(2), as it does."""
    arguments = make_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        # A log that is followed (`| tee`, nohup) gets each line when it is printed, not 8 KiB later.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        from retinanet_ext.engine import commands

        return getattr(commands, f"run_{arguments.command}")(arguments)
    except KeyboardInterrupt:
        print("\nretinanet-ext: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _readable(error)
        if message is None or os.environ.get("RETINANET_EXT_TRACEBACK"):
            raise
        print(f"retinanet-ext {arguments.command}: error: {message}", file=sys.stderr)
        return _status(error)


def _status(error: Exception) -> int:
    from retinanet_ext.engine.settings import UsageError

    return 2 if isinstance(error, UsageError) else 1


def _readable(error: Exception) -> str | None:
    """One message for a mistake that a user can mend; None for what is a defect of this program."""
    import torch

    from retinanet_ext.data.extras import MissingExtraError
    from retinanet_ext.engine.loop import TrainingError
    from retinanet_ext.engine.settings import SettingError

    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: try a smaller --batch-size or --min-size ({str(error).splitlines()[0]})"
    if isinstance(error, SettingError):
        return f"{', '.join(map(_option, error.names))}: {error.text}"
    if isinstance(error, ValueError | TrainingError | MissingExtraError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return None


def _option(setting: str) -> str:
    """The option of a setting of a run."""
    return {"validate_every": "--val-every", "verify": "--check-images"}.get(setting, f"--{setting.replace('_', '-')}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retinanet-ext",
        description="Train, evaluate and use RetinaNet detectors.",
        epilog="examples:\n"
        "  retinanet-ext demo\n"
        "  retinanet-ext train VOCdevkit/VOC2012 --arch resnet50 --epochs 12\n"
        "  retinanet-ext predict runs/train/weights/best.pt photos/\n"
        "Each command has its own --help. Exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.\n"
        "RETINANET_EXT_TRACEBACK=1 shows where an error came from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_val(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_demo(commands)
    _add_env(commands)
    return parser


def _command(
    commands, name: str, summary: str, examples: str, description: str = "", **options
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description or summary[0].upper() + summary[1:] + ".", 80),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    return command


def _add_train(commands) -> None:
    command = _command(
        commands,
        "train",
        "train a RetinaNet on a data set",
        "  retinanet-ext train VOCdevkit/VOC2012 --arch resnet50 --epochs 12\n"
        "  retinanet-ext train train.json --images photos --val-data val.json --min-size 480 --max-size 640\n"
        "  retinanet-ext train cells --arch resnet18 --min-size 240 --max-size 320 "
        "--anchor-sizes 16 32 64 128 256\n"
        "  retinanet-ext train --resume runs/train",
        "Train a RetinaNet from random weights. The run folder receives args.json, results.csv (an epoch a "
        "row), steps.csv, results.png, problems.txt, weights/last.pt (the whole state, for --resume), "
        "weights/best.pt (the model of the best validation AP), and of the best epoch "
        "metrics.json, per_class.csv, PR_curve.png and detections.json.",
        # Defaults are TrainConfig's: what is not typed is not there, so that --resume knows what was asked of it.
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("data", nargs="?", help=_DATA_HELP)
    data = command.add_argument_group("data")
    data.add_argument("--images", metavar="DIR", help="the images of a COCO json, if they are not beside it")
    data.add_argument("--split", help="name of the training split (default: train)")
    data.add_argument("--val-data", metavar="DATA", help="the validation set, if it is not in DATA")
    data.add_argument("--val-images", metavar="DIR", help="the images of --val-data (default: --images)")
    data.add_argument("--val-split", help="name of the validation split (default: val)")
    data.add_argument("--no-val", action="store_true", help="train without a validation set")
    data.add_argument(
        "--val-every",
        dest="validate_every",
        type=int,
        metavar="N",
        help="validate every N epochs and after the last (default: 1)",
    )
    _add_checks(data)
    model = command.add_argument_group("model")
    model.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50", "resnet101"), help="(default: resnet50)")
    model.add_argument("--norm", choices=("batch", "frozen_batch", "group"), help="(default: batch)")
    model.add_argument(
        "--min-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="side the shorter image side is resized to; of several, each batch draws one (default: 800)",
    )
    model.add_argument("--max-size", type=int, metavar="PX", help="limit of the longer side (default: 1333)")
    model.add_argument(
        "--anchor-sizes",
        type=float,
        nargs=5,
        metavar="PX",
        help="smallest anchor side of the levels P3 to P7, in pixels of the resized image (default: 32 64 "
        "128 256 512); each level has it times 1, 1.26 and 1.59",
    )
    model.add_argument(
        "--aspect-ratios",
        type=float,
        nargs="+",
        metavar="R",
        help="height / width of the anchors (default: 0.5 1 2)",
    )
    recipe = command.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, help="(default: 12)")
    recipe.add_argument("--batch-size", type=int, metavar="N", help="images a step (default: 4)")
    recipe.add_argument("--optimizer", choices=("adamw", "sgd"), help="(default: adamw)")
    recipe.add_argument(
        "--lr", type=float, help="learning rate (default: 3e-4 for adamw, 0.01 x batch size / 16 for sgd)"
    )
    recipe.add_argument(
        "--weight-decay", type=float, help="(default: 0.01 for adamw, 1e-4 for sgd; norms and biases none)"
    )
    recipe.add_argument(
        "--schedule",
        choices=("cosine", "step"),
        help="step: a tenth at 8/12 and 11/12 of the run (default: cosine)",
    )
    recipe.add_argument(
        "--warmup-steps",
        type=int,
        metavar="N",
        help="steps of linear warm-up (default: a tenth of the run, at most 500)",
    )
    recipe.add_argument(
        "--clip-grad-norm",
        type=float,
        metavar="X",
        help="limit of the gradient's norm, 0 for none (default: 1 for adamw, none for sgd)",
    )
    recipe.add_argument("--hflip", type=float, metavar="P", help="chance of a left-right flip (default: 0.5)")
    recipe.add_argument("--vflip", type=float, metavar="P", help="chance of a top-bottom flip (default: 0)")
    recipe.add_argument("--seed", type=int, help="(default: 0)")
    run = command.add_argument_group("run")
    run.add_argument(
        "--run-dir", default=None, metavar="DIR", help="the run folder (default: runs/train, runs/train2, ...)"
    )
    run.add_argument(
        "--resume",
        default=None,
        metavar="RUN",
        help="go on with the run in this folder after its last finished epoch, or from the start if there is none, "
        "with its own arguments; only --epochs, --device and --workers can be changed",
    )
    _add_machine(run)
    run.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory layout of images and weights; the faster one on most machines (default: yes)",
    )


def _add_val(commands) -> None:
    command = _command(
        commands,
        "val",
        "evaluate a trained model with pycocotools",
        "  retinanet-ext val runs/train/weights/best.pt VOCdevkit/VOC2012\n"
        "  retinanet-ext val best.pt test.json --images photos --run-dir runs/test",
        "Evaluate a trained model: COCO AP overall and for each class. Writes metrics.json, per_class.csv, "
        "PR_curve.png, detections.json (COCO results) and problems.txt to the run folder.",
    )
    command.add_argument("weights", help="a checkpoint of `retinanet-ext train`, or its run folder: the best weights")
    command.add_argument("data", help=_DATA_HELP)
    command.add_argument("--images", metavar="DIR", help="the images of a COCO json, if they are not beside it")
    command.add_argument("--split", default="val", help="name of the split (default: val)")
    command.add_argument("--batch-size", type=int, default=4, metavar="N", help="(default: 4)")
    command.add_argument("--run-dir", metavar="DIR", help="where results go (default: runs/val, runs/val2, ...)")
    _add_checks(command)
    command.set_defaults(verify="header")
    _add_machine(command)


def _add_predict(commands) -> None:
    command = _command(
        commands,
        "predict",
        "detect objects in images",
        "  retinanet-ext predict runs/train/weights/best.pt photo.jpg\n"
        "  retinanet-ext predict best.pt photos/ more.png list.txt --score 0.3 --run-dir found",
        "Detect objects in images: pictures with boxes drawn, and detections.json (a COCO data set whose "
        "annotations carry scores). Exits with 1 if any image could not be read, after doing the others.",
    )
    command.add_argument("weights", help="a checkpoint of `retinanet-ext train`, or its run folder: the best weights")
    command.add_argument("sources", nargs="+", help="images, folders of images, or .txt lists with a path a line")
    command.add_argument(
        "--score",
        type=float,
        default=0.5,
        metavar="S",
        help="draw detections of at least this score (default: 0.5)",
    )
    command.add_argument(
        "--min-score",
        type=float,
        default=0.05,
        metavar="S",
        help="write detections above this score to the json (default: 0.05)",
    )
    command.add_argument("--no-pictures", action="store_true", help="write the json alone")
    command.add_argument(
        "--run-dir", metavar="DIR", help="where results go (default: runs/predict, runs/predict2, ...)"
    )
    _add_machine(command, workers=False)


def _add_export(commands) -> None:
    command = _command(
        commands,
        "export",
        "write a trained model for other programs",
        "  retinanet-ext export runs/train --format pt2 --output detector.pt2 --size 640\n"
        "  retinanet-ext export best.pt --format pt2 --output any_size.pt2 --dynamic-size --batch-size 1\n"
        "  retinanet-ext export best.pt --format onnx --output detector.onnx --size 480 640\n"
        "  retinanet-ext export best.pt --format torchvision --output weights.pth\n"
        "formats:\n"
        "  pt2          torch.export of the whole detector; torch.export.load reads it beside this library\n"
        "  aoti         the same, compiled by AOTInductor for this kind of machine; needs a C++ compiler\n"
        "  onnx         the whole detector in standard operators, for onnxruntime and others\n"
        "  onnx-heads   the network alone: class logits, box deltas and anchors\n"
        "  torchvision  the weights alone, for torchvision's RetinaNet",
        "Write a trained model for other programs. A program takes a batch of images, float32 in 0..1, that have "
        "its size already, a multiple of 32, and gives boxes, scores, labels and counts; see docs/export.md.",
    )
    command.add_argument("weights", help="a checkpoint of `retinanet-ext train`, or its run folder: the best weights")
    # Formats are checked by the export itself, which knows them; here they would load torch for --help.
    command.add_argument("--format", required=True, metavar="FORMAT", help="one of those below")
    command.add_argument("--output", required=True, metavar="FILE", help="the file to write; it must not exist")
    command.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PX",
        help="height and width of the images, or one side of squares, multiples of 32 (default: the model's "
        "min_size and max_size, rounded up)",
    )
    command.add_argument(
        "--dynamic-size",
        action="store_true",
        help="take any height and width that are multiples of 32 and at least 160",
    )
    command.add_argument("--batch-size", type=int, metavar="N", help="images a call (default: any number)")
    command.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help="give detections above this score (default: the model's threshold, 0.05 after training)",
    )
    command.add_argument("--device", help="where a pt2 or aoti program is to run: auto, cpu or cuda[:N] (default: cpu)")


def _add_demo(commands) -> None:
    command = _command(
        commands,
        "demo",
        "train and evaluate on a generated data set, in minutes on a CPU",
        "  retinanet-ext demo\n  retinanet-ext demo --run-dir /tmp/demo --seed 1",
        "Generate a small COCO-format data set of shapes on textured backgrounds, train a RetinaNet on it "
        "from random weights, evaluate it on held-out images and draw what it finds. Fails if the AP50 falls "
        "short of what a working installation reaches.",
    )
    command.add_argument("--run-dir", metavar="DIR", help="where everything goes (default: runs/demo, runs/demo2, ...)")
    command.add_argument("--seed", type=int, default=0, help="(default: 0)")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda[:N] (default: auto)")


def _add_env(commands) -> None:
    _command(
        commands,
        "env",
        "print versions, build, devices, and what is wrong with them",
        "  retinanet-ext env",
        "Print versions, build and devices, for a bug report. Exits with 1 if something is wrong.",
    )


def _add_checks(group) -> None:
    group.add_argument(
        "--check-images",
        dest="verify",
        choices=("header", "decode"),
        help="what to verify of each image before the start: its header (quick) or all its pixels; broken "
        "pixels found later are reported and skipped (default: header)",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop if the data has any problem; verifies all pixels before the start",
    )


def _add_machine(group, workers: bool = True) -> None:
    group.add_argument("--device", help="auto, cpu or cuda[:N] (default: auto)")
    if workers:
        group.add_argument(
            "--workers",
            type=int,
            metavar="N",
            help="loader processes (default: 4 beside a GPU, 0 on the CPU)",
        )
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="bf16 autocast (default: on GPUs of compute capability 8.0 or more, else off)",
    )
