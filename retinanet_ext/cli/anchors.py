"""`retinanet-ext anchors`: which boxes the anchors cover, and better anchors."""

from retinanet_ext.models import PRESETS

from .options import DATA_HELP, add_anchors, new_command


def add_parser(commands) -> None:
    command = new_command(
        commands,
        "anchors",
        "report which boxes of a data set the anchors cover, and propose better ones",
        "  retinanet-ext anchors VOCdevkit/VOC2012\n"
        "  retinanet-ext anchors cells --min-size 240 --max-size 320 --anchor-sizes 16 32 64 128 256",
        "Report, by size and by class, how many boxes of a data set have an anchor of IoU 0.5 or more once their image "
        "is resized, and propose sizes and ratios that cover more. Give it the sizes that train will get. No image is "
        "decoded, nothing is written.",
    )
    command.add_argument("data", help=DATA_HELP)
    command.add_argument("--images", metavar="DIR", help="the images of a COCO json, if they are not beside it")
    command.add_argument("--split", default="train", help="name of the split (default: train)")
    command.add_argument(
        "--min-size",
        type=int,
        default=800,
        metavar="PX",
        help="side the shorter image side is resized to (default: 800)",
    )
    command.add_argument(
        "--max-size", type=int, default=1333, metavar="PX", help="limit of the longer side (default: 1333)"
    )
    command.add_argument(
        "--preset",
        choices=PRESETS,
        help="whose rounding, strides and centres the anchors have, see docs/models.md (default: torchvision's)",
    )
    add_anchors(command)
    command.set_defaults(anchor_sizes=[32, 64, 128, 256, 512], aspect_ratios=[0.5, 1.0, 2.0])
