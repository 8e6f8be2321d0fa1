"""Focal loss in plain PyTorch: what the kernels are compared with, and the baseline they are timed against.

Lin et al., "Focal Loss for Dense Object Detection" (arXiv 1708.02002), equation 5, in the form that keeps its
digits: with ``z = x`` for background and ``z = -x`` for the positive class,

    loss = alpha_t * sigmoid(z)**gamma * softplus(z)

Every factor is computed from ``z`` without subtracting nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every narrower floating type is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device. Meta tensors have none, and asking about them is an error."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def softplus(z: Tensor) -> Tensor:
    # F.softplus drops the exponential above its threshold; logsigmoid is exact everywhere.
    return -F.logsigmoid(-z)


def balance(alpha: float | Tensor, positive: Tensor) -> Tensor | float:
    """alpha_t: ``alpha`` where ``positive`` is 1, ``1 - alpha`` where it is 0; 1 where ``alpha`` is negative."""
    if isinstance(alpha, Tensor):
        alpha = alpha.to(positive.dtype)
        return torch.where(alpha < 0, torch.ones_like(alpha), alpha * positive + (1 - alpha) * (1 - positive))
    return alpha * positive + (1 - alpha) * (1 - positive) if alpha >= 0 else 1.0


def soft_target_loss(x: Tensor, t: Tensor, alpha: float | Tensor, gamma: float) -> Tensor:
    """Elementwise loss for targets in [0, 1] of the shape of ``x``."""
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    cross_entropy = (1 - t) * softplus(x) + t * softplus(-x)
    miss = p * (1 - t) + q * t
    # The clamp keeps the derivative of miss**gamma finite where miss underflows and gamma < 1.
    modulation = miss**gamma if gamma == 2 else miss.clamp_min(torch.finfo(x.dtype).tiny) ** gamma
    return balance(alpha, t) * modulation * cross_entropy


def class_index_loss(
    x: Tensor,
    targets: Tensor,
    alpha: float | Tensor,
    gamma: float,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Elementwise loss of ``x`` [..., K] for class indices [...]; ignored rows are exactly zero."""
    num_classes = x.shape[-1]
    ignored = (targets == ignore_index).unsqueeze(-1)
    columns = torch.arange(num_classes, device=x.device)
    positive = (targets.unsqueeze(-1) == columns) & ~ignored
    x = torch.where(ignored, torch.zeros_like(x), x)

    z = torch.where(positive, -x, x)
    cross_entropy = softplus(z) - 0.5 * label_smoothing * z if label_smoothing else softplus(z)
    modulation = torch.exp(gamma * F.logsigmoid(z))
    loss = balance(alpha, positive.to(x.dtype)) * modulation * cross_entropy
    if weight is not None and num_classes > 0:
        foreground = positive.any(-1, keepdim=True)
        row_class = targets.clamp(0, num_classes - 1).long()
        row_weight = weight.to(x.dtype)[row_class].unsqueeze(-1)
        loss = loss * torch.where(foreground, row_weight, torch.ones_like(row_weight))
    return loss.masked_fill(ignored, 0)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -2,
) -> Tensor:
    """The same contract as :func:`retinanet_ext.sigmoid_focal_loss`, without its argument checks."""
    x = inputs.to(compute_dtype(inputs.dtype))
    if targets.is_floating_point():
        loss = soft_target_loss(x, targets.to(x.dtype), alpha, gamma)
        count: Tensor | int = loss.numel()
    else:
        loss = class_index_loss(x, targets, alpha, gamma, weight, label_smoothing, ignore_index)
        count = (targets != ignore_index).sum() * inputs.shape[-1]
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / count
    return loss if autocast_enabled(inputs) else loss.to(inputs.dtype)


def anchor_rows(level: Tensor, num_classes: int) -> Tensor:
    """One level's logits as rows in anchor order: [B, A*K, H, W] → [B, H*W*A, K]; [B, n, K] passes through."""
    if level.dim() == 3:
        return level
    batch, channels, height, width = level.shape
    per_cell = channels // num_classes
    grid = level.view(batch, per_cell, num_classes, height, width)
    return grid.permute(0, 3, 4, 1, 2).reshape(batch, height * width * per_cell, num_classes)


def infer_num_classes(logits: Sequence[Tensor], num_anchors: int) -> int:
    """K from the levels' sizes: a [B, n, K] level states it, [B, A*K, H, W] levels hold B*N*K elements."""
    for level in logits:
        if level.dim() == 3:
            return level.shape[-1]
    per_image = sum(level.shape[1:].numel() for level in logits)
    return per_image // num_anchors if num_anchors else 1


def multilevel_focal_loss(
    logits: Sequence[Tensor],
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The same contract as :func:`retinanet_ext.multilevel_focal_loss`, without its argument checks."""
    num_classes = infer_num_classes(logits, targets.shape[1])
    rows = torch.cat([anchor_rows(level, num_classes) for level in logits], dim=1)
    x = rows.to(compute_dtype(rows.dtype))
    loss = class_index_loss(x, targets, alpha, gamma, None, 0.0, -2).sum(dim=(1, 2))
    if normalizer is not None:
        loss = loss / (normalizer.detach() if isinstance(normalizer, Tensor) else normalizer)
    return loss.sum().float()
