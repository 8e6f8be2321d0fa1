"""torchvision's functions under the patch: what its own unit tests ask of them, and what ours could do otherwise."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import retinanet_ext

pytest.importorskip("torchvision", reason="patches torchvision")

from peer_modules import assert_same, outcome, random_boxes, record_calls
from torchvision import ops as tv_ops
from torchvision import tv_tensors

from retinanet_ext.interop.torchvision import REPLACEMENTS

FUNCTIONS = ("nms", "batched_nms", "sigmoid_focal_loss", "box_iou")
ORIGINALS = {name: REPLACEMENTS[name].original for name in FUNCTIONS}


@pytest.fixture(autouse=True)
def patched():
    with retinanet_ext.patch("torchvision"):
        yield


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, FUNCTIONS)


def assert_same_outcome(name, *arguments, **options):
    found = outcome(getattr(tv_ops, name), *arguments, **options)
    expected = outcome(ORIGINALS[name], *arguments, **options)
    if isinstance(expected, torch.Tensor):
        assert_same(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_and_documentation_are_the_originals(name):
    function, original = getattr(tv_ops, name), ORIGINALS[name]
    assert function is not original
    assert inspect.signature(function, follow_wrapped=False) == inspect.signature(original)
    assert (function.__doc__, function.__name__, function.__module__) == (
        original.__doc__,
        original.__name__,
        original.__module__,
    )


# nms, batched_nms


def boxes_around_the_threshold(count, iou_threshold):
    """The last box overlaps the first by hardly more than the threshold, and has the best score."""
    boxes, scores = random_boxes(count), torch.rand(count)
    boxes[-1] = boxes[0]
    x1, _, x2, _ = boxes[-1].tolist()
    boxes[-1, 0] += (x2 - x1) * (1 - (iou_threshold + 1e-5))
    scores[-1] += 1
    return boxes, scores


def greedy_suppression(boxes, scores, iou_threshold):
    """The textbook: take the best box, drop what it overlaps too much, go on with the rest."""
    kept, order = [], scores.argsort(descending=True, stable=True).tolist()
    iou = ORIGINALS["box_iou"](boxes, boxes)
    while order:
        best, *order = order
        kept.append(best)
        order = [other for other in order if not iou[best, other] > iou_threshold]
    return torch.tensor(kept, dtype=torch.int64)


@pytest.mark.parametrize("iou_threshold", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_nms_is_the_textbooks(calls, iou_threshold, seed):
    torch.manual_seed(seed)
    boxes, scores = boxes_around_the_threshold(300, iou_threshold)
    kept = tv_ops.nms(boxes, scores, iou_threshold)
    assert calls == ["nms"]
    assert_same(kept, greedy_suppression(boxes, scores, iou_threshold))
    assert_same(kept, ORIGINALS["nms"](boxes, scores, iou_threshold))
    assert_same(kept, tv_ops.nms(iou_threshold=iou_threshold, scores=scores, boxes=boxes))
    assert 0 not in kept  # the last box, hardly above the threshold, has suppressed it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nms_of_halves(dtype):
    boxes, scores = random_boxes(200), torch.rand(200)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    kept = tv_ops.nms(boxes, scores, 0.4)
    assert_same(kept, ORIGINALS["nms"](boxes.float(), scores.float(), 0.4))
    labels = torch.randint(3, (200,))
    kept = tv_ops.batched_nms(boxes, scores, labels, 0.4)
    assert_same(kept, ORIGINALS["batched_nms"](boxes.double(), scores.double(), labels, 0.4))


def test_nms_under_autocast_takes_mixed_types_as_torchvision_does(calls):
    boxes, scores, labels = random_boxes(100), torch.rand(100).bfloat16(), torch.randint(3, (100,))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outcome("nms", boxes, scores, 0.5)
        assert_same_outcome("nms", boxes.bfloat16(), scores, 0.5)
        tv_ops.batched_nms(boxes, scores, labels, 0.5)
    assert calls == ["nms", "nms", "batched_nms"]
    assert_same_outcome("nms", boxes, scores, 0.5)  # without autocast an error, the original's


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [
        (torch.rand(4), torch.rand(3)),
        (torch.rand(3, 5), torch.rand(3)),
        (torch.rand(3, 4), torch.rand(3, 2)),
        (torch.rand(3, 4), torch.rand(4)),
        (torch.rand(3, 4), torch.rand(3).double()),
        (torch.randint(9, (3, 4)), torch.randint(9, (3,))),
        ([[0.0, 0.0, 1.0, 1.0]], torch.rand(1)),
        (torch.rand(3, 4), None),
    ],
    ids=["boxes 1d", "five numbers", "scores 2d", "lengths", "types", "integers", "list", "none"],
)
def test_nms_errors_are_torchvisions(boxes, scores):
    expected = outcome(ORIGINALS["nms"], boxes, scores, 0.5)
    assert issubclass(expected[0], Exception)
    assert outcome(tv_ops.nms, boxes, scores, 0.5) == expected
    # (which takes boxes of one dimension: they broadcast with its offsets)
    assert_same_outcome("batched_nms", boxes, scores, torch.zeros(3, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("scale", [0.5, 2.0, 10.0])
def test_nms_of_quantised_boxes_is_torchvisions(calls, scale):
    boxes = torch.tensor([[0, 0, 50, 50], [1, 1, 51, 51], [60, 60, 90, 90]], dtype=torch.float32)
    scores = torch.tensor([0.5, 0.75, 0.25])
    arguments = [torch.quantize_per_tensor(values, scale, 0, torch.quint8) for values in (boxes, scores)]
    assert_same(tv_ops.nms(*arguments, 0.5), ORIGINALS["nms"](*arguments, 0.5))
    assert calls == []


def test_empty_boxes():
    for shape in ((0, 4), (0,)):
        boxes, scores, labels = torch.empty(shape), torch.empty(0), torch.empty(0, dtype=torch.int64)
        assert_same_outcome("nms", boxes, scores, 0.5)
        assert_same_outcome("batched_nms", boxes, scores, labels, 0.5)
        assert tv_ops.batched_nms(boxes, scores, labels, 0.5).dtype == torch.int64


@pytest.mark.parametrize("count", [200, 1500], ids=["offsets in torchvision", "by label in torchvision"])
@pytest.mark.parametrize("label_type", [torch.int64, torch.int32, torch.float32, torch.bool])
def test_batched_nms(calls, count, label_type):
    boxes, scores = random_boxes(count).double(), torch.rand(count).double()
    labels = torch.randint(0, 4, (count,)).to(label_type)
    kept = tv_ops.batched_nms(boxes, scores, labels, 0.5)
    assert calls == ["batched_nms"]
    assert_same(kept, ORIGINALS["batched_nms"](boxes, scores, labels, 0.5))
    by_label = [torch.where(labels == label)[0] for label in labels.unique()]
    kept_by_label = torch.cat([rows[ORIGINALS["nms"](boxes[rows], scores[rows], 0.5)] for rows in by_label])
    assert_same(kept.sort().values, kept_by_label.sort().values)


def test_batched_nms_of_negative_coordinates_compares_labels():
    """docs/interop.md: torchvision's offset of the second label moves its box onto the first."""
    boxes = torch.tensor([[-189.0, -189, -179, -179], [-100, -100, -90, -90]])
    arguments = boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5
    assert tv_ops.batched_nms(*arguments).tolist() == [0, 1]
    assert ORIGINALS["batched_nms"](*arguments).tolist() == [0]


@pytest.mark.parametrize("side", [math.nan, math.inf])
def test_a_box_that_is_not_finite_suppresses_nothing_and_changes_nothing_else(side):
    """docs/interop.md: torchvision's offsets are of the largest coordinate, and move every box to where it is."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, side, 9]])
    arguments = boxes, torch.tensor([0.9, 0.8, 0.7]), torch.ones(3, dtype=torch.int64), 0.5
    assert tv_ops.batched_nms(*arguments).tolist() == [0, 2]
    assert ORIGINALS["batched_nms"](*arguments).tolist() == [0, 1, 2]


def test_batched_nms_with_a_negative_threshold_is_torchvisions(calls):
    """It suppresses boxes of other classes, which do not touch, where torchvision moves these apart."""
    for count in (200, 1500):
        assert_same_outcome("batched_nms", random_boxes(count), torch.rand(count), torch.randint(3, (count,)), -0.1)
    assert "batched_nms" not in calls


def test_batched_nms_with_labels_that_do_not_fit_is_torchvisions(calls):
    boxes, scores = random_boxes(6), torch.rand(6)
    assert_same_outcome("batched_nms", boxes, scores, torch.zeros(5), 0.5)
    assert_same_outcome("batched_nms", boxes, scores, None, 0.5)
    assert_same_outcome("nms", boxes, scores, "half")
    assert calls == []


# sigmoid_focal_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0, 0.5, 2, 3.5])
@pytest.mark.parametrize("alpha", [-1, 0, 0.25, 0.6, 1])
def test_focal_loss_is_the_cross_entropy_times_its_factors(calls, alpha, gamma, dtype):
    logits = (torch.randn(40, 7) * 3).to(dtype)
    targets = torch.randint(0, 2, (40, 7)).to(dtype)
    loss = tv_ops.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
    assert calls == ["sigmoid_focal_loss"]
    assert (loss.dtype, loss.shape) == (dtype, logits.shape)
    logits, targets = logits.double(), targets.double()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = torch.where(targets == 1, torch.sigmoid(-logits), torch.sigmoid(logits))
    weight = 1.0 if alpha < 0 else alpha * targets + (1 - alpha) * (1 - targets)
    # float32: what docs/operators.md promises; halves: one rounding more, of the smallest float16 an absolute one
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype == torch.float16 else 0.0
    torch.testing.assert_close(loss.double(), weight * miss**gamma * cross_entropy, rtol=tolerance, atol=smallest)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_focal_loss_without_its_factors_is_the_cross_entropy(reduction, dtype):
    logits, targets = torch.randn(30, 5).to(dtype), torch.rand(30, 5).to(dtype)
    loss = tv_ops.sigmoid_focal_loss(logits, targets, -1, 0, reduction)
    expected = F.binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction=reduction)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=max(2e-6, torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradient_of_the_focal_loss_without_its_factors_is_the_cross_entropys(reduction):
    targets = torch.rand(30, 5)
    gradients = []
    for function in (
        lambda logits: tv_ops.sigmoid_focal_loss(logits, targets, -1, 0, reduction),
        lambda logits: F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction),
    ):
        logits = torch.linspace(-9, 9, 150).view(30, 5).requires_grad_()
        gradients.append(torch.autograd.grad(function(logits).sum(), logits)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_focal_loss_and_its_gradients_are_torchvisions(reduction):
    logits = (torch.randn(50, 9, dtype=torch.float64) * 4).requires_grad_()
    targets = torch.rand(50, 9, dtype=torch.float64).requires_grad_()
    upstream = torch.rand(50, 9, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7).double()
    results = []
    for function in (tv_ops.sigmoid_focal_loss, ORIGINALS["sigmoid_focal_loss"]):
        loss = function(logits, targets, reduction=reduction)
        results.append([loss, *torch.autograd.grad(loss, (logits, targets), upstream)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("logits_type", "targets_type"),
    [(torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16),
     (torch.float32, torch.float64), (torch.float64, torch.float16)],
)  # fmt: skip
def test_focal_loss_of_mixed_types_has_torchvisions_type(logits_type, targets_type):
    logits, targets = torch.randn(20, 3).to(logits_type), torch.rand(20, 3).to(targets_type)
    for reduction in ("none", "mean", "sum"):
        found = tv_ops.sigmoid_focal_loss(logits, targets, reduction=reduction)
        expected = ORIGINALS["sigmoid_focal_loss"](logits, targets, reduction=reduction)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)  # torchvision's sigmoid of a half is a half


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_focal_loss_under_autocast_has_torchvisions_type(dtype):
    logits, targets = torch.randn(20, 3).to(dtype), torch.rand(20, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for reduction in ("none", "mean", "sum"):
            found = tv_ops.sigmoid_focal_loss(logits, targets, reduction=reduction)
            assert found.dtype == ORIGINALS["sigmoid_focal_loss"](logits, targets, reduction=reduction).dtype


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (torch.rand(4, 3), dict(alpha=1.5)),
        (torch.rand(4, 3), dict(reduction="total")),
        (torch.rand(4, 2), {}),
        (torch.rand(3), {}),
        (torch.randint(0, 2, (4, 3)), {}),
        (torch.randint(0, 3, (4,)), {}),  # class indices, which ours would take
        (torch.rand(4, 3), dict(gamma=-1.0)),
        (torch.rand(4, 3), dict(gamma=torch.tensor(2.0))),
    ],
    ids=["alpha", "reduction", "shape", "broadcast", "integers", "class indices", "gamma < 0", "gamma a tensor"],
)
def test_focal_loss_that_only_torchvision_defines_is_torchvisions(calls, targets, options):
    assert_same_outcome("sigmoid_focal_loss", torch.randn(4, 3), targets, **options)
    assert calls == []


def test_focal_loss_of_nothing():
    nothing = torch.empty(0, 5)
    for reduction in ("none", "mean", "sum"):
        assert_same_outcome("sigmoid_focal_loss", nothing, nothing, reduction=reduction)


def test_focal_loss_in_transforms_of_functions_is_torchvisions(calls):
    logits, targets = torch.randn(6, 3), torch.rand(6, 3)

    def loss(x):
        return tv_ops.sigmoid_focal_loss(x, targets, reduction="sum")

    hessian = torch.func.hessian(loss)(logits)
    assert hessian.shape == (6, 3, 6, 3)
    assert torch.func.vmap(tv_ops.sigmoid_focal_loss)(logits, targets).shape == (6, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        assert torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent is not None
    assert calls == []


def compiled_with_operators(function):
    """The compiled function, and the names of the operators in the graphs that it came to."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    names = []

    def note(graph, _inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(function, backend=aot_autograd(fw_compiler=note), fullgraph=True), names


def test_compiled_focal_loss():
    def mean(logits, targets):
        return tv_ops.sigmoid_focal_loss(logits, targets, reduction="mean")

    compiled, names = compiled_with_operators(mean)
    results = []
    for function, reduction in ((compiled, {}), (ORIGINALS["sigmoid_focal_loss"], {"reduction": "mean"})):
        logits, targets = torch.linspace(-4, 4, 24).view(8, 3).requires_grad_(), torch.linspace(0, 1, 24).view(8, 3)
        loss = function(logits, targets, **reduction)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert any("retinanet_ext" in name for name in names)


@pytest.mark.parametrize("name", ["nms", "batched_nms", "box_iou"])
def test_compiled_functions_have_our_operators_in_their_graphs(name):
    boxes = random_boxes(40)
    labels = torch.randint(3, (40,))
    arguments = {
        "nms": (boxes, torch.rand(40), 0.5),
        "batched_nms": (boxes, torch.rand(40), labels, 0.5),
        "box_iou": (boxes, boxes[:7]),
    }[name]
    compiled, names = compiled_with_operators(lambda *arguments: getattr(tv_ops, name)(*arguments))
    assert_same(compiled(*arguments), ORIGINALS[name](*arguments))
    assert any("retinanet_ext" in target for target in names)


# box_iou

IOU_TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]


@pytest.mark.parametrize("fmt", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("type2", IOU_TYPES)
@pytest.mark.parametrize("type1", IOU_TYPES)
def test_box_iou_has_torchvisions_bits_in_every_type(type1, type2, fmt):
    boxes1, boxes2 = random_boxes(13).to(type1), random_boxes(9).to(type2)
    assert_same_outcome("box_iou", boxes1, boxes2, fmt=fmt)
    assert_same_outcome("box_iou", boxes1, boxes2.expand(2, 3, 9, 4), fmt)


def test_box_iou_of_known_boxes(calls):
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 50, 50], [200, 200, 300, 300], [0, 0, 25, 25]])
    expected = torch.tensor([[1, 0.25, 0, 0.0625], [0.25, 1, 0, 0.25], [0, 0, 1, 0], [0.0625, 0.25, 0, 1]])
    assert_same(tv_ops.box_iou(boxes, boxes), expected)
    assert_same(tv_ops.box_iou(boxes1=boxes[:0], boxes2=boxes), expected[:0])
    batch = torch.stack([boxes, boxes.flip(0)])
    assert_same(tv_ops.box_iou(batch, batch), torch.stack([expected, expected.flip(0, 1)]))
    assert calls == ["box_iou"] * 3


def test_box_iou_gradients_are_torchvisions():
    boxes = [random_boxes(7).requires_grad_(), random_boxes(5).requires_grad_()]
    upstream = torch.rand(7, 5)
    found, expected = (
        torch.autograd.grad(function(*boxes), boxes, upstream)
        for function in (tv_ops.box_iou, ORIGINALS["box_iou"])
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("boxes1", "boxes2", "fmt"),
    [
        (torch.rand(3, 4), torch.rand(2, 4), "yxyx"),
        (torch.rand(4), torch.rand(2, 4), "xyxy"),
        (torch.rand(3, 3), torch.rand(2, 3), "xyxy"),
        (torch.rand(2, 3, 4), torch.rand(3, 2, 4), "xyxy"),
        (torch.rand(3, 4), None, "xyxy"),
    ],
    ids=["format", "1d", "three numbers", "batches", "none"],
)
def test_box_iou_that_only_torchvision_defines_is_torchvisions(calls, boxes1, boxes2, fmt):
    assert_same_outcome("box_iou", boxes1, boxes2, fmt)
    assert calls == []


def test_annotated_tensors_give_plain_ones_as_in_torchvision(calls):
    boxes = tv_tensors.BoundingBoxes(random_boxes(20), format="XYXY", canvas_size=(300, 300))
    scores = torch.rand(20)
    for name, arguments in (("box_iou", (boxes, boxes)), ("nms", (boxes, scores, 0.3))):
        found, expected = getattr(tv_ops, name)(*arguments), ORIGINALS[name](*arguments)
        assert type(found) is type(expected) is torch.Tensor
        assert_same(found, expected)
    assert calls == ["box_iou", "nms"]


def test_scripting_and_tracing_record_torchvisions_functions():
    boxes, scores, labels = random_boxes(30), torch.rand(30), torch.randint(3, (30,))

    def suppress(boxes, scores, labels):
        return tv_ops.batched_nms(boxes, scores, labels, 0.5)

    expected = ORIGINALS["batched_nms"](boxes, scores, labels, 0.5)
    scripted = torch.jit.script(tv_ops.batched_nms)
    assert_same(scripted(boxes, scores, labels, 0.5), expected)
    traced = torch.jit.trace(suppress, (boxes, scores, labels))
    assert_same(traced(boxes, scores, labels), expected)
    loss = torch.jit.script(tv_ops.sigmoid_focal_loss)
    logits, targets = torch.randn(30, 4), torch.rand(30, 4)
    for alpha in (-1.0, 0.0, 0.58, 1.0):
        for gamma in (0.0, 2.0, 3.0):
            for reduction in ("none", "mean", "sum"):
                arguments = logits, targets, alpha, gamma, reduction
                torch.testing.assert_close(
                    loss(*arguments), tv_ops.sigmoid_focal_loss(*arguments), rtol=1e-5, atol=1e-7
                )
    keep, iou = torch.jit.script(tv_ops.nms), torch.jit.script(tv_ops.box_iou)
    assert_same(keep(boxes, scores, 0.5), tv_ops.nms(boxes, scores, 0.5))
    assert_same(iou(boxes, boxes[:5]), tv_ops.box_iou(boxes, boxes[:5]))
    graphs = (traced.inlined_graph, scripted.graph, loss.graph, keep.graph, iou.graph)
    assert "retinanet_ext::" not in "".join(map(str, graphs))


@pytest.mark.parametrize("seed", range(10))
def test_torchvisions_two_ways_of_batched_nms_agree(calls, seed):
    """Both call nms, which is ours: label by label, and over boxes that are moved apart."""
    torch.manual_seed(seed)
    boxes, scores, labels = random_boxes(1000), torch.rand(1000), torch.randint(0, 4, (1000,))
    kept = tv_ops.boxes._batched_nms_vanilla(boxes, scores, labels, 0.9)
    assert_same(tv_ops.boxes._batched_nms_coordinate_trick(boxes, scores, labels, 0.9), kept)
    assert_same(tv_ops.batched_nms(boxes, scores, labels, 0.9), kept)
    assert set(calls) == {"nms", "batched_nms"}
