"""mmcv's operators under the patch, compared with mmcv's own, and how the patch comes and goes."""

import inspect
import sys

import numpy as np
import pytest
import torch
from peer_modules import (
    assert_same,
    attributes,
    changes,
    forget_adapters,
    importable,
    is_installed,
    outcome,
    random_boxes,
    record_calls,
)

import retinanet_ext

PACKAGES = ("mmcv", "mmdet")
NAMES = ("nms", "batched_nms", "sigmoid_focal_loss")


@pytest.fixture(scope="module", autouse=True)
def peers():
    with importable(*PACKAGES):
        import mmdet.models.losses  # noqa: F401

        yield


@pytest.fixture
def mmcv_ops(peers):
    import mmcv.ops

    return mmcv.ops


@pytest.fixture
def originals(mmcv_ops):
    return {name: getattr(mmcv_ops, name) for name in NAMES}


@pytest.fixture
def patched(originals):
    with retinanet_ext.patch("mmcv"):
        yield


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, NAMES)


def test_a_patch_reaches_every_place_and_leaves_nothing_behind(originals):
    before = attributes(*PACKAGES)
    with retinanet_ext.patch("mmcv") as patch:
        assert patch.functions == NAMES
        changed = changes(before, attributes(*PACKAGES))
        assert changed == {key for key, value in before.items() if any(value is one for one in originals.values())}
        assert changed >= {
            ("mmcv.ops", "nms"),
            ("mmcv.ops.nms", "nms"),
            ("mmcv.ops.nms", "batched_nms"),
            ("mmcv.ops.focal_loss", "sigmoid_focal_loss"),
            ("mmdet.models.losses.focal_loss", "_sigmoid_focal_loss"),
        }
    assert changes(before, attributes(*PACKAGES)) == set()


def test_signatures_are_the_originals(patched, mmcv_ops, originals):
    from mmcv.ops.focal_loss import SigmoidFocalLossFunction

    for name in ("nms", "batched_nms"):
        function = getattr(mmcv_ops, name)
        found, expected = (
            [(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (function, originals[name])
        )
        assert found == expected
        assert (function.__doc__, function.__name__) == (originals[name].__doc__, originals[name].__name__)
    found = inspect.signature(mmcv_ops.sigmoid_focal_loss, follow_wrapped=False).parameters.values()
    expected = list(inspect.signature(SigmoidFocalLossFunction.forward).parameters.values())[1:]
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected]


def test_another_signature_is_refused(monkeypatch, peers):
    import mmcv.ops.focal_loss as focal_loss

    monkeypatch.setattr(focal_loss.SigmoidFocalLossFunction, "forward", staticmethod(lambda ctx, input, target: None))
    forget_adapters(monkeypatch, "mmcv")
    with pytest.raises(
        RuntimeError, match=r"sigmoid_focal_loss: expected \(input, target, gamma=2\.0.*in the releases of mmcv"
    ):
        retinanet_ext.patch("mmcv")


# nms


@pytest.mark.parametrize(
    "options",
    [
        {"iou_threshold": 0.5},
        {"iou_threshold": 0.3, "score_threshold": 0.4},
        {"iou_threshold": 0.7, "max_num": 5},
        {"iou_threshold": 0.7, "score_threshold": 0.2, "max_num": 20},
        {"iou_threshold": 1},
        {"iou_threshold": 0.5, "score_threshold": 2.0},
        {"iou_threshold": 0.5, "score_threshold": -1.0, "max_num": 0},
    ],
)
def test_nms(patched, mmcv_ops, originals, calls, options):
    boxes, scores = random_boxes(200), torch.rand(200)
    found = mmcv_ops.nms(boxes, scores, **options)
    assert calls == ["nms"]
    assert_same(found, originals["nms"](boxes, scores, **options))
    assert found[0].shape == (len(found[1]), 5)


def test_nms_of_nothing(patched, mmcv_ops, originals, calls):
    arguments = torch.empty(0, 4), torch.empty(0), 0.5
    assert mmcv_ops.nms(*arguments)[0].shape == (0, 5)
    assert mmcv_ops.nms(*arguments)[1].dtype == torch.int64
    assert calls == ["nms"] * 2


def test_the_threshold_is_a_float32(patched, mmcv_ops, originals):
    """An overlap of exactly the float32 next to 0.6 is above 0.6, but not above mmcv's threshold of 0.6."""
    boxes, scores = torch.tensor([[0.0, 0, 10, 1], [0, 0, 6, 1]]), torch.tensor([0.9, 0.8])
    assert (torch.tensor(6.0) / 10).item() > 0.6
    assert_same(mmcv_ops.nms(boxes, scores, 0.6), originals["nms"](boxes, scores, 0.6))
    assert len(mmcv_ops.nms(boxes, scores, 0.6)[1]) == 2
    assert len(retinanet_ext.nms(boxes, scores, 0.6)) == 1


def test_gradients_flow_through_what_is_kept(patched, mmcv_ops, originals):
    boxes, scores = random_boxes(30).requires_grad_(), torch.rand(30, requires_grad=True)
    cfg = {"type": "nms", "iou_threshold": 0.5}
    classes = torch.randint(3, (30,))
    gradients = []
    for functions in (vars(mmcv_ops), originals):
        dets = functions["nms"](boxes, scores, 0.5)[0].square().sum()
        dets = dets + functions["batched_nms"](boxes, scores, classes, cfg)[0].pow(3).sum()
        gradients.append(torch.autograd.grad(dets, (boxes, scores)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda boxes, scores: ((boxes, scores, 0.5, 1), {}),
        lambda boxes, scores: ((boxes, scores), {"iou_thr": 0.5}),
        lambda boxes, scores: ((boxes.numpy(), scores.numpy(), 0.5), {}),
        lambda boxes, scores: ((boxes.double(), scores.double(), 0.5), {}),
        lambda boxes, scores: ((boxes[:, :3], scores, 0.5), {}),
        lambda boxes, scores: ((boxes, scores[:3], 0.5), {}),
        lambda boxes, scores: ((boxes, scores, 0.5, 2), {}),
        lambda boxes, scores: ((boxes.tolist(), scores, 0.5), {}),
        lambda boxes, scores: ((boxes, scores), {"threshold": 0.5}),
        lambda boxes, scores: ((boxes, scores), {}),
    ],
    ids=["offset", "older name", "arrays", "float64", "columns", "lengths", "offset 2", "list", "unknown", "missing"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_only_mmcv_defines_goes_to_mmcv(patched, mmcv_ops, originals, calls, change):
    arguments, options = change(random_boxes(40), torch.rand(40))
    found, expected = (outcome(nms, *arguments, **options) for nms in (mmcv_ops.nms, originals["nms"]))
    if isinstance(expected[0], torch.Tensor):
        assert_same(found, expected)
    elif isinstance(expected[0], np.ndarray):
        assert type(found[0]) is type(found[1]) is np.ndarray
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    else:
        assert found[0] is expected[0]
    assert calls == []


# batched_nms


@pytest.mark.parametrize("split_thr", [10000, 100])
@pytest.mark.parametrize(
    "cfg",
    [
        {"type": "nms", "iou_threshold": 0.5},
        {"iou_threshold": 0.4, "max_num": 7},
        {"type": "nms", "iou_threshold": 0.6, "score_threshold": 0.3, "max_num": 30},
        {"type": "nms", "iou_threshold": 0.5, "class_agnostic": True},
    ],
)
def test_batched_nms(patched, mmcv_ops, originals, calls, cfg, split_thr):
    # Coordinates on a grid of 1/16: the offsets of the classes lose no digits of them.
    boxes, scores, classes = (random_boxes(300) * 16).round() / 16, torch.rand(300), torch.randint(4, (300,))
    cfg = {**cfg, "split_thr": split_thr}
    given = dict(cfg)
    found = mmcv_ops.batched_nms(boxes, scores, classes, cfg)
    assert calls == ["nms" if cfg.get("class_agnostic") and split_thr > 300 else "batched_nms"]
    assert cfg == given
    assert_same(found, originals["batched_nms"](boxes, scores, classes, cfg))
    if "class_agnostic" not in cfg:
        agnostic = mmcv_ops.batched_nms(boxes, scores, classes, cfg, class_agnostic=True)
        assert_same(agnostic, originals["batched_nms"](boxes, scores, classes, cfg, class_agnostic=True))
        assert_same(found, mmcv_ops.batched_nms(boxes, scores, classes, {**cfg, "type": mmcv_ops.nms}))


def test_batched_nms_of_negative_coordinates_compares_labels(patched, mmcv_ops, originals):
    """docs/interop.md: mmcv's offset of the second label moves its box onto the first."""
    boxes = torch.tensor([[-189.0, -189, -179, -179], [-100, -100, -90, -90]])
    arguments = boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), {"type": "nms", "iou_threshold": 0.5}
    assert mmcv_ops.batched_nms(*arguments)[1].tolist() == [0, 1]
    assert originals["batched_nms"](*arguments)[1].tolist() == [0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"nms_cfg": None},
        {"nms_cfg": {"type": "nms", "iou_threshold": 0.5, "offset": 1}},
        {"nms_cfg": {"type": "nms", "iou_thr": 0.5}},
        {"nms_cfg": {"type": "nms"}},
        {"nms_cfg": {"type": "nms", "iou_threshold": 0.5, "unknown": 1}},
        {"boxes": torch.empty(0, 4), "scores": torch.empty(0), "idxs": torch.empty(0, dtype=torch.int64)},
        {"idxs": torch.rand(40)},
        {"nms_cfg": {"type": "nms", "iou_threshold": -0.1}},
    ],
    ids=["no suppression", "offset", "older name", "no threshold", "unknown", "nothing", "floating labels", "negative"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_configurations_that_are_mmcvs_own_affair(patched, mmcv_ops, originals, calls, arguments):
    defaults = {"boxes": random_boxes(40), "scores": torch.rand(40), "idxs": torch.randint(3, (40,))}
    arguments = {**defaults, "nms_cfg": {"type": "nms", "iou_threshold": 0.5}, **arguments}
    found, expected = (outcome(f, **arguments) for f in (mmcv_ops.batched_nms, originals["batched_nms"]))
    if isinstance(expected[0], torch.Tensor):
        assert_same(found, expected)
    else:
        assert found[0] is expected[0]
    assert "batched_nms" not in calls


def test_other_kinds_of_suppression_are_mmcvs(monkeypatch, patched, mmcv_ops, calls):
    """By their name in mmcv's module, where somebody may have put another one."""
    module, seen = sys.modules["mmcv.ops.nms"], []

    def keep_all(boxes, scores, iou_threshold):
        seen.append(iou_threshold)
        return torch.cat([boxes, 0.5 * scores[:, None]], 1), torch.arange(len(boxes))

    arguments = random_boxes(10), torch.rand(10), torch.zeros(10, dtype=torch.int64)
    monkeypatch.setattr(module, "soft_nms", keep_all)
    dets, _ = mmcv_ops.batched_nms(*arguments, {"type": "soft_nms", "iou_threshold": 0.3})
    assert_same(dets[:, 4], 0.5 * arguments[1])
    mmcv_ops.batched_nms(*arguments, {"type": keep_all, "iou_threshold": 0.4})
    monkeypatch.setattr(module, "nms", keep_all)
    mmcv_ops.batched_nms(*arguments, {"type": "nms", "iou_threshold": 0.5})
    assert (seen, calls) == ([0.3, 0.4, 0.5], [])


# sigmoid_focal_loss


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_and_its_gradient(patched, mmcv_ops, originals, calls, reduction, weighted):
    logits = (1.5 * torch.randn(50, 6)).requires_grad_()
    # mmcv reads weights out of bounds where the background, K, is weighted
    target = torch.randint(0, 6 if weighted else 7, (50,))
    weight = 0.5 + torch.rand(6) if weighted else None
    found = mmcv_ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, weight, reduction)
    assert calls == ["sigmoid_focal_loss"]
    expected = originals["sigmoid_focal_loss"](logits, target, 1.5, 0.3, weight, reduction)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss.square().sum(), logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_focal_loss_of_labels_that_are_no_class(patched, mmcv_ops, originals, calls):
    logits, target = torch.randn(7, 3), torch.tensor([-2, -1, 0, 2, 3, 77, -(2**40)])
    found = mmcv_ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    torch.testing.assert_close(found, originals["sigmoid_focal_loss"](logits, target, 2.0, 0.25, None, "none"))
    assert (found > 0).all()  # all of them count: -2 too, which leaves rows out in our own loss
    loss = mmcv_ops.SigmoidFocalLoss(2.0, 0.25, reduction="sum")
    torch.testing.assert_close(loss(logits, target), found.sum())
    assert calls == ["sigmoid_focal_loss"] * 2


def test_the_background_has_weight_1(patched, mmcv_ops):
    logits, target, weight = torch.randn(4, 3), torch.tensor([3, 3, 0, 3]), torch.tensor([5.0, 6.0, 7.0])
    found = mmcv_ops.sigmoid_focal_loss(logits, target, weight=weight, reduction="none")
    plain = mmcv_ops.sigmoid_focal_loss(logits, target, reduction="none")
    torch.testing.assert_close(found, plain * torch.tensor([1.0, 1, 5, 1])[:, None])


def test_weights_of_classes_have_no_gradient(patched, mmcv_ops, originals):
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([1, 0, 2, 2])
    weight = torch.ones(3, requires_grad=True)
    for loss in (mmcv_ops.sigmoid_focal_loss, originals["sigmoid_focal_loss"]):
        loss(logits, target, 2.0, 0.25, weight, "sum").backward()
        assert logits.grad is not None
        assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_focal_loss_keeps_the_type(patched, mmcv_ops, dtype, reduction):
    logits, target = torch.randn(9, 3).to(dtype), torch.randint(4, (9,))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert mmcv_ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, reduction).dtype == dtype


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.int32)),
        (torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.int64)),
        (torch.randn(4, 3), torch.zeros(5, dtype=torch.int64)),
        (torch.randn(3), torch.zeros(3, dtype=torch.int64)),
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 2.0, 0.25, torch.ones(2)),
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 2.0, 0.25, None, "median"),
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), 2.0, -1.0, None, "sum"),
    ],
    ids=["int32", "target 2d", "lengths", "input 1d", "weight", "reduction", "alpha"],
)
def test_what_only_mmcvs_loss_defines_goes_to_mmcv(patched, mmcv_ops, originals, calls, arguments):
    found, expected = (outcome(f, *arguments) for f in (mmcv_ops.sigmoid_focal_loss, originals["sigmoid_focal_loss"]))
    if isinstance(expected, torch.Tensor):
        assert_same(found, expected)
    else:
        assert found == expected
    assert calls == []


def test_mmcv_itself_was_what_was_compared_with(originals):
    if not is_installed("mmcv"):
        pytest.skip("mmcv is not installed: what stands in for it was compared with")
    assert "standins" not in inspect.getsourcefile(originals["batched_nms"])


def test_an_mmcv_without_operators(monkeypatch):
    forget_adapters(monkeypatch, "mmcv")
    for name in [name for name in sys.modules if name.startswith("mmcv.ops")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmcv._ext", None)
    monkeypatch.delattr(sys.modules["mmcv"], "_ext")
    with pytest.raises(ImportError, match="patch: mmcv is installed without its operators"):
        retinanet_ext.patch("mmcv")


def test_an_mmcv_that_is_not_installed(monkeypatch):
    for peer in PACKAGES:
        monkeypatch.setitem(sys.modules, peer, None)
        with pytest.raises(ImportError, match=f"patch: {peer} is not installed"):
            retinanet_ext.patch(peer)
