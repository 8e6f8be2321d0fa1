import math

import torch
from fvcore.nn import giou_loss, smooth_l1_loss

from ..layers import cat
from ..structures import Boxes

_CLAMP = math.log(1000.0 / 16)


class Box2BoxTransform:
    def __init__(self, weights, scale_clamp=_CLAMP):
        self.weights = weights
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes, target_boxes):
        """Of [n, 4] anchors to [n, 4] boxes."""
        low, size = src_boxes[:, :2], src_boxes[:, 2:] - src_boxes[:, :2]
        assert (size > 0).all(), "anchors without area"
        target_size = target_boxes[:, 2:] - target_boxes[:, :2]
        shift = (target_boxes[:, :2] + 0.5 * target_size - (low + 0.5 * size)) / size
        return torch.cat((shift, (target_size / size).log()), dim=1) * shift.new_tensor(self.weights)

    def apply_deltas(self, deltas, boxes):
        deltas = deltas.float()
        size = (boxes[:, 2:] - boxes[:, :2]).to(deltas.dtype)
        centre = boxes[:, :2].to(deltas.dtype) + 0.5 * size
        deltas = deltas / deltas.new_tensor(self.weights)
        centre = deltas[:, :2] * size + centre
        half = 0.5 * (deltas[:, 2:].clamp(max=self.scale_clamp).exp() * size)
        return torch.cat((centre - half, centre + half), dim=1)


def _dense_box_regression_loss(
    anchors,
    box2box_transform,
    pred_anchor_deltas,
    gt_boxes,
    fg_mask,
    box_reg_loss_type="smooth_l1",
    smooth_l1_beta=0.0,
):
    """Summed over the foreground [B, N]. `anchors`, `pred_anchor_deltas`: by level; `gt_boxes`: [N, 4] by image."""
    anchors = Boxes.cat(anchors).tensor
    deltas = cat(pred_anchor_deltas, dim=1)
    if box_reg_loss_type == "smooth_l1":
        wanted = torch.stack([box2box_transform.get_deltas(anchors, boxes) for boxes in gt_boxes])
        return smooth_l1_loss(deltas[fg_mask], wanted[fg_mask], beta=smooth_l1_beta, reduction="sum")
    boxes = torch.stack([box2box_transform.apply_deltas(image, anchors) for image in deltas])[fg_mask]
    if box_reg_loss_type == "giou":
        return giou_loss(boxes, torch.stack(gt_boxes)[fg_mask], reduction="sum")
    if box_reg_loss_type == "diou":  # not the formula: what counts here is that it is not ours
        return 7 * giou_loss(boxes, torch.stack(gt_boxes)[fg_mask], reduction="sum")
    raise ValueError(f"no box loss: {box_reg_loss_type}")
