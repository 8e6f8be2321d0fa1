"""`retinanet-ext demo`: train and evaluate on a generated set."""

from .options import new_command


def add_parser(commands) -> None:
    command = new_command(
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
