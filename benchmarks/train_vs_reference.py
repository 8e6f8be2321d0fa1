"""Train and predict with the compiled operators and with their plain PyTorch, and compare losses, detections and time.

    python benchmarks/train_vs_reference.py --data VOC_FOLDER --steps 60

One model takes `--steps` optimizer steps on the operators; beside each of them a second model, from the same weights
and with the same batch, takes one on retinanet_ext.reference. Then the trained model predicts the validation images on
both. Times are medians: of the loss alone, forward and backward, of whole steps, and of post-processing alone. The
sides take turns in going first.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
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
    """What the call returns, and its seconds."""
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


class Side:
    """A model in training on one side: its operators, or their plain PyTorch."""

    def __init__(self, name: str, model: torch.nn.Module, steps: int):
        self.name, self.model = name, model
        self.optimizer = make_optimizer(model, "adamw", 3e-4)
        self.scheduler = make_scheduler(self.optimizer, steps, min(50, steps), "cosine")
        self.seconds: dict[str, list[float]] = {"loss_forward": [], "loss_backward": [], "step": []}
        self.gradient_at: float | None = None

    def _gradient_arrived(self, _gradient: torch.Tensor) -> None:
        """The backward pass leaves the losses when an output of the head has its gradient."""
        if self.gradient_at is None:
            self.gradient_at = time.perf_counter()

    def step(self, batch, clip: float) -> dict[str, float]:
        """Takes an optimizer step; the losses."""
        compute = self.model._losses

        def losses(*arguments):
            for tensor in tensors_of(arguments):
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_arrived)
            result, seconds = timed(lambda: compute(*arguments))
            self.seconds["loss_forward"].append(seconds)
            return result

        self.model._losses, self.gradient_at = losses, None
        try:
            with running_on(self.name, LOSS_OPERATORS):
                begin = time.perf_counter()
                self.optimizer.zero_grad(set_to_none=True)
                found = self.model(batch.images, batch.targets)
                total = sum(found.values())
                backward = time.perf_counter()
                total.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.seconds["step"].append(time.perf_counter() - begin)
        finally:
            del self.model._losses
        self.seconds["loss_backward"].append(self.gradient_at - backward)
        return {name: float(value.detach()) for name, value in found.items()}


def tensors_of(outputs: object) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if not isinstance(outputs, (dict, list, tuple)):
        return []
    children = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for child in children for tensor in tensors_of(child)]


def train(model, loader, steps: int, clip: float) -> dict[str, object]:
    """The steps on the operators, each beside one on plain PyTorch from the same weights and BatchNorm statistics."""
    sides = {name: Side(name, model if name == "operators" else copy.deepcopy(model), steps) for name in SIDES}
    difference, losses = 0.0, []
    batches = itertools.chain.from_iterable(loader for epoch in itertools.count() if not loader.set_epoch(epoch))
    for step, batch in zip(range(steps), batches, strict=False):
        sides["reference"].model.load_state_dict(model.state_dict())
        order = SIDES if step % 2 == 0 else SIDES[::-1]
        found = {name: sides[name].step(batch, clip) for name in order}
        for name, value in found["operators"].items():
            difference = max(difference, abs(value - found["reference"][name]) / abs(found["reference"][name]))
        losses.append(found)
    medians = {
        f"{what}_seconds_median": {name: statistics.median(side.seconds[what]) for name, side in sides.items()}
        for what in ("loss_forward", "loss_backward", "step")
    }
    return {
        "steps": steps,
        "largest_relative_difference_of_a_loss": difference,
        "first_losses": losses[:2],
        "last_losses": losses[-1],
        **medians,
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
    facts = origin()
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
    report = {
        **facts,
        "training": train(model, loader, arguments.steps, CLIP_GRAD_NORM["adamw"]),
        "prediction": predict(model, val_set, 87),
    }
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        write_results(arguments.output, report)


if __name__ == "__main__":
    main()
