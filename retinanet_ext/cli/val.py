"""`retinanet-ext val`: evaluate a trained model."""

from .options import DATA_HELP, add_checks, add_machine, new_command


def add_parser(commands) -> None:
    command = new_command(
        commands,
        "val",
        "evaluate a trained model",
        "  retinanet-ext val runs/train/weights/best.pt VOCdevkit/VOC2012\n"
        "  retinanet-ext val best.pt test.json --images photos --run-dir runs/test",
        "Evaluate a trained model: COCO AP overall and for each class, and the loss. Writes metrics.json, "
        "per_class.csv, PR_curve.png, confusion_matrix.png, scores.png, val_batch*.jpg, detections.json (COCO results) "
        "and problems.txt to the run folder.",
    )
    command.add_argument("weights", help="a checkpoint of `retinanet-ext train`, or its run folder: the best weights")
    command.add_argument("data", help=DATA_HELP)
    command.add_argument("--images", metavar="DIR", help="the images of a COCO json, if they are not beside it")
    command.add_argument("--split", default="val", help="name of the split (default: val)")
    command.add_argument("--batch-size", type=int, default=4, metavar="N", help="(default: 4)")
    command.add_argument("--run-dir", metavar="DIR", help="where results go (default: runs/val, runs/val2, ...)")
    add_checks(command)
    command.set_defaults(verify="header")
    add_machine(command)
