"""An accelerated torchvision RetinaNet beside itself: losses, gradients, detections, and what it must leave alone."""

import copy

import pytest
import torch
from torch import nn

import retinanet_ext

pytest.importorskip("torchvision", reason="accelerates torchvision's RetinaNet")

from peer_modules import record_calls
from torchvision.models import detection as tv_detection
from torchvision.models.detection import _utils as det_utils
from torchvision_models import (
    FLOODING,
    IMAGES,
    LOSS_OPERATORS,
    NUM_CLASSES,
    TARGETS,
    assert_same_detections,
    images_of,
    tiny_retinanet,
)


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, [*LOSS_OPERATORS, "detect", "sigmoid_focal_loss"])


def both(*arguments, **options):
    """A model, and an accelerated copy of it."""
    model = tiny_retinanet(*arguments, **options)
    return model, retinanet_ext.accelerate(copy.deepcopy(model))


def losses_of(model, images=IMAGES, targets=TARGETS):
    losses = model.train()(images, [dict(target) for target in targets])
    assert list(losses) == ["classification", "bbox_regression"]
    return losses


def assert_same_losses(theirs, ours, images=IMAGES, targets=TARGETS, rel=2e-6):
    expected, found = losses_of(theirs, images, targets), losses_of(ours, images, targets)
    for name, loss in expected.items():
        assert found[name].dtype == loss.dtype
        assert found[name].shape == loss.shape
        assert found[name].item() == pytest.approx(loss.item(), rel=rel), name


def assert_same_evaluation(theirs, ours, images=IMAGES, least=10):
    with torch.no_grad():
        expected, found = theirs.eval()(images), ours.eval()(images)
    assert min(len(image["boxes"]) for image in expected) >= least
    assert_same_detections(found, expected)


def change(model, what):
    """One of the settings that ours reproduce."""
    head, coder = model.head.regression_head, model.box_coder
    if what == "smooth_l1":
        head._loss_type = "smooth_l1"
    elif what == "weights":
        head.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
        coder.weights = (2.0, 2.0, 1.0, 0.5)
    elif what == "thresholds":
        model.proposal_matcher = det_utils.Matcher(0.35, 0.2, allow_low_quality_matches=True)
        model.score_thresh, model.nms_thresh = 0.2, 0.3
        model.detections_per_img, model.topk_candidates = 17, 50
    elif what == "no low-quality matches":
        model.proposal_matcher = det_utils.Matcher(0.8, 0.4, allow_low_quality_matches=False)
    return model


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("what", ["as built", "smooth_l1", "weights", "thresholds", "no low-quality matches"])
def test_losses_and_detections(calls, version, what):
    theirs, ours = both(version)
    change(theirs, what)
    change(ours, what)  # after it was accelerated: settings are read at every call
    assert_same_losses(theirs, ours)
    assert calls == LOSS_OPERATORS
    calls.clear()
    assert_same_evaluation(theirs, ours)
    assert calls == ["detect"]


@pytest.mark.parametrize("make", [tv_detection.retinanet_resnet50_fpn, tv_detection.retinanet_resnet50_fpn_v2])
def test_torchvisions_own_builders(calls, make):
    theirs = make(weights=None, weights_backbone=None, num_classes=NUM_CLASSES, min_size=64, max_size=112)
    classifier = theirs.head.classification_head.cls_logits
    nn.init.normal_(classifier.weight, std=0.3 if make is tv_detection.retinanet_resnet50_fpn else 0.1)
    nn.init.constant_(classifier.bias, -3.0)
    ours = copy.deepcopy(theirs)
    assert retinanet_ext.accelerate(ours) is ours
    assert_same_losses(theirs, ours)
    assert_same_evaluation(theirs, ours)
    assert calls == [*LOSS_OPERATORS, "detect"]


@pytest.mark.parametrize(
    "targets",
    [[TARGETS[1]] * 3, [FLOODING, *TARGETS[1:]], [dict(target, labels=target["labels"].int()) for target in TARGETS]],
    ids=["no objects", "flood", "int32 labels"],
)
def test_losses_of_other_targets(calls, targets):
    assert_same_losses(*both(), targets=targets)
    assert calls == LOSS_OPERATORS


@pytest.mark.parametrize("version", [1, 2])
def test_gradients(version):
    """In float64 the same; in float32 no further from that than torchvision's."""
    theirs, ours = both(version)

    def gradients(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        targets = [dict(target, boxes=target["boxes"].to(dtype)) for target in TARGETS]
        losses = losses_of(model, [image.to(dtype) for image in IMAGES], targets)
        assert {loss.dtype for loss in losses.values()} == {dtype}
        (losses["classification"] + 2 * losses["bbox_regression"]).backward()
        values = torch.stack([loss.detach() for loss in losses.values()])
        return values, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact_losses, exact = gradients(theirs, torch.float64)
    found_losses, found = gradients(ours, torch.float64)
    torch.testing.assert_close(found_losses, exact_losses, rtol=1e-12, atol=0)
    assert (found - exact).norm() <= 1e-11 * exact.norm()
    error, their_error = (gradients(model, torch.float32)[1].double() - exact for model in (ours, theirs))
    assert error.norm() <= 2 * their_error.norm()


def test_training_steps_stay_together():
    theirs, ours = both()
    before = [parameter.clone() for parameter in theirs.parameters()]
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            sum(losses_of(model).values()).backward()
            optimizer.step()
    for found, expected, first in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert (found - expected).norm() <= 1e-3 * (expected - first).norm()
        assert not torch.equal(expected, first)


def test_detections_with_gradients():
    theirs, ours = both()
    results = []
    for model in (theirs.eval(), ours.eval()):
        detections = model(IMAGES)
        sum((d["scores"].sum() + 0.01 * d["boxes"].square().mean()) for d in detections).backward()
        results.append((detections, [parameter.grad for parameter in model.parameters()]))
    (expected, expected_gradients), (found, gradients) = results
    for a, b in zip(found, expected, strict=True):
        assert a["boxes"].requires_grad
        assert a["scores"].requires_grad
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=4 * 200 * 2**-23)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_detections_in_float64():
    theirs, ours = (model.double() for model in both())
    assert_same_evaluation(theirs, ours, [image.double() for image in IMAGES])


@pytest.mark.parametrize("name", ["detections_per_img", "topk_candidates"])
def test_no_detections_wanted(calls, name):
    theirs, ours = both()
    for model in (theirs, ours):
        setattr(model, name, 0)
    assert_same_evaluation(theirs, ours, least=0)
    assert calls == ["detect"]


def test_limits_without_end_take_no_memory(calls):
    theirs, ours = both()
    for model in (theirs.eval(), ours.eval()):
        model.detections_per_img = model.topk_candidates = 10**12
    with torch.no_grad():
        expected, found = theirs(IMAGES), ours(IMAGES)
    assert calls == ["detect"]
    for a, b in zip(found, expected, strict=True):
        assert len(b["scores"]) > 1000  # among so many some scores are equal, whose order torchvision leaves open
        torch.testing.assert_close(a["scores"], b["scores"], rtol=2**-22, atol=0)


def outputs_in_float32(model):
    """The same head outputs, widened before torchvision's losses or post-processing see them."""

    def widen(module, inputs, outputs):
        return {name: value.float() for name, value in outputs.items()}

    model.head.register_forward_hook(widen)
    return model


@pytest.mark.parametrize("mode", ["half", "bfloat16", "autocast"])
def test_halves_are_computed_in_float32(mode, calls):
    """torchvision rounds every step to halves: compared with its float32 code on the same halves, and its types."""
    theirs, ours = both()
    images = IMAGES
    if mode != "autocast":
        dtype = dict(half=torch.float16, bfloat16=torch.bfloat16)[mode]
        theirs, ours, images = theirs.to(dtype), ours.to(dtype), images_of(*(i.shape[1:] for i in IMAGES), dtype=dtype)
    wide = outputs_in_float32(copy.deepcopy(theirs))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        expected_types = {name: loss.dtype for name, loss in losses_of(theirs, images).items()}
        expected, found = losses_of(wide, images), losses_of(ours, images)
        assert {name: loss.dtype for name, loss in found.items()} == expected_types
        for name, loss in expected.items():
            rounding = 2e-6 if expected_types[name] == torch.float32 else torch.finfo(expected_types[name]).eps
            assert found[name].item() == pytest.approx(loss.item(), rel=rounding)
        (sum(found.values()) * 0.01).backward()
        assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())
        with torch.no_grad():
            expected, found = wide.eval()(images), ours.eval()(images)
            if mode == "autocast":
                types = [value.dtype for value in theirs.eval()(images)[0].values()]
            else:  # torchvision's suppression takes no halves on the CPU: what it would be given
                types = [dtype, dtype, torch.int64]
    assert [value.dtype for value in found[0].values()] == types
    assert calls == [*LOSS_OPERATORS, "detect"]
    for a, b in zip(found, expected, strict=True):
        assert len(b["boxes"]) > 10
        # of equal float32 scores (there are few values of a half) the lower index comes first, in torchvision any
        torch.testing.assert_close(a["scores"], b["scores"].to(a["scores"].dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_boxes_of_another_type_are_torchvisions_business(calls, dtype):
    targets = [dict(target, boxes=target["boxes"].to(dtype)) for target in TARGETS]
    theirs, ours = both()
    for model in (theirs, ours):  # without the transform, which makes float32 of integers
        model.transform.resize = lambda image, target: (image, target)
    images = images_of((96, 96), (96, 96), (96, 96))
    assert_same_losses(theirs, ours, images, targets)
    assert calls == []
