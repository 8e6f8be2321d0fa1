"""`retinanet-ext train`: train a RetinaNet."""

import argparse

from retinanet_ext.models import BACKBONES, PRESETS
from retinanet_ext.models.resnet import NORMS

from .options import DATA_HELP, add_anchors, add_checks, add_machine, new_command


def add_parser(commands) -> None:
    command = new_command(
        commands,
        "train",
        "train a RetinaNet on a data set",
        "  retinanet-ext train VOCdevkit/VOC2012 --arch resnet50 --epochs 12\n"
        "  retinanet-ext train train.json --images photos --val-data val.json --min-size 480 --max-size 640\n"
        "  retinanet-ext train data.yaml --epochs 50 --run-dir runs/yolo_data\n"
        "  retinanet-ext train cells --arch resnet18 --min-size 240 --max-size 320 "
        "--anchor-sizes 16 32 64 128 256\n"
        "  retinanet-ext train cells --arch resnet50 --weights resnet50.pth\n"
        "  retinanet-ext train --resume runs/train\n"
        "  torchrun --nproc-per-node=8 --no-python retinanet-ext train train.json --val-data val.json --batch-size 16\n"
        "docs/training.md says what each option does and when it helps.",
        "Train a RetinaNet, from random weights unless --weights names others. The run folder receives args.json, "
        "results.csv (an epoch a row), steps.csv, results.png, labels.png, train_batch*.jpg, problems.txt, "
        "weights/last.pt (the whole state, for --resume), weights/best.pt (the model of the best validation AP), and "
        "of the best epoch metrics.json, per_class.csv, detections.json, PR_curve.png, confusion_matrix.png, "
        "scores.png and val_batch*.jpg; TensorBoard's events where it is installed.",
        # Defaults are TrainConfig's: what is not typed is not there, so that --resume knows what was asked of it.
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("data", nargs="?", help=DATA_HELP)
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
        help="validate every N epochs, 0: never, and after the last (default: 1)",
    )
    add_checks(data)
    model = command.add_argument_group("model")
    model.add_argument("--arch", choices=BACKBONES, help="the backbone (default: resnet50)")
    model.add_argument(
        "--preset",
        choices=PRESETS,
        help="whose anchors, losses, matching and limits the model has, see docs/models.md (default: torchvision's, "
        "matching as this library's)",
    )
    model.add_argument("--norm", choices=tuple(NORMS), help="of the backbone (default: batch)")
    model.add_argument(
        "--weights",
        metavar="FILE",
        help="start from these: a run or a checkpoint of this library, a RetinaNet of torchvision, detectron2 or "
        "mmdet, or a ResNet classifier, for the backbone; what does not fit, such as the last layer for other "
        "classes, starts random (default: all of it)",
    )
    model.add_argument(
        "--min-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="side the shorter image side is resized to; of several, each image draws one (default: 800)",
    )
    model.add_argument("--max-size", type=int, metavar="PX", help="limit of the longer side (default: 1333)")
    add_anchors(model)
    recipe = command.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, help="(default: 12)")
    recipe.add_argument("--batch-size", type=int, metavar="N", help="images at once, over all processes (default: 4)")
    recipe.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="add up the gradients of N batches for each step, which then has N x batch size images (default: 1)",
    )
    recipe.add_argument("--optimizer", choices=("adamw", "sgd"), help="(default: adamw)")
    recipe.add_argument(
        "--lr", type=float, help="learning rate (default: 3e-4 for adamw, 0.01 x images a step / 16 for sgd)"
    )
    recipe.add_argument(
        "--scale-lr",
        action="store_true",
        help="--lr is meant for 16 images a step: scale it linearly to those of this run",
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
        "--lr-steps",
        type=float,
        nargs="+",
        metavar="EPOCH",
        help="with --schedule step: after which epochs the rate is divided by ten",
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
    recipe.add_argument(
        "--ema",
        type=float,
        metavar="DECAY",
        help="average the weights over the steps, such as 0.9998; the average is validated and kept in best.pt "
        "(default: no average)",
    )
    recipe.add_argument(
        "--scale-jitter",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="zoom each image by a random scale between these, cutting or padding it, such as 0.5 1.5 or the "
        "large-scale jitter 0.1 2 (default: none)",
    )
    recipe.add_argument("--hflip", type=float, metavar="P", help="chance of a left-right flip (default: 0.5)")
    recipe.add_argument("--vflip", type=float, metavar="P", help="chance of a top-bottom flip (default: 0)")
    recipe.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop after N validations without a better AP (default: all epochs)",
    )
    recipe.add_argument("--seed", type=int, help="(default: 0)")
    run = command.add_argument_group("run")
    run.add_argument(
        "--run-dir", default=None, metavar="DIR", help="the run folder (default: runs/train, runs/train2, ...)"
    )
    run.add_argument(
        "--resume",
        default=None,
        metavar="RUN",
        help="go on with the run in this folder after its last checkpoint, or from the start if there is none, with "
        "its own arguments; only --epochs, --device, --workers, --lr, --clip-grad-norm, --amp, --patience and "
        "--save-every can be changed",
    )
    run.add_argument(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="write last.pt every so many steps too, not only after each epoch; 0 for no (default: 0)",
    )
    add_machine(run)
    run.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="memory layout of images and weights; the faster one on most machines (default: yes)",
    )
    run.add_argument(
        "--compile",
        action="store_true",
        help="compile network and losses (torch.compile); takes minutes at the start, needs a C++ compiler",
    )
    run.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay the whole step as a CUDA graph, one for each shape of a batch; for small networks, one process",
    )
    run.add_argument(
        "--sync-batch-norm",
        action="store_true",
        help="BatchNorm over the images of all processes; for few images a GPU, CUDA alone",
    )
