"""detectron2, mmcv and mmdet under their patches on a GPU, compared with their own results on the CPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
from detectron2_models import batch, instances_of, losses_of, tiny_retinanet
from peer_modules import assert_same, importable, random_boxes, record_calls

import retinanet_ext

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def peers():
    with importable("detectron2", "fvcore", "mmcv", "mmdet"):
        import detectron2.modeling  # noqa: F401
        import mmdet.models.losses
        import mmdet.models.task_modules.assigners  # noqa: F401

        yield


@pytest.fixture
def calls(monkeypatch):
    names = ["assign_targets", "match_anchors", "multilevel_focal_loss", "box_regression_loss", "detect"]
    return record_calls(monkeypatch, [*names, "nms", "batched_nms", "sigmoid_focal_loss"])


def test_detectron2s_losses(calls):
    expected, gradients, scalars = losses_of(tiny_retinanet())
    assert calls == []
    found, found_gradients, found_scalars = losses_of(retinanet_ext.accelerate(tiny_retinanet().to(DEVICE)))
    assert calls == ["assign_targets", "multilevel_focal_loss", "box_regression_loss"]
    assert found_scalars == scalars
    for name, loss in found.items():  # after convolutions of another device
        torch.testing.assert_close(loss.cpu(), expected[name], rtol=1e-3, atol=0)
    for name, gradient in found_gradients.items():
        assert (gradient.cpu() - gradients[name]).norm() <= 1e-2 * gradients[name].norm()


def test_detectron2s_detections_and_labels_of_the_same_outputs(calls):
    model = tiny_retinanet().eval()
    accelerated = retinanet_ext.accelerate(copy.deepcopy(model).to(DEVICE))
    with torch.no_grad():
        images = model.preprocess_image(batch())
        features = list(model.backbone(images.tensor).values())
        outputs = model.head(features)
        expected = model.forward_inference(images, features, outputs)
        moved = [[level.to(DEVICE) for level in levels] for levels in outputs]
        found = accelerated.forward_inference(images, [level.to(DEVICE) for level in features], moved)
    assert calls == ["detect"]
    for one, other in zip(found, expected, strict=True):
        assert_same(one.pred_classes.cpu(), other.pred_classes)
        torch.testing.assert_close(one.scores.cpu(), other.scores, rtol=1e-6, atol=0)
        torch.testing.assert_close(one.pred_boxes.tensor.cpu(), other.pred_boxes.tensor, rtol=1e-5, atol=1e-4)
    instances = instances_of((64, 80), [[4.0, 6, 22, 20], [30, 10, 62, 44]], [1, 4])
    anchors = model.anchor_generator(features)
    labels, _ = accelerated.label_anchors([level.to(DEVICE) for level in anchors], [instances.to(DEVICE)])
    assert calls[1:] == ["match_anchors"]
    assert_same(labels[0].cpu(), model.label_anchors(anchors, [instances])[0][0])


def test_mmcvs_suppression(calls):
    import mmcv.ops

    boxes, scores, labels = random_boxes(300), torch.rand(300), torch.randint(4, (300,))
    boxes = (boxes * 16).round() / 16
    cfg = {"type": "nms", "iou_threshold": 0.5, "max_num": 50}
    expected = mmcv.ops.nms(boxes, scores, 0.4, 0, 0.2, 40), mmcv.ops.batched_nms(boxes, scores, labels, cfg)
    boxes, scores, labels = boxes.to(DEVICE), scores.to(DEVICE), labels.to(DEVICE)
    with retinanet_ext.patch("mmcv"):
        found = mmcv.ops.nms(boxes, scores, 0.4, 0, 0.2, 40), mmcv.ops.batched_nms(boxes, scores, labels, cfg)
    assert calls == ["nms", "batched_nms"]
    assert_same([[part.cpu() for part in pair] for pair in found], [list(pair) for pair in expected])


def test_mmdets_loss_and_assignment(calls):
    from mmdet.models.losses import FocalLoss
    from mmdet.models.task_modules.assigners import MaxIoUAssigner

    logits, target, weight = 1.5 * torch.randn(60, 5), torch.randint(6, (60,)), (torch.rand(60) < 0.7).float()
    loss, assigner = FocalLoss(), MaxIoUAssigner(pos_iou_thr=0.5, neg_iou_thr=0.4)
    priors, boxes, labels = random_boxes(500), random_boxes(9), torch.arange(9)

    def results(device):
        assigned = assigner.assign(
            SimpleNamespace(priors=priors.to(device)),
            SimpleNamespace(bboxes=boxes.to(device), labels=labels.to(device)),
        )
        computed = loss(logits.to(device), target.to(device), weight.to(device), avg_factor=7)
        return computed.cpu(), [part.cpu() for part in (assigned.gt_inds, assigned.labels, assigned.max_overlaps)]

    expected = results("cpu")
    with retinanet_ext.patch("mmdet"):
        found = results(DEVICE)
    assert calls == ["match_anchors", "sigmoid_focal_loss", "match_anchors"]
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=0)
    assert_same(found[1], expected[1])
