"""Stands in for mmcv's compiled operators, also beside an mmcv that is installed without them (mmcv-lite).

`nms` is mmcv's on the CPU: float32 overlaps, compared with the threshold as a float32. The focal loss, which mmcv has
for devices only, is here on the CPU, so that there is something to compare with.
"""

import numpy as np
import torch


def __getattr__(name):
    """Everything else is there, as mmcv asks of its library, and does not work."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_arguments, **_options):
        raise NotImplementedError(f"mmcv's operator {name} is not among the stand-ins")

    return missing


def nms(boxes, scores, iou_threshold, offset):
    boxes, limit = boxes.numpy(), np.float32(iou_threshold)
    if boxes.dtype != np.float32:
        raise RuntimeError("expected scalar type Float")
    low, high = boxes[:, :2], boxes[:, 2:]
    areas, kept = np.prod(high - low + np.float32(offset), axis=1), []
    order = scores.sort(stable=True, descending=True).indices.numpy()
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        sides = np.minimum(high[best], high[order]) - np.maximum(low[best], low[order]) + np.float32(offset)
        inter = np.prod(np.maximum(sides, np.float32(0)), axis=1)
        order = order[~(inter / (areas[best] + areas[order] - inter) > limit)]
    return torch.tensor(np.array(kept, dtype=np.int64))


def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha):
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha):
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_focal_loss(logits, target, weight, gamma, alpha).sum(), logits)
    grad_input.copy_(gradient)


def _focal_loss(logits, target, weight, gamma, alpha):
    """`target` [N]: any number that is no class is background. `weight` [K], or empty, by the class of the row."""
    classes = torch.arange(logits.shape[1])
    positive = target[:, None] == classes
    probability = logits.sigmoid()
    tiny = torch.finfo(torch.float32).tiny
    loss = torch.where(
        positive,
        -alpha * (1 - probability) ** gamma * probability.clamp(min=tiny).log(),
        -(1 - alpha) * probability**gamma * (1 - probability).clamp(min=tiny).log(),
    )
    if weight.numel():
        loss = loss * weight[target].unsqueeze(1)
    return loss
