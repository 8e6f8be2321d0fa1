"""The model beside torchvision's: keys, initialisation, head outputs, losses, gradients, detections."""

import copy

import pytest
import torch
from torch import nn

from retinanet_ext import models
from retinanet_ext.models.anchors import AnchorGenerator
from retinanet_ext.models.resnet import FrozenBatchNorm2d
from retinanet_ext.models.transform import ImageTransform, resize_boxes

pytest.importorskip("torchvision", reason="compares with torchvision")

from torchvision.models import detection as tv_detection
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.detection.transform import resize_boxes as torchvision_resize_boxes
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

NUM_CLASSES = 7
SMALL = dict(min_size=64, max_size=112)
MAKERS = {
    18: models.retinanet_resnet18_fpn,
    34: models.retinanet_resnet34_fpn,
    50: models.retinanet_resnet50_fpn,
    101: models.retinanet_resnet101_fpn,
    152: models.retinanet_resnet152_fpn,
}
TORCHVISION_NORMS = {"batch": nn.BatchNorm2d, "frozen_batch": TorchvisionFrozenBatchNorm2d}


def torchvision_model(depth, norm="batch", num_classes=NUM_CLASSES, **kwargs):
    if depth == 50 and norm == "batch":
        return tv_detection.retinanet_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=num_classes, **kwargs
        )
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}",
        weights=None,
        norm_layer=TORCHVISION_NORMS[norm],
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return tv_detection.RetinaNet(backbone, num_classes, **kwargs)


def both(depth=18, norm="batch", ours_kwargs=None, **kwargs):
    """torchvision's model and ours with the same weights."""
    torch.manual_seed(depth)
    theirs = torchvision_model(depth, norm, **kwargs)
    for module in theirs.modules():
        if hasattr(module, "running_var"):  # as if trained, so that evaluation has something to normalise by
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(theirs.head.regression_head.bbox_reg.weight, std=0.05)
    ours = MAKERS[depth](kwargs.pop("num_classes", NUM_CLASSES), norm=norm, **kwargs, **(ours_kwargs or {}))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def images_of(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


IMAGES = images_of((100, 140), (130, 90), (64, 200))


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


TARGETS = [
    dict(boxes=boxes_of((10, 10, 60, 70), (30, 30, 100, 90), (5, 60, 40, 95)), labels=torch.tensor([1, 6, 0])),
    dict(boxes=boxes_of(), labels=torch.zeros(0, dtype=torch.int64)),
    dict(boxes=boxes_of((100, 5, 180, 60)), labels=torch.tensor([3])),
]


# the second box touches no anchor: torchvision's rule gives all anchors their best box back
FLOODING = dict(boxes=boxes_of((20, 20, 60, 60), (900, 900, 990, 990)), labels=torch.tensor([2, 4]))


@pytest.mark.parametrize("norm", ["batch", "frozen_batch"])
@pytest.mark.parametrize("depth", MAKERS)
def test_state_dict_keys_order_and_shapes(depth, norm):
    with torch.device("meta"):
        theirs, ours = torchvision_model(depth, norm), MAKERS[depth](NUM_CLASSES, norm=norm)
    expected = {key: (value.shape, value.dtype) for key, value in theirs.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in ours.state_dict().items()} == expected
    # the order of parameters too, which an optimizer's state goes by
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_state_dicts_load_both_ways():
    theirs, ours = both(18)
    result = theirs.load_state_dict(models.retinanet_resnet18_fpn(NUM_CLASSES).state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    # a checkpoint of trainable BatchNorm fits a model of frozen BatchNorm
    frozen = models.retinanet_resnet18_fpn(NUM_CLASSES, norm="frozen_batch")
    frozen.load_state_dict(ours.state_dict(), strict=True)


def test_initialisation_has_the_same_distribution():
    torch.manual_seed(0)
    theirs, ours = torchvision_model(18), models.retinanet_resnet18_fpn(NUM_CLASSES)
    for (name, expected), found in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        if expected.dtype != torch.float32 or expected.std(correction=0) < 1e-6:
            assert torch.equal(found, expected), name  # constants: biases, BatchNorm
            continue
        # two samples of n numbers: their standard deviations differ by about 1 / sqrt(n), relatively
        tolerance = 6 / found.numel() ** 0.5
        assert (found.std() / expected.std()).item() == pytest.approx(1, abs=tolerance), name
        assert abs(found.mean()) / expected.std() < tolerance, name
        # normal or uniform: mean absolute value over standard deviation is 0.798 or 0.866
        shape, expected_shape = (values.abs().mean() / values.std() for values in (found, expected))
        assert shape.item() == pytest.approx(expected_shape.item(), abs=tolerance), name


def outputs(model, images):
    """Class logits and deltas of each level, in the layout of the convolution."""
    with torch.no_grad():
        batch = model.transform(images)
        features = model.backbone(batch[0].tensors if isinstance(batch[0], ImageList) else batch.tensor)
        levels = list(features.values()) if isinstance(features, dict) else features
        head = model.head
        if isinstance(model, tv_detection.RetinaNet):
            cls, reg = head.classification_head, head.regression_head
            return [cls.cls_logits(cls.conv(lv)) for lv in levels], [reg.bbox_reg(reg.conv(lv)) for lv in levels]
        return head(levels)


@pytest.mark.parametrize(("depth", "norm"), [(18, "frozen_batch"), (34, "batch"), (50, "batch"), (101, "batch")])
def test_head_outputs_are_the_same_bits(depth, norm):
    theirs, ours = both(depth, norm, **SMALL)
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        for expected, found in zip(outputs(theirs, IMAGES[:2]), outputs(ours, IMAGES[:2]), strict=True):
            assert len(found) == 5
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_eps_of_torchvisions_coco_weights():
    """torchvision sets it to 0 where it loads them, for they come from another library."""
    theirs, ours = both(18, "frozen_batch", ours_kwargs={"norm_eps": 0.0}, **SMALL)
    before = outputs(theirs.eval(), IMAGES[:1])
    overwrite_eps(theirs, 0.0)
    expected, found = outputs(theirs, IMAGES[:1]), outputs(ours.eval(), IMAGES[:1])
    for after, mine, other in zip(expected, found, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, after, strict=True))
        assert not torch.equal(other[0], after[0])


def losses_of(model, images, targets):
    losses = model(images, targets)
    assert list(losses) == ["classification", "bbox_regression"]
    return torch.stack(list(losses.values()))


@pytest.mark.parametrize(
    ("norm", "policy", "targets"),
    [
        ("batch", "torchvision", TARGETS),
        ("batch", "safe", TARGETS),
        ("frozen_batch", "torchvision", TARGETS),
        ("batch", "torchvision", [TARGETS[1]] * 3),
        ("batch", "torchvision", [FLOODING, TARGETS[1], TARGETS[2]]),
    ],
    ids=["torchvision", "safe", "frozen_batch", "no objects", "flood"],
)
def test_losses(norm, policy, targets):
    theirs, ours = both(18, norm, ours_kwargs=dict(match_policy=policy), **SMALL)
    with torch.no_grad():
        expected, found = losses_of(theirs, IMAGES, targets), losses_of(ours, IMAGES, targets)
    # the networks agree to the bit; a sum of 1e5 float32 terms, pairwise, is good to (log2(1e5) + 10) / 2^24
    assert found.tolist() == pytest.approx(expected.tolist(), rel=2e-6)


def test_flooding_is_what_the_safe_policy_leaves_out():
    targets = [FLOODING, TARGETS[1], TARGETS[2]]
    theirs, safe = both(18, **SMALL)
    with torch.no_grad():
        theirs_loss, safe_loss = losses_of(theirs, IMAGES, targets), losses_of(safe, IMAGES, targets)
        alone = dict(boxes=FLOODING["boxes"][:1], labels=FLOODING["labels"][:1])
        safe_alone = losses_of(safe, IMAGES, [alone, *targets[1:]])
    assert torch.equal(safe_loss, safe_alone)
    assert (theirs_loss - safe_loss)[1] > 0.1  # every anchor is foreground of the first image


def test_gradients():
    theirs, ours = both(18, ours_kwargs=dict(match_policy="torchvision"), **SMALL)

    def loss_and_gradients(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        targets = [dict(target, boxes=target["boxes"].to(dtype)) for target in TARGETS]
        losses = losses_of(model, [image.to(dtype) for image in IMAGES], targets)
        losses.sum().backward()
        return losses.tolist(), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, exact_gradients = loss_and_gradients(theirs, torch.float64)
    found, gradients = loss_and_gradients(ours, torch.float64)
    assert found == pytest.approx(exact, rel=1e-6)  # the class loss itself is float32
    assert (gradients - exact_gradients).norm() <= 1e-9 * exact_gradients.norm()

    error, their_error = (
        loss_and_gradients(model, torch.float32)[1].double() - exact_gradients for model in (ours, theirs)
    )
    assert error.norm() <= 2 * their_error.norm()


def spread_logits(model):
    """Random features give nearly constant logits: scale them so that some are detections and some not."""
    final = model.head.classification_head.cls_logits
    logits = torch.cat([level.flatten() for level in outputs(model, IMAGES)[0]])
    with torch.no_grad():
        final.weight *= 1.5 / logits.std()
        final.bias.fill_(-3.0)


@pytest.mark.parametrize("norm", ["batch", "frozen_batch"])
def test_detections(norm):
    for options in ({}, dict(score_thresh=0.2, nms_thresh=0.3, detections_per_img=17, topk_candidates=50)):
        theirs, ours = both(18, norm, **SMALL, **options)
        theirs.eval()
        ours.eval()
        spread_logits(theirs)
        ours.load_state_dict(theirs.state_dict())
        assert_same_detections(ours, theirs, more_than=10)


def test_detections_of_a_trained_model():
    """Trained until it finds something: logits and deltas as training leaves them, not as they are drawn."""
    theirs, ours = both(18, **SMALL)
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-3)
    ours.train()
    for _ in range(20):
        optimizer.zero_grad()
        sum(ours(IMAGES, TARGETS).values()).backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
    theirs.load_state_dict(ours.state_dict())
    # Evaluation with the statistics of these batches, which 20 steps have not yet gathered.
    for model in (ours.eval(), theirs.eval()):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
    found = assert_same_detections(ours, theirs, more_than=-1)  # the second image has no boxes
    for image in (0, 2):
        assert found[image]["scores"].max() > 0.3


def assert_same_detections(ours, theirs, more_than):
    with torch.no_grad():
        expected, found = theirs(IMAGES), ours(IMAGES)
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        assert len(b["boxes"]) > more_than
        # The exponentials of the two box coders are each within an ulp of the truth; sides are at most 200 pixels.
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=4 * 200 * 2**-23)
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["scores"], b["scores"], rtol=2**-22, atol=0)
    return found


def test_batch_norm_statistics_are_the_same_bits():
    theirs, ours = both(18, **SMALL)
    with torch.no_grad():
        for _ in range(2):
            theirs(IMAGES, TARGETS)
            ours(IMAGES, TARGETS)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(("min_size", "max_size"), [(800, 1333), (96, 100), (64, 1000), ((64, 96), 500), (333, 333)])
def test_transform_is_the_same_bits(min_size, max_size):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    theirs = GeneralizedRCNNTransform(min_size, max_size, mean, std).eval()
    ours = ImageTransform(min_size, max_size).eval()
    for sizes in ([(100, 140), (130, 90)], [(33, 33)], [(64, 96), (96, 64)], [(7, 250), (50, 50), (41, 99)]):
        images = images_of(*sizes)
        if min_size == 800:
            images = images[:1]
        expected, _ = theirs(images)
        found = ours(images)
        assert torch.equal(found.tensor, expected.tensors)
        assert found.sizes == [tuple(size) for size in expected.image_sizes]
        assert found.original_sizes == [tuple(image.shape[1:]) for image in images]
        boxes = boxes_of((0.3, 1.7, 20, 30), (5, 5, 5.5, 7.25))
        for size, new_size in zip(found.original_sizes, found.sizes, strict=True):
            assert torch.equal(resize_boxes(boxes, size, new_size), torchvision_resize_boxes(boxes, size, new_size))


def test_anchors_are_the_same_bits():
    ours = AnchorGenerator()
    theirs = TorchvisionAnchors(ours.sizes, (ours.aspect_ratios,) * 5)
    for height, width in ((800, 1344), (800, 1088), (96, 160), (32, 32), (224, 64)):
        grids = [(height, width)]
        for _ in range(7):
            grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
        grids = grids[3:]
        images = ImageList(torch.zeros(1, 1, height, width), [(height, width)])
        expected = theirs(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]
        assert torch.equal(ours((height, width), grids), expected)
    assert len(ours((800, 1344), [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)])) == 201_600


def test_other_anchors_losses_and_detections():
    sizes, ratios = tuple((s, int(1.5 * s)) for s in (16, 32, 64, 128, 256)), (0.5, 1.0)
    generator = TorchvisionAnchors(sizes, (ratios,) * 5)
    torch.manual_seed(3)
    theirs = torchvision_model(18, anchor_generator=generator, **SMALL)
    ours = models.retinanet_resnet18_fpn(
        NUM_CLASSES, anchor_sizes=sizes, aspect_ratios=ratios, match_policy="torchvision", **SMALL
    )
    ours.load_state_dict(theirs.state_dict())
    expected, found = theirs(IMAGES, TARGETS), ours(IMAGES, TARGETS)
    for key, loss in expected.items():
        assert found[key].item() == pytest.approx(loss.item(), rel=2e-6)


def test_frozen_batch_norm_is_the_same_bits():
    theirs, ours = TorchvisionFrozenBatchNorm2d(8), FrozenBatchNorm2d(8)
    state = {key: torch.rand(8) for key in theirs.state_dict()}
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    x = torch.randn(2, 8, 5, 3)
    assert torch.equal(ours(x), theirs(x))
