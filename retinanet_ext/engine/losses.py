"""The losses of a batch for the optimizer step: prepared on the host, computed on the device without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retinanet_ext import ops
from retinanet_ext.data import Batch
from retinanet_ext.models import LossNormalizer, RetinaNet
from retinanet_ext.models.retinanet import _FOCAL_ALPHA, _FOCAL_GAMMA
from retinanet_ext.models.targets import check_images, check_targets
from retinanet_ext.models.transform import resize_boxes

# Rows for ground truth: a power of two, so that few shapes are compiled or captured, and at least so many.
LEAST_CAPACITY = 64


class Losses(nn.Module):
    """What DistributedDataParallel wraps: `forward(*prepare(batch, device))` gives the losses of a model. Of nothing it
    gives zeros that every parameter takes part in, so that a process without images still meets the others where
    gradients are summed. `foreground`, where the model counts them: foreground anchors of each image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # The processes meet in each layer, or where foreground is counted, too, not only where gradients are summed.
        self.in_layers = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        self.counted = [m for m in model.modules() if isinstance(m, LossNormalizer) and m.of_whole_batch]

    @property
    def synchronised(self) -> bool:
        """Whether a process without images has to take part in the forward pass of the others."""
        return self.in_layers or bool(self.counted)

    def prepare(self, batch: Batch, device: torch.device) -> tuple[Any, ...]:
        """What `forward` takes, on `device`."""
        images = batch.images_on(device)
        targets = [
            {k: v.to(device, non_blocking=True) for k, v in target.items() if isinstance(v, Tensor)}
            for target in batch.targets
        ]
        return images, targets

    def forward(self, *prepared: Any) -> dict[str, Tensor]:
        if prepared:
            return self.compute(*prepared)
        if self.in_layers:
            nothing = self._of_no_images()
        else:
            nothing = sum(parameter[:0].sum() for parameter in self.model.parameters() if parameter.requires_grad)
        for normalizer in self.counted:
            normalizer(torch.zeros(0, dtype=torch.int32, device=nothing.device))
        return {"classification": nothing, "bbox_regression": nothing}

    def compute(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.model(images, targets)

    def alone(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The losses of a batch without gradients, by this process's own counts: no other one is waited for, unless in
        synchronised layers."""
        modes = [normalizer.training for normalizer in self.counted]
        for normalizer in self.counted:
            normalizer.eval()
        try:
            with torch.no_grad():
                return self.compute(*self.prepare(batch, device))
        finally:
            for normalizer, mode in zip(self.counted, modes, strict=True):
                normalizer.train(mode)

    def _of_no_images(self) -> Tensor:
        """Zero, from the whole network: synchronised normalisation takes part with a count of 0, in the order in which
        the others do, forward and backward."""
        weight = next(self.model.parameters())
        # Its statistics travel in the type of an empty input, where the others' are float32.
        with torch.autocast(weight.device.type, enabled=False):
            outputs = self.model.head(self.model.backbone(weight.new_zeros((0, 3, 64, 64))))
            return sum(level.sum() for levels in outputs for level in levels)


class PackedLosses(Losses):
    """The losses of a RetinaNet of this library, to the bit those that it gives itself.

    The ground truth travels in tensors of a fixed capacity, and is checked before it leaves the host. So `compute`
    takes tensors alone, never waits for the device, and is one graph to torch.compile.
    """

    # Sides of the images are padded to a multiple of this, if to more than the model's own.
    side = 1

    def prepare(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] as the network takes them, anchors [N, 4], and boxes [capacity, 4], labels, ignore
        [capacity], offsets [B + 1]: image b has the rows `offsets[b]:offsets[b + 1]`."""
        images = check_images(batch.images_on(device))
        targets = [{k: v for k, v in target.items() if isinstance(v, Tensor)} for target in batch.targets]
        check_targets(targets, batch.images, self.model.num_classes)  # all on the host
        transformed = self.model.transform(images)
        height, width = (-side % self.side for side in transformed.tensor.shape[-2:])
        pixels = nn.functional.pad(transformed.tensor, (0, width, 0, height)) if height or width else transformed.tensor
        dtype = torch.promote_types(pixels.dtype, torch.float32)
        boxes = [
            resize_boxes(target["boxes"].to(dtype), old, new)
            for target, old, new in zip(targets, transformed.original_sizes, transformed.sizes, strict=True)
        ]
        anchors = self.model.anchor_generator(tuple(pixels.shape[-2:]), self._grids(pixels), device, dtype)
        return pixels, anchors, *_packed(boxes, targets, device)

    def compute(
        self, images: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor, ignore: Tensor, offsets: Tensor
    ) -> dict[str, Tensor]:
        model = self.model
        cls_logits, box_deltas = model.head(model.backbone(images))
        assigned = ops.assign_targets(
            anchors,
            boxes,
            labels,
            model.fg_iou_thresh,
            model.bg_iou_thresh,
            policy=model.match_policy,
            gt_ignore=ignore,
            gt_offsets=offsets,
        )
        normalizer = model.loss_normalizer(assigned.num_foreground, anchors.dtype)
        classification = ops.multilevel_focal_loss(
            cls_logits, assigned.labels, alpha=_FOCAL_ALPHA, gamma=_FOCAL_GAMMA, normalizer=normalizer
        )
        bbox_regression = ops.box_regression_loss(
            box_deltas,
            anchors,
            boxes,
            assigned.matched,
            loss=model.box_loss,
            beta=model.box_loss_beta,
            normalizer=normalizer,
            gt_offsets=offsets,
        )
        return {
            "classification": classification,
            "bbox_regression": bbox_regression,
            "foreground": assigned.num_foreground,
        }

    def _grids(self, images: Tensor) -> list[tuple[int, int]]:
        """Height and width of each level, which halves from P3, an eighth of the images, on."""
        grid = tuple(-(-side // 8) for side in images.shape[-2:])
        grids = [grid]
        for _ in self.model.anchor_generator.sizes[1:]:
            grid = tuple(-(-side // 2) for side in grid)
            grids.append(grid)
        return grids


def make_losses(model: nn.Module) -> Losses:
    return (PackedLosses if isinstance(model, RetinaNet) else Losses)(model)


def _packed(
    boxes: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = [len(image) for image in boxes]
    rows = sum(counts)
    capacity = max(LEAST_CAPACITY, 1 << (rows - 1).bit_length() if rows else 0)
    packed_boxes = boxes[0].new_zeros((capacity, 4))
    packed_labels = torch.zeros(capacity, dtype=torch.int64)
    packed_ignore = torch.zeros(capacity, dtype=torch.bool)
    torch.cat(list(boxes), out=packed_boxes[:rows])
    packed_labels[:rows] = torch.cat([target["labels"].long() for target in targets])
    if any("ignore" in target for target in targets):
        ignored = [target.get("ignore", torch.zeros(len(target["labels"]), dtype=torch.bool)) for target in targets]
        packed_ignore[:rows] = torch.cat(ignored)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    packed = (packed_boxes, packed_labels, packed_ignore, offsets)
    if device.type == "cuda":
        # From pageable memory the host would wait for the copy.
        packed = tuple(tensor.pin_memory() for tensor in packed)
    return tuple(tensor.to(device, non_blocking=True) for tensor in packed)
