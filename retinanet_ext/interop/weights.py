"""Weights of other implementations into a RetinaNet of this library, and back out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..models import RetinaNet
from .checkpoint_files import read_weights_and_order
from .layouts import ANCHOR_ORDERS, LAYOUTS, recognise, rename, reorder_anchors, take_rgb_images

_COUNTER = "num_batches_tracked"  # of trainable BatchNorm: a count that nothing is computed from


@dataclass
class LoadReport:
    """What became of a checkpoint's weights.

    Attributes:
        layout: whose names they had: "torchvision" (this library's too), "detectron2", "mmdet" or "resnet".
        loaded: names, this library's, of what was loaded.
        missing: of what the checkpoint has nothing for, and was left as it was.
        unexpected: names in the checkpoint that the model has no place for.
        reshaped: of what has another shape in the checkpoint, and was left as it was: name to (the checkpoint's shape,
            the model's). With another number of classes that is the last layer of the class subnet.
        reordered: of what had its anchors in another order and was put into the model's.
    """

    layout: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    reordered: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors of a checkpoint in {self.layout}'s layout were loaded"]
        if self.reordered:
            lines.append(f"reordered to the model's order of anchors: {', '.join(self.reordered)}")
        for name, (theirs, ours) in self.reshaped.items():
            lines.append(f"left as it was, for another shape: {name} ({theirs} in the checkpoint, {ours} here)")
        for what, names in (("without weights in the checkpoint", self.missing), ("without a place", self.unexpected)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"{what}: {', '.join(names[:8])}{more}")
        return "\n".join(lines)


def load_weights(
    model: RetinaNet,
    checkpoint: str | Path | Mapping[str, Tensor],
    *,
    layout: str | None = None,
    bgr_images: bool | None = None,
) -> LoadReport:
    """Loads a RetinaNet checkpoint of torchvision, detectron2, mmdet or this library, or a ResNet's into the backbone.

    What the model and the checkpoint share is loaded: with another number of classes everything but the last layer of
    the class subnet, with other anchors also that of the box subnet. BatchNorm's weights stay out of GroupNorm. The
    model must be built as the checkpoint's was for its outputs to be the same; see docs/interop.md.

    Args:
        model: takes the weights, where it is and in its type.
        checkpoint: a file that `read_weights` reads, or names and tensors.
        layout: whose names they are, "torchvision", "detectron2", "mmdet" or "resnet" (torchvision's and timm's
            classifiers); found out unless given. torchvision's names are this library's too: for a model whose anchors
            are ordered by size, say "torchvision" of a file of torchvision's, whose channels are then put in order. A
            checkpoint of this library says how its anchors are ordered.
        bgr_images: of detectron2's layout, whether the checkpoint was trained on images in the order blue, green,
            red, as its model zoo was (the default). The first convolution is turned round, and takes this library's
            images, whose pixels are divided by ImageNet's deviation.

    Returns:
        A `LoadReport`; ``print`` shows it.

    Raises:
        FileNotFoundError, ValueError: a file that is none of these, an unknown layout, weights of which nothing fits.
        TypeError: an argument of another type.
    """
    if not isinstance(model, RetinaNet):
        raise TypeError(f"load_weights: model: expected a retinanet_ext.models.RetinaNet, got {type(model).__name__}")
    order = None
    if not isinstance(checkpoint, Mapping):
        checkpoint, order = read_weights_and_order(checkpoint)
    told = layout is not None
    if not told:
        layout = recognise(checkpoint)
    elif layout not in LAYOUTS:
        raise ValueError(f"load_weights: layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if bgr_images is not None and layout != "detectron2":
        raise ValueError(f"load_weights: bgr_images: is for detectron2's layout, and this is {layout}'s")
    weights, unknown = rename(checkpoint, layout)
    report = LoadReport(layout)
    generator = model.anchor_generator
    if order is None:
        # torchvision's names are this library's too: unless told, they are of a model such as this one.
        order = generator.order if layout == "torchvision" and not told else ANCHOR_ORDERS.get(layout, generator.order)
    if generator.order != order:
        counts = len(generator.sizes[0]), len(generator.aspect_ratios)
        report.reordered = reorder_anchors(weights, *counts, generator.order)
    if layout == "detectron2":
        take_rgb_images(weights, bgr_images is not False)
        unknown = [name for name in unknown if not name.startswith(("anchor_generator.", "pixel_"))]
    _sort_out(report, weights, model.state_dict())
    report.unexpected += unknown
    report.reordered = [name for name in report.reordered if name in report.loaded]
    if not any(not name.endswith(_COUNTER) for name in report.loaded):
        raise ValueError(f"load_weights: none of the checkpoint's weights fits this model:\n{report}")
    model.load_state_dict({name: weights[name] for name in report.loaded}, strict=False)
    return report


def load_start_weights(model: RetinaNet, path: str | Path) -> LoadReport:
    """`load_weights` of a file, to start a training from: what has torchvision's names and is no checkpoint of this
    library is torchvision's, also for a model that orders its anchors by size."""
    return load_weights(model, path, layout=start_layout(path))


def start_layout(path: str | Path) -> str | None:
    """What `load_weights` is to be told of a file to start from. Raises its errors of files that do not do for any
    model."""
    weights, order = read_weights_and_order(path)
    layout = recognise(weights)
    return layout if order is None else None


def _sort_out(report: LoadReport, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """What fits, and what does not."""
    mean = "running_mean"
    # BatchNorm's in the checkpoint, GroupNorm's here: the same names and shapes, another meaning.
    other_norms = {name.removesuffix(mean) for name in weights if name.endswith(mean) and name not in own}
    for name, value in weights.items():
        if name not in own or f"{name.rpartition('.')[0]}." in other_norms:
            if not name.endswith(_COUNTER):
                report.unexpected.append(name)
        elif value.shape != own[name].shape:
            report.reshaped[name] = (list(value.shape), list(own[name].shape))
        else:
            report.loaded.append(name)
    placed = {*report.loaded, *report.reshaped}
    report.missing = [name for name in own if name not in placed and not name.endswith(_COUNTER)]


def save_torchvision_weights(path: str | Path, model: RetinaNet) -> None:
    """Writes a model's weights as torchvision keeps them: ``torchvision_model.load_state_dict(torch.load(path))``.

    The names and shapes are those of ``torchvision.models.detection.retinanet_resnet50_fpn`` with the same backbone (of
    its v2 for a model built so); anchors that the model orders by size are put into torchvision's order. The file
    appears whole or not at all.

    Raises:
        TypeError: ``model`` is something else.
        OSError: the file cannot be written.
    """
    from ..engine.checkpoint import write_atomically

    if not isinstance(model, RetinaNet):
        raise TypeError(
            f"save_torchvision_weights: model: expected a retinanet_ext.models.RetinaNet, got {type(model).__name__}"
        )
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    generator = model.anchor_generator
    if generator.order != ANCHOR_ORDERS["torchvision"]:
        reorder_anchors(weights, len(generator.sizes[0]), len(generator.aspect_ratios), ANCHOR_ORDERS["torchvision"])
    write_atomically(path, lambda stream: torch.save(weights, stream))
