"""`retinanet-ext export`: write a trained model for other programs."""

from .options import new_command


def add_parser(commands) -> None:
    command = new_command(
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
