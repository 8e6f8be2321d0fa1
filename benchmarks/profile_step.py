"""Where the time of a training step and of an inference goes: ours, torchvision's accelerated, torchvision's.

    python benchmarks/profile_step.py --output benchmarks/results/DATE-profile-cpu.json

ResNet-50 at 480 x 640, which the models resize to 800 x 1066; channels_last on all sides, the sides in turns, medians.
The parts are told apart by hooks between them. The backward pass leaves the losses when an output of the head has
its gradient: what was computed last comes first there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from bench_end_to_end import CASES, SMOKE, imitate_training, make_inputs, make_models
from results_file import origin, write_results
from torch import Tensor, nn

from retinanet_ext.models import fold_batch_norm

CASE = "480x640 B=1"
SIDES = {"ours": "model", "torchvision, accelerated": "accelerate"}


class Parts:
    """Seconds of each part of one call of a model, from one mark to the next."""

    def __init__(self, model: nn.Module):
        self.seconds: dict[str, float] = {}
        self.last = 0.0
        self.gradient_at: float | None = None
        for name in ("transform", "backbone", "head"):
            module = getattr(model, name)
            label = {"transform": "resize and batch", "backbone": "backbone and pyramid", "head": "subnets"}[name]
            module.register_forward_hook(lambda *_, label=label: self.mark(label))
        model.head.register_forward_hook(self._watch_gradients)

    def begin(self) -> None:
        self.seconds, self.gradient_at, self.last = {}, None, time.perf_counter()

    def mark(self, label: str) -> None:
        now = time.perf_counter()
        self.seconds[label] = now - self.last
        self.last = now

    def _watch_gradients(self, _module, _inputs, outputs) -> None:
        for output in tensors_of(outputs):
            if output.requires_grad:
                output.register_hook(self._gradient_arrived)

    def _gradient_arrived(self, _gradient) -> None:
        if self.gradient_at is None:
            self.gradient_at = time.perf_counter()

    def mark_backward(self) -> None:
        losses = self.gradient_at - self.last
        self.mark("backward")
        self.seconds["backward of the losses"] = losses
        self.seconds["backward of the network"] = self.seconds.pop("backward") - losses


def tensors_of(outputs) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    children = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for child in children for tensor in tensors_of(child)]


def training_call(model, images, targets):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    parts = Parts(model)

    def call():
        parts.begin()
        optimizer.zero_grad()
        parts.mark("gradients freed")
        losses = model(images, targets)
        total = losses["classification"] + losses["bbox_regression"]
        parts.mark("anchors, matching, losses")
        total.backward()
        parts.mark_backward()
        optimizer.step()
        parts.mark("update")
        return parts.seconds

    return call


def inference_call(model, images):
    model.eval()
    parts = Parts(model)

    def call():
        with torch.inference_mode():
            parts.begin()
            model(images)
            parts.mark("anchors, post-processing")
        return parts.seconds

    return call


def in_turns(calls, rounds):
    """Median milliseconds of each part, by side."""
    samples = {side: defaultdict(list) for side in calls}
    for number in range(rounds + 1):
        for side, call in calls.items():
            seconds = call()
            if number:  # the first warms up
                for part, value in {**seconds, "all": sum(seconds.values())}.items():
                    samples[side][part].append(1e3 * value)
    return {side: {part: statistics.median(values) for part, values in of.items()} for side, of in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="a tiny image, one round")
    parser.add_argument("--output", type=Path, help="also write the json here")
    arguments = parser.parse_args()
    facts = origin()
    device, timed = torch.device("cpu"), not arguments.smoke
    rounds = arguments.rounds if timed else 1
    images, targets = make_inputs(CASES[CASE] if timed else SMOKE, device)

    def models():
        made = {label: make_models(side, device, timed) for label, side in SIDES.items()}
        return {**{label: pair[0] for label, pair in made.items()}, "torchvision": made["ours"][1]}

    training = in_turns({side: training_call(model, images, targets) for side, model in models().items()}, rounds)
    sides = models()
    imitate_training(sides["torchvision"], images)
    for side in SIDES:
        sides[side].load_state_dict(sides["torchvision"].state_dict())
    fold_batch_norm(sides["ours"].eval())
    inference = in_turns({side: inference_call(model, images) for side, model in sides.items()}, rounds)
    report = {
        **facts,
        "case": CASE if timed else "smoke",
        "rounds": rounds,
        "unit": "milliseconds",
        "training": training,
        "inference": inference,
    }
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        write_results(arguments.output, report)


if __name__ == "__main__":
    main()
