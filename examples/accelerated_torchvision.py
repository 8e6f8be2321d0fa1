"""A torchvision RetinaNet on other operators by one line: the same losses, the same detections, and the time of both.

    python examples/accelerated_torchvision.py [--steps 2] [--size 128]

needs torchvision. The data is generated and the weights are random: a few seconds on a CPU, nothing is downloaded.
"""

import argparse
import copy
import time

import torch
from torchvision.models.detection import retinanet_resnet50_fpn

import retinanet_ext

CLASSES = 80


def rectangles(count, size, generator):
    """Images with a bright rectangle of one colour each, and their targets."""
    images, targets = [], []
    for _ in range(count):
        corner = torch.randint(0, size // 2, (2,), generator=generator)
        x, y, width, height = *corner.tolist(), *(torch.randint(16, size // 2, (2,), generator=generator)).tolist()
        label = torch.randint(0, CLASSES, (1,), generator=generator)
        image = torch.rand(3, size, size, generator=generator) * 0.3
        image[label % 3, y : y + height, x : x + width] = 0.9
        images.append(image)
        targets.append({"boxes": torch.tensor([[x, y, x + width, y + height]]).float(), "labels": label})
    return images, targets


def warm_up(model, images, targets):
    """What the first calls prepare is not timed: it would all be the first model's. A copy keeps the statistics."""
    model = copy.deepcopy(model)
    sum(model.train()(images, targets).values()).backward()
    detections(model, images)


def training(model, batches):
    """Losses of each step and the seconds that all of them took."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses, start = [], time.perf_counter()
    for images, targets in batches:
        loss = model.train()(images, targets)
        optimizer.zero_grad()
        sum(loss.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append([value.item() for value in loss.values()])
    return torch.tensor(losses), time.perf_counter() - start


@torch.no_grad()
def detections(model, images):
    start = time.perf_counter()
    found = model.eval()(images)
    return found, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="training steps of each model")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    batches = [rectangles(2, options.size, generator) for _ in range(options.steps)]
    results = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = retinanet_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=CLASSES,
            min_size=options.size,
            max_size=options.size,
        )
        # An untrained head gives every anchor the same score: make some of them detections.
        torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.05)
        if accelerated:
            model = retinanet_ext.accelerate(model)  # the one line
        warm_up(model, *batches[0])
        (found, evaluation_time), (losses, training_time) = detections(model, batches[0][0]), training(model, batches)
        print(
            f"{type(model).__name__}: {training_time / options.steps:.2f} s a training step, "
            f"{evaluation_time:.2f} s to detect, losses {losses[0].tolist()}"
        )
        results.append((losses, found))
    (losses, found), (accelerated_losses, accelerated_found) = results
    first, *_, last = [f"{step.max():.1e}" for step in ((accelerated_losses - losses) / losses).abs()] * 2
    print(f"relative difference of the losses: {first} in the first step, {last} in the last")
    same = all(torch.equal(a["labels"], b["labels"]) for a, b in zip(found, accelerated_found, strict=True))
    print(f"{sum(len(image['labels']) for image in found)} detections, labels {'the same' if same else 'DIFFER'}")


if __name__ == "__main__":
    main()
