"""Checkpoints of torchvision, detectron2 and mmdet, in every file format they come in: the tests write them by name, in
their layouts, from weights that are known."""

from __future__ import annotations

import collections
import math
import os
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch

from retinanet_ext import models
from retinanet_ext.engine.checkpoint import save_checkpoint
from retinanet_ext.interop import load_weights, read_weights, save_torchvision_weights
from retinanet_ext.interop.layouts import LAYOUTS

NUM_CLASSES = 5
SIZES, RATIOS = 3, 3
OUTPUTS = ("classification_head.cls_logits", "regression_head.bbox_reg")
IMAGES = [torch.rand(3, 60, 90, generator=torch.Generator().manual_seed(0))]


def make_model(builder=models.retinanet_resnet50_fpn, seed=0, num_classes=NUM_CLASSES, **options):
    """Random everywhere: nothing is equal by being 0 or 1."""
    torch.manual_seed(seed)
    model = builder(num_classes, min_size=64, max_size=96, **options)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.normal_(0, 0.05)
                if "running_var" in name:
                    value.abs_().add_(0.5)
    return model.eval()


def head_outputs(model, images=IMAGES):
    with torch.no_grad():
        return [level for levels in model.head(model.backbone(model.transform(images).tensor)) for level in levels]


def assert_same_model(found, expected, tolerance=0.0):
    for mine, right in zip(head_outputs(found), head_outputs(expected), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=tolerance * right.abs().max().item())


def in_detectron2_layout(model, bgr=True):
    """Names written out one by one, anchors size by size, the first convolution for 0..255 images."""
    own, theirs = model.state_dict(), {}
    body, prefix = "backbone.body.", "backbone.bottom_up."
    deviation = torch.tensor([0.229, 0.224, 0.225])
    first = own[body + "conv1.weight"] / (255 * deviation)[:, None, None]
    theirs[prefix + "stem.conv1.weight"] = first[:, [2, 1, 0]] if bgr else first
    statistics = ("weight", "bias", "running_mean", "running_var")
    for kind in statistics:
        theirs[f"{prefix}stem.conv1.norm.{kind}"] = own[f"{body}bn1.{kind}"]
    for stage in (1, 2, 3, 4):
        for block in range(len(getattr(model.backbone.body, f"layer{stage}"))):
            here, there = f"{body}layer{stage}.{block}.", f"{prefix}res{stage + 1}.{block}."
            for conv in (1, 2, 3):
                theirs[f"{there}conv{conv}.weight"] = own[f"{here}conv{conv}.weight"]
                for kind in statistics:
                    theirs[f"{there}conv{conv}.norm.{kind}"] = own[f"{here}bn{conv}.{kind}"]
            if block == 0:
                theirs[there + "shortcut.weight"] = own[here + "downsample.0.weight"]
                for kind in statistics:
                    theirs[f"{there}shortcut.norm.{kind}"] = own[f"{here}downsample.1.{kind}"]
    for kind in ("weight", "bias"):
        for level in (3, 4, 5):
            theirs[f"backbone.fpn_lateral{level}.{kind}"] = own[f"backbone.fpn.inner_blocks.{level - 3}.0.{kind}"]
            theirs[f"backbone.fpn_output{level}.{kind}"] = own[f"backbone.fpn.layer_blocks.{level - 3}.0.{kind}"]
        for level in ("p6", "p7"):
            theirs[f"backbone.top_block.{level}.{kind}"] = own[f"backbone.fpn.extra_blocks.{level}.{kind}"]
        for layer in range(4):
            theirs[f"head.cls_subnet.{2 * layer}.{kind}"] = own[f"head.classification_head.conv.{layer}.0.{kind}"]
            theirs[f"head.bbox_subnet.{2 * layer}.{kind}"] = own[f"head.regression_head.conv.{layer}.0.{kind}"]
        for name, last, width in (
            ("cls_score", "head.classification_head.cls_logits", model.num_classes),
            ("bbox_pred", "head.regression_head.bbox_reg", 4),
        ):
            value = own[f"{last}.{kind}"]
            moved = torch.empty_like(value)
            for size in range(SIZES):
                for ratio in range(RATIOS):
                    here, there = (ratio * SIZES + size) * width, (size * RATIOS + ratio) * width
                    moved[there : there + width] = value[here : here + width]
            theirs[f"head.{name}.{kind}"] = moved
    theirs["anchor_generator.cell_anchors.0"] = torch.zeros(9, 4)
    theirs["pixel_mean"] = torch.zeros(3, 1, 1)
    return theirs


def in_mmdet_layout(model):
    theirs = {}
    renames = (
        (r"backbone\.body\.", "backbone."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
        (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
        (r"head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.cls_convs.\1.conv."),
        (r"head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.reg_convs.\1.conv."),
        (r"head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
        (r"head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
    )
    for name, value in model.state_dict().items():
        for pattern, target in renames:
            name = re.sub(pattern, target, name)
        theirs[name] = value
    assert not any("body" in name or "fpn." in name for name in theirs)
    return theirs


def assert_all_fits(report):
    assert (report.missing, report.unexpected, report.reshaped) == ([], [], {})


def test_detectron2():
    """The same outputs from its weights: names, the order of anchors, blue before red, 0..255 pixels."""
    options = {"norm": "frozen_batch", "p6_from": "c5", "stride_in_1x1": True}
    expected, model = make_model(**options), make_model(seed=1, **options)
    for bgr in (True, False):
        report = load_weights(model, in_detectron2_layout(expected, bgr), bgr_images=None if bgr else False)
        assert report.layout == "detectron2"
        assert_all_fits(report)
        assert len(report.reordered) == 4
        assert len(report.loaded) == len(model.state_dict())
        assert_same_model(model, expected, tolerance=1e-5)  # the first convolution is scaled and scaled back


def test_mmdet():
    options = {"p6_from": "c5", "p7_relu": False}
    expected, model = make_model(**options), make_model(seed=1, **options)
    report = load_weights(model, in_mmdet_layout(expected))
    assert report.layout == "mmdet"
    assert_all_fits(report)
    assert not report.reordered
    assert_same_model(model, expected)


def by_size(value):
    """Channels of anchors by ratio and then by size, the other way round."""
    return value.reshape(RATIOS, SIZES, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)


def test_models_that_order_their_anchors_by_size(tmp_path):
    """Channels come into the model's order from every layout, and into torchvision's on the way out."""
    options = {"norm": "frozen_batch", "p6_from": "c5"}
    source, model = make_model(**options), make_model(seed=1, anchor_order="size", **options)
    names = [f"head.{part}.{kind}" for part in OUTPUTS for kind in ("weight", "bias")]
    expected = {name: by_size(source.state_dict()[name]) for name in names}
    files = [(in_detectron2_layout(source, False), None, {"bgr_images": False}, False)]
    files += [(in_mmdet_layout(source), None, {}, True), (source.state_dict(), "torchvision", {}, True)]
    for weights, layout, more, reordered in files:
        report = load_weights(model, weights, layout=layout, **more)
        assert_all_fits(report)
        assert sorted(report.reordered) == (sorted(names) if reordered else [])
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
        with torch.no_grad():
            model.head.classification_head.cls_logits.weight.zero_()
    load_weights(model, source.state_dict(), layout="torchvision")
    save_torchvision_weights(tmp_path / "theirs.pth", model)
    saved = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert all(torch.equal(saved[name], source.state_dict()[name]) for name in names)
    other = make_model(seed=2, anchor_order="size", **options)
    assert not load_weights(other, model.state_dict()).reordered  # this library's own
    assert_same_model(other, model)


@pytest.mark.parametrize("builder", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_torchvision(builder, tmp_path):
    """In and out, its own models and ours."""
    detection = pytest.importorskip("torchvision.models.detection", reason="compares with torchvision")
    ours = make_model(getattr(models, builder))
    save_torchvision_weights(tmp_path / "weights.pth", ours)
    theirs = getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    theirs.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=True)
    model = make_model(getattr(models, builder), seed=1)
    report = load_weights(model, theirs.state_dict())
    assert report.layout == "torchvision"
    assert_all_fits(report)
    assert_same_model(model, ours)


def test_torchvisions_older_names():
    expected, model = make_model(), make_model(seed=1)
    old = {}
    for name, value in expected.state_dict().items():
        name = re.sub(r"(fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name)
        name = re.sub(r"(head\.\w+\.conv)\.(\d)\.0\.", lambda match: f"{match[1]}.{2 * int(match[2])}.", name)
        old[name] = value
    assert "head.regression_head.conv.6.bias" in old
    report = load_weights(model, old)
    assert_all_fits(report)
    assert_same_model(model, expected)


def test_trainable_and_frozen_batch_norm():
    """A checkpoint without counters fits BatchNorm, one with them fits frozen statistics."""
    trainable, frozen = make_model(), make_model(seed=1, norm="frozen_batch")
    report = load_weights(frozen, trainable.state_dict())
    assert_all_fits(report)
    report = load_weights(make_model(seed=2), frozen.state_dict())
    assert_all_fits(report)


def test_another_number_of_classes_keeps_all_but_the_last_layer():
    expected, model = make_model(), make_model(seed=1, num_classes=2)
    last = "head.classification_head.cls_logits"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, expected.state_dict())
    assert report.reshaped == {
        f"{last}.weight": ([45, 256, 3, 3], [18, 256, 3, 3]),
        f"{last}.bias": ([45], [18]),
    }
    assert (report.missing, report.unexpected) == ([], [])
    after = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(after[name], before[name] if name.startswith(last) else value), name
    text = str(report)
    assert f"{last}.weight ([45, 256, 3, 3] in the checkpoint, [18, 256, 3, 3] here)" in text


def test_the_report_names_what_is_missing_and_what_has_no_place():
    weights = dict(make_model().state_dict())
    del weights["backbone.fpn.extra_blocks.p7.bias"]
    weights["roi_heads.box.weight"] = torch.zeros(3)
    weights["backbone.body.layer9.conv1.weight"] = torch.zeros(3)
    report = load_weights(make_model(seed=1), weights)
    assert report.missing == ["backbone.fpn.extra_blocks.p7.bias"]
    assert report.unexpected == ["backbone.body.layer9.conv1.weight", "roi_heads.box.weight"]
    assert "without a place: backbone.body.layer9.conv1.weight, roi_heads.box.weight" in str(report)


def test_other_anchors_than_the_models_are_reshaped_not_mixed_up():
    """Detectron2 with one size and three ratios, into a model of nine anchors."""
    expected = make_model(norm="frozen_batch", p6_from="c5")
    weights = in_detectron2_layout(expected)
    for name in list(weights):
        if name.startswith(("head.cls_score", "head.bbox_pred")):
            weights[name] = weights[name][: len(weights[name]) // 3 - 1]
    report = load_weights(make_model(seed=1, norm="frozen_batch", p6_from="c5"), weights)
    assert len(report.reshaped) == 4
    assert not report.reordered


def as_arrays(weights):
    return {name: value.numpy() for name, value in weights.items()}


def classifier_weights(model):
    """A ResNet classifier's, by torchvision's names."""
    prefix = "backbone.body."
    body = {n.removeprefix(prefix): v.clone() for n, v in model.state_dict().items() if n.startswith(prefix)}
    return {**body, "fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}


@pytest.mark.parametrize("norm", ["batch", "frozen_batch"])
def test_a_classifier_becomes_the_backbone(norm):
    builder = models.retinanet_resnet18_fpn
    source, model, untouched = (make_model(builder, seed, norm=norm) for seed in (0, 1, 1))
    report = load_weights(model, classifier_weights(source))
    assert report.layout == "resnet"
    assert report.unexpected == ["fc.weight", "fc.bias"]
    for name, value in model.state_dict().items():
        in_body = name.startswith("backbone.body.")
        assert (name in report.missing) is not (in_body or name.endswith("num_batches_tracked")), name
        assert torch.equal(value, (source if in_body else untouched).state_dict()[name]), name


def test_group_norm_takes_nothing_of_batch_norm():
    """The names and shapes of weight and bias are the same."""
    builder = models.retinanet_resnet18_fpn
    source, model, untouched = (
        make_model(builder),
        make_model(builder, 1, norm="group"),
        make_model(builder, 1, norm="group"),
    )
    report = load_weights(model, classifier_weights(source))
    assert {"bn1.weight", "bn1.bias", "bn1.running_mean"} <= {
        n.removeprefix("backbone.body.") for n in report.unexpected
    }
    for name, value in model.backbone.body.state_dict().items():
        taken = "conv" in name or name.endswith("downsample.0.weight")
        assert torch.equal(value, (source if taken else untouched).backbone.body.state_dict()[name]), name
        assert (f"backbone.body.{name}" in report.missing) is not taken


@pytest.mark.parametrize(("of_file", "of_model"), [("size", "ratio"), ("ratio", "size"), ("size", "size")])
def test_a_checkpoint_of_this_library_says_how_its_anchors_are_ordered(of_file, of_model, tmp_path):
    builder, path = models.retinanet_resnet18_fpn, tmp_path / "best.pt"
    source, model = make_model(builder, anchor_order=of_file), make_model(builder, 1, anchor_order=of_model)
    save_checkpoint(path, source, {"backbone": "resnet18", "anchor_order": of_file}, ["a"])
    report = load_weights(model, path)
    assert len(report.reordered) == (0 if of_file == of_model else 4)
    for name, value in source.state_dict().items():
        moved = any(part in name for part in OUTPUTS) and of_file != of_model
        assert torch.equal(model.state_dict()[name], by_size(value) if moved else value), name


def test_another_programs_model_config_says_nothing_of_anchors(tmp_path):
    """A checkpoint that has such an entry, of another format, is as any file of that layout."""
    builder, path = models.retinanet_resnet18_fpn, tmp_path / "theirs.pth"
    source, model = make_model(builder), make_model(builder, 1, anchor_order="size")
    torch.save({"model": source.state_dict(), "model_config": {"depth": 18}}, path)
    assert not load_weights(model, path).reordered
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("form", ["zip", "legacy", "pkl", "wrapped", "state_dict", "parallel", "own", "numpy in pth"])
def test_file_formats(form, tmp_path):
    model = make_model(models.retinanet_resnet18_fpn)
    weights, path = model.state_dict(), tmp_path / "weights.pth"
    if form == "zip":
        torch.save(weights, path)
    elif form == "legacy":
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    elif form == "pkl":
        path = tmp_path / "model_final.pkl"
        path.write_bytes(pickle.dumps({"model": as_arrays(weights), "__author__": "somebody"}, protocol=2))
    elif form == "wrapped":
        torch.save({"model": weights, "optimizer": {"state": {0: torch.zeros(2)}}, "iteration": 90_000}, path)
    elif form == "state_dict":
        torch.save({"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": collections.OrderedDict(weights)}, path)
    elif form == "parallel":
        torch.save({f"module.{name}": value for name, value in weights.items()}, path)
    elif form == "numpy in pth":
        torch.save({"model": as_arrays(weights)}, path)
    else:
        save_checkpoint(path, model, {"arch": "resnet18"}, ["a"])
    found = read_weights(path)
    assert list(found) == list(weights)
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
    assert_same_model(make_and_load(path), model)


def make_and_load(path):
    model = make_model(models.retinanet_resnet18_fpn, seed=1)
    load_weights(model, path)
    return model


class Harmful:
    """Unpickled as it asks to be, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Logger:
    """As training frameworks leave objects of their own beside the weights."""

    def __init__(self):
        self.history = [1, 2]


@pytest.mark.parametrize("form", ["zip", "legacy", "pkl"])
def test_no_code_of_a_file_is_run(form, tmp_path, monkeypatch):
    """Whatever else lies in it, also of classes that do not exist here, is passed over; the weights are read."""
    foreign = types.ModuleType("a_training_framework")
    foreign.Logger = type("Logger", (Logger,), {"__module__": "a_training_framework"})
    monkeypatch.setitem(sys.modules, "a_training_framework", foreign)
    weights = {"head.a": torch.arange(4.0)}
    made, others = tmp_path / "made", tmp_path / "others"
    pickle.loads(pickle.dumps(Harmful(others)))
    assert others.is_dir()  # so it is harmful
    content = {"model": weights, "log": foreign.Logger(), "worse": [Harmful(made)], "call": math.sqrt}
    path = tmp_path / ("file.pkl" if form == "pkl" else "file.pth")
    if form == "pkl":
        path.write_bytes(pickle.dumps({**content, "model": as_arrays(weights)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    monkeypatch.delitem(sys.modules, "a_training_framework")
    assert torch.equal(read_weights(path)["head.a"], weights["head.a"])
    assert not made.exists()


class Scripted(torch.nn.Module):
    """Compiled and saved, it has code that runs when it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        print("the code in the file runs")
        self.weight, self.training = state

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("name", ["file.pth", "file.pkl"])
def test_a_compiled_model_is_refused_and_its_code_is_not_run(name, tmp_path, capfd):
    """`torch.load` would hand it to `torch.jit.load`."""
    path = tmp_path / name
    torch.jit.script(Scripted()).save(path)
    capfd.readouterr()
    torch.jit.load(path)
    assert "the code in the file runs" in capfd.readouterr().out  # so it has such code
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: .*TorchScript.*state_dict"):
        read_weights(path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "cannot be read as a checkpoint"),
        (b"not a checkpoint at all", "cannot be read as a checkpoint"),
        (pickle.dumps({"model": {}}), "holds no weights"),
        (pickle.dumps(collections.Counter()), r"found an object that is not read: save its state_dict\(\)"),
        (pickle.dumps([1, 2]), "holds no weights: expected names and tensors, found list"),
        (pickle.dumps({"model": {"a": np.array(["text"])}}), "holds no weights"),
    ],
)
def test_files_that_are_none(content, text, tmp_path):
    for name in ("file.pkl", "file.pth"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"holds no weights|cannot be read") as error:
            read_weights(path)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=text):
        read_weights(tmp_path / "file.pkl")


def test_a_file_that_was_cut_short(tmp_path):
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    for new in (True, False):
        torch.save({"a": torch.zeros(1000)}, whole, _use_new_zipfile_serialization=new)
        for share in (0.1, 0.5, 0.99):
            cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
            with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
                read_weights(cut)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth: no such file"):
        read_weights(tmp_path / "nothing.pth")


def test_errors():
    model = make_model(models.retinanet_resnet18_fpn)
    with pytest.raises(TypeError, match=r"model: expected a retinanet_ext\.models.RetinaNet, got Linear"):
        load_weights(torch.nn.Linear(1, 1), {})
    with pytest.raises(TypeError, match=r"model: expected a retinanet_ext\.models.RetinaNet, got dict"):
        save_torchvision_weights("nowhere.pth", {})
    with pytest.raises(ValueError, match=f"layout: expected one of {', '.join(LAYOUTS)}, got 'keras'"):
        load_weights(model, model.state_dict(), layout="keras")
    with pytest.raises(ValueError, match="bgr_images: is for detectron2's layout, and this is torchvision's"):
        load_weights(model, model.state_dict(), bgr_images=True)
    with pytest.raises(ValueError, match=r"expected names of a RetinaNet of torchvision, .* got fc\.weight"):
        load_weights(model, {"fc.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="none of the checkpoint's weights fits this model"):
        load_weights(model, {"backbone.body.conv1.weight": torch.zeros(2)})
