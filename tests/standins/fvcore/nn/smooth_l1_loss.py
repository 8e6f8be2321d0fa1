import torch


def smooth_l1_loss(input, target, beta: float, reduction: str = "none"):
    """A beta below 1e-5 is the L1 loss. Only the sum is needed here."""
    assert reduction == "sum"
    difference = (input - target).abs()
    if beta < 1e-5:
        return difference.sum()
    return torch.where(difference < beta, difference**2 / (2 * beta), difference - beta / 2).sum()
