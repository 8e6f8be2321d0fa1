"""detectron2 has torchvision's; these need no torchvision, and compare labels as torchvision's does for many boxes."""

import torch


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    return batched_nms(boxes, scores, torch.zeros_like(scores), iou_threshold)


def batched_nms(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float):
    assert boxes.shape[-1] == 4
    boxes = boxes.float()
    if torch.is_autocast_enabled(boxes.device.type):
        scores = scores.float()  # as torchvision's operator
    if scores.dtype != boxes.dtype:
        raise RuntimeError("boxes and scores of two types")
    sizes = boxes[:, 2:] - boxes[:, :2]
    areas, kept = sizes[:, 0] * sizes[:, 1], []
    order = scores.argsort(descending=True, stable=True)
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        overlap = torch.minimum(boxes[best, 2:], boxes[order, 2:]) - torch.maximum(boxes[best, :2], boxes[order, :2])
        overlap = overlap.clamp(min=0)
        inter = overlap[:, 0] * overlap[:, 1]
        iou = inter / (areas[best] + areas[order] - inter)
        order = order[~((iou > iou_threshold) & (idxs[order] == idxs[best]))]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64, device=boxes.device)
