"""`retinanet-ext bench`: how fast this is on this machine."""

from .options import new_command


def add_parser(commands) -> None:
    command = new_command(
        commands,
        "bench",
        "time the operators and a small model on this machine, beside torchvision's",
        "  retinanet-ext bench\n  OMP_NUM_THREADS=1 retinanet-ext bench --device cpu",
        "Time the operators, a training step and inference of a small RetinaNet on this machine, in less than two "
        "minutes (what would take longer is left out), beside torchvision's where it is installed. The sides take "
        "turns; their results are compared first, and it exits with 1 if they differ.",
    )
    command.add_argument("--device", default="auto", help="auto, cpu or cuda[:N] (default: auto)")
    command.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        metavar="S",
        help="time for each of the eight lines; more than 3 lengthens the whole (default: 3)",
    )
