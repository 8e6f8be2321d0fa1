"""detectron2's RetinaNet on our operators: the same losses, gradients and detections, and what stays detectron2's."""

import copy
import pickle
import sys

import pytest
import torch
from detectron2_models import (
    BOXES,
    NUM_CLASSES,
    batch,
    detections_of,
    instances_of,
    losses_of,
    tiny_retinanet,
    unclipped_detections_of,
)
from peer_modules import assert_same, importable, outcome, record_calls

import retinanet_ext
from retinanet_ext.interop import restore

LOSSES = ["assign_targets", "multilevel_focal_loss", "box_regression_loss"]


@pytest.fixture(scope="module", autouse=True)
def peers():
    with importable("detectron2", "fvcore"):
        import detectron2.modeling  # noqa: F401

        yield


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, [*LOSSES, "match_anchors", "detect"])


def assert_same_training(model, expected_model, inputs=None, rtol=3e-5):
    found, expected = losses_of(model, inputs), losses_of(expected_model, inputs)
    assert list(found[0]) == list(expected[0]) == ["loss_cls", "loss_box_reg"]
    for found_part, expected_part in zip(found, expected, strict=True):
        torch.testing.assert_close(found_part, expected_part, rtol=rtol, atol=1e-6)
    assert model.loss_normalizer == pytest.approx(expected_model.loss_normalizer)
    return found[0]


def assert_same_detections(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.image_size == other.image_size
        assert list(one.get_fields()) == list(other.get_fields()) == ["pred_boxes", "scores", "pred_classes"]
        assert_same(one.pred_classes, other.pred_classes)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=0)
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smooth_l1_beta": 0.1},
        {"smooth_l1_beta": -1.0},
        {"box_reg_loss_type": "giou"},
        {"focal_loss_alpha": -1.0, "focal_loss_gamma": 0.5},
    ],
    ids=["l1", "smooth l1", "l1 by a negative beta", "giou", "other focal loss"],
)
def test_training(calls, options):
    model = tiny_retinanet(**options)
    accelerated = retinanet_ext.accelerate(copy.deepcopy(model))
    for _ in range(2):  # the normalizer moves on
        assert_same_training(accelerated, model)
    assert calls == LOSSES * 2


def test_box_weights_and_a_matcher_of_one_threshold(calls):
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher

    for low_quality in (True, False):
        model = tiny_retinanet(
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            anchor_matcher=Matcher([0.45], [0, 1], allow_low_quality_matches=low_quality),
        )
        accelerated = retinanet_ext.accelerate(copy.deepcopy(model))
        assert_same_training(accelerated, model)
        assert_same_detections(detections_of(accelerated), detections_of(model))
    assert calls == [*LOSSES, "detect"] * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"test_topk_candidates": 7},
        {"max_detections_per_image": 3},
        {"test_score_thresh": 0.2, "test_nms_thresh": 0.3},
        {"test_score_thresh": 0.9999},
        {"max_detections_per_image": 0},
    ],
    ids=["defaults", "topk", "limit", "thresholds", "nothing found", "no room"],
)
def test_inference(calls, options):
    model = tiny_retinanet(**options)
    expected, finished = unclipped_detections_of(model), detections_of(model)
    retinanet_ext.accelerate(model)
    found = unclipped_detections_of(model)
    assert calls == ["detect"]
    assert_same_detections(found, expected)
    assert_same_detections(detections_of(model), finished)
    if options.get("test_score_thresh", 0) < 0.9 and model.max_detections_per_image > 0:
        assert len(found[0]) == 3 or len(found[0]) >= 2 * 6
        # detectron2 does not clip before it suppresses
        assert len(found[0]) == 3 or (found[0].pred_boxes.tensor < 0).any()


def test_gradients_flow_through_detections():
    gradients = []
    for accelerated in (False, True):
        model = tiny_retinanet(test_score_thresh=0.2)
        if accelerated:
            retinanet_ext.accelerate(model)
        model.eval()
        instances = model(batch())[0]["instances"]
        (instances.scores.sum() + instances.pred_boxes.tensor.square().mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_halves_are_computed_in_float32(calls):
    model = tiny_retinanet()
    accelerated = retinanet_ext.accelerate(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        losses = assert_same_training(accelerated, model, rtol=2e-2)
        found, expected = unclipped_detections_of(accelerated)[0], unclipped_detections_of(model)[0]
    assert calls == [*LOSSES, "detect"]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found.scores.dtype == expected.scores.dtype == torch.bfloat16
    assert found.pred_boxes.tensor.dtype == torch.float32


def test_a_float64_model_is_detectron2s_but_for_its_labels(calls):
    model, accelerated = tiny_retinanet().double(), retinanet_ext.accelerate(tiny_retinanet().double())
    assert_same_training(accelerated, model)
    assert calls == ["match_anchors"]
    expected = outcome(detections_of, model)  # whose boxes are float32, and their scores are not
    assert expected[0] is RuntimeError
    assert outcome(detections_of, accelerated) == expected
    assert calls == ["match_anchors"]


def test_labels_of_anchors_are_bit_equal(calls):
    """Integer boxes on a grid: many overlaps are equal, and one box overlaps no anchor, which floods."""
    from detectron2.structures import Boxes

    model = tiny_retinanet()
    corners = torch.cartesian_prod(torch.arange(0.0, 64.0, 8), torch.arange(0.0, 64.0, 8))
    anchors = [Boxes(torch.cat([corners, corners + side], dim=1)) for side in (8, 16, 24)]
    truth = [
        (torch.tensor([[0, 0, 16, 16], [8, 8, 24, 24], [8, 8, 24, 24], [3, 5, 30, 40]]).float().tolist(), [1, 0, 3, 2]),
        ([[200.0, 200.0, 210.0, 210.0], [16.0, 16.0, 40.0, 40.0]], [4, 1]),
        ([], []),
    ]
    instances = [instances_of((64, 64), *objects) for objects in truth]
    expected_labels, expected_boxes = model.label_anchors(anchors, instances)
    found_labels, found_boxes = retinanet_ext.accelerate(model).label_anchors(anchors, instances)
    assert calls == ["match_anchors"]
    assert_same(found_labels, expected_labels)
    for found, expected, labels in zip(found_boxes, expected_boxes, found_labels, strict=True):
        foreground = (labels >= 0) & (labels != NUM_CLASSES)
        assert found.shape == expected.shape
        assert_same(found[foreground], expected[foreground])
    assert ((found_labels[1] == 4) | (found_labels[1] == 1)).all()  # flooded
    assert (found_labels[2] == NUM_CLASSES).all()


def test_a_patch_reaches_every_retinanet_and_accelerated_ones_stay(calls):
    from detectron2.modeling.meta_arch.retinanet import RetinaNet

    originals = dict(vars(RetinaNet))
    model, expected = tiny_retinanet(), tiny_retinanet()
    with retinanet_ext.patch("detectron2", "retinanet"):
        found = losses_of(model), detections_of(model)
        assert calls == [*LOSSES, "detect"]
    assert dict(vars(RetinaNet)) == originals
    torch.testing.assert_close(found[0], losses_of(expected), rtol=3e-5, atol=1e-6)
    assert_same_detections(found[1], detections_of(expected))
    assert len(calls) == 4
    accelerated = retinanet_ext.accelerate(model)
    with retinanet_ext.patch("detectron2"):
        assert retinanet_ext.accelerate(accelerated) is accelerated
    detections_of(accelerated)
    assert len(calls) == 5


def test_an_accelerated_model_is_copied_pickled_and_restored(calls):
    model = retinanet_ext.accelerate(tiny_retinanet())
    names = list(model.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(copied) is type(model)
    assert_same_detections(detections_of(copied), detections_of(model))
    assert calls == ["detect"] * 2
    cls = type(model).__bases__[1]
    assert restore(model) is model
    assert type(model) is cls
    assert list(model.state_dict()) == names
    assert_same_detections(detections_of(model), detections_of(copied))
    assert len(calls) == 3


# What stays detectron2's, or its author's. Each changes a model, and names the operators that run all the same.


def with_attribute(name, value):
    def change(model):
        setattr(model, name, value)

    return change


def own_matcher(model):
    from detectron2.modeling.matcher import Matcher

    class Keen(Matcher):
        def __call__(self, match_quality_matrix):
            return super().__call__((1.5 * match_quality_matrix).clamp(max=1))

    model.anchor_matcher = Keen([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)


def matcher_of_other_labels(model):
    from detectron2.modeling.matcher import Matcher

    model.anchor_matcher = Matcher([0.2, 0.4, 0.5], [-1, 0, -1, 1])


def own_coder(model):
    from detectron2.modeling.box_regression import Box2BoxTransform

    class Shifted(Box2BoxTransform):
        def apply_deltas(self, deltas, boxes):
            return super().apply_deltas(deltas, boxes) + 1

    model.box2box_transform = Shifted(weights=(1.0, 1.0, 1.0, 1.0))


def other_clamp(model):
    model.box2box_transform.scale_clamp = 0.1


def own_labels(model):
    def label_anchors(anchors, gt_instances):
        labels, boxes = type(model).label_anchors(model, anchors, gt_instances)
        for image in labels:
            image[::3] = -1
        return labels, boxes

    model.label_anchors = label_anchors


def own_losses(model):
    model.losses = lambda *arguments: {name: 3 * loss for name, loss in type(model).losses(model, *arguments).items()}


def own_permutation(model):
    def transposed(predictions, dims_per_anchor):
        found = type(model)._transpose_dense_predictions(model, predictions, dims_per_anchor)
        return [[1.1 * level for level in levels] for levels in found]

    model._transpose_dense_predictions = transposed


def own_single_image(model):
    def inference_single_image(*arguments):
        return type(model).inference_single_image(model, *arguments)[:2]

    model.inference_single_image = inference_single_image


ROWS = ["match_anchors", "multilevel_focal_loss", "box_regression_loss"]
CHANGED = {
    "matcher": (own_matcher, [*ROWS[1:], "detect"]),
    "labels of the matcher": (matcher_of_other_labels, [*ROWS[1:], "detect"]),
    "box loss": (with_attribute("box_reg_loss_type", "diou"), [*ROWS[:2], "detect"]),
    "coder": (own_coder, ROWS[:2]),
    "clamp": (other_clamp, LOSSES),
    "alpha": (with_attribute("focal_loss_alpha", 1.5), ["match_anchors", "detect"]),
    "label_anchors": (own_labels, [*ROWS, "detect"]),
    "losses": (own_losses, [*ROWS, "detect"]),
    "permutation": (own_permutation, ROWS),
    "inference of an image": (own_single_image, LOSSES),
}


@pytest.mark.parametrize("name", CHANGED)
def test_parts_that_are_not_detectron2s_own_run_as_they_are(calls, name):
    change, operators = CHANGED[name]
    model, accelerated = tiny_retinanet(), retinanet_ext.accelerate(tiny_retinanet())
    change(model)
    change(accelerated)
    assert_same_training(accelerated, model)
    assert_same_detections(detections_of(accelerated), detections_of(model))
    assert calls == operators


@pytest.mark.parametrize(
    ("module", "name", "operators"),
    [
        ("meta_arch.retinanet", "pairwise_iou", [*ROWS[1:], "detect"]),
        ("meta_arch.retinanet", "sigmoid_focal_loss_jit", ["match_anchors", "detect"]),
        ("meta_arch.retinanet", "_dense_box_regression_loss", [*ROWS[:2], "detect"]),
        ("meta_arch.retinanet", "batched_nms", LOSSES),
    ],
)
def test_functions_that_somebody_has_replaced_are_theirs(monkeypatch, calls, module, name, operators):
    place = sys.modules[f"detectron2.modeling.{module}"]
    original = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *arguments, **options: original(*arguments, **options))
    model, accelerated = tiny_retinanet(), retinanet_ext.accelerate(tiny_retinanet())
    assert_same_training(accelerated, model)
    assert_same_detections(detections_of(accelerated), detections_of(model))
    assert calls == operators


def test_a_release_without_some_method_is_left_alone(monkeypatch, calls):
    from detectron2.modeling.meta_arch.dense_detector import DenseDetector

    monkeypatch.delattr(DenseDetector, "_decode_per_level_predictions")
    model = tiny_retinanet()
    assert outcome(detections_of, retinanet_ext.accelerate(tiny_retinanet()))[0] is outcome(detections_of, model)[0]
    assert calls == []


def test_overridden_methods_of_a_subclass_stay(calls):
    from detectron2.modeling.meta_arch.retinanet import RetinaNet

    class Weighted(RetinaNet):
        def losses(self, *arguments):
            return {name: 2 * loss for name, loss in super().losses(*arguments).items()}

    assert_same_training(retinanet_ext.accelerate(tiny_retinanet(Weighted)), tiny_retinanet(Weighted))
    assert calls == ["match_anchors"]

    class Everything(RetinaNet):
        forward_training = losses = label_anchors = forward_inference = None

    with pytest.raises(ValueError, match=r"accelerate: model: .*Everything has forward_training, losses.*of its own"):
        retinanet_ext.accelerate(tiny_retinanet(Everything))


@pytest.mark.parametrize(
    ("boxes", "classes"),
    [
        ([*BOXES, [5.0, 5.0, 5.0, 9.0]], [0, 1, 2, 3]),
        ([*BOXES, [5.0, 5.0, float("nan"), 9.0]], [0, 1, 2, 3]),
        (BOXES, [0, NUM_CLASSES, 1]),
        (BOXES, [0, -1, 1]),
        (BOXES, [0, 77, 1]),
    ],
    ids=["no area", "nan", "background as a class", "ignored class", "class out of range"],
)
def test_objects_that_detectron2_has_its_own_way_with(calls, boxes, classes):
    inputs = batch([(boxes, classes), (BOXES[:1], [1])])
    model, accelerated = tiny_retinanet(), retinanet_ext.accelerate(tiny_retinanet())
    expected = outcome(losses_of, model, inputs)
    found = outcome(losses_of, accelerated, inputs)
    assert "assign_targets" not in calls
    if isinstance(expected[0], type):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=3e-5, atol=1e-6, equal_nan=True)


def test_what_is_no_retinanet_is_refused():
    with pytest.raises(
        TypeError, match=r"expected a .*detectron2\.modeling\.meta_arch\.retinanet\.RetinaNet, got torch"
    ):
        retinanet_ext.accelerate(torch.nn.DataParallel(tiny_retinanet()))


def test_tracing_records_detectron2s_own(calls):
    model = retinanet_ext.accelerate(tiny_retinanet(test_topk_candidates=6)).eval()
    inputs = batch()

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, image):
            instances = self.model([{"image": image, "instances": inputs[0]["instances"]}])[0]["instances"]
            return instances.pred_boxes.tensor, instances.scores

    with torch.no_grad():
        traced = torch.jit.trace(Traced(), inputs[0]["image"], check_trace=False)
        assert calls == []
        found = traced(inputs[0]["image"])
        assert_same_detections([detections_of(model, inputs[:1])[0]], detections_of(restore(model), inputs[:1]))
    assert len(found[1]) > 0
