import torch


def bbox_overlaps(bboxes1, bboxes2, mode="iou", is_aligned=False, eps=1e-6):
    """[m, n]: intersection over union, or over the area of the first."""
    assert mode in ("iou", "iof")
    assert not is_aligned
    if len(bboxes1) * len(bboxes2) == 0:
        return bboxes1.new_zeros((len(bboxes1), len(bboxes2)))
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (bboxes1, bboxes2)]
    one, two = bboxes1[:, None], bboxes2[None]
    sides = (torch.minimum(one[..., 2:], two[..., 2:]) - torch.maximum(one[..., :2], two[..., :2])).clamp(min=0)
    inter = sides[..., 0] * sides[..., 1]
    whole = areas[0][:, None] + areas[1] - inter if mode == "iou" else areas[0][:, None].expand_as(inter)
    return inter / whole.clamp(min=eps)
