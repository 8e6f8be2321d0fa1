"""The cases of `retinanet-ext bench`: our side, torchvision's where it is installed, and whether they agree."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import retinanet_ext
from retinanet_ext.models import retinanet_resnet18_fpn
from retinanet_ext.models.anchors import AnchorGenerator

A, K = 9, 80
STRIDES = (8, 16, 32, 64, 128)


@dataclass
class Case:
    """One line. `theirs` None: there is no torchvision, or it has no such thing. `agree` raises AssertionError."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    agree: Callable[[Any, Any], None]


def make_cases(device: torch.device, image: tuple[int, int] = (480, 640), batch: int = 1) -> list[Callable[[], Case]]:
    """What makes the cases, each its tensors when it is called. `image`: height and width; one size for all."""
    both = importlib.util.find_spec("torchvision") is not None
    generator = torch.Generator().manual_seed(0)
    grids = [(-(-image[0] // stride), -(-image[1] // stride)) for stride in STRIDES]
    anchors = AnchorGenerator()(image, grids).to(device)
    of_operators = (_focal_loss, _targets, _box_loss, _iou, _nms, _detect)
    made = [lambda make=make: make(both, generator, device, image, batch, grids, anchors) for make in of_operators]
    small = (min(image[0], 128), min(image[1], 160))
    return [*made, lambda: _training_step(both, device, small), lambda: _inference(both, device, small)]


def _random_boxes(count: int, image: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Boxes of 12 pixels to half the image, float32 [count, 4]."""
    height, width = image
    size = (torch.rand(count, 2, generator=generator) * 3.2 + 2.5).exp().clamp(max=min(image) / 2)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)
    return torch.cat((corner, corner + size), dim=1).to(device)


def _close(mine: Any, other: Any) -> None:
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def _same_detections(mine: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    """Each image's `boxes`, `scores` and `labels`, of which there are some, are the same."""
    for one, two in zip(mine, other, strict=True):
        assert len(two["scores"]), "nothing was found"
        assert len(one["scores"]) == len(two["scores"]), (
            f"{len(one['scores'])} detections, torchvision has {len(two['scores'])}"
        )
        # Scores of two classes may lie so close that their order is that of the last bits.
        one, two = (
            {name: values[(2 * image["labels"] - image["scores"].double()).argsort()] for name, values in image.items()}
            for image in (one, two)
        )
        assert torch.equal(one["labels"], two["labels"]), "labels differ"
        torch.testing.assert_close(one["scores"], two["scores"], rtol=1e-3, atol=1e-5, msg=lambda m: f"scores: {m}")
        torch.testing.assert_close(one["boxes"], two["boxes"], rtol=1e-3, atol=1e-2, msg=lambda m: f"boxes: {m}")


def _focal_loss(both, generator, device, image, batch, grids, anchors) -> Case:
    rows = batch * len(anchors)
    logits = torch.randn(rows, K, generator=generator).sub_(4).to(device).requires_grad_()
    labels = torch.where(torch.rand(rows, generator=generator) < 0.001, 1, -1).to(device)
    theirs = None

    def run(function: Callable[[], Tensor]) -> Tensor:
        logits.grad = None
        function().backward()
        return logits.grad

    if both:
        from torchvision.ops import sigmoid_focal_loss

        one_hot = torch.zeros(rows, K, device=device)
        one_hot[labels >= 0, 1] = 1.0
        theirs = lambda: run(lambda: sigmoid_focal_loss(logits, one_hot, reduction="sum"))  # noqa: E731
    ours = lambda: run(lambda: retinanet_ext.sigmoid_focal_loss(logits, labels, reduction="sum"))  # noqa: E731
    return Case(f"focal loss and gradient, {rows:,} x {K}", ours, theirs, _close)


def _targets(both, generator, device, image, batch, grids, anchors) -> Case:
    boxes = [_random_boxes(20, image, generator, device) for _ in range(batch)]
    labels = [torch.zeros(20, dtype=torch.int64, device=device) for _ in range(batch)]
    theirs = None
    if both:
        from torchvision.models.detection._utils import Matcher
        from torchvision.ops import box_iou

        matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
        theirs = lambda: torch.stack([matcher(box_iou(own, anchors)) for own in boxes])  # noqa: E731

    def agree(mine, other):
        assert torch.equal(mine.matched.long(), other)

    ours = lambda: retinanet_ext.assign_targets(anchors, boxes, labels, policy="torchvision")  # noqa: E731
    return Case(f"matching, {len(anchors):,} anchors x 20 boxes", ours, theirs, agree)


def _box_loss(both, generator, device, image, batch, grids, anchors) -> Case:
    levels = [torch.randn(batch, 4 * A, *grid, generator=generator).to(device).requires_grad_() for grid in grids]
    boxes = [_random_boxes(20, image, generator, device) for _ in range(batch)]
    labels = [torch.zeros(20, dtype=torch.int64, device=device) for _ in range(batch)]
    matched = retinanet_ext.assign_targets(anchors, boxes, labels).matched

    def run(function: Callable[[], Tensor]) -> list[Tensor]:
        for level in levels:
            level.grad = None
        function().backward()
        return [level.grad for level in levels]

    def reference() -> Tensor:
        from torchvision.models.detection._utils import BoxCoder

        coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        rows = torch.cat([retinanet_ext.reference.focal_loss.anchor_rows(level, 4) for level in levels], dim=1)
        losses = []
        for own, row, match in zip(boxes, rows, matched, strict=True):
            foreground = torch.where(match >= 0)[0]
            expected = coder.encode_single(own[match[foreground].long()], anchors[foreground])
            losses.append(torch.nn.functional.l1_loss(row[foreground], expected, reduction="sum"))
        return sum(losses)

    ours = lambda: run(lambda: retinanet_ext.box_regression_loss(levels, anchors, boxes, matched))  # noqa: E731
    theirs = (lambda: run(reference)) if both else None
    return Case(f"box loss and gradient, {len(anchors):,} anchors", ours, theirs, _close)


def _iou(both, generator, device, image, batch, grids, anchors) -> Case:
    one, other = (_random_boxes(count, image, generator, device) for count in (1000, 5000))
    theirs = None
    if both:
        from torchvision.ops import box_iou

        theirs = lambda: box_iou(one, other)  # noqa: E731
    return Case("box_iou, 1,000 x 5,000", lambda: retinanet_ext.box_iou(one, other), theirs, _close)


def _nms(both, generator, device, image, batch, grids, anchors) -> Case:
    boxes = _random_boxes(5000, image, generator, device)
    scores = ((torch.randperm(5000, generator=generator) + 1) / 5000).to(device)
    labels = torch.randint(0, K, (5000,), generator=generator).to(device)
    theirs = None
    if both:
        from torchvision.ops import batched_nms

        theirs = lambda: batched_nms(boxes, scores, labels, 0.5)  # noqa: E731
    ours = lambda: retinanet_ext.batched_nms(boxes, scores, labels, 0.5)  # noqa: E731

    def agree(mine, other):
        assert torch.equal(mine, other)

    return Case("batched_nms, 5,000 boxes", ours, theirs, agree)


def _detect(both, generator, device, image, batch, grids, anchors) -> Case:
    logits = [torch.randn(batch, A * K, *grid, generator=generator).mul_(1.2).sub_(7).to(device) for grid in grids]
    deltas = [torch.randn(batch, A * 4, *grid, generator=generator).mul_(0.3).to(device) for grid in grids]
    sizes = [image] * batch
    theirs = None
    if both:
        from torchvision.models.detection._utils import BoxCoder
        from torchvision.models.detection.retinanet import RetinaNet

        rows = retinanet_ext.reference.focal_loss.anchor_rows
        settings = {"score_thresh": 0.05, "topk_candidates": 1000, "nms_thresh": 0.5, "detections_per_img": 300}
        model = SimpleNamespace(**settings, box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)))
        # Its heads have joined the levels by then, which is not counted.
        outputs = {
            "cls_logits": [rows(level, K) for level in logits],
            "bbox_regression": [rows(level, 4) for level in deltas],
        }
        split = list(anchors.split([level.shape[1] for level in outputs["bbox_regression"]]))
        theirs = lambda: RetinaNet.postprocess_detections(model, outputs, [split] * batch, sizes)  # noqa: E731

    def agree(mine, other):
        padded = {"boxes": mine.boxes, "scores": mine.scores, "labels": mine.labels}
        counts = mine.counts.tolist()
        found = [{name: rows[i, :count] for name, rows in padded.items()} for i, count in enumerate(counts)]
        _same_detections(found, other)

    ours = lambda: retinanet_ext.detect(logits, deltas, anchors, sizes)  # noqa: E731
    return Case(f"post-processing, {sum(level.numel() for level in logits):,} logits", ours, theirs, agree)


def _models(both: bool, device: torch.device, image: tuple[int, int]):
    """Our ResNet-18 RetinaNet of 20 classes and torchvision's with the same weights, on batches of two images."""
    torch.manual_seed(0)
    settings = {"num_classes": 20, "min_size": min(image), "max_size": max(image)}
    mine, other = retinanet_resnet18_fpn(**settings, match_policy="torchvision").to(device), None
    if both:
        from torchvision.models import resnet18
        from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
        from torchvision.models.detection.retinanet import RetinaNet
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        extra = LastLevelP6P7(256, 256)
        backbone = _resnet_fpn_extractor(resnet18(weights=None), 5, returned_layers=[2, 3, 4], extra_blocks=extra)
        other = RetinaNet(backbone, **settings).to(device)
        other.load_state_dict(mine.state_dict())
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *image, generator=generator).to(device) for _ in range(2)]
    targets = [
        {
            "boxes": _random_boxes(8, image, generator, device),
            "labels": torch.randint(0, 20, (8,), generator=generator).to(device),
        }
        for _ in images
    ]
    return mine, other, images, targets


def _training_step(both: bool, device: torch.device, image: tuple[int, int]) -> Case:
    mine, other, images, targets = _models(both, device, image)

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def run():
            optimizer.zero_grad(set_to_none=True)
            losses = model(images, targets)
            total = losses["classification"] + losses["bbox_regression"]
            total.backward()
            optimizer.step()
            return total.detach()

        return run

    name = f"training step, ResNet-18, 2 x {image[0]} x {image[1]}"
    return Case(name, step(mine.train()), step(other.train()) if both else None, _close)


def _inference(both: bool, device: torch.device, image: tuple[int, int]) -> Case:
    mine, other, images, _ = _models(both, device, image)
    # A new model's scores lie around 0.01, and nothing would be found.
    generator = torch.Generator().manual_seed(0)
    for name, parameter in mine.head.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_reg.weight")):
            drawn = torch.randn(parameter.shape, generator=generator) * (0.3 if "cls_logits" in name else 0.05)
            parameter.data.copy_(drawn)
    if both:
        other.load_state_dict(mine.state_dict())

    def detect(model):
        @torch.no_grad()
        def run():
            return model(images)

        return run

    name = f"inference, ResNet-18, 2 x {image[0]} x {image[1]}"
    return Case(name, detect(mine.eval()), detect(other.eval()) if both else None, _same_detections)
