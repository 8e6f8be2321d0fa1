"""`retinanet-ext check-data`: read a whole data set and name what is wrong with it."""

from .options import DATA_HELP, new_command


def add_parser(commands) -> None:
    command = new_command(
        commands,
        "check-data",
        "read a whole data set, name each bad box and file, count and draw what there is",
        "  retinanet-ext check-data VOCdevkit/VOC2012\n"
        "  retinanet-ext check-data train.json --images photos\n"
        "  retinanet-ext check-data data.yaml --split train val --run-dir checked",
        "Read every image and box of a data set. Names each bad box and file and each image that comes twice, counts "
        "objects by class, and writes problems.txt and of each split SPLIT_labels.png and SPLIT_samples.jpg. Exits "
        "with 1 if there is any problem.",
    )
    command.add_argument("data", help=DATA_HELP)
    command.add_argument("--images", metavar="DIR", help="the images of a COCO json, if they are not beside it")
    command.add_argument(
        "--split", nargs="+", metavar="NAME", help="splits to read (default: those of train, val and test there are)"
    )
    command.add_argument("--run-dir", metavar="DIR", help="where pictures go (default: runs/check, runs/check2, ...)")
