"""Exports to ONNX, run by onnxruntime: the model's detections, and ties as the operator decides them."""

import copy
import json
import random

import pytest
import torch
from busy_checkpoint import CLASSES, model_config, save_busy_checkpoint
from tiny_retinanet import tiny_retinanet
from torch import nn

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f'{module} is not installed: pip install "retinanet_ext[export]"')

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from retinanet_ext import detect  # noqa: E402
from retinanet_ext.data import generate_shapes, open_dataset  # noqa: E402
from retinanet_ext.data.shapes import SHAPE_NAMES  # noqa: E402
from retinanet_ext.engine.checkpoint import build_model, load_model, save_checkpoint  # noqa: E402
from retinanet_ext.engine.export import export, export_model  # noqa: E402
from retinanet_ext.engine.export_modules import ExportedDetector, ExportedHeads  # noqa: E402
from retinanet_ext.engine.export_onnx import translate  # noqa: E402
from retinanet_ext.engine.export_report import ExportOptions  # noqa: E402
from retinanet_ext.models.anchors import AnchorGenerator  # noqa: E402

SIZE = (64, 96)
CONFIG = model_config(*SIZE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_busy_checkpoint(tmp_path_factory.mktemp("weights"), CONFIG)


@pytest.fixture(scope="module")
def model(weights):
    return load_model(weights)[0]


def session_of(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options)


def run(session, *inputs):
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


@torch.no_grad()
def assert_close(outputs, module, images, exact=None):
    """At most twice as far from float64 as PyTorch's own float32 is; integers the same."""
    exact = copy.deepcopy(module).double()(images.double()) if exact is None else exact
    for name, found, own, true in zip(module.output_names, outputs, module(images), exact, strict=True):
        assert found.dtype == own.dtype
        if not found.is_floating_point():
            assert torch.equal(found, own), name
        error, allowed = (found - true).abs().max(), 2 * (own - true).abs().max()
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    return export(weights, "onnx", tmp_path_factory.mktemp("onnx") / "detector.onnx")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_detections_are_the_model_s(exported, model, batch):
    session = session_of(exported.path)
    assert session.get_outputs()[0].shape == ["batch", 50, 4]
    assert_detects_as(model, session, torch.rand(batch, 3, *SIZE))


def assert_detects_as(model, session, images):
    outputs = run(session, images)
    assert_close(outputs, ExportedDetector(model, SIZE), images)
    with torch.no_grad():
        own = model(list(images))
    for image, count in enumerate(outputs[3].tolist()):
        assert count > 10
        assert outputs[2][image, :count].tolist() == own[image]["labels"].tolist()


def test_detections_in_photographs(exported, model):
    """Parts of one that comes with matplotlib, and the whole of it: smooth, and unlike noise with flat areas."""
    cbook = pytest.importorskip("matplotlib.cbook", reason="matplotlib is not installed")
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    height, width = SIZE
    corners = [(left, top) for left in (50, 250) for top in (30, 200, 400)]
    parts = [photograph.crop((left, top, left + 2 * width, top + 2 * height)) for left, top in corners]
    images = [np.asarray(part.resize((width, height))) for part in (photograph, *parts)]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    assert_detects_as(model, session_of(exported.path), images)


def test_other_sizes_are_refused(exported):
    with pytest.raises(Exception, match="Got invalid dimensions for input: images"):
        run(session_of(exported.path), torch.rand(1, 3, 96, 96))


def test_operators_are_standard_ones_and_classes_travel_along(exported):
    content = onnx.load(exported.path)
    assert {node.domain for node in content.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", 18)]
    assert not content.functions
    (entry,) = content.metadata_props
    assert entry.key == "retinanet_ext.json"
    assert json.loads(entry.value)["class_names"] == ["disc", "square", "star"]


def test_the_report_s_lines_run(exported):
    assert exported.takes.startswith("images [B, 3, 64, 96]")
    names = {}
    exec(exported.usage, names)
    assert names["counts"].shape == (1,)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Makes an image of any size, and its targets, of generated pictures that stand side by side."""
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder = tmp_path_factory.mktemp("data")
    dataset = open_dataset(generate_shapes(folder, train_images=3, val_images=1, image_size=64))
    pictures = [dataset[index] for index in range(len(dataset))]
    chance = random.Random(0)

    def make(height, width):
        image = torch.empty(3, -(-height // 64) * 64, -(-width // 64) * 64)
        boxes, labels = [], []
        for y in range(0, height, 64):
            for x in range(0, width, 64):
                image[:, y : y + 64, x : x + 64], target = chance.choice(pictures)
                boxes.append(target["boxes"] + torch.tensor([x, y, x, y]))
                labels.append(target["labels"])
        return image[:, :height, :width], {"boxes": torch.cat(boxes), "labels": torch.cat(labels)}

    return make


@pytest.fixture(scope="module")
def trained_weights(scene, tmp_path_factory):
    """Of a model that finds the shapes in such scenes, and is sure of many."""
    config = {**model_config(128, 128), "num_classes": len(SHAPE_NAMES), "score_thresh": 0.3}
    config |= {"detections_per_img": 300, "topk_candidates": 1000}
    torch.manual_seed(0)
    model = build_model(config).train()
    for module in model.modules():  # it learns in fewer steps so
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.4
    for subnet in (model.head.classification_head, model.head.regression_head):
        for conv in subnet.conv.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(30):
        image, target = scene(128, 128)
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "best.pt"
    save_checkpoint(path, model, config, SHAPE_NAMES)
    return path


# In scores and overlaps, far above what float32's rounding changes in them.
MARGIN = 1e-5


@torch.no_grad()
def exact_detections(module, images):
    """Outputs of the module in float64, and of each image whether rounding may decide: a threshold that differs by the
    margin finds other boxes, or two scores are as near to each other."""
    logits, deltas, anchors = copy.deepcopy(module).double().levels(images.double())
    sizes = torch.tensor([images.shape[-2:]] * len(images), dtype=torch.float64)
    found = detect(logits, deltas, anchors, sizes, **module.options)
    assert found.counts.max() < module.options["max_detections"]
    near = found.scores[:, :-1] - found.scores[:, 1:] < MARGIN
    undecided = (near & (found.labels[:, 1:] >= 0)).any(dim=1)
    for name in ("nms_thresh", "score_thresh"):
        for margin in (-MARGIN, MARGIN):
            options = {**module.options, name: module.options[name] + margin}
            other = detect(logits, deltas, anchors, sizes, **options)
            undecided |= (other.indices != found.indices).any(dim=1)
    return (found.boxes, found.scores, found.labels, found.counts), undecided


def test_any_size(trained_weights, scene, tmp_path):
    """Of a trained model: many detections, far from being equally sure."""
    session = session_of(export(trained_weights, "onnx", tmp_path / "any.onnx", dynamic_size=True).path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    model = load_model(trained_weights)[0]
    kept, scores = 0, []
    for batch, *size in ((3, 160, 160), (2, 288, 160), (2, 160, 224)):
        images = torch.stack([scene(*size)[0] for _ in range(batch)])
        detector = ExportedDetector(model, tuple(size))
        exact, undecided = exact_detections(detector, images)
        images = images[~undecided]
        kept += len(images)
        outputs = run(session, images)
        assert_close(outputs, detector, images, [value[~undecided] for value in exact])
        model.transform.min_size, model.transform.max_size = (min(size),), max(size)  # it resizes nothing
        with torch.no_grad():
            own = model(list(images))
        for image, (count, result) in enumerate(zip(outputs[3].tolist(), own, strict=True)):
            assert count >= 3
            assert outputs[2][image, :count].tolist() == result["labels"].tolist()
            scores += outputs[1][image, :count].tolist()
    assert kept >= 5
    assert sum(score > 0.8 for score in scores) >= 10
    for size in ((176, 160), (160, 170)):
        with pytest.raises(Exception, match="multiple"):
            run(session, torch.rand(1, 3, *size))


def test_heads_and_anchors(weights, model, tmp_path):
    exported = export(weights, "onnx-heads", tmp_path / "heads.onnx", batch_size=2)
    session = session_of(exported.path)
    images = torch.rand(2, 3, *SIZE)
    outputs = run(session, images)
    names = [value.name for value in session.get_outputs()]
    assert names[:2] == ["cls_logits_p3", "cls_logits_p4"]
    assert names[5:] == [*(f"box_deltas_p{level}" for level in range(3, 8)), "anchors"]
    assert_close(outputs, ExportedHeads(model, SIZE), images)
    found = detect(outputs[:5], outputs[5:10], outputs[10], [SIZE] * 2, topk_per_level=100, max_detections=50)
    with torch.no_grad():
        own = model(list(images))
    assert [found.labels[image, :count].tolist() for image, count in enumerate(found.counts.tolist())] == [
        result["labels"].tolist() for result in own
    ]


def test_heads_of_any_size(tmp_path):
    """Of a model of two levels."""
    model = tiny_retinanet(3).eval()
    options = ExportOptions(None, None, torch.device("cpu"))
    exported = export_model(model, CLASSES, {}, "onnx-heads", tmp_path / "any_heads.onnx", options)
    assert exported.takes.startswith("images [B, 3, H, W]")
    assert "cls_logits [B, n, 3]" in exported.gives
    session = session_of(exported.path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    shapes = {value.name: value.shape for value in session.get_outputs()}
    assert shapes["cls_logits_p3"] == ["batch", "cls_logits_p3_1", 3]
    assert shapes["box_deltas_p4"] == ["batch", "box_deltas_p4_1", 4]
    assert shapes["anchors"] == ["anchors_0", 4]
    for batch, *size in ((1, 160, 160), (3, 192, 352)):
        images = torch.rand(batch, 3, *size)
        outputs = run(session, images)
        cells = [size[0] // stride * (size[1] // stride) for stride in (8, 16)]
        assert [level.shape for level in outputs[:2]] == [(batch, 6 * count, 3) for count in cells]
        assert [level.shape for level in outputs[2:4]] == [(batch, 6 * count, 4) for count in cells]
        assert_close(outputs, ExportedHeads(model, tuple(size)), images)
    for size in ((176, 160), (160, 170)):
        with pytest.raises(Exception, match="multiple"):
            run(session, torch.rand(1, 3, *size))
    names = {}
    exec(exported.usage, names)
    assert len(names["logits_and_deltas"]) == 4


GRIDS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))
K = 4


class Detect(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, logits, deltas, anchors, sizes):
        return tuple(detect(logits, deltas, anchors, sizes, **self.options))


def post_processing(**options):
    """The operator alone, in onnxruntime."""
    inputs = (
        [torch.zeros(2, 9 * K, *grid) for grid in GRIDS],
        [torch.zeros(2, 9 * 4, *grid) for grid in GRIDS],
        AnchorGenerator()(SIZE, GRIDS),
        torch.zeros(2, 2),
    )
    program = torch.export.export(Detect(options), inputs)
    names = [*(f"logits{i}" for i in range(5)), *(f"deltas{i}" for i in range(5)), "anchors", "sizes"]
    outputs = ("boxes", "scores", "labels", "indices", "counts")
    return session_of(translate(program, names, outputs).SerializeToString())


@pytest.fixture(scope="module", params=[True, False], ids=["clip first", "clip last"])
def compiled(request):
    options = {"topk_per_level": 40, "max_detections": 60, "clip_before_nms": request.param}
    return post_processing(**options), options


@pytest.mark.parametrize(
    "logits_of", ["random", "all equal", "few values", "saturated", "infinite and NaN", "none", "few"]
)
def test_ties_and_extremes_of_the_operator(compiled, logits_of):
    session, options = compiled
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(2, 9 * K, *grid, generator=generator) * 2 for grid in GRIDS]
    deltas = [torch.randn(2, 9 * 4, *grid, generator=generator) * 0.3 for grid in GRIDS]
    if logits_of == "all equal":
        logits = [torch.full_like(level, 0.5) for level in logits]
    elif logits_of == "few values":
        logits = [level.round() for level in logits]
    elif logits_of == "saturated":
        logits = [level * 5 + 30 for level in logits]  # all scores are 1
    elif logits_of == "infinite and NaN":
        for value, every in ((float("inf"), 5), (float("-inf"), 7), (float("nan"), 11)):
            for level in logits:
                level.view(-1)[::every] = value
    elif logits_of in ("none", "few"):
        logits = [torch.full_like(level, -20.0) for level in logits]
        if logits_of == "few":
            logits[1][1, 5:30:3, 2, 1] = 1.0
    sizes = torch.tensor([[60.0, 90.0], [64.0, 33.0]])
    anchors = AnchorGenerator()(SIZE, GRIDS)
    expected = detect(logits, deltas, anchors, sizes, **options)
    boxes, scores, labels, indices, counts = run(session, *logits, *deltas, anchors, sizes)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(labels, expected.labels)
    assert torch.equal(indices, expected.indices)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(boxes, expected.boxes, rtol=0, atol=4 * 512 * eps)
    torch.testing.assert_close(scores, expected.scores, rtol=4 * eps, atol=0)
