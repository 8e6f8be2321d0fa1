"""Where the time of a training step and of an inference goes: ours, torchvision's accelerated, torchvision's.

    python benchmarks/profile_step.py --profiler --output benchmarks/results/DATE-profile-cpu.json

ResNet-50 at 480 x 640, which the models resize to 800 x 1066; channels_last on all sides, the sides in turns, medians.
The parts are told apart by hooks between them. The backward pass leaves the losses when an output of the head has
its gradient: what was computed last comes first there.

With --profiler PyTorch's profiler looks at one more step and one more inference of each side, and their time is shared
out by kind of operator: convolutions, BatchNorm and ReLU of the network by the operators' names, the rest by the part.
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
from torch.profiler import ProfilerActivity, profile, record_function

from retinanet_ext.models import fold_batch_norm

CASE = "480x640 B=1"
SIDES = {"ours": "model", "torchvision, accelerated": "accelerate"}
MARK = "part ends: "
# Kinds of operators of the network, by what their names hold, those of their nodes in autograd too.
KINDS = {
    "convolutions": ("convolution", "conv2d", "conv_depthwise"),
    "BatchNorm": ("batch_norm", "batchnorm"),
    "ReLU": ("relu", "threshold", "clamp_min"),
}
NETWORK = ("backbone and pyramid", "subnets", "backward of the network")


class Stopwatch:
    """Moments, and the seconds between them: on CUDA by events of the stream."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end) -> float:
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Parts:
    """What the parts of one call of a model take, from one mark to the next; a profiler sees the marks too."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.watch = Stopwatch(device)
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.gradient_is_due = False
        ends = {"resize and batch": [model.transform], "backbone and pyramid": [model.backbone]}
        ends["subnets"] = ends_of_subnets(model)
        for label, modules in ends.items():
            for module in modules:
                module.register_forward_hook(lambda *_, label=label: self.mark(label))
        for module in ends["subnets"]:
            module.register_forward_hook(self._watch_gradients)

    def begin(self) -> None:
        self.marks = []
        self.mark("nothing yet")

    def mark(self, label: str) -> None:
        """The part `label` ends here."""
        with record_function(MARK + label):
            self.marks.append((label, self.watch.now()))

    def seconds(self) -> dict[str, float]:
        """By part, in the order of their ends; one that ends several times has all of these spans."""
        spans = defaultdict(float)
        for (_, begin), (label, end) in zip(self.marks, self.marks[1:], strict=False):
            spans[label] += self.watch.seconds(begin, end)
        return dict(spans)

    def _watch_gradients(self, _module, _inputs, outputs) -> None:
        self.gradient_is_due = True
        for output in tensors_of(outputs):
            if output.requires_grad:
                output.register_hook(self._gradient_arrived)

    def _gradient_arrived(self, _gradient) -> None:
        if self.gradient_is_due:
            self.gradient_is_due = False
            self.mark("backward of the losses")


def ends_of_subnets(model: nn.Module) -> list[nn.Module]:
    """The modules whose last call ends the subnets. An accelerated model calls the layers of its head, and leaves a
    head that has a hook to torchvision's code."""
    if hasattr(type(model), "accelerated_from"):
        return [model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg]
    return [model.head]


def tensors_of(outputs) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    children = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for child in children for tensor in tensors_of(child)]


def training_call(model, images, targets):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    parts = Parts(model, images[0].device)

    def call():
        parts.begin()
        optimizer.zero_grad()
        parts.mark("gradients freed")
        losses = model(images, targets)
        total = losses["classification"] + losses["bbox_regression"]
        parts.mark("anchors, matching, losses")
        total.backward()
        parts.mark("backward of the network")
        optimizer.step()
        parts.mark("update")
        return parts.seconds()

    return call


def inference_call(model, images):
    model.eval()
    parts = Parts(model, images[0].device)

    def call():
        with torch.inference_mode():
            parts.begin()
            model(images)
            parts.mark("anchors, post-processing")
        return parts.seconds()

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


def kind_of(operator: str, part: str) -> str:
    """What an operator of a part counts as."""
    if part not in NETWORK:
        return part
    name = operator.lower()
    kind = next((kind for kind, names in KINDS.items() if any(held in name for held in names)), "other of the network")
    return f"{kind}, backward" if part == "backward of the network" else kind


def by_operator(call, device: torch.device) -> dict[str, float]:
    """Milliseconds of one call by kind of operator, most first: each operator's own time, without that of those it
    calls; on CUDA that of its kernels."""
    cuda = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True
    ) as seen:
        call()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CPU]
    ends = sorted((event.time_range.start, event.name) for event in events if event.name.startswith(MARK))
    kinds = defaultdict(float)
    for event in events:
        part = next((name.removeprefix(MARK) for start, name in ends if event.time_range.start < start), None)
        # Ranges such as that of the optimizer's step are no operators: what they have of their own is Python's.
        if part is None or event.name.startswith(MARK) or "::" not in event.name:
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        kinds[kind_of(event.name, part)] += own / 1e3
    return dict(sorted(((kind, value) for kind, value in kinds.items() if value > 0), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profiler", action="store_true", help="shares by kind of operator too")
    parser.add_argument("--smoke", action="store_true", help="a tiny image, one round")
    parser.add_argument("--output", type=Path, help="also write the json here")
    arguments = parser.parse_args()
    facts = origin()
    device, timed = torch.device(arguments.device), not arguments.smoke
    rounds = arguments.rounds if timed else 1
    images, targets = make_inputs(CASES[CASE] if timed else SMOKE, device)

    def models():
        made = {label: make_models(side, device, timed) for label, side in SIDES.items()}
        return {**{label: pair[0] for label, pair in made.items()}, "torchvision": made["ours"][1]}

    calls = {"training": {side: training_call(model, images, targets) for side, model in models().items()}}
    report = {**facts, "case": CASE if timed else "smoke", "rounds": rounds, "unit": "milliseconds"}
    report["training"] = in_turns(calls["training"], rounds)
    sides = models()
    imitate_training(sides["torchvision"], images)
    for side in SIDES:
        sides[side].load_state_dict(sides["torchvision"].state_dict())
    fold_batch_norm(sides["ours"].eval())
    calls["inference"] = {side: inference_call(model, images) for side, model in sides.items()}
    report["inference"] = in_turns(calls["inference"], rounds)
    if arguments.profiler:
        report["operators"] = {
            task: {side: by_operator(call, device) for side, call in of.items()} for task, of in calls.items()
        }
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        write_results(arguments.output, report)


if __name__ == "__main__":
    main()
