"""Which parts of an accelerated model stay torchvision's, or their author's, own."""

import copy
import functools
import pickle

import pytest
import torch

import retinanet_ext

pytest.importorskip("torchvision", reason="accelerates torchvision's RetinaNet")

from peer_modules import record_calls
from torchvision.models import detection as tv_detection
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection import retinanet as tv_retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import boxes as tv_boxes
from torchvision_models import (
    ALL,
    IMAGES,
    LOSS_OPERATORS,
    TARGETS,
    assert_same_results,
    boxes_of,
    results,
    tiny_retinanet,
)

from retinanet_ext.interop import restore


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, ALL)


# Parts that only torchvision's code, or somebody else's, computes right. Each changes a model and returns it.


class KeenMatcher(det_utils.Matcher):
    def __call__(self, match_quality_matrix):
        return super().__call__((2 * match_quality_matrix).clamp(max=1))


class ShiftedCoder(det_utils.BoxCoder):
    def decode_single(self, rel_codes, boxes):
        return super().decode_single(rel_codes, boxes) + 1

    def encode_single(self, reference_boxes, proposals):
        return super().encode_single(reference_boxes, proposals) + 1


class WeightedHead(tv_retinanet.RetinaNetHead):
    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return {name: 3 * loss for name, loss in losses.items()}


class WeightedClasses(tv_retinanet.RetinaNetClassificationHead):
    def compute_loss(self, targets, head_outputs, matched_idxs):
        assert all(matches.dtype == torch.int64 for matches in matched_idxs)
        return 3 * super().compute_loss(targets, head_outputs, matched_idxs)


class SharperHead(tv_retinanet.RetinaNetHead):
    def forward(self, x):
        return {name: 1.5 * value for name, value in super().forward(x).items()}


class OwnAnchors(AnchorGenerator):
    def forward(self, image_list, feature_maps):
        anchors = super().forward(image_list, feature_maps)
        return [image + index for index, image in enumerate(anchors)]


def with_class(part, cls):
    def apply(model):
        functools.reduce(getattr, part.split("."), model).__class__ = cls
        return model

    return apply


def with_attribute(name, value):
    def apply(model):
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, model), last, copy.deepcopy(value))
        return model

    return apply


def with_clipped_giou(model):
    model.head.regression_head._loss_type = "giou"
    model.head.regression_head.box_coder.bbox_xform_clip = 0.01
    return model


def with_method_on_the_instance(model):
    classes = model.head.classification_head
    classes.compute_loss = lambda *arguments: 2 * type(classes).compute_loss(classes, *arguments)
    return model


def with_hook(part):
    def apply(model):
        functools.reduce(getattr, part.split("."), model).register_forward_hook(stretch)
        return model

    return apply


def stretch(module, inputs, output):
    if isinstance(output, dict):
        return {name: 1.2 * value for name, value in output.items()}
    return [1.2 * image for image in output] if isinstance(output, list) else 1.2 * output


OTHER_PARTS = {
    "matcher": (with_class("proposal_matcher", KeenMatcher), ["detect"]),
    "SSD's matcher": (with_attribute("proposal_matcher", det_utils.SSDMatcher(0.5)), ["detect"]),
    "matcher's threshold above 1": (with_attribute("proposal_matcher.high_threshold", 1.5), ["detect"]),
    "matcher's threshold below 0": (with_attribute("proposal_matcher.low_threshold", -0.5), ["detect"]),
    "ciou": (
        with_attribute("head.regression_head._loss_type", "ciou"),
        ["assign_targets", "multilevel_focal_loss", "detect"],
    ),
    "unknown loss": (
        with_attribute("head.regression_head._loss_type", "iou"),
        ["assign_targets", "multilevel_focal_loss", "detect"],
    ),
    "coder of the loss": (
        with_class("head.regression_head.box_coder", ShiftedCoder),
        ["assign_targets", "multilevel_focal_loss", "detect"],
    ),
    "coder of the detections": (with_class("box_coder", ShiftedCoder), LOSS_OPERATORS),
    "clip of the detections": (with_attribute("box_coder.bbox_xform_clip", 0.1), LOSS_OPERATORS),
    "clip of a loss that encodes": (with_attribute("head.regression_head.box_coder.bbox_xform_clip", 0.1), ALL),
    "clip of a loss that decodes": (with_clipped_giou, ["assign_targets", "multilevel_focal_loss", "detect"]),
    "a method of one head": (
        with_method_on_the_instance,
        ["assign_targets", "box_regression_loss", "detect"],
    ),
    "losses of the head": (with_class("head", WeightedHead), ["assign_targets", "detect"]),
    "loss of the classes": (
        with_class("head.classification_head", WeightedClasses),
        ["assign_targets", "box_regression_loss", "detect"],
    ),
    "outputs of the head": (with_class("head", SharperHead), ALL),
    "anchors": (with_class("anchor_generator", OwnAnchors), ALL),
    "negative number of detections": (with_attribute("detections_per_img", -5), LOSS_OPERATORS),
    "negative threshold of suppression": (with_attribute("nms_thresh", -0.1), LOSS_OPERATORS),
    "hook on the head": (with_hook("head"), ALL),
    "hook on a subnet": (with_hook("head.regression_head"), ALL),
    "hook on the last layer": (with_hook("head.classification_head.cls_logits"), ALL),
    "hook on the anchors": (with_hook("anchor_generator"), ALL),
}


@pytest.mark.parametrize("part", OTHER_PARTS)
def test_other_parts_are_honoured(calls, part):
    apply, expected_calls = OTHER_PARTS[part]
    plain = results(tiny_retinanet())
    torch.manual_seed(0)
    theirs = apply(tiny_retinanet())
    ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    expected = results(theirs)
    assert calls == []
    assert_same_results(results(ours), expected)
    assert calls == expected_calls
    if part not in ("clip of a loss that encodes", "matcher's threshold below 0"):
        with pytest.raises(AssertionError):  # the part makes a difference
            assert_same_results(plain, expected)


@pytest.mark.parametrize("name", ["compute_loss", "postprocess_detections"])
def test_methods_put_on_an_instance_are_honoured(calls, name):
    model = tiny_retinanet()
    setattr(model, name, lambda *arguments: {} if name == "compute_loss" else [])
    retinanet_ext.accelerate(model)
    losses, detections = results(model)
    assert (losses if name == "compute_loss" else detections) in ({}, [])
    assert calls == (["detect"] if name == "compute_loss" else LOSS_OPERATORS)


@pytest.mark.parametrize(
    ("module", "name", "missing"),
    [
        (tv_retinanet, "sigmoid_focal_loss", "multilevel_focal_loss"),
        (tv_retinanet, "_box_loss", "box_regression_loss"),
        (tv_boxes, "box_iou", "assign_targets"),
        (tv_boxes, "batched_nms", "detect"),
        (tv_boxes, "clip_boxes_to_image", "detect"),
    ],
)
def test_functions_that_somebody_replaced_in_torchvision_are_honoured(calls, monkeypatch, module, name, missing):
    torch.manual_seed(0)
    theirs = tiny_retinanet()
    ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    original = getattr(module, name)
    used = []
    monkeypatch.setattr(
        module, name, lambda *arguments, **options: used.append(name) or original(*arguments, **options)
    )
    expected = results(theirs)
    used_by_theirs, used[:] = len(used), []
    assert_same_results(results(ours), expected)
    assert len(used) == used_by_theirs > 0
    assert missing not in calls


@pytest.mark.parametrize(
    ("cls", "name", "missing"),
    [
        (det_utils.Matcher, "set_low_quality_matches_", "assign_targets"),
        (tv_retinanet.RetinaNetRegressionHead, "compute_loss", "box_regression_loss"),
        (tv_retinanet.RetinaNetClassificationHead, "compute_loss", "multilevel_focal_loss"),
        (det_utils.BoxCoder, "decode_single", "detect"),
    ],
)
def test_methods_that_somebody_replaced_in_torchvision_are_honoured(calls, monkeypatch, cls, name, missing):
    model = retinanet_ext.accelerate(tiny_retinanet())
    original, used = getattr(cls, name), []
    monkeypatch.setattr(cls, name, lambda *arguments: used.append(name) or original(*arguments))
    results(model)
    assert used
    assert missing not in calls


class OwnLoss(tv_detection.RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        return {name: 2 * loss for name, loss in super().compute_loss(targets, head_outputs, anchors).items()}


class OwnDetections(tv_detection.RetinaNet):
    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        detections = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [{key: value[:3] for key, value in detection.items()} for detection in detections]


class OwnForward(tv_detection.RetinaNet):
    def forward(self, images, targets=None):
        return super().forward([image.flip(-1) for image in images], targets)


class OwnEverything(OwnLoss, OwnDetections, OwnForward):
    pass


class OwnNothing(tv_detection.RetinaNet):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.note = "mine"


@pytest.mark.parametrize(
    ("cls", "expected_calls"),
    [(OwnLoss, ["detect"]), (OwnDetections, LOSS_OPERATORS), (OwnForward, ALL), (OwnNothing, ALL)],
)
def test_methods_that_a_subclass_overrides_are_honoured(calls, cls, expected_calls):
    theirs = tiny_retinanet(cls=cls)
    ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    assert isinstance(ours, cls)
    assert_same_results(results(ours), results(theirs))
    assert calls == expected_calls
    assert restore(pickle.loads(pickle.dumps(ours))).__class__ is cls


def test_a_subclass_that_overrides_everything_is_refused():
    model = tiny_retinanet(cls=OwnEverything)
    with pytest.raises(ValueError, match="OwnEverything has forward, compute_loss, postprocess_detections of its own"):
        retinanet_ext.accelerate(model)
    assert type(model) is OwnEverything


@pytest.mark.parametrize(
    "targets",
    [
        [dict(TARGETS[0], labels=torch.tensor([1, 7, 0])), *TARGETS[1:]],
        [dict(TARGETS[0], labels=torch.tensor([1, -1, 0])), *TARGETS[1:]],
        [dict(TARGETS[0], labels=torch.tensor([1.0, 2, 0])), *TARGETS[1:]],
        [dict(TARGETS[0], labels=torch.tensor([1, 2])), *TARGETS[1:]],
        [dict(TARGETS[0], labels=torch.tensor([1, 2, 0, 4])), *TARGETS[1:]],
        [dict(TARGETS[0], boxes=boxes_of((5, 5, 50, 50), (9, 9, 9, 30), (1, 1, 9, 9))), *TARGETS[1:]],
        [dict(TARGETS[0], boxes=boxes_of((5, 5, 50, 50), (9, 9, 19, 3), (1, 1, 9, 9))), *TARGETS[1:]],
        [dict(TARGETS[0], boxes=boxes_of((5, 5, 50, 50), (9, 9, float("nan"), 30), (1, 1, 9, 9))), *TARGETS[1:]],
        [dict(TARGETS[0], boxes=boxes_of((5, 5, 50, 50), (9, 9, float("inf"), 30), (1, 1, 9, 9))), *TARGETS[1:]],
        [dict(TARGETS[0], boxes=torch.zeros(3, 5)), *TARGETS[1:]],
        [dict(TARGETS[0], boxes=torch.zeros(0)), *TARGETS[1:]],
        [dict(TARGETS[0], boxes=[[1.0, 2.0, 3.0, 4.0]]), *TARGETS[1:]],
        [dict(boxes=TARGETS[0]["boxes"]), *TARGETS[1:]],
        TARGETS[:2],
        None,
        [],
    ],
    ids=["label K", "label -1", "floating labels", "few labels", "many labels", "no width", "negative", "nan",
         "infinite", "five numbers", "1d", "list", "no labels", "few targets", "none", "empty"],
)  # fmt: skip
def test_targets_that_torchvision_has_its_own_way_with(targets):
    torch.manual_seed(0)
    theirs = tiny_retinanet()
    ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    found = []
    for model in (theirs, ours):
        try:
            losses = model(IMAGES, copy.deepcopy(targets))
            found.append({name: loss.item() for name, loss in losses.items()})
        except Exception as error:
            found.append((type(error), str(error)))
    if isinstance(found[0], dict):
        assert found[1] == pytest.approx(found[0], rel=2e-6, nan_ok=True)
    else:
        assert found[1] == found[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "num_classes"), [(6 * 14, 7), (6 * 7, 14), (6 * 7 + 1, 7)])
def test_a_head_at_odds_with_its_number_of_classes(training, channels, num_classes):
    """The last layer replaced for other classes, and not the number: torchvision's error, not other losses."""
    theirs = tiny_retinanet().train(training)
    theirs.head.classification_head.cls_logits = torch.nn.Conv2d(32, channels, 3, padding=1)
    theirs.head.classification_head.num_classes = num_classes
    errors = []
    for model in (theirs, retinanet_ext.accelerate(copy.deepcopy(theirs))):
        with pytest.raises((RuntimeError, IndexError)) as raised:
            model(IMAGES, TARGETS)
        errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]


def test_images_that_torchvision_refuses():
    model = retinanet_ext.accelerate(tiny_retinanet().eval())
    for images in ([torch.rand(3, 4, 5, 6)], [], [torch.rand(9)]):
        errors = []
        for candidate in (restore(copy.deepcopy(model)), model):
            with pytest.raises((RuntimeError, ValueError, IndexError, AssertionError)) as raised:
                candidate(images)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]


def test_degenerate_boxes_are_refused_in_evaluation_too():
    model = retinanet_ext.accelerate(tiny_retinanet().eval())
    with pytest.raises(AssertionError, match=r"All bounding boxes should have positive height.*index 1"):
        model(IMAGES[:2], [TARGETS[0], dict(TARGETS[2], boxes=boxes_of((9, 9, 9, 9)))])


def test_methods_called_by_themselves(calls):
    """As code does that takes the model apart: joined outputs in, degenerate boxes and all."""
    theirs = tiny_retinanet()
    ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    images, targets = theirs.transform(IMAGES, TARGETS)
    features = list(theirs.backbone(images.tensors).values())
    outputs, anchors = theirs.head(features), theirs.anchor_generator(images, features)
    for boxes in (targets[0]["boxes"], boxes_of((9, 9, 9, 30), (9, 9, 20, 30), (9, 9, 40, 30))):
        targets[0]["boxes"] = boxes
        for outputs_, anchors_ in ((outputs, anchors), (outputs, [anchors[0], anchors[0] + 1, anchors[0] + 2])):
            expected, found = (model.compute_loss(targets, outputs_, anchors_) for model in (theirs, ours))
            for name, loss in expected.items():
                torch.testing.assert_close(found[name], loss, rtol=2e-6, atol=0)
    assert calls == 2 * LOSS_OPERATORS  # not with the degenerate box
    broken = dict(outputs, cls_logits=outputs["cls_logits"][:, 1:])
    errors = []
    for model in (theirs, ours):
        with pytest.raises(IndexError) as raised:
            model.compute_loss(targets, broken, anchors)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
