"""How other implementations of RetinaNet name and lay out their weights, and how that becomes this library's layout,
which is torchvision's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..models.transform import IMAGENET_STD

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
Rule = tuple[str, str | Callable[[re.Match], str]]


def _stage(match: re.Match) -> str:
    stage, block, part = int(match[1]) - 1, match[2], match[3]
    name = part.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
    return f"backbone.body.layer{stage}.{block}.{name}"


def _minus(first: int, target: str) -> Callable[[re.Match], str]:
    return lambda match: target.format(int(match[1]) - first, match[2])


def _half(target: str) -> Callable[[re.Match], str]:
    return lambda match: target.format(int(match[1]) // 2, match[2])


_CLASS, _BOX = "head.classification_head", "head.regression_head"

_TORCHVISION: list[Rule] = [
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)", r"backbone.fpn.\1_blocks.\2.0.\3"),
    (r"head\.classification_head\.conv\.([0246])\.(weight|bias)", _half(_CLASS + ".conv.{}.0.{}")),
    (r"head\.regression_head\.conv\.([0246])\.(weight|bias)", _half(_BOX + ".conv.{}.0.{}")),
    (r"(backbone\.(?:body|fpn)\..+|head\..+)", r"\1"),
]
_DETECTRON2: list[Rule] = [
    (r"backbone\.bottom_up\.stem\.conv1\.weight", "backbone.body.conv1.weight"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm\." + _NORM, r"backbone.body.bn1.\1"),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.(.+)", _stage),
    (r"backbone\.fpn_lateral(\d)\.(weight|bias)", _minus(3, "backbone.fpn.inner_blocks.{}.0.{}")),
    (r"backbone\.fpn_output(\d)\.(weight|bias)", _minus(3, "backbone.fpn.layer_blocks.{}.0.{}")),
    (r"backbone\.top_block\.(p[67])\.(weight|bias)", r"backbone.fpn.extra_blocks.\1.\2"),
    (r"head\.cls_subnet\.([0246])\.(weight|bias)", _half(_CLASS + ".conv.{}.0.{}")),
    (r"head\.bbox_subnet\.([0246])\.(weight|bias)", _half(_BOX + ".conv.{}.0.{}")),
    (r"head\.cls_score\.(weight|bias)", _CLASS + r".cls_logits.\1"),
    (r"head\.bbox_pred\.(weight|bias)", _BOX + r".bbox_reg.\1"),
]
_MMDET: list[Rule] = [
    (r"backbone\.((?:conv1|bn1|layer\d\.).*)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.([012])\.conv\.(weight|bias)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(weight|bias)", r"backbone.fpn.extra_blocks.p6.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(weight|bias)", r"backbone.fpn.extra_blocks.p7.\1"),
    (r"bbox_head\.cls_convs\.(\d)\.conv\.(weight|bias)", _CLASS + r".conv.\1.0.\2"),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.(weight|bias)", _BOX + r".conv.\1.0.\2"),
    (r"bbox_head\.cls_convs\.(\d)\.gn\.(weight|bias)", _CLASS + r".conv.\1.1.\2"),
    (r"bbox_head\.reg_convs\.(\d)\.gn\.(weight|bias)", _BOX + r".conv.\1.1.\2"),
    (r"bbox_head\.retina_cls\.(weight|bias)", _CLASS + r".cls_logits.\1"),
    (r"bbox_head\.retina_reg\.(weight|bias)", _BOX + r".bbox_reg.\1"),
]
# A classifier's: the backbone is all of it that a RetinaNet has a place for.
_RESNET: list[Rule] = [(r"((?:conv1|bn1|layer[1-4])\..+)", r"backbone.body.\1")]
LAYOUTS: dict[str, list[Rule]] = {
    "torchvision": _TORCHVISION,
    "detectron2": _DETECTRON2,
    "mmdet": _MMDET,
    "resnet": _RESNET,
}
# A name that the others have not.
_TELLING = {
    "detectron2": r"backbone\.bottom_up\.|head\.(cls|bbox)_subnet\.|backbone\.fpn_lateral",
    "mmdet": r"bbox_head\.|neck\.",
    "torchvision": r"backbone\.(body|fpn)\.|head\.(classification|regression)_head\.",
    "resnet": r"conv1\.weight|layer[1-4]\.0\.conv1\.weight",
}


def recognise(weights: Mapping[str, Tensor]) -> str:
    """Whose names these are: a key of `LAYOUTS`. Raises ValueError where they are nobody's."""
    for layout, pattern in _TELLING.items():
        if any(re.match(pattern, name) for name in weights):
            return layout
    some = ", ".join(list(weights)[:4])
    raise ValueError(
        "weights: expected names of a RetinaNet of torchvision, detectron2, mmdet or this library, or of a ResNet, got "
        f"{some}, ..."
    )


def rename(weights: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under this library's names, and the names that no rule of the layout knows."""
    renamed, unknown = {}, []
    for name, value in weights.items():
        for pattern, target in LAYOUTS[layout]:
            match = re.fullmatch(pattern, name)
            if match:
                renamed[target(match) if callable(target) else match.expand(target)] = value
                break
        else:
            unknown.append(name)
    return renamed, unknown


# How each orders the anchors of a cell: "size", by size and then by ratio, or "ratio", the other way round.
ANCHOR_ORDERS = {"torchvision": "ratio", "detectron2": "size", "mmdet": "ratio"}


def reorder_anchors(weights: dict[str, Tensor], sizes: int, ratios: int, order: str) -> list[str]:
    """Puts the output channels of the last convolutions, which are in the other order, into `order`: "ratio", by ratio
    and then by size of each anchor, or "size". In place; returns the names of what was reordered."""
    reordered = []
    outer, inner = (sizes, ratios) if order == "ratio" else (ratios, sizes)
    for name in (f"{_CLASS}.cls_logits", f"{_BOX}.bbox_reg"):
        for kind in ("weight", "bias"):
            key = f"{name}.{kind}"
            if key not in weights or sizes * ratios == 1:
                continue
            value = weights[key]
            if len(value) % (sizes * ratios) != 0:
                continue  # of other anchors: reported as reshaped
            grouped = value.reshape(outer, inner, -1, *value.shape[1:])
            weights[key] = grouped.transpose(0, 1).reshape(value.shape).contiguous()
            reordered.append(key)
    return reordered


def take_rgb_images(weights: dict[str, Tensor], bgr: bool) -> None:
    """From images in 0..255, of which the mean alone is subtracted, to the images of this library: RGB in 0..1, mean
    subtracted, divided by ImageNet's deviation. The mean is the same. In place."""
    key = "backbone.body.conv1.weight"
    if key in weights:
        weight = weights[key].flip(1) if bgr else weights[key]
        scale = 255 * torch.tensor(IMAGENET_STD, dtype=weight.dtype)
        weights[key] = weight * scale[:, None, None]
