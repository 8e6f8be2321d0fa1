"""Focal loss over the levels of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..reference.focal_loss import infer_num_classes
from .focal_loss import FLOATING, INDICES


def multilevel_focal_loss(
    logits: Sequence[Tensor],
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Focal loss over all pyramid levels of a dense detector, from the heads' outputs as they are.

    Args:
        logits: one tensor a level, either [B, A*K, H, W] as the convolution leaves it (channel ``a*K + k``; contiguous
            or channels_last) or [B, H*W*A, K]. One floating dtype, one device.
        targets: [B, N] integer class of each anchor, N over all levels in the order level, row y, column x, anchor a.
            [0, K) is the positive class, -1 background, -2 ignored; any other value is background.
        alpha: weight of positive elements in [0, 1], or -1 for no balancing.
        gamma: focusing exponent, >= 0.
        normalizer: what each image's loss is divided by: a number, or a scalar or [B] tensor; no gradient flows into
            it. Default 1. torchvision's RetinaNet loss is ``normalizer = B * max(1, foreground of the image)``.

    Returns:
        float32 scalar: the sum over images of loss_b / normalizer_b.

    Raises:
        ValueError: shapes that do not fit together, or an option outside its range.

    Source: arXiv 1708.02002, equation 5.
    """
    _check_multilevel(logits, targets, alpha, gamma, normalizer)
    return reference.multilevel_focal_loss(logits, targets, alpha, gamma, normalizer)


def _check_multilevel(logits, targets, alpha, gamma, normalizer) -> None:
    name = "multilevel_focal_loss"
    if isinstance(logits, Tensor) or len(logits) == 0:
        raise ValueError(f"{name}: logits must be a list of tensors, one a level, and is {type(logits).__name__}")
    for argument, value in (
        ("targets", targets),
        *((f"logits[{i}]", level) for i, level in enumerate(logits)),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, and is {type(value).__name__}")
    if targets.dim() != 2 or targets.dtype not in INDICES:
        raise ValueError(
            f"{name}: targets must be integers of shape [B, N], and are {targets.dtype} of shape {tuple(targets.shape)}"
        )
    batch, num_anchors = targets.shape
    for i, level in enumerate(logits):
        if level.dim() not in (3, 4) or level.shape[0] != batch:
            raise ValueError(
                f"{name}: logits[{i}] must be [{batch}, A*K, H, W] or [{batch}, n, K], and has shape "
                f"{tuple(level.shape)}"
            )
        if level.dtype not in FLOATING or level.dtype != logits[0].dtype:
            raise ValueError(f"{name}: logits must share one floating dtype, and logits[{i}] is {level.dtype}")
        if level.device != targets.device:
            raise ValueError(
                f"{name}: logits and targets must be on one device; logits[{i}] is on {level.device}, "
                f"targets on {targets.device}"
            )
    num_classes = infer_num_classes(logits, num_anchors)
    per_image = sum(level.numel() for level in logits)
    if per_image != batch * num_anchors * num_classes:
        raise ValueError(
            f"{name}: targets name {num_anchors} anchors an image, and logits of shapes "
            f"{[tuple(level.shape) for level in logits]} are not {num_anchors} times a whole number of classes"
        )
    for i, level in enumerate(logits):
        channels = level.shape[1] if level.dim() == 4 else level.shape[2]
        if (num_classes and channels % num_classes) or (level.dim() == 3 and channels != num_classes):
            raise ValueError(
                f"{name}: logits[{i}] has {channels} channels, which do not hold whole anchors of {num_classes} classes"
            )
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"{name}: alpha must be in [0, 1], or -1 for no balancing, and is {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{name}: gamma must be finite and >= 0, and is {gamma}")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1 and tuple(normalizer.shape) != (batch,):
        raise ValueError(
            f"{name}: normalizer must be a number, or a scalar or [{batch}] tensor, and has shape "
            f"{tuple(normalizer.shape)}"
        )
