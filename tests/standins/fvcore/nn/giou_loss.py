import torch


def giou_loss(boxes1, boxes2, reduction: str = "none", eps: float = 1e-7):
    """Only the sum is needed here."""
    assert reduction == "sum"

    def area(low, high):
        return (high - low).clamp(min=0).prod(dim=-1)

    low1, high1, low2, high2 = boxes1[..., :2], boxes1[..., 2:], boxes2[..., :2], boxes2[..., 2:]
    overlap = area(torch.maximum(low1, low2), torch.minimum(high1, high2))
    union = area(low1, high1) + area(low2, high2) - overlap
    hull = area(torch.minimum(low1, low2), torch.maximum(high1, high2))
    return (1 - overlap / (union + eps) + (hull - union) / (hull + eps)).sum()
