"""The whole loss of a RetinaNet, from the heads' outputs and the ground truth to one number, as users compose it: one
graph for torch.compile, no waiting for the device, and on CUDA a graph that replays with other boxes."""

import pytest
import torch
from cuda_gates import capture, host_must_not_wait

from retinanet_ext import assign_targets, box_regression_loss, multilevel_focal_loss, reference
from retinanet_ext.models.anchors import AnchorGenerator

A, K = 9, 5
IMAGE, GRIDS = (64, 96), ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))


def make_case(counts=(3, 0, 5), seed=0, device="cpu"):
    """Head outputs that require gradients, anchors, boxes and labels of each image."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(counts), channels, *grid) for channels in (A * K, A * 4) for grid in GRIDS]
    maps = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    boxes, labels = [], []
    for count in counts:
        size = torch.rand(count, 2, generator=generator) * 40 + 12
        corner = torch.rand(count, 2, generator=generator) * 40
        boxes.append(torch.cat((corner, corner + size), dim=1).to(device))
        labels.append(torch.randint(0, K, (count,), generator=generator).to(device))
    anchors = AnchorGenerator()(IMAGE, GRIDS, device)
    return maps[: len(GRIDS)], maps[len(GRIDS) :], anchors, boxes, labels


def pack(boxes, labels, capacity):
    """In tensors of a fixed size; what is past the last box is NaN and must not be read."""
    packed_boxes = torch.full((capacity, 4), float("nan"), device=boxes[0].device)
    packed_labels = torch.full((capacity,), -9, dtype=torch.int64, device=boxes[0].device)
    rows = sum(len(image) for image in boxes)
    packed_boxes[:rows], packed_labels[:rows] = torch.cat(boxes), torch.cat(labels)
    offsets = torch.tensor([0, *(len(image) for image in boxes)]).cumsum(0).int()
    return packed_boxes, packed_labels, offsets.to(boxes[0].device)


def detection_loss(logits, deltas, anchors, boxes, labels, offsets=None, loss="l1", ops=None):
    assign, focal, box = ops or (assign_targets, multilevel_focal_loss, box_regression_loss)
    targets = assign(anchors, boxes, labels, gt_offsets=offsets)
    normalizer = targets.labels.shape[0] * targets.num_foreground.clamp(min=1).float()
    return focal(logits, targets.labels, normalizer=normalizer) + box(
        deltas, anchors, boxes, targets.matched, loss=loss, normalizer=normalizer, gt_offsets=offsets
    )


def value_and_gradients(function, logits, deltas, *rest, **options):
    value = function(logits, deltas, *rest, **options)
    return value.detach(), *torch.autograd.grad(value, [*logits, *deltas])


@pytest.mark.parametrize("loss", ["l1", "smooth_l1", "giou"])
def test_agrees_with_the_reference(loss):
    case = make_case()
    ops = (reference.assign_targets, reference.multilevel_focal_loss, reference.box_regression_loss)
    expected = value_and_gradients(detection_loss, *case, loss=loss, ops=ops)
    for mine, right in zip(value_and_gradients(detection_loss, *case, loss=loss), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-5, atol=1e-7)


def test_packed_boxes_give_the_same_bits():
    logits, deltas, anchors, boxes, labels = make_case()
    expected = value_and_gradients(detection_loss, logits, deltas, anchors, boxes, labels)
    for capacity in (8, 30):
        packed = pack(boxes, labels, capacity)
        for mine, right in zip(
            value_and_gradients(detection_loss, logits, deltas, anchors, *packed), expected, strict=True
        ):
            assert torch.equal(mine, right)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["l1", "giou"])
def test_compiles_as_one_graph(loss, packed):
    compiled = torch.compile(detection_loss, fullgraph=True, backend="aot_eager")
    for seed, counts in enumerate(((3, 0, 5), (1, 2, 4))):
        logits, deltas, anchors, boxes, labels = make_case(counts, seed)
        ground_truth = pack(boxes, labels, 8) if packed else (boxes, labels)
        arguments = (logits, deltas, anchors, *ground_truth)
        expected = value_and_gradients(detection_loss, *arguments, loss=loss)
        for mine, right in zip(value_and_gradients(compiled, *arguments, loss=loss), expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-9)


def test_compiles_with_inductor():
    """Generated code around the operators: values and gradients."""
    compiled = torch.compile(detection_loss, fullgraph=True)
    logits, deltas, anchors, boxes, labels = make_case()
    arguments = (logits, deltas, anchors, *pack(boxes, labels, 8))
    expected = value_and_gradients(detection_loss, *arguments, loss="giou")
    for mine, right in zip(value_and_gradients(compiled, *arguments, loss="giou"), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-9)


@pytest.mark.cuda
@pytest.mark.sync
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_waits_nowhere(packed):
    logits, deltas, anchors, boxes, labels = make_case(device="cuda")
    ground_truth = pack(boxes, labels, 20) if packed else (boxes, labels)
    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        value_and_gradients(detection_loss, logits, deltas, anchors, *ground_truth)
    with host_must_not_wait():
        results = value_and_gradients(detection_loss, logits, deltas, anchors, *ground_truth)
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.cuda
@pytest.mark.graph
@pytest.mark.parametrize("loss", ["l1", "giou"])
def test_a_graph_replays_with_other_boxes_and_another_number_of_them(loss):
    logits, deltas, anchors, boxes, labels = make_case(device="cuda")
    static = pack(boxes, labels, 40)

    def step():
        return value_and_gradients(detection_loss, logits, deltas, anchors, *static, loss=loss)

    graph, results = capture(step)
    for seed, counts in enumerate(((3, 0, 5), (0, 0, 0), (20, 10, 9), (1, 0, 0)), start=1):
        other_logits, other_deltas, _, other_boxes, other_labels = make_case(counts, seed, "cuda")
        with torch.no_grad():
            for leaf, value in zip((*logits, *deltas), (*other_logits, *other_deltas), strict=True):
                leaf.copy_(value)
        for target, value in zip(static, pack(other_boxes, other_labels, 40), strict=True):
            target.copy_(value)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        expected = value_and_gradients(
            detection_loss, other_logits, other_deltas, anchors, other_boxes, other_labels, loss=loss
        )
        for mine, right in zip(results, expected, strict=True):
            assert torch.equal(mine, right)
