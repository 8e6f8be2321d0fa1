"""The command `retinanet-ext`: train, val, predict, export, anchors, check-data, bench, env, demo.

Exit status: 0 done; 1 the command failed, with the reason on standard error; 2 arguments that are missing,
contradict each other or have a wrong value, before anything is written; 130 interrupted. A module here holds the
arguments of one command, `engine.commands` what it does with them. The extras of training are imported by the
commands that use them, so `--help` and `env` need none.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from . import anchors, bench, check_data, demo, env, export, predict, train, val


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. What argparse itself refuses raises SystemExit(2), as it does."""
    arguments = make_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        # A log that is followed (`| tee`, nohup) gets each line when it is printed, not 8 KiB later.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        from retinanet_ext.engine import commands

        return getattr(commands, f"run_{arguments.command.replace('-', '_')}")(arguments)
    except KeyboardInterrupt:
        print("\nretinanet-ext: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _readable(error)
        if message is None or os.environ.get("RETINANET_EXT_TRACEBACK"):
            raise
        status = _status(error)
        # Wrong arguments are wrong for every process that torchrun has started: one of them says so.
        if status != 2 or _speaks():
            print(f"retinanet-ext {arguments.command}: error: {message}", file=sys.stderr)
        return status


def _speaks() -> bool:
    """Whether this is the main process of those that torchrun has started, or alone."""
    return os.environ.get("RANK", "0") == "0"


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


class Parser(argparse.ArgumentParser):
    """Says of wrong arguments one line, as the commands themselves do, without the list of all options."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see: {self.prog} --help)\n" if _speaks() else None)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    for module in (train, val, predict, export, anchors, check_data, bench, env, demo):
        module.add_parser(commands)
    return parser
