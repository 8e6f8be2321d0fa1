import torch
from torch import nn

from .. import _ext


class SigmoidFocalLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, gamma: float = 2.0, alpha: float = 0.25, weight=None, reduction: str = "mean"):
        assert target.dtype == torch.long
        assert (input.dim(), target.dim()) == (2, 1)
        assert len(input) == len(target)
        weight = input.new_empty(0) if weight is None else weight
        assert weight.shape in ((0,), input.shape[1:])
        assert reduction in ("none", "mean", "sum")
        output = torch.zeros_like(input)
        _ext.sigmoid_focal_loss_forward(input, target, weight, output, gamma=float(gamma), alpha=float(alpha))
        ctx.save_for_backward(input, target, weight)
        ctx.options = float(gamma), float(alpha)
        ctx.divisor = len(input) if reduction == "mean" else 1
        return output if reduction == "none" else output.sum() / ctx.divisor

    @staticmethod
    def backward(ctx, grad_output):
        input, target, weight = ctx.saved_tensors
        gradient = torch.zeros_like(input)
        _ext.sigmoid_focal_loss_backward(input, target, weight, gradient, *ctx.options)
        return gradient * grad_output / ctx.divisor, None, None, None, None, None


sigmoid_focal_loss = SigmoidFocalLossFunction.apply


class SigmoidFocalLoss(nn.Module):
    def __init__(self, gamma: float, alpha: float, weight=None, reduction: str = "mean"):
        super().__init__()
        self.gamma, self.alpha, self.reduction = gamma, alpha, reduction
        self.register_buffer("weight", weight)

    def forward(self, input, target):
        return sigmoid_focal_loss(input, target, self.gamma, self.alpha, self.weight, self.reduction)
