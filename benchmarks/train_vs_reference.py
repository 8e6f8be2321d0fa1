"""Train and predict with the compiled operators and with their plain PyTorch, and compare losses, detections and time.

    python benchmarks/train_vs_reference.py --data VOC_FOLDER --steps 60

One model takes `--steps` optimizer steps on the operators; before each step the same batch and weights go through the
loss on retinanet_ext.reference too. Then the trained model predicts the validation images on both. Times are medians of
the loss (or of post-processing) alone, and of the whole step beside it. The sides take turns in going first.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from results_file import origin, write_results

from retinanet_ext import ops, reference
from retinanet_ext.data import make_loader, open_dataset
from retinanet_ext.engine.checkpoint import build_model
from retinanet_ext.engine.config import octaves
from retinanet_ext.engine.schedule import CLIP_GRAD_NORM, make_optimizer, make_scheduler

SIDES = ("operators", "reference")
LOSS_OPERATORS = ("assign_targets", "multilevel_focal_loss", "box_regression_loss")


@contextlib.contextmanager
def running_on(side: str, names: tuple[str, ...]) -> Iterator[None]:
    """The model calls retinanet_ext.ops; here it finds the reference's functions there."""
    kept = {name: getattr(ops, name) for name in names}
    if side == "reference":
        for name in names:
            setattr(ops, name, getattr(reference, name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(ops, name, function)


def timed(call: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


class Recorder:
    """Stands between the model and its operators: how long they took, forward."""

    def __init__(self, model: torch.nn.Module, method: str):
        self.seconds = 0.0
        self.wrapped = getattr(model, method)
        setattr(model, method, self)

    def __call__(self, *arguments):
        result, self.seconds = timed(lambda: self.wrapped(*arguments))
        return result


def loss_of(model: torch.nn.Module, batch, side: str) -> dict[str, float]:
    """Losses of one batch on one side, and the seconds that they took, without the network's own forward pass."""
    recorder = Recorder(model, "_losses")
    try:
        with running_on(side, LOSS_OPERATORS), torch.no_grad():
            losses = model(batch.images, batch.targets)
    finally:
        del model._losses
    return {**{name: float(value) for name, value in losses.items()}, "seconds": recorder.seconds}


def train(model, loader, optimizer, scheduler, steps: int, clip: float) -> dict[str, object]:
    """The steps on the operators, each after a look at both sides' losses in the same state (BatchNorm's too)."""
    seconds = {side: [] for side in SIDES}
    difference, step_seconds, first = 0.0, [], []
    batches = itertools.chain.from_iterable(loader for epoch in itertools.count() if not loader.set_epoch(epoch))
    for step, batch in zip(range(steps), batches, strict=False):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found = {}
        for side in SIDES if step % 2 == 0 else SIDES[::-1]:
            found[side] = loss_of(model, batch, side)
            seconds[side].append(found[side].pop("seconds"))
            model.load_state_dict(state)
        for name, value in found["operators"].items():
            difference = max(difference, abs(value - found["reference"][name]) / abs(found["reference"][name]))
        first.append(found)

        def take_step(batch=batch):
            optimizer.zero_grad(set_to_none=True)
            sum(model(batch.images, batch.targets).values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()

        step_seconds.append(timed(take_step)[1])
    return {
        "steps": steps,
        "largest_relative_difference_of_a_loss": difference,
        "first_losses": first[:2],
        "last_losses": first[-1],
        "loss_seconds_median": {side: statistics.median(values) for side, values in seconds.items()},
        "step_seconds_median": statistics.median(step_seconds),
    }


def predict(model, dataset, images: int) -> dict[str, object]:
    """Detections of both sides over validation images: what differs, and how long post-processing took."""
    model.eval()
    seconds = {side: [] for side in SIDES}
    same, detections, box_difference, score_difference = 0, 0, 0.0, 0.0
    for index in range(min(images, len(dataset))):
        image = dataset[index][0]
        found = {}
        for side in SIDES if index % 2 == 0 else SIDES[::-1]:
            recorder = Recorder(model, "_detections")
            try:
                with running_on(side, ("detect",)), torch.no_grad():
                    [found[side]] = model([image])
            finally:
                del model._detections
            seconds[side].append(recorder.seconds)
        ours, theirs = found["operators"], found["reference"]
        detections += len(theirs["labels"])
        if torch.equal(ours["labels"], theirs["labels"]):
            same += 1
            if len(ours["labels"]) > 0:
                box_difference = max(box_difference, float((ours["boxes"] - theirs["boxes"]).abs().max()))
                score_difference = max(score_difference, float((ours["scores"] - theirs["scores"]).abs().max()))
    return {
        "images": min(images, len(dataset)),
        "images_with_the_same_labels_in_the_same_order": same,
        "detections": detections,
        "largest_difference_of_a_coordinate": box_difference,
        "largest_difference_of_a_score": score_difference,
        "postprocess_seconds_median": {side: statistics.median(values) for side, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a VOC folder, or a COCO set, with splits train and val")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--min-size", type=int, default=240)
    parser.add_argument("--max-size", type=int, default=320)
    parser.add_argument("--anchor-sizes", type=float, nargs=5, default=[16, 32, 64, 128, 256])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the json here")
    arguments = parser.parse_args()
    train_set = open_dataset(arguments.data, "train")
    val_set = open_dataset(arguments.data, "val", class_names=train_set.class_names)
    torch.manual_seed(arguments.seed)
    model = build_model(
        {
            "arch": "resnet18",
            "num_classes": len(train_set.class_names),
            "min_size": arguments.min_size,
            "max_size": arguments.max_size,
            "anchor_sizes": octaves(arguments.anchor_sizes),
        }
    ).train()
    loader = make_loader(train_set, arguments.batch_size, train=True, seed=arguments.seed)
    optimizer = make_optimizer(model, "adamw", 3e-4)
    scheduler = make_scheduler(optimizer, arguments.steps, min(50, arguments.steps), "cosine")
    report = {
        **origin(),
        "training": train(model, loader, optimizer, scheduler, arguments.steps, CLIP_GRAD_NORM["adamw"]),
        "prediction": predict(model, val_set, 87),
    }
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        write_results(arguments.output, report)


if __name__ == "__main__":
    main()
