"""`retinanet-ext predict`: detect objects in images."""

from .options import add_machine, new_command


def add_parser(commands) -> None:
    command = new_command(
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
    add_machine(command, workers=False)
