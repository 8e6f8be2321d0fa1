"""What several commands share: how a parser is made, and the arguments they have in common."""

import argparse
import textwrap

DATA_HELP = (
    "the data set: a Pascal VOC folder, a COCO json file, a folder with annotations/instances_SPLIT.json "
    "and images in SPLIT/, or a YOLO yaml"
)


def new_command(
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


def add_anchors(group) -> None:
    group.add_argument(
        "--anchor-sizes",
        type=float,
        nargs=5,
        metavar="PX",
        help="smallest anchor side of the levels P3 to P7, in pixels of the resized image (default: 32 64 "
        "128 256 512); each level has it times 1, 1.26 and 1.59",
    )
    group.add_argument(
        "--aspect-ratios",
        type=float,
        nargs="+",
        metavar="R",
        help="height / width of the anchors (default: 0.5 1 2)",
    )


def add_checks(group) -> None:
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


def add_machine(group, workers: bool = True) -> None:
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
