"""The model by itself: what goes in, what comes out, and what it says about mistakes."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import retinanet_ext
from retinanet_ext import models, ops
from retinanet_ext.models.anchors import AnchorGenerator, cell_anchors
from retinanet_ext.models.transform import ImageTransform, resize_boxes

SMALL = dict(min_size=64, max_size=112)
NUM_CLASSES = 5


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def target_of(boxes, labels):
    return dict(boxes=boxes_of(*boxes), labels=torch.tensor(labels, dtype=torch.int64))


NOTHING = target_of([], [])
OBJECT = target_of([(10, 10, 50, 60)], [3])


@pytest.fixture(scope="module")
def untouched_model():
    torch.manual_seed(0)
    return models.retinanet_resnet18_fpn(NUM_CLASSES, **SMALL)


@pytest.fixture
def model(untouched_model):
    return copy.deepcopy(untouched_model)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 80, generator=generator), torch.rand(3, 90, 70, generator=generator)]


# In a process of its own, whose auditing sees every import and every connection, wherever it is asked for.
_ALONE = """
import sys

def forbid(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] == "torchvision":
        raise AssertionError("torchvision is imported")
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise AssertionError(f"a connection: {event}")

sys.addaudithook(forbid)

import torch
from retinanet_ext import models

builders = [getattr(models, name) for name in models.__all__ if name.startswith("retinanet_")]
assert len(builders) == len(models.BACKBONES) + 1, builders  # resnet50 has a v2
with torch.device("meta"):
    for build in builders:
        build(num_classes=5)
model = models.retinanet_resnet18_fpn(5, min_size=64, max_size=64, score_thresh=0.0)
images = [torch.rand(3, 64, 64)]
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
sum(model(images, [{"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([3])}]).values()).backward()
optimizer.step()
assert len(model.eval()(images)[0]["boxes"]) > 0

# What must not happen would be seen.
import socket, urllib.request

def planted():
    import torchvision

actions = (
    planted,
    lambda: socket.socket().connect(("127.0.0.1", 9)),
    lambda: urllib.request.urlopen("http://127.0.0.1:9"),
    lambda: torch.hub.load_state_dict_from_url("http://127.0.0.1:9/x.pth", model_dir="."),
)
for action in actions:
    try:
        action()
    except AssertionError:
        continue
    raise SystemExit("an import or a connection was not seen")
"""


def test_the_model_needs_no_torchvision_and_downloads_nothing(tmp_path):
    """Every constructor, a step of training and a detection."""
    environment = {**os.environ, "PYTHONPATH": str(Path(retinanet_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_published_parameter_count():
    with torch.device("meta"):
        frozen = models.retinanet_resnet50_fpn(norm="frozen_batch")
        trainable = models.retinanet_resnet50_fpn(num_classes=91)
    assert sum(p.numel() for p in frozen.parameters()) == 34_014_999
    assert sum(p.numel() for p in trainable.parameters()) == 34_014_999 + 2 * 26_560  # BatchNorm's weights and biases


def test_training_output(model, images):
    losses = model(images, [OBJECT, target_of([(5, 5, 30, 80), (20, 30, 66, 70)], [0, 4])])
    assert list(losses) == ["classification", "bbox_regression"]
    for loss in losses.values():
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert loss > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.last_num_foreground.dtype == torch.int32
    assert model.last_num_foreground.shape == (2,)
    assert (model.last_num_foreground > 0).all()
    assert not model.last_num_foreground.requires_grad


def test_losses_are_those_of_the_operators(model, images):
    """By hand, from the heads' outputs: the mean over images of each one's loss per foreground anchor."""
    targets = [OBJECT, NOTHING]
    model.eval()  # BatchNorm must not depend on the batch
    batch = model.transform(images)
    features = model.backbone(batch.tensor)
    cls_logits, box_deltas = model.head(features)
    anchors = model.anchor_generator(batch.tensor.shape[-2:], [level.shape[-2:] for level in features])
    boxes = [resize_boxes(t["boxes"], a, b) for t, a, b in zip(targets, batch.original_sizes, batch.sizes, strict=True)]
    assigned = ops.assign_targets(anchors, boxes, [target["labels"] for target in targets])

    logits = torch.cat([lv.unflatten(1, (9, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for lv in cls_logits], 1)
    deltas = torch.cat([lv.unflatten(1, (9, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for lv in box_deltas], 1)
    logits, deltas = logits.double(), deltas.double()
    expected_cls, expected_box = 0, 0
    for image in range(2):
        foreground = assigned.labels[image] >= 0
        count = max(1, int(foreground.sum()))
        target = torch.zeros_like(logits[image])
        target[foreground, assigned.labels[image][foreground].long()] = 1
        p = logits[image].sigmoid()
        ce = nn.functional.binary_cross_entropy_with_logits(logits[image], target, reduction="none")
        focal = (0.25 * target + 0.75 * (1 - target)) * (p * (1 - target) + (1 - p) * target) ** 2 * ce
        expected_cls += focal[assigned.labels[image] != -2].sum() / count / 2
        matched = boxes[image][assigned.matched[image][foreground].long()]
        distance = deltas[image][foreground] - ops.encode_boxes(matched, anchors[foreground])
        expected_box += distance.abs().sum() / count / 2

    for module in (model, model.transform):
        module.training = True
    losses = model(images, targets)
    assert losses["classification"].item() == pytest.approx(expected_cls.item(), rel=2e-6)
    assert losses["bbox_regression"].item() == pytest.approx(expected_box.item(), rel=2e-6)


def test_images_without_objects_train(model, images):
    losses = model(images, [NOTHING, NOTHING])
    assert losses["bbox_regression"] == 0
    assert losses["classification"] > 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert (model.head.regression_head.bbox_reg.weight.grad == 0).all()
    assert (model.head.classification_head.cls_logits.weight.grad != 0).any()
    assert model.last_num_foreground.tolist() == [0, 0]


def test_a_few_steps_reduce_the_loss(model, images):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    totals = []
    for _ in range(6):
        losses = model(images, [OBJECT, NOTHING])
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


def test_evaluation_output(model, images):
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -2.0)
    model.eval()
    detections = model(images)
    assert len(detections) == 2
    for image, found in zip(images, detections, strict=True):
        height, width = image.shape[1:]
        count = len(found["boxes"])
        assert set(found) == {"boxes", "scores", "labels"}
        assert count > 0
        assert found["boxes"].shape == (count, 4)
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32
        assert found["labels"].dtype == torch.int64
        assert found["scores"].shape == found["labels"].shape == (count,)
        assert (found["scores"].diff() <= 0).all()
        assert (found["scores"] > model.score_thresh).all()
        assert ((found["labels"] >= 0) & (found["labels"] < NUM_CLASSES)).all()
        # clipped in the resized image: the ratio back is rounded once
        assert found["boxes"].min() >= 0
        assert found["boxes"][:, 0::2].max() <= width * (1 + 2**-22)
        assert found["boxes"][:, 1::2].max() <= height * (1 + 2**-22)
        assert not found["boxes"].requires_grad


def test_nothing_found_is_an_empty_result(model, images):
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -50.0)
    model.eval()
    for found in model(images):
        assert found["boxes"].shape == (0, 4)
        assert found["scores"].shape == found["labels"].shape == (0,)


def test_ignored_boxes_are_left_out_of_the_loss(model, images):
    crowd = target_of([(0, 0, 40, 64), (10, 10, 50, 60)], [1, 3])
    losses = {}
    for name, ignore in (
        ("counted", None),
        ("none", torch.tensor([False, False])),
        ("ignored", torch.tensor([True, False])),
    ):
        model_copy = copy.deepcopy(model)
        target = crowd if ignore is None else dict(crowd, ignore=ignore)
        losses[name] = model_copy(images, [target, NOTHING])
        losses[name]["count"] = model_copy.last_num_foreground[0]
    assert losses["counted"] == losses["none"]
    assert losses["ignored"]["count"] < losses["counted"]["count"]
    only = copy.deepcopy(model)(images, [OBJECT, NOTHING])
    # the box that counts is trained on as if alone; the region around the other is no background
    assert losses["ignored"]["bbox_regression"] == only["bbox_regression"]
    assert losses["ignored"]["classification"] < only["classification"]


@pytest.mark.parametrize("norm", ["frozen_batch", "group"])
def test_other_norms_train(norm, images):
    torch.manual_seed(2)
    model = models.retinanet_resnet18_fpn(NUM_CLASSES, norm=norm, **SMALL)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = model(images[:1], [OBJECT])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    kinds = {type(module).__name__ for module in model.backbone.body.modules()}
    assert {"frozen_batch": "FrozenBatchNorm2d", "group": "GroupNorm"}[norm] in kinds
    assert "BatchNorm2d" not in kinds
    if norm == "frozen_batch":
        assert not any("bn" in name for name, _ in model.named_parameters())


def test_bfloat16_autocast(model, images):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        detections = model(images)
        model.train()
        losses = model(images, [OBJECT, NOTHING])
    assert all(found["boxes"].dtype == torch.float32 for found in detections)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_channels_last(model, images):
    model, images = model.double(), [image.double() for image in images]
    expected = copy.deepcopy(model)(images, [OBJECT, NOTHING])
    model = model.to(memory_format=torch.channels_last)
    found = model(images, [OBJECT, NOTHING])
    for key in expected:  # sums in another order, in float64; the class loss is rounded to float32
        assert found[key].item() == pytest.approx(expected[key].item(), rel=2**-22)
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_tensor_in_either_memory_format(model):
    batch = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    model.eval()
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -2.0)
    expected = model(list(batch))
    for form in (batch, batch.contiguous(memory_format=torch.channels_last)):
        for a, b in zip(model(form), expected, strict=True):
            assert torch.equal(a["boxes"], b["boxes"])
            assert torch.equal(a["scores"], b["scores"])


def test_pickle_deepcopy_and_state_dict(model, images):
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -2.0)
    model(images, [OBJECT, NOTHING])
    model.eval()
    expected = model(images)
    reloaded = models.retinanet_resnet18_fpn(NUM_CLASSES, **SMALL).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    reloaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded):
        for a, b in zip(other(images), expected, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_files_of_earlier_torchvision_versions_load(model):
    state = model.state_dict()
    old = {}
    for key, value in state.items():
        for blocks in ("inner_blocks", "layer_blocks"):
            for level in range(3):
                key = key.replace(f"{blocks}.{level}.0.", f"{blocks}.{level}.")
        for layer in range(4):
            key = key.replace(f"_head.conv.{layer}.0.", f"_head.conv.{2 * layer}.")
        old[key] = value
    assert set(old) != set(state)
    torch.manual_seed(4)
    other = models.retinanet_resnet18_fpn(NUM_CLASSES, **SMALL)
    other.load_state_dict(old, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert "head.classification_head.conv.2.weight" in old  # the caller's dictionary is left alone


def test_anchors_are_cached_by_grid_and_device():
    generator = AnchorGenerator()
    grids = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    first = generator((64, 96), grids)
    assert generator((64, 96), [list(grid) for grid in grids]) is first
    # the same grids under a larger image have other strides
    assert not torch.equal(generator((128, 96), grids), first)
    assert generator((64, 96), grids, dtype=torch.float64).dtype == torch.float64
    for height in range(64, 64 + 50):
        generator((height, 96), grids)
    assert len(generator._cache) <= 16
    assert torch.equal(generator((64, 96), grids), first)


def test_anchors_that_stand_for_others_are_not_kept():
    generator, grids = AnchorGenerator(), [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    with torch._subclasses.FakeTensorMode():
        assert generator((64, 96), grids).shape == (9 * 129, 4)
    assert type(generator((64, 96), grids)) is torch.Tensor
    assert torch.equal(generator((64, 96), grids), AnchorGenerator()((64, 96), grids))
    assert type(generator((96, 64), [grid[::-1] for grid in grids])) is torch.Tensor


def test_training_after_inference_mode(model, images):
    model.eval()
    with torch.inference_mode():
        model(images)
    model.train()
    sum(model(images, [OBJECT, NOTHING]).values()).backward()
    (anchors,) = model.anchor_generator._cache.values()
    assert not anchors.is_inference()


def test_cell_anchors_by_their_formula():
    anchors = cell_anchors((32, 40), (0.5, 1.0, 2.0))
    rows = []
    for ratio in (0.5, 1.0, 2.0):
        for size in (32, 40):
            width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
            rows.append([round(-width / 2), round(-height / 2), round(width / 2), round(height / 2)])
    assert anchors.tolist() == rows


def test_transform_draws_among_several_sizes():
    transform = ImageTransform((32, 64, 96), 1000)
    image = torch.rand(3, 50, 50)
    torch.manual_seed(0)
    drawn = {transform([image]).sizes[0] for _ in range(60)}
    assert drawn == {(32, 32), (64, 64), (96, 96)}
    assert transform.eval()([image]).sizes == [(96, 96)]
