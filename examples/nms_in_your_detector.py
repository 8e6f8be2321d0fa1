"""Batched suppression in a detector of another kind: anchor-free, one image scale, in plain PyTorch.

    python examples/nms_in_your_detector.py [--steps 200]

Each cell of a small convolutional network says what lies there and how far its four sides are (as FCOS does, Tian et
al., 2019). All cells of an object report it; suppression leaves one of them, and looks at each class by itself.
`batched_nms` has torchvision's arguments; `batched_nms_padded` takes all images at once, has results of a fixed size,
never waits for a GPU and compiles. The data is generated: seconds on a CPU.
"""

import argparse

import torch
from torch import Tensor, nn

from retinanet_ext import batched_nms, batched_nms_padded, box_iou, sigmoid_focal_loss

CLASSES, SIZE, STRIDE = 2, 64, 4
CELLS = SIZE // STRIDE
SURE = 0.3  # scores above this count as found


def rectangles(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a bar that stands and one that lies, often crossed; their boxes [B, 2, 4] and classes [B, 2]."""
    centre = torch.randint(20, SIZE - 20, (count, 2, 2)).float()
    half = torch.tensor([[6.0, 18.0], [18.0, 6.0]])
    boxes = torch.cat((centre - half, centre + half), dim=2)
    images = 0.2 * torch.randn(count, 3, SIZE, SIZE)
    pixel = torch.arange(SIZE) + 0.5
    for bar in range(2):
        left, top, right, bottom = (side[:, None] for side in boxes[:, bar].unbind(1))
        inside_x, inside_y = (pixel > left) & (pixel < right), (pixel > top) & (pixel < bottom)
        images[:, bar] += (inside_y[:, :, None] & inside_x[:, None, :]).float()
    return images, boxes, torch.arange(2).expand(count, 2)


class AnchorFree(nn.Module):
    """For each cell, row by row: class logits [B, cells, K], and the four sides' distances in strides [B, cells, 4]."""

    def __init__(self):
        super().__init__()
        layers = []
        for width_in, stride in ((3, 2), (32, 2), (32, 1), (32, 1)):
            layers += [nn.Conv2d(width_in, 32, 5, stride, padding=2), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.classes, self.sides = nn.Conv2d(32, CLASSES, 1), nn.Conv2d(32, 4 * CLASSES, 1)
        nn.init.constant_(self.classes.bias, -3.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        sides = self.sides(features).exp().unflatten(1, (CLASSES, 4))
        return self.classes(features).flatten(2).transpose(1, 2), sides.flatten(3).permute(0, 3, 1, 2)


def cell_centres() -> Tensor:
    line = (torch.arange(CELLS) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(-1, 2)


def candidates(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [B, N, 4], scores and classes [B, N]: one of each cell and class."""
    logits, sides = model(images)
    centres = cell_centres()[:, None]
    boxes = torch.cat((centres - sides[..., :2] * STRIDE, centres + sides[..., 2:] * STRIDE), dim=-1).flatten(1, 2)
    return boxes, logits.sigmoid().flatten(1), torch.arange(CLASSES).expand_as(logits).flatten(1)


def detection_loss(model: nn.Module, images: Tensor, boxes: Tensor) -> Tensor:
    """A cell is foreground of each class whose box it lies in the middle of."""
    logits, sides = model(images)
    centres = cell_centres()[:, None]
    distances = torch.cat(
        (centres - boxes[:, None, :, :2], boxes[:, None, :, 2:] - centres), dim=-1
    )  # [B, cells, K, 4]
    foreground = distances.amin(dim=-1) > STRIDE / 2
    of_sides = (sides.log() - (distances.clamp(min=1) / STRIDE).log()).abs().mean(dim=-1)
    number = foreground.sum().clamp(min=1)
    return (sigmoid_focal_loss(logits, foreground.float(), reduction="sum") + of_sides[foreground].sum()) / number


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = AnchorFree()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(options.steps):
        images, boxes, _ = rectangles(16)
        loss = detection_loss(model, images, boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss:.3f} after {options.steps} steps")

    images, truth, true_classes = rectangles(32)
    with torch.no_grad():
        boxes, scores, classes = candidates(model, images)

    # One image at a time, as with torchvision's.
    sure = scores[0] > SURE
    kept = batched_nms(boxes[0][sure], scores[0][sure], classes[0][sure], 0.5)
    print(f"the first image: {int(sure.sum())} cells report something, {len(kept)} boxes stay")

    # All images at once. Scores below the threshold are not left out but last: the best ten are taken.
    indices, counts = batched_nms_padded(boxes, scores, classes, iou_threshold=0.5, max_detections=10)
    found = right = 0
    for image, rows in enumerate(indices):
        rows = rows[: counts[image]]
        rows = rows[scores[image, rows] > SURE]
        overlap = box_iou(boxes[image, rows], truth[image])
        same_class = classes[image, rows][:, None] == true_classes[image]
        right += int(((overlap > 0.5) & same_class).any(dim=0).sum())
        found += len(rows)
    print(f"all {len(images)} images: {truth[..., 0].numel()} bars, {found} boxes, {right} bars found")


if __name__ == "__main__":
    main()
