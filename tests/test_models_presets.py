"""The conventions of each implementation, by number: anchors at a cell, normalizers over batches, losses, clipping; and
the configuration that holds them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from tiny_retinanet import OTHER_TARGETS, TARGETS

from retinanet_ext import models, ops
from retinanet_ext.engine.checkpoint import build_model, load_model, load_state, save_checkpoint
from retinanet_ext.engine.config import TrainConfig
from retinanet_ext.engine.export_modules import _GridAnchors
from retinanet_ext.models import PRESETS, LossNormalizer, RetinaNetConfig, build_retinanet
from retinanet_ext.models.anchors import AnchorGenerator
from retinanet_ext.models.transform import ImageBatch

SIZE, GRIDS = (800, 1344), ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
NUM_CLASSES = 3
SMALL = {"min_size": 64, "max_size": 112}
IMAGES = [torch.rand(3, *size, generator=torch.Generator().manual_seed(size[0])) for size in ((64, 96), (96, 64))]


def small_config(name, **changes):
    return RetinaNetConfig.preset(name, NUM_CLASSES, "resnet18", **{**SMALL, **changes})


@pytest.fixture(scope="module")
def built():
    """A model of each preset, of the same weights wherever they have the same shape."""
    found = {}
    for name in PRESETS:
        torch.manual_seed(0)
        found[name] = build_retinanet(small_config(name))
        torch.nn.init.normal_(found[name].head.regression_head.bbox_reg.weight, std=0.05)
    return found


# Of cell (row 1, column 2): (level, anchor of the cell) to its box. By hand, size 645.08 = 512 * 2^(1/3):
# torchvision: P7's strides are 800 // 7 = 114 and 1344 // 11 = 122, the centre is (244, 114), and sizes are truncated;
#   a ratio of 0.5 makes 645 x 645 into 912.17 x 456.08, whose halves are rounded.
# detectron2, mmdet: the stride is 128, the centre (256, 128), and nothing is rounded: 912.280 x 456.140.
# paper: P3's centre is (2.5 * 8, 1.5 * 8); a cell of 8 x 8 becomes 11 x 6 of ratio 0.5 and 6 x 12 of ratio 2, rounded
#   from 11.3 x 5.5 and 5.66 x 12; size 32 is four times that, the next one four times 2^(1/3).
TORCHVISION = {
    (4, 0): (244 - 362, 114 - 181, 244 + 362, 114 + 181),
    (4, 1): (244 - 456, 114 - 228, 244 + 456, 114 + 228),
    (4, 3): (244 - 256, 114 - 256, 244 + 256, 114 + 256),
    (0, 8): (16 - 18, 8 - 35, 16 + 18, 8 + 35),  # 50 of ratio 2: 35.36 x 70.71
}
FLOATS = (256 - 456.1401, 128 - 228.0700, 256 + 456.1401, 128 + 228.0700)
BY_HAND = {
    "torchvision": TORCHVISION,
    "torchvision_v2": TORCHVISION,
    "detectron2": {(4, 1): (0, -128, 512, 384), (4, 3): FLOATS, (0, 0): (16 - 22.6274, 8 - 11.3137, 38.6274, 19.3137)},
    "mmdet": {(4, 3): (0, -128, 512, 384), (4, 1): FLOATS, (0, 0): (16 - 22.6274, 8 - 11.3137, 38.6274, 19.3137)},
    "paper": {
        (0, 0): (20 - 22, 12 - 12, 20 + 22, 12 + 12),
        (0, 2): (20 - 12, 12 - 24, 20 + 12, 12 + 24),
        (0, 3): (20 - 27.71826, 12 - 15.11905, 20 + 27.71826, 12 + 15.11905),
        (4, 1): (320 - 256, 192 - 256, 320 + 256, 192 + 256),
    },
}


def cell_of(level, row, column):
    """The first anchor of a cell among all."""
    before = sum(height * width for height, width in GRIDS[:level])
    return 9 * (before + row * GRIDS[level][1] + column)


@pytest.mark.parametrize("name", PRESETS)
def test_anchors_by_hand(name, built):
    anchors = built[name].anchor_generator(SIZE, GRIDS)
    for (level, index), expected in BY_HAND[name].items():
        found = anchors[cell_of(level, 1, 2) + index]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-3)
        if name.startswith("torchvision"):
            assert found.tolist() == list(expected)


def test_detectrons_published_anchors():
    """Those in the comments of Detectron's (and py-faster-rcnn's) generate_anchors, of MATLAB: the first pixel is 1,
    and a box counts its last one in."""
    generator = AnchorGenerator(((128, 256, 512),), strides=(16,), rounding="strides", offset=0.5, order="ratio")
    anchors = generator((16, 16), [(1, 1)])
    published = [(-83, -39, 100, 56), (-175, -87, 192, 104), (-359, -183, 376, 200), (-55, -55, 72, 72)]
    published += [(-119, -119, 136, 136), (-247, -247, 264, 264), (-35, -79, 52, 96), (-79, -167, 96, 184)]
    published += [(-167, -343, 184, 360)]
    assert (anchors + torch.tensor([1, 1, 0, 0])).tolist() == [list(map(float, box)) for box in published]


@pytest.mark.parametrize("name", PRESETS)
def test_exported_grids_have_the_same_anchors(name, built):
    images = torch.zeros(1, 3, *SIZE)
    levels = [torch.zeros(1, 1, *grid) for grid in GRIDS]
    assert torch.equal(_GridAnchors(built[name])(images, levels), built[name].anchor_generator(SIZE, GRIDS))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (
            {"anchor_rounding": "floor"},
            r"anchor_rounding: expected one of \('pixels', .*got 'floor'",
        ),
        ({"anchor_order": "scale"}, r"anchor_order: expected one of \('ratio', 'size'\), got 'scale'"),
        ({"anchor_strides": (8, 16)}, r"anchor_strides: expected a positive one for each of 5 levels, got \(8, 16\)"),
        ({"anchor_strides": (8, 16, 32, 64, 0)}, "anchor_strides: expected a positive one"),
        ({"anchor_rounding": "strides"}, "anchor_strides: expected one for each level.*got None"),
        ({"anchor_offset": 1.0}, r"anchor_offset: expected a number in \[0, 1\), got 1.0"),
        ({"loss_normalizer": "sum"}, r"loss_normalizer: expected one of \('per_image', 'ema', .*got 'sum'"),
        ({"norm_eps": -1e-5, "norm": "frozen_batch"}, "norm_eps: expected a number above 0, or 0 .* got -1e-05"),
        ({"norm_eps": None}, "norm_eps: expected a number above 0, or 0 .* got None"),
        ({"norm_eps": 0.0}, "norm_eps: expected a number above 0, or 0 .* got 0.0 with norm='batch'"),
        ({"backbone": "vgg16"}, "backbone: expected one of resnet18, .*got 'vgg16'"),
    ],
)
def test_bad_values_are_named(bad, text):
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        build_retinanet(RetinaNetConfig(**{"backbone": "resnet18", **bad}))


def test_normalizers_over_two_batches():
    batches = [torch.tensor([3, 0], dtype=torch.int32), torch.tensor([5, 4], dtype=torch.int32)]
    expected = {
        "per_image": [[6, 2], [10, 8]],  # two images, each by max(1, foreground)
        "ema": [0.9 * 100 + 0.1 * 3, 0.9 * 90.3 + 0.1 * 9],
        "foreground": [3 + 1, 5 + 4],
        "foreground_plus_one": [4 + 1, 6 + 5],
    }
    for kind, values in expected.items():
        normalizer = LossNormalizer(kind)
        for batch, value in zip(batches, values, strict=True):
            found = normalizer(batch, torch.float64)
            torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), rtol=1e-6, atol=0)
    normalizer = LossNormalizer("ema")
    assert normalizer(torch.zeros(2, dtype=torch.int32)).item() == pytest.approx(0.9 * 100 + 0.1)  # at least one
    normalizer.eval()
    for _ in range(2):  # a validation does not move it
        assert normalizer(batches[0]).item() == pytest.approx(90.1)


def plain_losses(model, images, targets):
    """Sums over all images, by plain formulas, and the foreground of each image."""
    batch = model.transform(images)
    features = model.backbone(batch.tensor)
    logits, deltas = (
        torch.cat([_rows(level, channels) for level in levels], dim=1)
        for levels, channels in zip(model.head(features), (model.num_classes, 4), strict=True)
    )
    grids = [tuple(level.shape[-2:]) for level in features]
    anchors = model.anchor_generator(tuple(batch.tensor.shape[-2:]), grids)
    classification = bbox_regression = 0.0
    foreground = []
    for row, target in enumerate(targets):
        boxes = target["boxes"]  # images have the network's size
        matched = ops.match_anchors(anchors, [boxes], 0.5, 0.4, policy=model.match_policy)[0]
        one_hot = torch.zeros_like(logits[row])
        fg = matched >= 0
        one_hot[fg, target["labels"][matched[fg]]] = 1.0
        p = logits[row].sigmoid()
        p_t = torch.where(one_hot == 1, p, 1 - p)
        alpha_t = torch.where(one_hot == 1, 0.25, 0.75)
        classification += (-alpha_t * (1 - p_t) ** 2 * p_t.log())[matched != -2].sum()
        wanted = ops.encode_boxes(boxes[matched[fg]], anchors[fg])
        away = (deltas[row][fg] - wanted).abs()
        if model.box_loss == "smooth_l1":
            beta = model.box_loss_beta
            away = torch.where(away < beta, 0.5 * away**2 / beta, away - 0.5 * beta)
        bbox_regression += away.sum()
        foreground.append(int(fg.sum()))
    return classification, bbox_regression, foreground


def _rows(level, channels):
    batch, _, height, width = level.shape
    return level.view(batch, -1, channels, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, channels)


def _targets(*boxes):
    return [
        {"boxes": torch.tensor(image, dtype=torch.float32).reshape(-1, 4), "labels": torch.arange(len(image)) % 3}
        for image in boxes
    ]


def test_losses_by_their_formulas(built):
    first = _targets([(10, 10, 50, 60), (40, 5, 90, 60)], [])
    second = _targets([(0, 0, 60, 60)], [(5, 30, 60, 90)])
    ema = 100.0
    for targets in (first, second):
        divisors = {}
        for name in ("detectron2", "mmdet", "paper"):
            model = built[name]
            with torch.no_grad():
                classification, bbox_regression, foreground = plain_losses(model, IMAGES, targets)
                found = model(IMAGES, targets)
            if name == "detectron2":
                ema = 0.9 * ema + 0.1 * sum(foreground)
            divisors[name] = {
                "detectron2": ema,
                "mmdet": sum(max(1, f) for f in foreground),
                "paper": sum(f + 1 for f in foreground),
            }[name]
            assert model.last_num_foreground.tolist() == foreground
            assert foreground[0] > 1
            assert found["classification"].item() == pytest.approx(classification.item() / divisors[name], rel=1e-5)
            assert found["bbox_regression"].item() == pytest.approx(bbox_regression.item() / divisors[name], rel=1e-5)
        assert len(set(divisors.values())) == 3


def test_the_papers_box_loss():
    """beta 0.11: 0.05 is on the parabola, 0.3 on the line; two images, foreground (1, 0), so a normalizer of 3."""
    assert RetinaNetConfig.preset("paper").box_loss_beta == 0.11
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    deltas = torch.tensor([[[0.05, -0.3, 0, 0]], [[1.0, 1, 1, 1]]])
    loss = ops.box_regression_loss(
        deltas,
        anchors,
        [anchors, torch.zeros(0, 4)],
        torch.tensor([[0], [-1]], dtype=torch.int32),
        loss="smooth_l1",
        beta=0.11,
        normalizer=LossNormalizer("foreground_plus_one")(torch.tensor([1, 0])),
    )
    assert loss.item() == pytest.approx((0.5 * 0.05**2 / 0.11 + 0.3 - 0.055) / 3, rel=1e-6)


def test_clipping_before_or_after_suppression(built):
    """Two boxes of an IoU of 100 / 400, which at the image's edge are one and the same box."""
    anchors = torch.tensor([[-30.0, 0, 10, 10], [0, 0, 10, 10]])
    logits = [torch.tensor([[[2.0, -9, -9], [1, -9, -9]]])]
    batch = ImageBatch(torch.zeros(1, 3, 64, 64), [(64, 64)], [(64, 64)])
    kept = {
        name: model._detections(logits, [torch.zeros(1, 2, 4)], anchors, batch).counts.item()
        for name, model in built.items()
    }
    assert kept == {"torchvision": 1, "torchvision_v2": 1, "detectron2": 2, "mmdet": 1, "paper": 1}


def test_the_rest_of_the_table(built):
    facts = {
        name: (
            model.backbone.fpn.p6_from,
            model.backbone.fpn.extra_blocks.relu,
            "GroupNorm" in repr(model.head),
            model.box_loss,
            model.match_policy,
            model.detections_per_img,
        )
        for name, model in built.items()
    }
    assert facts == {
        "torchvision": ("p5", True, False, "l1", "torchvision", 300),
        "torchvision_v2": ("c5", True, True, "giou", "torchvision", 300),
        "detectron2": ("c5", True, False, "l1", "detectron2", 100),
        "mmdet": ("c5", False, False, "l1", "mmdet", 100),
        "paper": ("c5", True, False, "smooth_l1", "detectron2", 100),
    }
    for model in built.values():
        options = (model.fg_iou_thresh, model.bg_iou_thresh, model.score_thresh, model.nms_thresh)
        assert (*options, model.topk_candidates) == (0.5, 0.4, 0.05, 0.5, 1000)


def test_where_the_backbones_bottlenecks_stride():
    """The MSRA ResNets of detectron2 and of the paper stride early, their ResNeXts do not."""
    strides = {
        (name, backbone): RetinaNetConfig.preset(name, backbone=backbone).stride_in_1x1
        for name in PRESETS
        for backbone in ("resnet50", "resnext50_32x4d")
    }
    assert {key for key, early in strides.items() if early} == {("detectron2", "resnet50"), ("paper", "resnet50")}


def test_named_builders_have_the_presets_configurations():
    with torch.device("meta"):
        v1 = models.retinanet_resnet18_fpn(7, match_policy="torchvision", **SMALL)
        v2 = models.retinanet_resnet50_fpn_v2(7, match_policy="torchvision", **SMALL)
    assert v1.config == RetinaNetConfig.preset("torchvision", 7, "resnet18", **SMALL)
    assert v2.config == RetinaNetConfig.preset("torchvision_v2", 7, **SMALL)


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_as_json(name):
    config = small_config(name, min_size=(64, 80), image_mean=[0.5, 0.5, 0.5])
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored == config.to_dict()
    assert RetinaNetConfig.from_dict(stored) == config
    assert hash(RetinaNetConfig.from_dict(stored)) == hash(config)
    assert dataclasses.replace(config, num_classes=9) != config


def test_dictionaries_of_earlier_checkpoints():
    old = {"arch": "resnet34", "num_classes": 2, "norm": "group", "min_size": [64, 80], "anchor_sizes": [[8], [16]]}
    config = RetinaNetConfig.from_dict(old)
    expected = RetinaNetConfig(2, "resnet34", norm="group", min_size=(64, 80), anchor_sizes=((8,), (16,)))
    assert config == expected
    with pytest.raises(ValueError, match="model configuration: unknown: anchor_size, colour"):
        RetinaNetConfig.from_dict({**old, "colour": 1, "anchor_size": 3})
    with pytest.raises(ValueError, match=r"preset: expected one of torchvision, .*paper, got 'yolo'"):
        RetinaNetConfig.preset("yolo")


def test_training_configurations():
    plain = TrainConfig("data", arch="resnet18", min_size=(480,)).model_config(4)
    assert RetinaNetConfig.from_dict(plain) == RetinaNetConfig(4, "resnet18", min_size=480)
    for name in PRESETS:
        stored = TrainConfig("data", preset=name, arch="resnet18").model_config(4)
        assert RetinaNetConfig.from_dict(stored) == RetinaNetConfig.preset(name, 4, "resnet18")
        json.dumps(stored)
    chosen = TrainConfig("data", preset="mmdet", anchor_sizes=(8, 16, 32, 64, 128)).model_config(4)
    assert chosen["anchor_sizes"][0] == [8, 8 * 2 ** (1 / 3), 8 * 2 ** (2 / 3)]
    with pytest.raises(ValueError, match=r"preset: expected one of torchvision, .* got 'yolo'"):
        TrainConfig("data", preset="yolo")


def test_the_running_normalizer_in_checkpoints_and_weights(tmp_path, built):
    """Beside the weights in a checkpoint, not among them: torchvision's load strictly."""
    config = small_config("detectron2")
    torch.manual_seed(1)
    model = build_retinanet(config)
    model.load_state_dict(built["torchvision"].state_dict() | _resized_p6(model), strict=True)
    assert model.loss_normalizer.average == 100
    model.loss_normalizer.average.fill_(42.5)
    save_checkpoint(tmp_path / "x.pt", model, config.to_dict(), ["a", "b", "c"])
    loaded, names, checkpoint = load_model(tmp_path / "x.pt")
    assert loaded.loss_normalizer.average == 42.5
    assert names == ["a", "b", "c"]
    assert loaded.config == config == RetinaNetConfig.from_dict(checkpoint["model_config"])
    other = build_model(config.to_dict())
    load_state(other, {key: value for key, value in checkpoint.items() if key != "buffers"})  # an earlier version's
    assert other.loss_normalizer.average == 100


def _resized_p6(model):
    name = "backbone.fpn.extra_blocks.p6.weight"
    return {name: model.state_dict()[name]}


def test_the_running_normalizer_compiles_as_one_graph():
    from tiny_retinanet import IMAGES, tiny_retinanet

    torch.compiler.reset()
    model, plain = (tiny_retinanet() for _ in range(2))
    model.loss_normalizer, plain.loss_normalizer = LossNormalizer("ema"), LossNormalizer("ema")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for targets in (TARGETS, OTHER_TARGETS):
        found, expected = compiled(IMAGES, targets), plain(IMAGES, targets)
        for key, loss in expected.items():
            torch.testing.assert_close(found[key], loss)
    assert model.loss_normalizer.average == plain.loss_normalizer.average != 100


def test_two_forwards_before_one_backward():
    """The running mean moves on between a loss and its gradient."""
    from tiny_retinanet import IMAGES, tiny_retinanet

    model = tiny_retinanet()
    model.loss_normalizer = LossNormalizer("ema")
    losses = [sum(model(IMAGES, targets).values()) for targets in (TARGETS, OTHER_TARGETS)]
    sum(losses).backward()
    alone = tiny_retinanet()
    alone.loss_normalizer = LossNormalizer("ema")
    for targets in (TARGETS, OTHER_TARGETS):
        sum(alone(IMAGES, targets).values()).backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_snippet_of_the_documentation():
    text = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    names = {}
    with torch.device("meta"):
        exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert names["model"].config == names["config"]
    assert names["config"].norm == "frozen_batch"
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [cell.partition("`")[0] for cell in table[0][1:]] == list(PRESETS)
    rows = {row[0]: row[1:] for row in table}
    configs = [RetinaNetConfig.preset(name) for name in PRESETS]
    assert rows["P6 from"] == [config.p6_from.upper() for config in configs]
    assert rows["matching"] == [config.match_policy for config in configs]
    assert rows["losses divided by"] == [config.loss_normalizer for config in configs]
    assert rows["detections an image"] == [str(config.detections_per_img) for config in configs]
    assert rows["order of the anchors"] == [
        {"ratio": "ratio, size", "size": "size, ratio"}[config.anchor_order] for config in configs
    ]


def test_images_are_normalised_by_imagenets_statistics_unless_told():
    assert RetinaNetConfig(image_mean=None, image_std=None) == RetinaNetConfig()
    assert RetinaNetConfig().to_dict()["image_mean"] == [0.485, 0.456, 0.406]
