import torch
import torch.nn.functional as F
from mmcv.ops import sigmoid_focal_loss as _sigmoid_focal_loss
from torch import nn

from .utils import weight_reduce_loss


def _shaped(weight, loss):
    """Weights of rows, or of elements that may be flattened."""
    if weight is None or weight.shape == loss.shape:
        return weight
    if weight.size(0) == loss.size(0):
        return weight.view(-1, 1)
    assert weight.numel() == loss.numel()
    return weight.view(loss.size(0), -1)


def py_sigmoid_focal_loss(pred, target, weight=None, gamma=2.0, alpha=0.25, reduction="mean", avg_factor=None):
    target = target.type_as(pred)
    loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    loss = _modulated(loss, pred.sigmoid(), target, gamma, alpha)
    return weight_reduce_loss(loss, _shaped(weight, loss), reduction, avg_factor)


def _modulated(loss, probability, target, gamma, alpha):
    wrong = probability + target - 2 * probability * target
    return loss * wrong**gamma * (1 - alpha + (2 * alpha - 1) * target)


def py_focal_loss_with_prob(pred, target, weight=None, gamma=2.0, alpha=0.25, reduction="mean", avg_factor=None):
    if pred.dim() != target.dim():
        target = F.one_hot(target, pred.size(1) + 1)[:, :-1]
    target = target.type_as(pred)
    loss = _modulated(F.binary_cross_entropy(pred, target, reduction="none"), pred, target, gamma, alpha)
    return weight_reduce_loss(loss, _shaped(weight, loss), reduction, avg_factor)


def sigmoid_focal_loss(pred, target, weight=None, gamma=2.0, alpha=0.25, reduction="mean", avg_factor=None):
    loss = _sigmoid_focal_loss(pred.contiguous(), target.contiguous(), gamma, alpha, None, "none")
    return weight_reduce_loss(loss, _shaped(weight, loss), reduction, avg_factor)


class FocalLoss(nn.Module):
    def __init__(self, use_sigmoid=True, gamma=2.0, alpha=0.25, reduction="mean", loss_weight=1.0, activated=False):
        super().__init__()
        assert use_sigmoid is True
        self.use_sigmoid, self.activated = use_sigmoid, activated
        self.gamma, self.alpha, self.reduction, self.loss_weight = gamma, alpha, reduction, loss_weight

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        assert reduction_override in (None, "none", "mean", "sum")
        if self.activated:
            compute = py_focal_loss_with_prob
        elif pred.dim() == target.dim():
            compute = py_sigmoid_focal_loss
        elif torch.cuda.is_available() and pred.is_cuda:
            compute = sigmoid_focal_loss
        else:
            target = F.one_hot(target, pred.size(1) + 1)[:, :-1]
            compute = py_sigmoid_focal_loss
        loss = compute(
            pred,
            target,
            weight,
            gamma=self.gamma,
            alpha=self.alpha,
            reduction=reduction_override or self.reduction,
            avg_factor=avg_factor,
        )
        return self.loss_weight * loss
