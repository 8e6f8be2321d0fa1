import torch


class Boxes:
    """[N, 4] float32, whatever comes, in `tensor`."""

    def __init__(self, tensor):
        self.tensor = torch.as_tensor(tensor, dtype=torch.float32).reshape(-1, 4)

    @classmethod
    def cat(cls, boxes_list):
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]))

    def __getitem__(self, item):
        return Boxes(self.tensor[item])

    def __len__(self):
        return len(self.tensor)

    def to(self, device):
        return Boxes(self.tensor.to(device))

    def area(self):
        sizes = self.tensor[:, 2:] - self.tensor[:, :2]
        return sizes[:, 0] * sizes[:, 1]

    def clip(self, box_size):
        """(height, width), in place."""
        for side, limit in enumerate((box_size[1], box_size[0])):
            self.tensor[:, side::2].clamp_(0, limit)

    @property
    def device(self):
        return self.tensor.device


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """[N, M], 0 where boxes do not overlap."""
    one, two = boxes1.tensor[:, None], boxes2.tensor[None]
    sides = (torch.minimum(one[..., 2:], two[..., 2:]) - torch.maximum(one[..., :2], two[..., :2])).clamp(min=0)
    inter = sides[..., 0] * sides[..., 1]
    union = boxes1.area()[:, None] + boxes2.area() - inter
    return torch.where(inter > 0, inter / union, torch.zeros_like(inter))
