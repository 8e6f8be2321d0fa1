"""Train this library's RetinaNet and torchvision's on the same data set, in turns, and compare AP and speed.

    python benchmarks/train_vs_torchvision.py --data VOC_FOLDER --epochs 10

Both get ResNet-18 (or --arch resnet50) with trainable BatchNorm, the same anchors, the same initial weights (unless
--own-weights), the same loader, order, flips, optimizer and schedule, and are scored by the same code. They train an
epoch each in turn, the first one alternating, so that whatever else the machine does falls on both alike. At the end
each side's weights are also scored in the other's model: what differs there is due to predicting, and the rest to the
weights. On the CPU both keep freed memory for the next step, as `retinanet-ext train` does. Seconds a step are
medians over the steps; data loading counts for both. Peak memory is the most that an epoch of a side held beyond what
there was before it: gradients, the optimizer's state and what the backward pass needs, without the weights.

    python benchmarks/train_vs_torchvision.py --data VOC_FOLDER --lockstep 20 --float64

trains both a step each in turn and says how far their weights are apart, in float64: whether the two trainings are the
same computation, which rounding hides in float32. And

    python benchmarks/train_vs_torchvision.py --data VOC_FOLDER --lockstep 20 --twins

trains torchvision's model twice, the second time from weights that differ from the first's in their last place alone:
how far rounding drives two runs of one computation apart; without --lockstep, how far their AP. At last

    python benchmarks/train_vs_torchvision.py --data VOC_FOLDER --same-weights 51

trains torchvision's model and before each step gives ours its weights and its optimizer's state: how far losses,
gradients and the steps that are taken are apart, however far two runs would be; with --float64 also how far each
gradient is from the one in float64. Over a whole training, --same-weights 471 --every 5 compares one step in five.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peak_memory import peak_bytes
from results_file import origin, write_results
from torch import nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet_ext.data import (
    Batch,
    Compose,
    DetectionDataset,
    RandomHorizontalFlip,
    RandomVerticalFlip,
    make_loader,
    open_dataset,
)
from retinanet_ext.engine.allocator import keep_freed_memory
from retinanet_ext.engine.checkpoint import build_model
from retinanet_ext.engine.config import octaves
from retinanet_ext.engine.evaluate import Evaluation, evaluate, format_metrics
from retinanet_ext.engine.loop import StepRecord, train_steps
from retinanet_ext.engine.schedule import CLIP_GRAD_NORM, make_optimizer, make_scheduler
from retinanet_ext.engine.stepper import Stepper


@dataclass
class Contestant:
    """One model with its own loader, optimizer and schedule, and what it did so far."""

    name: str
    model: nn.Module
    loader: Any
    stepper: Stepper
    device: torch.device
    records: list[StepRecord] = field(default_factory=list)
    result: Evaluation | None = None
    peak_bytes: int | None = None  # None where the system does not say

    def train_epoch(self, epoch: int, total_steps: int) -> None:
        """Train one epoch, or what is left of `total_steps`."""
        self.loader.set_epoch(epoch)
        left = total_steps - len(self.records)
        batches = (batch for _, batch in zip(range(left), self.loader, strict=False))
        steps = train_steps(self.stepper, batches, first_step=len(self.records))
        peak = peak_bytes(lambda: self.records.extend(steps), self.device)
        if peak is not None:
            self.peak_bytes = max(peak, self.peak_bytes or 0)

    def summary(self) -> dict[str, Any]:
        """AP, AP50, steps and times of this contestant."""
        seconds = [record.seconds for record in self.records]
        epoch = len(self.loader)
        return {
            **{key: round(value, 4) for key, value in self.result.metrics.items()},
            "per_class_AP": {row["class"]: round(row["AP"], 4) for row in self.result.per_class},
            "steps": len(self.records),
            "seconds_per_step_median": round(statistics.median(seconds), 4),
            "seconds_per_step_mean": round(statistics.fmean(seconds), 4),
            "peak_bytes": self.peak_bytes,
            "train_seconds": round(sum(seconds), 1),
            "predict_seconds_per_image": round(self.result.seconds / self.result.images, 4),
            "first_losses": [round(r.total, 5) for r in self.records[:3]],
            "epoch_losses": [
                round(statistics.fmean(r.total for r in self.records[first : first + epoch]), 4)
                for first in range(0, len(self.records), epoch)
            ],
        }


def torchvision_model(
    arch: str, num_classes: int, min_size: int, max_size: int, anchor_sizes: list[list[int]]
) -> nn.Module:
    """torchvision's RetinaNet with trainable BatchNorm, random weights."""
    backbone = resnet_fpn_backbone(
        backbone_name=arch,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    anchors = AnchorGenerator(tuple(map(tuple, anchor_sizes)), ((0.5, 1.0, 2.0),) * 5)
    return TorchvisionRetinaNet(backbone, num_classes, min_size=min_size, max_size=max_size, anchor_generator=anchors)


@torch.no_grad()
def change_last_places(model: nn.Module) -> nn.Module:
    """Each weight one unit in the last place, or none, away from what it was."""
    for parameter in model.parameters():
        parameter.mul_(1 + torch.finfo(parameter.dtype).eps * torch.randint(-1, 2, parameter.shape))
    return model


def make_contestants(
    arguments: argparse.Namespace, train_set: DetectionDataset, total_steps: int, device: torch.device
) -> list[Contestant]:
    """Ours first, torchvision's second, with the same weights unless told otherwise; or torchvision's twice."""
    anchor_sizes = octaves(arguments.anchor_sizes)
    num_classes = len(train_set.class_names)
    torch.manual_seed(arguments.seed)
    theirs = torchvision_model(arguments.arch, num_classes, arguments.min_size, arguments.max_size, anchor_sizes)
    torch.manual_seed(arguments.seed)
    ours = build_model(
        {
            "arch": arguments.arch,
            "num_classes": num_classes,
            "min_size": arguments.min_size,
            "max_size": arguments.max_size,
            "anchor_sizes": anchor_sizes,
        }
    )
    if not arguments.own_weights:
        ours.load_state_dict(theirs.state_dict())
    sides = {"retinanet_ext": ours, "torchvision": theirs}
    if arguments.twins:
        sides = {"torchvision": theirs, "torchvision, last places changed": change_last_places(copy.deepcopy(theirs))}
    contestants = []
    for name, model in sides.items():
        model.to(device)
        if arguments.channels_last:
            model.to(memory_format=torch.channels_last)
        loader = make_loader(
            train_set,
            arguments.batch_size,
            train=True,
            transform=Compose([RandomHorizontalFlip(), RandomVerticalFlip()]),
            seed=arguments.seed,
        )
        optimizer = make_optimizer(model, "adamw", arguments.lr)
        scheduler = make_scheduler(optimizer, total_steps, arguments.warmup_steps, "cosine")
        stepper = Stepper(model, optimizer, scheduler, device, clip_grad_norm=arguments.clip_grad_norm)
        contestants.append(Contestant(name, model, loader, stepper, device))
    return contestants


def evaluate_swapped(contestants: list[Contestant], val_set: DetectionDataset) -> dict[str, dict[str, float]]:
    """The metrics that each side's weights reach in the other side's model: whether predictions or weights differ."""
    first, second = contestants
    weights = {one.name: copy.deepcopy(one.model.state_dict()) for one in contestants}
    metrics = {}
    for name, other in ((first.name, second), (second.name, first)):
        other.model.load_state_dict(weights[name])
        result = evaluate(other.model, val_set, device=other.device)
        metrics[name] = {key: round(value, 4) for key, value in result.metrics.items()}
    return metrics


def double(batch: Batch) -> Batch:
    """The batch in float64."""
    images = [image.double() for image in batch.images]
    targets = [{**target, "boxes": target["boxes"].double()} for target in batch.targets]
    return batch._replace(images=images, targets=targets)


def whole(named: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Tensors in the order of their names, as one vector in float64."""
    return torch.cat([value.detach().double().flatten() for _, value in sorted(named)])


def weights_of(model: nn.Module) -> torch.Tensor:
    return whole(model.named_parameters())


def compare_in_lockstep(contestants: list[Contestant], steps: int, in_float64: bool) -> dict[str, Any]:
    """Trains both a step each in turn; after each, how far apart losses are, and what a model holds beside its change.

    That is its weights, and the running statistics of its BatchNorms, which predictions depend on as well.
    """

    def batches_of(loader):
        for _, batch in zip(range(steps), loader, strict=False):
            yield double(batch) if in_float64 else batch

    def statistics_of(model: nn.Module) -> torch.Tensor:
        return whole((name, value) for name, value in model.named_buffers() if ".running_" in name)

    held = {"weights": weights_of, "running_statistics": statistics_of}
    runs = []
    for contestant in contestants:
        if in_float64:
            contestant.model.double()
        contestant.loader.set_epoch(0)
        runs.append(train_steps(contestant.stepper, batches_of(contestant.loader)))
    models = [contestant.model for contestant in contestants]
    start = {what: values_of(models[1]) for what, values_of in held.items()}
    rows = []
    for first, second in zip(*runs, strict=True):
        apart = {}
        for what, values_of in held.items():
            one, other = map(values_of, models)
            apart[what] = float((one - other).norm() / (other - start[what]).norm())
        rows.append(
            {
                "step": first.step,
                "losses": [first.total, second.total],
                "relative_difference_of_the_losses": abs(first.total - second.total) / second.total,
                **{f"difference_of_the_{what}_over_their_change": value for what, value in apart.items()},
            }
        )
    return {
        "sides": [contestant.name for contestant in contestants],
        "precision": "float64" if in_float64 else "float32",
        "lockstep": rows,
    }


def gradients(model: nn.Module, batch: Batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The losses of a batch and the gradient of each parameter, in float64 and by name."""
    model.train()
    model.zero_grad(set_to_none=True)
    losses = model(batch.images, [dict(target) for target in batch.targets])
    sum(losses.values()).backward()
    named = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return {name: loss.item() for name, loss in losses.items()}, named


def batches_of_epochs(loader: Any) -> Iterator[Batch]:
    """The batches of one epoch after the other, without end."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def compare_at_the_same_weights(
    contestants: list[Contestant], steps: int, every: int, beside_float64: bool
) -> dict[str, Any]:
    """Trains the second; before one step in `every`, how far the first's losses and gradient of the batch are from its.

    And how far apart that step takes both, with the same state of the optimizer too; and, where it is asked for, how
    far either gradient is from that of the second in float64.
    """
    first, second = contestants
    exact_model = copy.deepcopy(second.model).double() if beside_float64 else None
    rows = []

    def compare(step: int, batch: Batch) -> dict[str, Any]:
        before = copy.deepcopy(second.model.state_dict())
        first.model.load_state_dict(before)
        (losses, own), (expected, other) = (gradients(side.model, batch) for side in contestants)
        second.model.load_state_dict(before)  # the running statistics

        def norm(values: Iterable[torch.Tensor]) -> float:
            return sum(float(value.square().sum()) for value in values) ** 0.5

        def apart(one: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
            return norm(one[name] - reference[name] for name in reference) / norm(reference.values())

        row = {
            "step": step + 1,
            "losses": expected,
            "relative_difference_of_the_losses": {
                name: abs(losses[name] - value) / value for name, value in expected.items()
            },
            "difference_of_the_gradients_over_their_norm": apart(own, other),
            "ratio_of_the_norms_less_one": norm(own.values()) / norm(other.values()) - 1,
        }
        if exact_model is not None:
            exact_model.load_state_dict(before)
            _, exact = gradients(exact_model, double(batch))
            row["distance_to_the_gradient_in_float64"] = {
                first.name: apart(own, exact),
                second.name: apart(other, exact),
            }
        return row

    def take_state_of_second() -> None:
        first.model.load_state_dict(second.model.state_dict())
        for part in ("optimizer", "scheduler"):
            state = copy.deepcopy(getattr(second.stepper, part).state_dict())
            getattr(first.stepper, part).load_state_dict(state)

    for step, batch in zip(range(steps), batches_of_epochs(second.loader), strict=False):
        sides = [second]
        if step % every == 0:
            rows.append(compare(step, batch))
            take_state_of_second()
            start, sides = weights_of(second.model), contestants
        for side in sides:
            list(train_steps(side.stepper, [batch], first_step=step))
        if first in sides:
            moved, expected = (weights_of(side.model) - start for side in contestants)
            rows[-1]["difference_of_the_steps_over_their_size"] = float((moved - expected).norm() / expected.norm())
    return {"sides": [first.name, second.name], "at_the_same_weights": rows}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a VOC folder, or a COCO set, with splits train and val")
    parser.add_argument("--arch", default="resnet18", choices=["resnet18", "resnet50"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="stop after so many steps (default: all of the epochs)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--clip-grad-norm", type=float, default=CLIP_GRAD_NORM["adamw"])
    parser.add_argument("--min-size", type=int, default=240)
    parser.add_argument("--max-size", type=int, default=320)
    parser.add_argument("--anchor-sizes", type=float, nargs=5, default=[16, 32, 64, 128, 256])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--own-weights", action="store_true", help="each model starts from its own random weights")
    parser.add_argument("--channels-last", action="store_true", help="channels_last weights for both")
    parser.add_argument("--lockstep", type=int, metavar="N", help="compare N steps instead, see above")
    parser.add_argument("--float64", action="store_true", help="with --lockstep: in float64; --same-weights: beside it")
    parser.add_argument("--same-weights", type=int, metavar="N", help="compare N steps' gradients instead, see above")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="with --same-weights: one step in K")
    parser.add_argument("--twins", action="store_true", help="torchvision's against itself, see above")
    parser.add_argument("--output", type=Path, help="also write the json here")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.lockstep and arguments.same_weights:
        raise SystemExit("train_vs_torchvision.py: --lockstep and --same-weights are two comparisons: choose one")
    if arguments.float64 and not (arguments.lockstep or arguments.same_weights):
        raise SystemExit("train_vs_torchvision.py: --float64 belongs to --lockstep N or --same-weights N")
    if arguments.every < 1 or (arguments.every > 1 and not arguments.same_weights):
        raise SystemExit("train_vs_torchvision.py: --every K, 1 or more, belongs to --same-weights N")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    facts = origin()
    if device.type == "cpu":
        keep_freed_memory()
    train_set = open_dataset(arguments.data, "train")
    val_set = open_dataset(arguments.data, "val", class_names=train_set.class_names)
    steps_per_epoch = max(1, len(train_set) // arguments.batch_size)
    total_steps = arguments.steps or steps_per_epoch * arguments.epochs
    contestants = make_contestants(arguments, train_set, total_steps, device)
    if arguments.lockstep or arguments.same_weights:
        if arguments.lockstep:
            compared = compare_in_lockstep(contestants, arguments.lockstep, arguments.float64)
        else:
            steps, every = arguments.same_weights, arguments.every
            compared = compare_at_the_same_weights(contestants, steps, every, arguments.float64)
        report = {**facts, **compared}
        print(json.dumps(report, indent=1))
        if arguments.output is not None:
            write_results(arguments.output, report)
        return 0
    start = time.perf_counter()
    for epoch in range(-(-total_steps // steps_per_epoch)):
        for contestant in contestants if epoch % 2 == 0 else contestants[::-1]:
            contestant.train_epoch(epoch, total_steps)
        print(
            f"epoch {epoch + 1}  "
            + "  ".join(
                f"{c.name} loss {statistics.fmean(r.total for r in c.records[-steps_per_epoch:]):.4f} "
                f"{statistics.median(r.seconds for r in c.records[-steps_per_epoch:]):.3f} s/step"
                for c in contestants
            )
            + f"  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    for contestant in contestants:
        contestant.result = evaluate(contestant.model, val_set, device=device)
        print(f"{contestant.name}\n{format_metrics(contestant.result)}")
    swapped = {} if arguments.twins else {"weights_in_the_other_model": evaluate_swapped(contestants, val_set)}
    report = {
        **facts,
        "recipe": {key: value for key, value in vars(arguments).items() if key not in ("data", "output", "threads")},
        "data": {
            "train_images": len(train_set),
            "val_images": len(val_set),
            "classes": train_set.class_names,
        },
        **{contestant.name: contestant.summary() for contestant in contestants},
        **swapped,
    }
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        write_results(arguments.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
