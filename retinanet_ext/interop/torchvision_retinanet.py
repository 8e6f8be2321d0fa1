"""The losses and the post-processing of torchvision's RetinaNet on our operators, as methods of its class.

Each method computes with ours what it can and leaves the rest to torchvision's method, part by part: another matcher
(then the losses take its matches), another head or box loss, boxes or labels that torchvision has its own way with,
tracing. `forward` reads the levels as the convolutions leave them: what torchvision's permutes and joins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops.boxes import clip_boxes_to_image

from .. import ops
from .._load import CUDA_MISSING
from ..reference.focal_loss import anchor_rows, autocast_enabled, compute_dtype
from . import torchvision_stock as stock

THEIRS = {name: vars(RetinaNet)[name] for name in ("forward", "compute_loss", "postprocess_detections")}

Targets = Sequence[Mapping[str, Tensor]]
Levels = Sequence[Tensor]  # [B, A * K, H, W] or [B, n, K] each; deltas with 4 in place of K


def compute_loss(self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict[str, Tensor]:
    """``cls_logits`` [B, N, K], ``bbox_regression`` [B, N, 4], ``anchors`` [N, 4] of each image."""
    logits, deltas = [head_outputs.get("cls_logits")], [head_outputs.get("bbox_regression")]
    if not (
        _is_eager(logits[0])
        and stock.has_own_matching(self)
        and _rows_fit(logits, deltas, [[image] for image in anchors])
        and _layouts_fit(targets, logits, deltas, anchors)
        and _values_fit(targets, logits[0].shape[-1])
    ):
        return THEIRS["compute_loss"](self, targets, head_outputs, anchors)
    assigned = _assign(self, targets, _joined_anchors(anchors))
    matches = list(assigned.matched.long())
    head = self.head
    if not stock.has_own_loss(head):
        return head.compute_loss(targets, head_outputs, anchors, matches)
    classes, boxes = head.classification_head, head.regression_head
    return {
        "classification": _class_loss(logits, assigned)
        if stock.has_own_class_loss(classes)
        else classes.compute_loss(targets, head_outputs, matches),
        "bbox_regression": _box_loss(boxes, targets, deltas, _joined_anchors(anchors), assigned)
        if stock.has_own_box_loss(boxes)
        else boxes.compute_loss(targets, head_outputs, anchors, matches),
    }


def postprocess_detections(
    self,
    head_outputs: dict[str, list[Tensor]],
    anchors: list[list[Tensor]],
    image_shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """A level: ``cls_logits`` [B, n, K], ``bbox_regression`` [B, n, 4]; ``anchors`` [n, 4] by image and level."""
    logits, deltas = head_outputs.get("cls_logits", []), head_outputs.get("bbox_regression", [])
    if not (
        len(image_shapes) == len(anchors) and _rows_fit(logits, deltas, anchors) and _can_detect(self, logits, deltas)
    ):
        return THEIRS["postprocess_detections"](self, head_outputs, anchors, image_shapes)
    joined = _joined_anchors([torch.cat(list(levels)) for levels in anchors])
    return _detections(self, logits, deltas, joined, image_shapes)


def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
    """torchvision's `RetinaNet.forward`, step by step, but that the heads' outputs are not permuted and joined."""
    if not (_levels_are_enough(self) and len(images) > 0 and _is_eager(images[0])):
        return THEIRS["forward"](self, images, targets)
    original_sizes = _check_inputs(images, targets, self.training)
    images, targets = self.transform(images, targets)
    num_classes = self.head.classification_head.num_classes
    usable = targets is not None and _have_boxes_and_labels(targets) and _values_fit(targets, num_classes)
    if targets is not None and not usable:
        _reject_degenerate(targets)
    features = self.backbone(images.tensors)
    if isinstance(features, Tensor):
        features = OrderedDict([("0", features)])
    features = list(features.values())
    classes, boxes = self.head.classification_head, self.head.regression_head
    logits = [classes.cls_logits(classes.conv(level)) for level in features]
    deltas = [boxes.bbox_reg(boxes.conv(level)) for level in features]
    anchors = self.anchor_generator(images, features)

    losses, detections = {}, []
    if self.training:
        if usable and _layouts_fit(targets, logits, deltas, anchors):
            shared = _joined_anchors(anchors, stock.has_shared_anchors(self.anchor_generator))
            assigned = _assign(self, targets, shared)
            losses = {
                "classification": _class_loss(logits, assigned),
                "bbox_regression": _box_loss(boxes, targets, deltas, shared, assigned),
            }
        else:
            losses = self.compute_loss(targets, _joined_outputs(logits, deltas, num_classes), anchors)
    else:
        if _can_detect(self, logits, deltas) and _anchors_fit(deltas, anchors):
            shared = _joined_anchors(anchors, stock.has_shared_anchors(self.anchor_generator))
            detections = _detections(self, logits, deltas, shared, images.image_sizes)
        else:
            rows = {
                "cls_logits": [anchor_rows(level, num_classes) for level in logits],
                "bbox_regression": [anchor_rows(level, 4) for level in deltas],
            }
            counts = [level.shape[1] for level in rows["cls_logits"]]
            split = [list(image.split(counts)) for image in anchors]
            detections = self.postprocess_detections(rows, split, images.image_sizes)
        detections = self.transform.postprocess(detections, images.image_sizes, original_sizes)
    return self.eager_outputs(losses, detections)


OURS = {"forward": forward, "compute_loss": compute_loss, "postprocess_detections": postprocess_detections}


def _is_eager(tensor: Tensor | None) -> bool:
    """A device that our operators run on, and no tracer, which would record other operators than torchvision's."""
    device = tensor.device.type if isinstance(tensor, Tensor) else None
    return (
        (device == "cpu" or (device == "cuda" and CUDA_MISSING is None))
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


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


def _check_inputs(images: list[Tensor], targets: Targets | None, training: bool) -> list[tuple[int, int]]:
    """torchvision's checks, in its words. Returns the images' sizes."""
    if training:
        torch._assert(targets is not None, "targets should not be none when in training mode")
        for target in targets:
            boxes = target["boxes"]
            torch._assert(isinstance(boxes, Tensor), "Expected target boxes to be of type Tensor.")
            torch._assert(
                len(boxes.shape) == 2 and boxes.shape[-1] == 4, "Expected target boxes to be a tensor of shape [N, 4]."
            )
    for image in images:
        torch._assert(
            len(image.shape[-2:]) == 2,
            f"expecting the last two dimensions of the Tensor to be H and W instead got {image.shape[-2:]}",
        )
    return [(image.shape[-2], image.shape[-1]) for image in images]


def _reject_degenerate(targets: Targets) -> None:
    for index, target in enumerate(targets):
        boxes = target["boxes"]
        degenerate = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
        if degenerate.any():
            first = boxes[torch.where(degenerate)[0][0]].tolist()
            torch._assert(
                False,
                "All bounding boxes should have positive height and width."
                f" Found invalid box {first} for target at index {index}.",
            )


def _have_boxes_and_labels(targets: Targets) -> bool:
    """Boxes [M, 4] and integer labels [M] that torchvision reads as they are."""
    for target in targets:
        boxes, labels = target.get("boxes"), target.get("labels")
        if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor):
            return False
        if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            return False
        if labels.dtype not in (torch.int64, torch.int32) or labels.device != boxes.device:
            return False
        if torch.is_grad_enabled() and boxes.requires_grad:
            return False
    return len(targets) > 0 and len({target["boxes"].device for target in targets}) == 1


def _values_fit(targets: Targets, num_classes: int) -> bool:
    """No box without area, no label that torchvision wraps around or refuses. Waits for the device once."""
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    boxes_fit = (boxes[:, 2:] > boxes[:, :2]).all() & boxes.isfinite().all()
    return bool(boxes_fit & ((labels >= 0) & (labels < num_classes)).all())


def _layouts_fit(targets: Targets, logits: Levels, deltas: Levels, anchors: list[Tensor]) -> bool:
    """Targets for each image, in the type that we and torchvision compute in."""
    wide = compute_dtype(deltas[0].dtype)
    return (
        len(targets) == len(anchors)
        and _have_boxes_and_labels(targets)
        and all(target["boxes"].dtype == wide and target["boxes"].device == deltas[0].device for target in targets)
        and compute_dtype(logits[0].dtype) == wide
        and _anchors_fit(deltas, anchors)
    )


def _anchors_fit(deltas: Levels, anchors: list[Tensor]) -> bool:
    """[N, 4] for each image of the batch, in no other precision than the deltas."""
    first = anchors[0]
    return len(anchors) == len(deltas[0]) and all(
        image.shape == first.shape
        and compute_dtype(image.dtype) == compute_dtype(deltas[0].dtype)
        and not (torch.is_grad_enabled() and image.requires_grad)
        for image in anchors
    )


def _rows_fit(logits: Levels, deltas: Levels, anchors: list[list[Tensor]]) -> bool:
    """Logits [B, n, K], deltas [B, n, 4] and anchors [n, 4] of the same levels and images, K > 0."""
    if not anchors or not logits or not len(logits) == len(deltas) == len(anchors[0]):
        return False
    batch, num_classes = len(anchors), logits[0].shape[-1]
    for index, (level_logits, level_deltas) in enumerate(zip(logits, deltas, strict=True)):
        rows = level_logits.shape[1] if level_logits.dim() == 3 else -1
        if level_logits.shape != (batch, rows, num_classes) or level_deltas.shape != (batch, rows, 4):
            return False
        if any(len(image) != len(logits) or image[index].shape != (rows, 4) for image in anchors):
            return False
    return num_classes > 0 and _anchors_fit(deltas, [image[0] for image in anchors])


def _joined_anchors(anchors: list[Tensor], shared: bool = False) -> Tensor:
    """[N, 4] where the images share them, else [B, N, 4]."""
    if shared or all(image is anchors[0] for image in anchors):
        return anchors[0]
    return torch.stack(list(anchors))


def _joined_outputs(logits: Levels, deltas: Levels, num_classes: int) -> dict[str, Tensor]:
    """What torchvision's head returns."""
    return {
        "cls_logits": torch.cat([anchor_rows(level, num_classes) for level in logits], dim=1),
        "bbox_regression": torch.cat([anchor_rows(level, 4) for level in deltas], dim=1),
    }


def _assign(model: RetinaNet, targets: Targets, anchors: Tensor):
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


def _normalizer(assigned, dtype: torch.dtype) -> Tensor:
    """[B]: the mean over images of each image's loss per foreground anchor."""
    return len(assigned.labels) * assigned.num_foreground.clamp(min=1).to(dtype)


def _class_loss(logits: Levels, assigned) -> Tensor:
    dtype = logits[0].dtype
    normalizer = _normalizer(assigned, compute_dtype(dtype))
    if dtype == torch.float64:  # the joint loss of all levels is float32
        num_classes = sum(level[0].numel() for level in logits) // assigned.labels.shape[1]
        rows = torch.cat([anchor_rows(level, num_classes) for level in logits], dim=1)
        sums = [ops.sigmoid_focal_loss(*image, reduction="sum") for image in zip(rows, assigned.labels, strict=True)]
        return (torch.stack(sums) / normalizer).sum()
    loss = ops.multilevel_focal_loss(logits, assigned.labels, normalizer=normalizer)
    return loss if autocast_enabled(logits[0]) else loss.to(dtype)


def _box_loss(head: nn.Module, targets: Targets, deltas: Levels, anchors: Tensor, assigned) -> Tensor:
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
        _is_eager(logits[0])
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
        [_unweighted(level, model.box_coder.weights) for level in deltas],
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


def _unweighted(level: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas [B, 4 * A, H, W] or [B, n, 4] for a coder whose weights are all 1."""
    if all(weight == 1 for weight in weights):
        return level
    weights = torch.tensor(weights, dtype=level.dtype, device=level.device)
    if level.dim() == 3:
        return level / weights
    return level / weights.repeat(level.shape[1] // 4)[:, None, None]


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
