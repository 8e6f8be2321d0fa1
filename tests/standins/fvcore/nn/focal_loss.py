import torch
from torch.nn import functional as F


def sigmoid_focal_loss(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = -1,
    gamma: float = 2,
    reduction: str = "none",
) -> torch.Tensor:
    """In float32 whatever comes; below 0 alpha does not balance; a reduction of another name is none."""
    logits, wanted = inputs.float(), targets.float()
    probability = logits.sigmoid()
    right = probability * wanted + (1 - probability) * (1 - wanted)
    loss = (1 - right) ** gamma * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if alpha >= 0:
        loss = loss * (alpha * wanted + (1 - alpha) * (1 - wanted))
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if reduction == "mean" else loss


sigmoid_focal_loss_jit = torch.jit.script(sigmoid_focal_loss)
