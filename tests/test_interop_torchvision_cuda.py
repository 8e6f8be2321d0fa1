"""torchvision under the patch, and its accelerated RetinaNet, on a GPU."""

import copy

import pytest
import torch

import retinanet_ext

pytest.importorskip("torchvision", reason="patches torchvision")

from peer_modules import record_calls
from torchvision import ops as tv_ops
from torchvision_models import ALL, IMAGES, TARGETS, assert_same_detections, tiny_retinanet

pytestmark = pytest.mark.cuda


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, [*ALL, "nms", "batched_nms", "box_iou"])


def on_gpu(values):
    return [{key: value.cuda() for key, value in target.items()} for target in values]


def test_losses_and_gradients(calls):
    theirs = tiny_retinanet().cuda()
    ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    results = []
    for model in (theirs, ours):
        losses = model([image.cuda() for image in IMAGES], on_gpu(TARGETS))
        sum(losses.values()).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((torch.stack([loss.detach() for loss in losses.values()]), gradients))
    (expected, expected_gradients), (found, gradients) = results
    assert calls == ALL[:-1]
    # The convolutions before the losses may choose other algorithms for each model.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert (gradients - expected_gradients).norm() <= 1e-2 * expected_gradients.norm()


def test_detections_of_the_same_outputs(calls):
    model = tiny_retinanet().cuda().eval()
    with torch.no_grad():
        images, _ = model.transform([image.cuda() for image in IMAGES])
        features = list(model.backbone(images.tensors).values())
        counts = [6 * level.shape[2] * level.shape[3] for level in features]
        outputs = {name: list(value.split(counts, dim=1)) for name, value in model.head(features).items()}
        anchors = [list(image.split(counts)) for image in model.anchor_generator(images, features)]
        expected = model.postprocess_detections(outputs, anchors, images.image_sizes)
        found = retinanet_ext.accelerate(model).postprocess_detections(outputs, anchors, images.image_sizes)
    assert calls == ["detect"]
    assert min(len(image["boxes"]) for image in expected) > 10
    assert_same_detections(found, expected)


def test_functions_under_the_patch(calls):
    corners = torch.rand(500, 2, device="cuda") * 100
    boxes = torch.cat([corners, corners + 1 + torch.rand(500, 2, device="cuda") * 50], dim=1)
    scores, labels = torch.rand(500, device="cuda"), torch.randint(3, (500,), device="cuda")
    originals = [tv_ops.nms, tv_ops.box_iou]
    with retinanet_ext.patch("torchvision"):
        assert torch.equal(tv_ops.nms(boxes, scores, 0.5), originals[0](boxes, scores, 0.5))
        kept = tv_ops.batched_nms(boxes, scores, labels, 0.5)
        assert torch.equal(tv_ops.box_iou(boxes, boxes), originals[1](boxes, boxes))
    by_label = [torch.where(labels == label)[0] for label in labels.unique()]
    alone = torch.cat([rows[originals[0](boxes[rows], scores[rows], 0.5)] for rows in by_label])
    assert torch.equal(kept.sort().values, alone.sort().values)
    assert calls == ["nms", "batched_nms", "box_iou"]


def test_autocast_has_torchvisions_types(calls):
    theirs = tiny_retinanet().cuda().eval()
    ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    images = [image.cuda() for image in IMAGES]
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        types = [[value.dtype for value in model(images)[0].values()] for model in (theirs, ours)]
    assert calls == ["detect"]
    assert types[0] == types[1]
