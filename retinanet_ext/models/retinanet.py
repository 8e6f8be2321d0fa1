"""RetinaNet (Lin et al., 2017, arXiv 1708.02002) on the operators of this library.

Conventions, names, defaults, weights, losses and detections are those of
``torchvision.models.detection.retinanet_resnet50_fpn`` and ``retinanet_resnet50_fpn_v2``: state dicts load both ways
without conversion. `RetinaNetConfig.preset` has the conventions of other implementations, and `retinanet_ext.interop`
reads their checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.anchor_match import POLICIES
from .anchors import DEFAULT_ASPECT_RATIOS, DEFAULT_SIZES, AnchorGenerator
from .config import RetinaNetConfig
from .heads import RetinaNetHead
from .normalizers import LossNormalizer
from .targets import check_images, check_targets
from .transform import ImageBatch, ImageTransform, resize_boxes, resize_ratios

_FOCAL_ALPHA, _FOCAL_GAMMA = 0.25, 2.0
BOX_LOSSES = ("l1", "smooth_l1", "giou")


class PaddedDetections(NamedTuple):
    """What `RetinaNet.padded_detections` returns: the best ``D`` detections of each image, best first, and padding.

    Attributes:
        boxes: ``[B, D, 4]``, pixels of the image as passed, padding 0.
        scores: ``[B, D]``, padding 0.
        labels: int64 ``[B, D]``, padding -1.
        counts: int32 ``[B]``, how many detections each image has.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor


class RetinaNet(nn.Module):
    """A one-stage detector: a backbone with a feature pyramid, a class subnet and a box subnet.

    In training mode ``model(images, targets)`` returns the losses, in evaluation mode ``model(images)`` the
    detections; see `forward`.

    Args:
        backbone: images ``[B, 3, H, W]`` to a list of levels ``[B, out_channels, H_l, W_l]``, finest first;
            has the attribute ``out_channels``.
        num_classes: ``K``. Labels are ``0 .. K - 1``. (torchvision's 91 of COCO counts a background that is
            never a target.)
        min_size: side in pixels that an image's shorter side is resized to; of several, training draws one.
        max_size: the longer side in pixels is at most this.
        image_mean, image_std: of each channel, for images in 0..1; ImageNet's by default.
        anchor_sizes: for each level, in pixels of the resized image.
        aspect_ratios: height / width, at every level.
        anchor_strides, anchor_rounding, anchor_offset, anchor_order: see `AnchorGenerator`.
        score_thresh: detections have a score above this.
        nms_thresh: of two detections of a class with an IoU above this only the better one stays.
        detections_per_img: at most so many detections an image.
        topk_candidates: at most so many candidates a level, before suppression.
        clip_before_nms: whether boxes are clipped to their image before suppression or, as in detectron2, after it.
        fg_iou_thresh: an anchor with at least this IoU with a box is trained on that box.
        bg_iou_thresh: an anchor with less than this IoU with every box is background.
        match_policy: how boxes that no anchor fits get theirs, see `retinanet_ext.ops.match_anchors`;
            "torchvision" gives torchvision's losses also where a box touches no anchor at all.
        head_norm: of the subnets: "none", or "group" for GroupNorm of 32 groups.
        box_loss: "l1", "smooth_l1" or "giou", see `retinanet_ext.ops.box_regression_loss`.
        box_loss_beta: where smooth L1 turns from a parabola into a line.
        loss_normalizer: what the losses are divided by, see `retinanet_ext.models.normalizers`.

    Attributes:
        config: the `RetinaNetConfig` it was built from, None where it was built by hand.
        last_num_foreground: after a training step, int32 ``[B]``: foreground anchors of each image. None
            before.

    Raises:
        ValueError: an argument out of its range, by name.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        anchor_sizes: Sequence[Sequence[float]] = DEFAULT_SIZES,
        aspect_ratios: Sequence[float] = DEFAULT_ASPECT_RATIOS,
        anchor_strides: Sequence[float] | None = None,
        anchor_rounding: str = "pixels",
        anchor_offset: float = 0.0,
        anchor_order: str = "ratio",
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 300,
        topk_candidates: int = 1000,
        clip_before_nms: bool = True,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
        match_policy: str = "safe",
        head_norm: str = "none",
        box_loss: str = "l1",
        box_loss_beta: float = 1 / 9,
        loss_normalizer: str = "per_image",
    ):
        super().__init__()
        self.config: RetinaNetConfig | None = None
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if match_policy not in POLICIES:
            raise ValueError(f"match_policy: expected one of {POLICIES}, got {match_policy!r}")
        if not 0 <= bg_iou_thresh <= fg_iou_thresh <= 1:
            raise ValueError(
                f"bg_iou_thresh, fg_iou_thresh: expected 0 <= bg <= fg <= 1, got {bg_iou_thresh}, {fg_iou_thresh}"
            )
        if box_loss not in BOX_LOSSES:
            raise ValueError(f"box_loss: expected one of {BOX_LOSSES}, got {box_loss!r}")
        if not box_loss_beta > 0:
            raise ValueError(f"box_loss_beta: expected a positive number, got {box_loss_beta}")
        for name, value in (("score_thresh", score_thresh), ("nms_thresh", nms_thresh)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
        for name, value in (("detections_per_img", detections_per_img), ("topk_candidates", topk_candidates)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.transform = ImageTransform(min_size, max_size, image_mean, image_std)
        self.anchor_generator = AnchorGenerator(
            anchor_sizes,
            aspect_ratios,
            strides=anchor_strides,
            rounding=anchor_rounding,
            offset=anchor_offset,
            order=anchor_order,
        )
        self.backbone = backbone
        self.head = RetinaNetHead(backbone.out_channels, self.anchor_generator.num_anchors, num_classes, norm=head_norm)
        self.loss_normalizer = LossNormalizer(loss_normalizer)

        self.num_classes = num_classes
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img
        self.topk_candidates = topk_candidates
        self.clip_before_nms = clip_before_nms
        self.fg_iou_thresh = fg_iou_thresh
        self.bg_iou_thresh = bg_iou_thresh
        self.match_policy = match_policy
        self.box_loss = box_loss
        self.box_loss_beta = box_loss_beta
        self.last_num_foreground: Tensor | None = None

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: a list of floating ``[3, H, W]`` in 0..1, of any sizes.
            targets: for each image, in training mode only: ``boxes`` ``[M, 4]``, (x1, y1, x2, y2) in pixels
                of the image as passed; ``labels``, integers ``[M]`` in ``[0, num_classes)``; optionally
                ``ignore``, bool ``[M]``: regions to leave out of the loss. ``M`` may be 0.

        Returns:
            In training mode the scalars ``classification`` and ``bbox_regression``. In evaluation mode for
            each image ``boxes`` ``[D, 4]`` in pixels of the image as passed, ``scores`` ``[D]``, best first,
            and ``labels`` int64 ``[D]``.

        Raises:
            TypeError, ValueError: what is wrong with which image or target (under ``torch.compile`` boxes and labels
                are not looked at, only their types and shapes).
        """
        images = check_images(images)
        if not self.training:
            return _unpadded(self._detections(*self._outputs(images)))
        targets = check_targets(targets, images, self.num_classes)
        return self._losses(*self._outputs(images), targets)

    def detections_and_losses(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The detections of a batch and its losses, by one pass through the network; for validation.

        In evaluation mode normalisation layers use what they have learned, not the batch. An image's losses still
        depend on the others beside it where images differ in size, by the padding, and where the normalizer is that
        of the batch.

        Args, errors: as `forward` has them in training mode.

        Returns:
            what `forward` returns in evaluation mode, and what it returns in training mode.
        """
        images = check_images(images)
        targets = check_targets(targets, images, self.num_classes)
        outputs = self._outputs(images)
        detections, losses = self._detections(*outputs), self._losses(*outputs, targets)
        return _unpadded(detections), losses

    def padded_detections(self, images: Sequence[Tensor] | Tensor) -> PaddedDetections:
        """The detections of a batch as tensors of fixed shapes: one graph for ``torch.compile(model.padded_detections,
        fullgraph=True)``, and the host does not wait for their number.

        Args:
            images: as `forward` has them.

        Returns:
            A named tuple: ``boxes`` ``[B, D, 4]`` in pixels of the image as passed, ``scores`` ``[B, D]``, best first,
            ``labels`` int64 ``[B, D]``, ``counts`` int32 ``[B]``; ``D`` is ``detections_per_img``. Rows past an image's
            count hold 0, 0 and -1; those before it are what `forward` returns in evaluation mode.

        Raises:
            ValueError: the model is in training mode, or as `forward`.
            TypeError: as `forward`.
        """
        if self.training:
            raise ValueError("model: expected evaluation mode, got training mode: model.eval()")
        return self._detections(*self._outputs(check_images(images)))

    @property
    def detect_options(self) -> dict[str, Any]:
        """The thresholds and limits of this model, by the names of `retinanet_ext.ops.detect`."""
        return {
            "score_thresh": self.score_thresh,
            "topk_per_level": self.topk_candidates,
            "nms_thresh": self.nms_thresh,
            "max_detections": self.detections_per_img,
            "clip_before_nms": self.clip_before_nms,
        }

    def _outputs(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor, ImageBatch]:
        """Class logits and box deltas a level, the anchors, and the batch as the network sees it."""
        batch = self.transform(images)
        features = self.backbone(batch.tensor)
        cls_logits, box_deltas = self.head(features)
        anchors = self.anchor_generator(
            tuple(batch.tensor.shape[-2:]),
            [tuple(level.shape[-2:]) for level in features],
            batch.tensor.device,
            torch.promote_types(batch.tensor.dtype, torch.float32),
        )
        return cls_logits, box_deltas, anchors, batch

    def _losses(
        self,
        cls_logits: list[Tensor],  # [B, A * K, H_l, W_l] a level
        box_deltas: list[Tensor],  # [B, 4 * A, H_l, W_l] a level
        anchors: Tensor,  # [N, 4]
        batch: ImageBatch,
        targets: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The sums over images of each image's loss by its normalizer."""
        gt_boxes = [
            resize_boxes(target["boxes"].to(anchors.dtype), original_size, size)
            for target, original_size, size in zip(targets, batch.original_sizes, batch.sizes, strict=True)
        ]
        assigned = ops.assign_targets(
            anchors,
            gt_boxes,
            [target["labels"] for target in targets],
            self.fg_iou_thresh,
            self.bg_iou_thresh,
            policy=self.match_policy,
            gt_ignore=_ignore_masks(targets),
        )
        self.last_num_foreground = assigned.num_foreground
        normalizer = self.loss_normalizer(assigned.num_foreground, anchors.dtype)
        return {
            "classification": ops.multilevel_focal_loss(
                cls_logits, assigned.labels, alpha=_FOCAL_ALPHA, gamma=_FOCAL_GAMMA, normalizer=normalizer
            ),
            "bbox_regression": ops.box_regression_loss(
                box_deltas,
                anchors,
                gt_boxes,
                assigned.matched,
                loss=self.box_loss,
                beta=self.box_loss_beta,
                normalizer=normalizer,
            ),
        }

    def _detections(
        self, cls_logits: list[Tensor], box_deltas: list[Tensor], anchors: Tensor, batch: ImageBatch
    ) -> PaddedDetections:
        found = ops.detect(cls_logits, box_deltas, anchors, batch.sizes, **self.detect_options)
        ratios = [
            resize_ratios(size, original_size, found.boxes)
            for size, original_size in zip(batch.sizes, batch.original_sizes, strict=True)
        ]
        return PaddedDetections(found.boxes * torch.stack(ratios)[:, None], found.scores, found.labels, found.counts)


def _unpadded(detections: PaddedDetections) -> list[dict[str, Tensor]]:
    """The detections of each image; the host reads their numbers. Called by what is compiled as its last step: the
    graph ends before the call."""
    return [
        {
            "boxes": detections.boxes[image, :count],
            "scores": detections.scores[image, :count],
            "labels": detections.labels[image, :count],
        }
        for image, count in enumerate(detections.counts.tolist())
    ]


def _ignore_masks(targets: Sequence[Mapping[str, Tensor]]) -> list[Tensor] | None:
    """The ``ignore`` mask of each image, or None where no image has one."""
    if all(target.get("ignore") is None for target in targets):
        return None
    return [
        torch.zeros_like(target["labels"], dtype=torch.bool) if target.get("ignore") is None else target["ignore"]
        for target in targets
    ]
