"""A RetinaNet head of mmdet itself under the patch: the same losses, gradients and detections."""

import pytest
import torch
from peer_modules import assert_same, importable, is_installed, record_calls

import retinanet_ext

if not is_installed("mmdet"):
    pytest.skip("compares with mmdet's own head, which is not installed", allow_module_level=True)

IMAGE_SIZE = (64, 80)
INFO = {"img_shape": IMAGE_SIZE, "pad_shape": IMAGE_SIZE, "ori_shape": IMAGE_SIZE, "scale_factor": (1.0, 1.0)}


@pytest.fixture(scope="module", autouse=True)
def peers():
    with importable("mmcv", "mmdet"):
        yield


def make_head():
    from mmdet.models.dense_heads import RetinaHead
    from mmengine.config import ConfigDict

    assigner = {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": 0.5,
        "neg_iou_thr": 0.4,
        "min_pos_iou": 0,
        "ignore_iof_thr": -1,
    }
    test_cfg = {
        "nms_pre": 200,
        "min_bbox_size": 0,
        "score_thr": 0.05,
        "nms": {"type": "nms", "iou_threshold": 0.5},
        "max_per_img": 30,
    }
    anchors = {"octave_base_scale": 2, "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0], "strides": [8, 16]}
    torch.manual_seed(0)
    head = RetinaHead(
        num_classes=5,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        loss_cls={"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
        anchor_generator={"type": "AnchorGenerator", **anchors},
        train_cfg=ConfigDict(assigner=assigner, sampler={"type": "PseudoSampler"}, allowed_border=-1, pos_weight=-1),
        test_cfg=ConfigDict(test_cfg),
    )
    torch.nn.init.normal_(head.retina_cls.weight, std=0.3)
    torch.nn.init.constant_(head.retina_cls.bias, -2.0)
    return head


def run(head):
    """The losses of two images, one of them without objects, the gradients, and the detections."""
    from mmengine.structures import InstanceData

    torch.manual_seed(1)
    features = [torch.randn(2, 8, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride) for stride in (8, 16)]
    boxes = torch.tensor([[4.0, 6, 22, 20], [30, 10, 62, 44], [30, 10, 62, 44], [10, 30, 40, 52]])
    objects = [
        InstanceData(bboxes=boxes, labels=torch.tensor([0, 4, 1, 2])),
        InstanceData(bboxes=boxes[:0], labels=torch.zeros(0, dtype=torch.int64)),
    ]
    head.zero_grad()
    losses = head.loss_by_feat(*head(features), objects, [INFO, INFO])
    torch.stack([torch.stack(levels).sum() for levels in losses.values()]).sum().backward()
    with torch.no_grad():
        detections = head.predict_by_feat(*head(features), batch_img_metas=[INFO, INFO], rescale=False)
    losses = {name: torch.stack(levels).detach() for name, levels in losses.items()}
    return losses, [parameter.grad.clone() for parameter in head.parameters()], detections


def test_losses_gradients_and_detections(monkeypatch):
    calls = record_calls(monkeypatch, ["match_anchors", "sigmoid_focal_loss", "batched_nms"])
    head = make_head()
    expected = run(head)
    assert calls == []
    with retinanet_ext.patch("mmdet"):
        found = run(head)
    assert calls == ["match_anchors", "sigmoid_focal_loss", "sigmoid_focal_loss", "batched_nms", "batched_nms"]
    torch.testing.assert_close(found[:2], expected[:2], rtol=5e-5, atol=1e-6)
    for one, other in zip(found[2], expected[2], strict=True):
        assert len(one) == 30
        for name in ("bboxes", "scores", "labels"):
            assert_same(getattr(one, name), getattr(other, name))
