import torch


def weight_reduce_loss(loss, weight=None, reduction="mean", avg_factor=None):
    if weight is not None:
        loss = loss * weight
    if avg_factor is not None and reduction == "mean":
        return loss.sum() / (avg_factor + torch.finfo(torch.float32).eps)
    if avg_factor is not None and reduction != "none":
        raise ValueError("a sum has no factor to average by")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"no reduction: {reduction}")
    return loss if reduction == "none" else getattr(loss, reduction)()
