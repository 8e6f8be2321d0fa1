"""The losses and the post-processing of torchvision's RetinaNet on our operators, as methods of its class.

Each method computes with ours what it can and leaves the rest to torchvision's method, part by part: another matcher
(then the losses take its matches), another head or box loss, boxes or labels that torchvision has its own way with,
tracing. `forward` reads the levels as the convolutions leave them: what torchvision's permutes and joins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops.boxes import clip_boxes_to_image

from .. import ops
from ..reference.anchor_match import AssignedTargets
from ..reference.focal_loss import autocast_enabled, compute_dtype
from . import torchvision_inputs as inputs
from . import torchvision_stock as stock
from .accelerated import Acceleration
from .levels import Levels, join_levels, unweighted
from .ordinary import is_eager
from .torchvision_inputs import Targets

THEIRS = {name: vars(RetinaNet)[name] for name in ("forward", "compute_loss", "postprocess_detections")}


def compute_loss(self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict[str, Tensor]:
    """``cls_logits`` [B, N, K], ``bbox_regression`` [B, N, 4], ``anchors`` [N, 4] of each image."""
    logits, deltas = [head_outputs.get("cls_logits")], [head_outputs.get("bbox_regression")]
    if not (
        is_eager(logits[0])
        and stock.has_own_matching(self)
        and inputs.rows_fit(logits, deltas, [[image] for image in anchors])
        and inputs.layouts_fit(targets, logits, deltas, anchors)
        and inputs.values_fit(targets, logits[0].shape[-1])
    ):
        return THEIRS["compute_loss"](self, targets, head_outputs, anchors)
    joined = _joined_anchors(anchors)
    assigned = _assign(self, targets, joined)
    head = self.head
    if not stock.has_own_loss(head):
        return head.compute_loss(targets, head_outputs, anchors, _matches(assigned))
    classes, boxes = head.classification_head, head.regression_head
    if stock.has_own_class_loss(classes):
        classification = _class_loss(logits, assigned)
    else:
        classification = classes.compute_loss(targets, head_outputs, _matches(assigned))
    if stock.has_own_box_loss(boxes):
        bbox_regression = _box_loss(boxes, targets, deltas, joined, assigned)
    else:
        bbox_regression = boxes.compute_loss(targets, head_outputs, anchors, _matches(assigned))
    return {"classification": classification, "bbox_regression": bbox_regression}


def postprocess_detections(
    self,
    head_outputs: dict[str, list[Tensor]],
    anchors: list[list[Tensor]],
    image_shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """A level: ``cls_logits`` [B, n, K], ``bbox_regression`` [B, n, 4]; ``anchors`` [n, 4] by image and level."""
    logits, deltas = head_outputs.get("cls_logits", []), head_outputs.get("bbox_regression", [])
    if not (
        len(image_shapes) == len(anchors)
        and inputs.rows_fit(logits, deltas, anchors)
        and _can_detect(self, logits, deltas)
    ):
        return THEIRS["postprocess_detections"](self, head_outputs, anchors, image_shapes)
    joined = _joined_anchors([torch.cat(list(levels)) for levels in anchors])
    return _detections(self, logits, deltas, joined, image_shapes)


def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
    """torchvision's `RetinaNet.forward`, step by step, but that the heads' outputs are not permuted and joined."""
    if not (
        _levels_are_enough(self)
        and len(images) > 0
        and is_eager(images[0])
        and inputs.are_taken(images, targets, self.training)
    ):
        return THEIRS["forward"](self, images, targets)
    given = images, targets
    original_sizes = [tuple(image.shape[-2:]) for image in images]
    images, targets = self.transform(images, targets)
    num_classes = self.head.classification_head.num_classes
    usable = targets is not None and inputs.have_boxes_and_labels(targets) and inputs.values_fit(targets, num_classes)
    if targets is not None and not usable and inputs.have_degenerate_boxes(targets):
        return THEIRS["forward"](self, *given)
    features = self.backbone(images.tensors)
    features = [features] if isinstance(features, Tensor) else list(features.values())
    classes, boxes = self.head.classification_head, self.head.regression_head
    logits = [classes.cls_logits(classes.conv(level)) for level in features]
    deltas = [boxes.bbox_reg(boxes.conv(level)) for level in features]
    anchors = self.anchor_generator(images, features)

    losses, detections = {}, []
    if self.training:
        losses = _losses_of_levels(self, targets if usable else None, logits, deltas, anchors)
        if losses is None:
            losses = self.compute_loss(targets, _joined_outputs(logits, deltas, num_classes), anchors)
    else:
        detections = _detections_of_levels(self, logits, deltas, anchors, images.image_sizes)
        if detections is None:
            outputs, split_anchors = _split_outputs(logits, deltas, anchors, num_classes)
            detections = self.postprocess_detections(outputs, split_anchors, images.image_sizes)
        detections = self.transform.postprocess(detections, images.image_sizes, original_sizes)
    return self.eager_outputs(losses, detections)


OURS = {"forward": forward, "compute_loss": compute_loss, "postprocess_detections": postprocess_detections}
ACCELERATION = Acceleration("torchvision_retinanet", RetinaNet, OURS, THEIRS)


def _levels_are_enough(model: RetinaNet) -> bool:
    """Whether nobody but our own losses or post-processing wants the head's joined outputs."""
    name = "compute_loss" if model.training else "postprocess_detections"
    if getattr(type(model), name, None) is not OURS[name] or name in vars(model):
        return False
    if not stock.has_own_head(model.head):
        return False
    return not model.training or (
        stock.has_own_matching(model)
        and stock.has_own_loss(model.head)
        and stock.has_own_class_loss(model.head.classification_head)
        and stock.has_own_box_loss(model.head.regression_head)
    )


def _losses_of_levels(
    model: RetinaNet, targets: Targets | None, logits: Levels, deltas: Levels, anchors: list[Tensor]
) -> dict[str, Tensor] | None:
    """None where torchvision's code has to see the inputs. ``targets``: their values have been looked at."""
    head = model.head
    if (
        targets is None
        or not inputs.sizes_fit(logits, deltas, anchors, head.classification_head.num_classes)
        or not inputs.layouts_fit(targets, logits, deltas, anchors)
    ):
        return None
    joined = _joined_anchors(anchors, stock.has_shared_anchors(model.anchor_generator))
    assigned = _assign(model, targets, joined)
    return {
        "classification": _class_loss(logits, assigned),
        "bbox_regression": _box_loss(head.regression_head, targets, deltas, joined, assigned),
    }


def _detections_of_levels(
    model: RetinaNet, logits: Levels, deltas: Levels, anchors: list[Tensor], image_sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]] | None:
    """None where torchvision's code has to see the inputs."""
    num_classes = model.head.classification_head.num_classes
    if not _can_detect(model, logits, deltas) or not inputs.sizes_fit(logits, deltas, anchors, num_classes):
        return None
    joined = _joined_anchors(anchors, stock.has_shared_anchors(model.anchor_generator))
    return _detections(model, logits, deltas, joined, image_sizes)


def _joined_anchors(anchors: list[Tensor], shared: bool = False) -> Tensor:
    """[N, 4] where the images share them, else [B, N, 4]."""
    if shared or all(image is anchors[0] for image in anchors):
        return anchors[0]
    return torch.stack(list(anchors))


def _joined_outputs(logits: Levels, deltas: Levels, num_classes: int) -> dict[str, Tensor]:
    """What torchvision's head returns: [B, N, K] and [B, N, 4]."""
    return {"cls_logits": join_levels(logits, num_classes), "bbox_regression": join_levels(deltas, 4)}


def _split_outputs(
    logits: Levels, deltas: Levels, anchors: list[Tensor], num_classes: int
) -> tuple[dict[str, list[Tensor]], list[list[Tensor]]]:
    """What torchvision's `RetinaNet.forward` gives to ``postprocess_detections``."""
    outputs = _joined_outputs(logits, deltas, num_classes)
    cells = [level.shape[2] * level.shape[3] for level in logits]
    per_cell = outputs["cls_logits"].shape[1] // sum(cells)
    counts = [count * per_cell for count in cells]
    split = {name: list(rows.split(counts, dim=1)) for name, rows in outputs.items()}
    return split, [list(image.split(counts)) for image in anchors]


def _assign(model: RetinaNet, targets: Targets, anchors: Tensor) -> AssignedTargets:
    matcher = model.proposal_matcher
    return ops.assign_targets(
        anchors,
        [target["boxes"] for target in targets],
        [target["labels"] for target in targets],
        matcher.high_threshold,
        matcher.low_threshold,
        bool(matcher.allow_low_quality_matches),
        policy="torchvision",
    )


def _matches(assigned: AssignedTargets) -> list[Tensor]:
    """What torchvision's matcher returns for each image."""
    return list(assigned.matched.long())


def _normalizer(assigned: AssignedTargets, dtype: torch.dtype) -> Tensor:
    """[B]: the mean over images of each image's loss per foreground anchor."""
    return len(assigned.labels) * assigned.num_foreground.clamp(min=1).to(dtype)


def _class_loss(logits: Levels, assigned: AssignedTargets) -> Tensor:
    dtype = logits[0].dtype
    normalizer = _normalizer(assigned, compute_dtype(dtype))
    if dtype == torch.float64:  # the joint loss of all levels is float32
        num_classes = sum(level[0].numel() for level in logits) // assigned.labels.shape[1]
        images = zip(join_levels(logits, num_classes), assigned.labels, strict=True)
        sums = [ops.sigmoid_focal_loss(*image, reduction="sum") for image in images]
        return (torch.stack(sums) / normalizer).sum()
    loss = ops.multilevel_focal_loss(logits, assigned.labels, normalizer=normalizer)
    return loss if autocast_enabled(logits[0]) else loss.to(dtype)


def _box_loss(head: nn.Module, targets: Targets, deltas: Levels, anchors: Tensor, assigned: AssignedTargets) -> Tensor:
    return ops.box_regression_loss(
        deltas,
        anchors,
        [target["boxes"] for target in targets],
        assigned.matched,
        loss=head._loss_type,
        beta=1.0,  # torch.nn.functional.smooth_l1_loss's, which torchvision does not change
        weights=head.box_coder.weights,
        normalizer=_normalizer(assigned, compute_dtype(deltas[0].dtype)),
    )


def _can_detect(model: RetinaNet, logits: Levels, deltas: Levels) -> bool:
    return (
        is_eager(logits[0])
        and stock.has_own_postprocessing(model)
        and compute_dtype(logits[0].dtype) == compute_dtype(deltas[0].dtype)
    )


def _detections(
    model: RetinaNet, logits: Levels, deltas: Levels, anchors: Tensor, image_sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """``anchors`` [N, 4] or [B, N, 4]."""
    num_classes = sum(level[0].numel() for level in logits) * 4 // sum(level[0].numel() for level in deltas)
    candidates = [level[0].numel() for level in logits]
    topk = min(model.topk_candidates, max(candidates))
    found = ops.detect(
        logits,
        [unweighted(level, model.box_coder.weights) for level in deltas],
        anchors,
        image_sizes,
        score_thresh=model.score_thresh,
        topk_per_level=topk,
        nms_thresh=model.nms_thresh,
        max_detections=min(model.detections_per_img, sum(min(topk, count) for count in candidates)),
    )
    counts = found.counts.tolist()
    if torch.is_grad_enabled() and any(level.requires_grad for level in (*logits, *deltas)):
        return _differentiable(model, logits, deltas, anchors, image_sizes, found.indices, counts, num_classes)
    box_dtype = _decoded_dtype(model, deltas[0], anchors)
    return [
        {
            "boxes": found.boxes[image, :count].to(box_dtype),
            "scores": found.scores[image, :count].to(logits[0].dtype),
            "labels": found.labels[image, :count],
        }
        for image, count in enumerate(counts)
    ]


def _decoded_dtype(model: RetinaNet, deltas: Tensor, anchors: Tensor) -> torch.dtype:
    """The type of torchvision's boxes, which of halves under autocast is not the deltas'."""
    if deltas.dtype in (torch.float32, torch.float64):
        return deltas.dtype
    return model.box_coder.decode_single(deltas.new_empty((0, 4)), anchors.new_empty((0, 4))).dtype


def _differentiable(
    model: RetinaNet,
    logits: Levels,
    deltas: Levels,
    anchors: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    indices: Tensor,  # [B, D], anchor * K + class
    counts: Sequence[int],
    num_classes: int,
) -> list[dict[str, Tensor]]:
    """The detections of these indices, computed as torchvision computes them, so that gradients flow back."""
    rows = _joined_outputs(logits, deltas, num_classes)
    detections = []
    for image, count in enumerate(counts):
        chosen = indices[image, :count]
        anchor_ids = chosen // num_classes
        image_anchors = anchors if anchors.dim() == 2 else anchors[image]
        boxes = model.box_coder.decode_single(rows["bbox_regression"][image][anchor_ids], image_anchors[anchor_ids])
        detections.append(
            {
                "boxes": clip_boxes_to_image(boxes, image_sizes[image]),
                "scores": torch.sigmoid(rows["cls_logits"][image].flatten()[chosen]),
                "labels": chosen % num_classes,
            }
        )
    return detections
