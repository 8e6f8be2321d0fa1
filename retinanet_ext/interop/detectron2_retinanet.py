"""The matching, the losses and the inference of detectron2's RetinaNet on our operators, as methods of its class.

Of releases 0.6 and newer, whose RetinaNet is a `DenseDetector`. Each method computes with ours what it can and leaves
the rest to detectron2's method, part by part: another matcher, coder or box loss, boxes or labels that detectron2 has
its own way with, tracing. `forward_training` and `forward_inference` read the levels as the convolutions leave them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.meta_arch import retinanet as d2_retinanet
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .. import ops
from ..reference.focal_loss import compute_dtype
from . import detectron2_stock as stock
from .accelerated import Acceleration
from .levels import Levels, rows_at, unweighted
from .ordinary import is_eager

_METHODS = ("forward_training", "losses", "label_anchors", "forward_inference")
_missing = [name for name in _METHODS if name not in vars(RetinaNet)]
if _missing:
    raise RuntimeError(
        f"detectron2: expected release 0.6 or newer, whose RetinaNet has {', '.join(_METHODS)}; "
        f"the installed one is without {', '.join(_missing)}"
    )
THEIRS = {name: vars(RetinaNet)[name] for name in _METHODS}


@torch.no_grad()
def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> tuple[list[Tensor], list[Tensor]]:
    """Labels [N] of each image, -1 left out and K background, and the matched boxes [N, 4]."""
    thresholds = _usable_thresholds(self, gt_instances, anchors)
    if thresholds is None:
        return THEIRS["label_anchors"](self, anchors, gt_instances)
    all_anchors = Boxes.cat(anchors).tensor
    gt_boxes = [instances.gt_boxes.tensor for instances in gt_instances]
    low_quality = bool(self.anchor_matcher.allow_low_quality_matches)
    matched = ops.match_anchors(all_anchors, gt_boxes, *thresholds, low_quality, policy="detectron2")
    labels, boxes = [], []
    for image_matches, instances in zip(matched, gt_instances, strict=True):
        if len(instances) == 0:
            labels.append(torch.full_like(image_matches, self.num_classes, dtype=torch.int64))
            boxes.append(torch.zeros_like(all_anchors))
            continue
        rows = image_matches.clamp(min=0).long()
        image_labels = instances.gt_classes[rows]
        image_labels[image_matches == -1] = self.num_classes
        image_labels[image_matches == -2] = -1
        labels.append(image_labels)
        boxes.append(instances.gt_boxes.tensor[rows])
    return labels, boxes


def losses(
    self,
    anchors: list[Boxes],
    pred_logits: list[Tensor],  # a level [B, n, K]
    gt_labels: list[Tensor],  # [N] of each image
    pred_anchor_deltas: list[Tensor],  # a level [B, n, 4]
    gt_boxes: list[Tensor],  # [N, 4] of each image, the matched ones
) -> dict[str, Tensor]:
    fits = is_eager(pred_logits[0]) and stock.has_own_class_loss(self) and _rows_fit(self, pred_logits, gt_labels)
    labels = torch.stack(gt_labels) if fits else None
    if labels is None or not bool(((labels >= -1) & (labels <= self.num_classes)).all()):
        return THEIRS["losses"](self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
    foreground = (labels >= 0) & (labels != self.num_classes)
    normalizer = _next_normalizer(self, foreground.sum(), len(labels))
    # detectron2's -1 is our -2; its K is background to us as well.
    loss_cls = _class_loss(self, pred_logits, labels.masked_fill(labels == -1, -2), normalizer)
    if stock.has_own_box_loss(self) and _narrow(pred_anchor_deltas) and all(type(level) is Boxes for level in anchors):
        own_row = torch.arange(labels.shape[1], device=labels.device)  # each anchor has its box in a row of its own
        matched = torch.where(foreground, own_row, -1)
        all_anchors = Boxes.cat(anchors).tensor
        loss_box_reg = _box_loss(self, pred_anchor_deltas, all_anchors, gt_boxes, matched, normalizer)
    else:
        loss_box_reg = d2_retinanet._dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            foreground,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        loss_box_reg = loss_box_reg / normalizer
    return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}


def forward_training(self, images, features, predictions, gt_instances: list[Instances]) -> dict[str, Tensor]:
    """``predictions``: logits [B, A * K, H, W] and deltas [B, A * 4, H, W] of each level."""
    logits, deltas = predictions
    anchors, thresholds = None, None
    if _levels_are_enough(self, logits, deltas):
        anchors = self.anchor_generator(features)
        thresholds = _usable_thresholds(self, gt_instances, anchors, self.num_classes)
    if thresholds is None or not _levels_fit(self, logits, deltas, anchors):
        return THEIRS["forward_training"](self, images, features, predictions, gt_instances)
    all_anchors = Boxes.cat(anchors).tensor
    gt_boxes = [instances.gt_boxes.tensor for instances in gt_instances]
    gt_classes = [instances.gt_classes for instances in gt_instances]
    low_quality = bool(self.anchor_matcher.allow_low_quality_matches)
    assigned = ops.assign_targets(all_anchors, gt_boxes, gt_classes, *thresholds, low_quality, policy="detectron2")
    normalizer = _next_normalizer(self, assigned.num_foreground.sum(), len(gt_instances))
    return {
        "loss_cls": _class_loss(self, logits, assigned.labels, normalizer),
        "loss_box_reg": _box_loss(self, deltas, all_anchors, gt_boxes, assigned.matched, normalizer),
    }


def forward_inference(self, images, features, predictions) -> list[Instances]:
    """``predictions``: logits [B, A * K, H, W] and deltas [B, A * 4, H, W] of each level."""
    logits, deltas = predictions
    anchors = None
    if is_eager(logits[0]) and stock.has_own_inference(self):
        anchors = self.anchor_generator(features)
    if anchors is None or not _levels_fit(self, logits, deltas, anchors):
        return THEIRS["forward_inference"](self, images, features, predictions)
    return _detections(self, logits, deltas, Boxes.cat(anchors).tensor, images.image_sizes)


OURS = {
    "forward_training": forward_training,
    "losses": losses,
    "label_anchors": label_anchors,
    "forward_inference": forward_inference,
}
ACCELERATION = Acceleration("detectron2_retinanet", RetinaNet, OURS, THEIRS)


def _levels_are_enough(model: RetinaNet, logits: Levels, deltas: Levels) -> bool:
    """Whether nobody but our own losses wants the levels permuted, or the labels of the anchors."""
    return (
        is_eager(logits[0])
        and all(
            getattr(type(model), name) is OURS[name] and name not in vars(model) for name in ("losses", "label_anchors")
        )
        and stock.takes_levels(model)
        and stock.has_own_class_loss(model)
        and stock.has_own_box_loss(model)
    )


def _usable_thresholds(
    model: RetinaNet, gt_instances: list[Instances], anchors: list[Boxes], num_classes: int | None = None
) -> tuple[float, float] | None:
    """Of foreground and background; None where detectron2's matching has to see boxes, classes or matcher itself.

    ``num_classes``: labels have to be below it. Waits for the device once.
    """
    thresholds = stock.iou_thresholds(model)
    if thresholds is None or not stock.has_own_iou() or not gt_instances or not anchors:
        return None
    if any(type(level) is not Boxes or not is_eager(level.tensor) for level in anchors):
        return None
    device = anchors[0].tensor.device
    for instances in gt_instances:
        if not (instances.has("gt_boxes") and instances.has("gt_classes")) or type(instances.gt_boxes) is not Boxes:
            return None
        boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
        if not isinstance(classes, Tensor) or classes.dtype != torch.int64 or classes.shape != boxes.shape[:1]:
            return None
        if boxes.device != device or classes.device != device:
            return None
    boxes = torch.cat([instances.gt_boxes.tensor for instances in gt_instances])
    classes = torch.cat([instances.gt_classes for instances in gt_instances])
    fit = (boxes[:, 2:] > boxes[:, :2]).all() & boxes.isfinite().all()
    if num_classes is not None:
        fit &= ((classes >= 0) & (classes < num_classes)).all()
    return thresholds if bool(fit) else None


def _levels_fit(model: RetinaNet, logits: Levels, deltas: Levels, anchors: list[Boxes]) -> bool:
    """As many classes as the model has, and an anchor for each prediction, of each level."""
    if not len(logits) == len(deltas) == len(anchors) or not (_narrow(logits) and _narrow(deltas)):
        return False
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        if type(level_anchors) is not Boxes or level_logits.dim() != 4 or level_deltas.dim() != 4:
            return False
        batch, channels, height, width = level_deltas.shape
        if channels % 4 or len(level_anchors) != channels // 4 * height * width:
            return False
        if level_logits.shape != (batch, channels // 4 * model.num_classes, height, width):
            return False
    return True


def _rows_fit(model: RetinaNet, logits: Levels, labels: list[Tensor]) -> bool:
    """A label for each row of logits, of each image."""
    rows = sum(level.shape[1] for level in logits if level.dim() == 3)
    return (
        _narrow(logits)
        and all(level.dim() == 3 and level.shape[::2] == (len(labels), model.num_classes) for level in logits)
        and len(labels) > 0
        and all(
            image.shape == (rows,) and image.dtype == torch.int64 and image.device == logits[0].device
            for image in labels
        )
    )


def _narrow(levels: Levels) -> bool:
    """Whether detectron2, too, computes them in float32."""
    return all(compute_dtype(level.dtype) == torch.float32 for level in levels)


def _next_normalizer(model: RetinaNet, num_foreground: Tensor, num_images: int) -> float:
    """detectron2's: a moving average of the number of foreground anchors. Waits for the device."""
    count = num_foreground.item()
    d2_retinanet.get_event_storage().put_scalar("num_pos_anchors", count / num_images)
    return model._ema_update("loss_normalizer", max(count, 1), 100)


def _class_loss(model: RetinaNet, logits: Levels, labels: Tensor, normalizer: float) -> Tensor:
    alpha = model.focal_loss_alpha if model.focal_loss_alpha >= 0 else -1
    return ops.multilevel_focal_loss(logits, labels, alpha, model.focal_loss_gamma, normalizer)


def _box_loss(
    model: RetinaNet, deltas: Levels, anchors: Tensor, gt_boxes: Sequence[Tensor], matched: Tensor, normalizer: float
) -> Tensor:
    loss, beta = model.box_reg_loss_type, model.smooth_l1_beta
    if loss == "smooth_l1" and beta < 1e-5:
        loss, beta = "l1", 0.0  # as fvcore's smooth_l1_loss has it
    return ops.box_regression_loss(
        deltas,
        anchors,
        gt_boxes,
        matched,
        loss=loss,
        beta=beta,
        weights=model.box2box_transform.weights,
        normalizer=normalizer,
    )


def _detections(
    model: RetinaNet, logits: Levels, deltas: Levels, anchors: Tensor, image_sizes: Sequence[tuple[int, int]]
) -> list[Instances]:
    """Unclipped, as detectron2's are until its `detector_postprocess`."""
    weights = model.box2box_transform.weights
    candidates = [level[0].numel() for level in logits]
    topk = min(model.test_topk_candidates, max(candidates))
    with torch.no_grad():
        found = ops.detect(
            logits,
            [unweighted(level, weights) for level in deltas],
            anchors,
            [tuple(size) for size in image_sizes],
            score_thresh=model.test_score_thresh,
            topk_per_level=topk,
            nms_thresh=model.test_nms_thresh,
            max_detections=min(model.max_detections_per_image, sum(min(topk, count) for count in candidates)),
            clip_before_nms=False,
        )
    anchor_ids = found.indices.clamp(min=0) // model.num_classes
    scores = rows_at(logits, anchor_ids, model.num_classes).gather(2, found.labels.clamp(min=0)[:, :, None])
    scores = scores.squeeze(2).sigmoid()
    boxes = ops.decode_boxes(rows_at(deltas, anchor_ids, 4).float(), anchors[anchor_ids], weights)
    detections = []
    for image, (count, size) in enumerate(zip(found.counts.tolist(), image_sizes, strict=True)):
        instances = Instances(size)
        instances.pred_boxes = Boxes(boxes[image, :count])
        instances.scores = scores[image, :count]
        instances.pred_classes = found.labels[image, :count]
        detections.append(instances)
    return detections
