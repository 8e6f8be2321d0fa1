"""One call of every operator, at sizes that several threads share: for tests of where and under what operators run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

import retinanet_ext as rnx

A, K, GRID, IMAGE = 9, 5, (48, 48), (384, 384)
COUNTS = (7, 0)  # ground-truth boxes of each image


class OperatorCall(NamedTuple):
    """An operator with what it is called on: tensors, and lists of tensors."""

    function: Callable[..., object]
    inputs: tuple[object, ...]
    num_differentiated: int = 0  # the first so many inputs get a gradient

    def to(self, device: torch.device | str) -> OperatorCall:
        return self._replace(inputs=tree_map_only(Tensor, lambda tensor: tensor.to(device), self.inputs))

    def run(self, function: Callable[..., object] | None = None) -> list[Tensor]:
        """What it returns, and the gradients of its sum; `function`: in place of the operator."""
        first = tree_map_only(
            Tensor, lambda leaf: leaf.detach().requires_grad_(), self.inputs[: self.num_differentiated]
        )
        results = tree_flatten((function or self.function)(*first, *self.inputs[self.num_differentiated :]))[0]
        if not self.num_differentiated:
            return results
        gradients = torch.autograd.grad(results, tree_flatten(first)[0], [ones_like(result) for result in results])
        return [*(result.detach() for result in results), *gradients]


def ones_like(tensor: Tensor) -> Tensor:
    """Filled by NumPy: PyTorch would wake its threads, which do not exist in a forked process."""
    return torch.from_numpy(np.ones(tensor.shape, np.float32)).to(tensor.device)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * 300
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 80 + 1), dim=1)


def operator_calls(seed: int = 0) -> dict[str, OperatorCall]:
    """By the operator's name; the same numbers in every process."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    batch, num_anchors = len(COUNTS), A * GRID[0] * GRID[1]
    anchors = random_boxes(num_anchors, generator)
    gt_boxes = [random_boxes(count, generator) for count in COUNTS]
    gt_labels = [torch.randint(K, (count,), generator=generator) for count in COUNTS]
    logits, deltas = [normal(batch, A * K, *GRID) - 2], [normal(batch, A * 4, *GRID) * 0.3]
    targets = rnx.assign_targets(anchors, gt_boxes, gt_labels)
    normalizer = batch * targets.num_foreground.clamp(min=1).float()
    boxes, scores = random_boxes(3000, generator), torch.rand(3000, generator=generator)
    labels = torch.randint(2, (3000,), generator=generator)
    sizes = torch.tensor([IMAGE, (200, 384)])
    return {
        "sigmoid_focal_loss": OperatorCall(
            lambda x, t: rnx.sigmoid_focal_loss(x, t, reduction="sum"),
            (normal(num_anchors, K), targets.labels[0]),
            1,
        ),
        "multilevel_focal_loss": OperatorCall(
            lambda x, t, n: rnx.multilevel_focal_loss(x, t, normalizer=n), (logits, targets.labels, normalizer), 1
        ),
        "match_anchors": OperatorCall(rnx.match_anchors, (anchors, gt_boxes)),
        "assign_targets": OperatorCall(rnx.assign_targets, (anchors, gt_boxes, gt_labels)),
        "box_iou": OperatorCall(rnx.box_iou, (boxes[:500], boxes[-500:]), 2),
        "encode_boxes": OperatorCall(rnx.encode_boxes, (anchors + 1, anchors), 2),
        "decode_boxes": OperatorCall(rnx.decode_boxes, (normal(num_anchors, 4), anchors), 2),
        "box_regression_loss": OperatorCall(
            lambda d, *rest: rnx.box_regression_loss(d, *rest[:-1], normalizer=rest[-1]),
            (deltas, anchors, gt_boxes, targets.matched, normalizer),
            1,
        ),
        "nms": OperatorCall(lambda b, s: rnx.nms(b, s, 0.5), (boxes, scores)),
        "batched_nms": OperatorCall(lambda b, s, i: rnx.batched_nms(b, s, i, 0.5), (boxes, scores, labels)),
        "batched_nms_padded": OperatorCall(
            lambda b, s, i: rnx.batched_nms_padded(b, s, i, 0.5, 50),
            tuple(value.view(2, 1500, *value.shape[1:]) for value in (boxes, scores, labels)),
        ),
        "detect": OperatorCall(rnx.detect, (logits, deltas, anchors, sizes)),
    }


OPERATORS = tuple(operator_calls())
