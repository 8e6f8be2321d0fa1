"""What a RetinaNet is built from, as one value: readable, comparable, and kept as JSON beside the weights.

Presets are the conventions of each implementation by name. Sources: the paper (Lin et al., 2017, arXiv 1708.02002) with
Detectron, by which it was done; torchvision's ``retinanet_resnet50_fpn`` and ``_v2``; detectron2's ``Base-RetinaNet``;
mmdet's ``retinanet_r50_fpn``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .anchors import DEFAULT_ASPECT_RATIOS, DEFAULT_SIZES, DEFAULT_SMALLEST_SIZES, octave_sizes
from .resnet import BACKBONES, NORMS
from .transform import IMAGENET_MEAN, IMAGENET_STD

# What a file calls itself that holds such a configuration and the weights of its model.
CHECKPOINT_FORMAT = "retinanet_ext.checkpoint"

_EXACT_ANCHORS = {
    "anchor_sizes": octave_sizes(DEFAULT_SMALLEST_SIZES, truncated=False),
    "anchor_strides": (8, 16, 32, 64, 128),
    "anchor_rounding": "none",
}
_PRESETS: dict[str, dict[str, Any]] = {
    "torchvision": {"match_policy": "torchvision"},
    "torchvision_v2": {
        "match_policy": "torchvision",
        "p6_from": "c5",
        "head_norm": "group",
        "box_loss": "giou",
    },
    "detectron2": {
        **_EXACT_ANCHORS,
        "anchor_order": "size",
        "stride_in_1x1": True,
        "p6_from": "c5",
        "match_policy": "detectron2",
        "loss_normalizer": "ema",
        "detections_per_img": 100,
        "clip_before_nms": False,
    },
    "mmdet": {
        **_EXACT_ANCHORS,
        "p6_from": "c5",
        "p7_relu": False,
        "match_policy": "mmdet",
        "loss_normalizer": "foreground",
        "detections_per_img": 100,
    },
    "paper": {
        **_EXACT_ANCHORS,
        "anchor_rounding": "strides",
        "anchor_offset": 0.5,
        "anchor_order": "size",
        "stride_in_1x1": True,
        "p6_from": "c5",
        "match_policy": "detectron2",
        "box_loss": "smooth_l1",
        "box_loss_beta": 0.11,
        "loss_normalizer": "foreground_plus_one",
        "detections_per_img": 100,
    },
}
PRESETS = tuple(_PRESETS)


def truncates_sizes(preset: str | None) -> bool:
    """Whether the preset's anchor sizes are whole pixels, as they are without one."""
    return "anchor_sizes" not in _PRESETS.get(preset, {})


@dataclass(frozen=True)
class RetinaNetConfig:
    """The arguments of a `RetinaNet` with a ResNet and a feature pyramid; `build_retinanet` builds it.

    Sequences become tuples, and an ``image_mean`` or ``image_std`` of None ImageNet's. The defaults are torchvision's
    ``retinanet_resnet50_fpn``, except that a box which touches no anchor changes nothing (``match_policy="safe"``).

    Attributes:
        num_classes: ``K``.
        backbone: one of `retinanet_ext.models.BACKBONES`.
        norm: of the backbone, see `retinanet_resnet50_fpn`.
        norm_eps: what the backbone's normalisation adds to the variance; 0 for torchvision's COCO_V1 weights, which are
            for "frozen_batch", the one norm that takes 0.
        stride_in_1x1: see `ResNet`; of the MSRA weights that detectron2's and Detectron's models began with.
        p6_from, p7_relu: see `FeaturePyramid`.
        anchor_strides, anchor_rounding, anchor_offset, anchor_order: see `AnchorGenerator`.
        others: see `RetinaNet`.

    Raises:
        ValueError: an unknown ``backbone`` or ``norm``, a wrong ``norm_eps``; what else is wrong, `build_retinanet`
            says.
    """

    num_classes: int = 91
    backbone: str = "resnet50"
    norm: str = "batch"
    norm_eps: float = 1e-5
    stride_in_1x1: bool = False
    p6_from: str = "p5"
    p7_relu: bool = True
    head_norm: str = "none"
    min_size: int | tuple[int, ...] = 800
    max_size: int = 1333
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    anchor_sizes: tuple[tuple[float, ...], ...] = DEFAULT_SIZES
    aspect_ratios: tuple[float, ...] = DEFAULT_ASPECT_RATIOS
    anchor_strides: tuple[float, ...] | None = None
    anchor_rounding: str = "pixels"
    anchor_offset: float = 0.0
    anchor_order: str = "ratio"
    fg_iou_thresh: float = 0.5
    bg_iou_thresh: float = 0.4
    match_policy: str = "safe"
    box_loss: str = "l1"
    box_loss_beta: float = 1 / 9
    loss_normalizer: str = "per_image"
    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    detections_per_img: int = 300
    topk_candidates: int = 1000
    clip_before_nms: bool = True

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {self.backbone!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm: expected one of {tuple(NORMS)}, got {self.norm!r}")
        is_number = isinstance(self.norm_eps, (int, float)) and 0 <= self.norm_eps < float("inf")
        if not is_number or (self.norm_eps == 0 and self.norm != "frozen_batch"):
            raise ValueError(
                f'norm_eps: expected a number above 0, or 0 with norm="frozen_batch", '
                f"got {self.norm_eps!r} with norm={self.norm!r}"
            )
        for name, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for field in fields(self):
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))

    @classmethod
    def preset(cls, name: str, num_classes: int = 91, backbone: str = "resnet50", **changes: Any) -> RetinaNetConfig:
        """The conventions of an implementation.

        ``norm`` is no part of a preset: which one a backbone wants depends on the weights it begins with.

        Args:
            name: "torchvision", "torchvision_v2", "detectron2", "mmdet" or "paper".
            num_classes, backbone: see `RetinaNetConfig`. A ResNeXt strides in its 3x3 convolutions under every preset.
            **changes: other fields, instead of the preset's.

        Raises:
            ValueError: an unknown ``name`` or ``backbone``.
            TypeError: a change of no field.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        chosen = dict(_PRESETS[name])
        if backbone.startswith("resnext"):
            chosen.pop("stride_in_1x1", None)
        return cls(**{**chosen, "num_classes": num_classes, "backbone": backbone, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON has it: numbers, strings, lists, None. `from_dict` reads it."""
        return {name: _lists(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RetinaNetConfig:
        """The configuration of a dictionary; what it leaves out has its default. ``arch`` is an older name of
        ``backbone``.

        Raises:
            ValueError: names that are no fields, or a value that is none of its choices.
        """
        values = dict(values)
        if "arch" in values:
            values.setdefault("backbone", values.pop("arch"))
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"model configuration: unknown: {', '.join(unknown)}")
        return cls(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if _is_sequence(value) else value


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if _is_sequence(value) else value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
