"""The focal loss in a training loop of your own: one import, and class indices in place of one-hot targets.

    python examples/drop_in_loss.py [--steps 100]

A small convolutional network learns which of three colours lies in each cell of an image; nine cells in ten hold none.
It needs no model, data or training code of retinanet_ext, and no torchvision. The data is generated: seconds on a CPU.
"""

import argparse

import torch
from torch import nn

from retinanet_ext import sigmoid_focal_loss  # was: from torchvision.ops import sigmoid_focal_loss

COLOURS, CELLS, PIXELS = 3, 8, 8  # classes; cells a side of an image; pixels a side of a cell
BACKGROUND = -1


def coloured_cells(count):
    """Noisy images [count, 3, 64, 64], and the class of each cell [count, 8, 8]."""
    classes = torch.where(
        torch.rand(count, CELLS, CELLS) < 0.1, torch.randint(COLOURS, (count, CELLS, CELLS)), BACKGROUND
    )
    colour = nn.functional.one_hot(classes + 1, COLOURS + 1)[..., 1:].permute(0, 3, 1, 2).float()
    images = nn.functional.interpolate(colour, scale_factor=PIXELS)
    return images + 2 * torch.randn_like(images), classes


def network():
    """Logits [B, 3, 8, 8] of images [B, 3, 64, 64], none of them likely at the beginning (Lin et al., 2017)."""
    layers = []
    for width_in, width in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(width_in, width, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(32, COLOURS, 1))
    nn.init.constant_(model[-1].bias, -3.0)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        images, classes = coloured_cells(16)
        logits = model(images).permute(0, 2, 3, 1)  # [B, 8, 8, 3]: the classes last; a view is fine
        loss = sigmoid_focal_loss(logits, classes, reduction="sum") / (classes != BACKGROUND).sum()
        if step == 0:
            one_hot = nn.functional.one_hot(classes + 1, COLOURS + 1)[..., 1:].float()
            same = sigmoid_focal_loss(logits, one_hot, reduction="sum") / (classes != BACKGROUND).sum()
            print(f"one-hot targets, as torchvision wants them, give the same loss: {same:.6f} and {loss:.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, options.steps - 1):
            print(f"step {step + 1}: loss {loss:.3f} a coloured cell")

    images, classes = coloured_cells(64)
    with torch.no_grad():
        probabilities, colours = model(images).sigmoid().max(dim=1)
    found = torch.where(probabilities > 0.5, colours, BACKGROUND)
    print(f"cells of new images named right: {(found == classes).float().mean():.1%}")


if __name__ == "__main__":
    main()
