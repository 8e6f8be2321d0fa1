"""detectron2's and fvcore's functions under the patch, and how the patch comes and goes."""

import inspect
import itertools
import sys

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

PACKAGES = ("detectron2", "fvcore")


@pytest.fixture(scope="module", autouse=True)
def peers():
    with importable(*PACKAGES):
        import detectron2.modeling  # noqa: F401

        yield


@pytest.fixture
def places(peers):
    """The modules that the functions are found in."""
    import detectron2
    import fvcore.nn

    return {
        "batched_nms": [
            detectron2.layers,
            sys.modules["detectron2.layers.nms"],
            detectron2.modeling.meta_arch.retinanet,
        ],
        "pairwise_iou": [detectron2.structures, detectron2.structures.boxes, detectron2.modeling.meta_arch.retinanet],
        "sigmoid_focal_loss": [fvcore.nn, fvcore.nn.focal_loss],
        "sigmoid_focal_loss_jit": [fvcore.nn, fvcore.nn.focal_loss, detectron2.modeling.meta_arch.retinanet],
    }


@pytest.fixture
def originals(places):
    return {name: getattr(modules[0], name) for name, modules in places.items()}


@pytest.fixture
def patched(originals):
    with retinanet_ext.patch("detectron2"):
        yield


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, ["batched_nms", "box_iou", "sigmoid_focal_loss"])


def test_a_patch_reaches_every_place_and_leaves_nothing_behind(places, originals):
    before = attributes(*PACKAGES)
    with retinanet_ext.patch("detectron2") as patch:
        assert patch.functions == ("batched_nms", "pairwise_iou", "sigmoid_focal_loss", "retinanet")
        for name, modules in places.items():
            assert len({getattr(module, name) for module in modules} - {originals[name]}) == 1
        assert ("detectron2.modeling.meta_arch.retinanet.RetinaNet", "losses") in changes(before, attributes(*PACKAGES))
    assert changes(before, attributes(*PACKAGES)) == set()


def test_one_function_alone(places, originals):
    with retinanet_ext.patch("detectron2", "sigmoid_focal_loss"):
        assert places["sigmoid_focal_loss_jit"][2].sigmoid_focal_loss_jit is not originals["sigmoid_focal_loss_jit"]
        assert places["batched_nms"][0].batched_nms is originals["batched_nms"]
        with retinanet_ext.patch("detectron2", ["sigmoid_focal_loss", "batched_nms"]):
            pass
        assert places["sigmoid_focal_loss"][0].sigmoid_focal_loss is not originals["sigmoid_focal_loss"]
        assert places["batched_nms"][0].batched_nms is originals["batched_nms"]
    with pytest.raises(ValueError, match=r"patch: functions: expected some of .*'pairwise_iou'.*got \['nms'\]"):
        retinanet_ext.patch("detectron2", "nms")


def test_signatures_are_the_originals(patched, places, originals):
    for name in ("batched_nms", "pairwise_iou", "sigmoid_focal_loss"):
        function = getattr(places[name][0], name)
        parameters, expected = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f, follow_wrapped=False).parameters.values()]
            for f in (function, originals[name])
        )
        assert parameters == expected
        assert (function.__doc__, function.__module__) == (originals[name].__doc__, originals[name].__module__)
    jit = places["sigmoid_focal_loss_jit"][0].sigmoid_focal_loss_jit
    assert list(inspect.signature(jit, follow_wrapped=False).parameters) == [
        "inputs",
        "targets",
        "alpha",
        "gamma",
        "reduction",
    ]


# sigmoid_focal_loss


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "sigmoid_focal_loss_jit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.25}, {"alpha": 0.0, "gamma": 0.5}, {"alpha": -0.3, "gamma": 3.0}, {"alpha": 1, "gamma": 0}],
)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_focal_loss_and_its_gradient(patched, places, originals, calls, name, options, reduction):
    logits = (3 * torch.randn(40, 7)).requires_grad_()
    targets = (torch.rand(40, 7) < 0.2).float()
    found = getattr(places[name][0], name)(logits, targets, **options, reduction=reduction)
    expected = originals[name](logits, targets, **options, reduction=reduction)
    assert calls == ["sigmoid_focal_loss"]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    weights = torch.rand_like(found)
    gradients = [torch.autograd.grad(loss, logits, weights)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_focal_loss_is_float32_whatever_comes(patched, places, originals, calls, dtype):
    logits, targets = torch.randn(30, 4).to(dtype), torch.randint(2, (30, 4))
    for kind in (torch.int64, torch.bool, dtype):
        found = places["sigmoid_focal_loss"][0].sigmoid_focal_loss(logits, targets.to(kind), 0.25, 2, "sum")
        expected = originals["sigmoid_focal_loss"](logits, targets.to(kind), 0.25, 2, "sum")
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert calls == ["sigmoid_focal_loss"] * 3


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(4, 3), torch.ones(4, 3), 1.5),
        (torch.randn(4, 3), torch.ones(4, 3), 0.25, -1.0),
        (torch.randn(4, 3), torch.ones(4, 3), 0.25, 2.0, "nothing"),
        (torch.randn(4, 3), torch.ones(4)),
        (torch.randn(4, 3).to(torch.complex64), torch.ones(4, 3)),
        (torch.randn(4, 3), None),
    ],
    ids=["alpha", "gamma", "reduction", "shape", "complex", "none"],
)
def test_what_only_fvcore_defines_goes_to_fvcore(patched, places, originals, calls, arguments):
    found = outcome(places["sigmoid_focal_loss"][0].sigmoid_focal_loss, *arguments)
    expected = outcome(originals["sigmoid_focal_loss"], *arguments)
    if isinstance(expected, torch.Tensor):
        assert_same(found, expected)
    else:
        assert found == expected
    assert calls == []


def test_the_scripted_loss_in_other_scripted_code(patched, places):
    loss = places["sigmoid_focal_loss_jit"][0].sigmoid_focal_loss_jit

    def twice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 2 * loss(logits, targets, 0.25, 2.0, "sum")

    logits, targets = torch.randn(5, 3), torch.ones(5, 3)
    torch.testing.assert_close(torch.jit.script(twice)(logits, targets), twice(logits, targets), rtol=1e-5, atol=0)


# batched_nms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_batched_nms(patched, places, originals, calls, dtype):
    boxes, scores, classes = random_boxes(200).to(dtype), torch.rand(200), torch.randint(3, (200,))
    found = places["batched_nms"][0].batched_nms(boxes, scores, classes, 0.5)
    assert calls == ["batched_nms"]
    assert_same(found, originals["batched_nms"](boxes, scores, classes, 0.5))
    assert 0 < len(found) < 200


def test_batched_nms_under_autocast_takes_half_scores(patched, places, originals, calls):
    arguments = random_boxes(90), torch.rand(90).bfloat16(), torch.randint(3, (90,)), 0.5
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(places["batched_nms"][0].batched_nms(*arguments), originals["batched_nms"](*arguments))
    assert calls == ["batched_nms"]


def test_a_negative_threshold_is_the_originals(patched, places, originals, calls):
    """It suppresses boxes of other classes, which do not touch, where the original moves these apart."""
    arguments = random_boxes(9), torch.rand(9), torch.arange(9) % 2, -0.1
    assert_same(places["batched_nms"][0].batched_nms(*arguments), originals["batched_nms"](*arguments))
    assert calls == []


def test_what_batched_nms_refuses_is_refused_in_the_original_words(patched, places, originals, calls):
    boxes, scores, classes = random_boxes(9), torch.rand(9), torch.zeros(9, dtype=torch.int64)
    wrong = [(boxes[:, :3], scores, classes), (boxes, scores.half(), classes), (boxes, scores.double(), classes)]
    for arguments in wrong:
        found = outcome(places["batched_nms"][0].batched_nms, *arguments, 0.5)
        assert isinstance(found, tuple)
        assert found == outcome(originals["batched_nms"], *arguments, 0.5)
    assert calls == []


# pairwise_iou


def test_pairwise_iou_is_bit_equal(patched, places, originals, calls):
    from detectron2.structures import Boxes

    random, grid = random_boxes(60), torch.cartesian_prod(*[torch.arange(0.0, 12.0, 4.0)] * 4)  # many without area
    for one, two in itertools.product((random, grid), repeat=2):
        found = places["pairwise_iou"][0].pairwise_iou(Boxes(one), Boxes(two))
        assert_same(found, originals["pairwise_iou"](Boxes(one), Boxes(two)))
        assert not found.isnan().any()
    assert calls == ["box_iou"] * 4
    assert places["pairwise_iou"][0].pairwise_iou(Boxes(random[:0]), Boxes(random)).shape == (0, 60)


def test_pairwise_iou_of_a_subclass_is_the_originals(patched, places, calls):
    from detectron2.structures import Boxes

    class Rotated(Boxes):
        pass

    boxes = Rotated(random_boxes(4))
    assert places["pairwise_iou"][0].pairwise_iou(boxes, boxes).shape == (4, 4)
    assert calls == []


def test_a_matcher_on_our_matrix_has_detectron2s_matches(patched, places, calls):
    from detectron2.modeling.matcher import Matcher
    from detectron2.structures import Boxes

    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    boxes, anchors = random_boxes(5), random_boxes(300)
    matches, labels = matcher(places["pairwise_iou"][0].pairwise_iou(Boxes(boxes), Boxes(anchors)))
    ours = retinanet_ext.match_anchors(anchors, [boxes], 0.5, 0.4, True, policy="detectron2")[0]
    assert_same(
        torch.where(labels == 1, matches, labels.long() - 1),
        torch.where(ours >= 0, ours, torch.where(ours == -1, -1, -2)).long(),
    )


def test_fvcore_itself_was_what_the_loss_was_compared_with(places):
    if not is_installed("fvcore"):
        pytest.skip("fvcore is not installed: what stands in for it was compared with")
    assert "standins" not in inspect.getsourcefile(places["sigmoid_focal_loss"][1])


def test_a_detectron2_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError, match="patch: detectron2 is not installed"):
        retinanet_ext.patch("detectron2")


def test_a_release_without_dense_detectors_is_refused_by_name(monkeypatch):
    import detectron2.modeling.meta_arch.retinanet as retinanet

    forget_adapters(monkeypatch, "detectron2")
    monkeypatch.setattr(retinanet, "RetinaNet", type("RetinaNet", (torch.nn.Module,), {"losses": None}))
    with pytest.raises(RuntimeError, match=r"detectron2: expected release 0\.6 or newer.*without forward_training"):
        retinanet_ext.patch("detectron2")
