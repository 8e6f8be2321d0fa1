"""How a patch of torchvision comes and goes: where it reaches, in which order it is undone, what it refuses."""

import importlib
import pickle
import sys
import threading
import types

import pytest
import torch

import retinanet_ext

pytest.importorskip("torchvision", reason="patches torchvision")

import torchvision
from torchvision.models import detection as tv_detection

from retinanet_ext.interop import drop_in
from retinanet_ext.interop.patching import FunctionReplacement, Group, Patch
from retinanet_ext.interop.torchvision import REPLACEMENTS

FUNCTIONS = ("nms", "batched_nms", "sigmoid_focal_loss", "box_iou")
ORIGINALS = {name: REPLACEMENTS[name].original for name in FUNCTIONS}
METHODS = ("forward", "compute_loss", "postprocess_detections")


def attributes():
    """Every attribute of torchvision's loaded modules, and the methods of its RetinaNet, by identity."""
    found = {
        (name, attribute): value
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "torchvision" and isinstance(module, types.ModuleType)
        for attribute, value in vars(module).items()
    }
    found |= {("RetinaNet", name): value for name, value in vars(tv_detection.RetinaNet).items()}
    return found


def changes(before, after):
    missing = object()
    return {key for key in before | after if before.get(key, missing) is not after.get(key, missing)}


@pytest.fixture(autouse=True)
def unpatched():
    """Each test begins and ends with torchvision as it was."""
    before = attributes()
    yield
    assert not any(replacement.held for replacement in REPLACEMENTS.values())
    assert changes(before, attributes()) == set()


def ours(name):
    return getattr(torchvision.ops, name) is not ORIGINALS[name]


def test_every_place_of_a_function_and_nothing_else_is_replaced():
    before = attributes()
    with retinanet_ext.patch("torchvision", ["sigmoid_focal_loss", "nms"]):
        changed = changes(before, attributes())
        assert changed == {
            key for key, value in before.items() if value in (ORIGINALS[n] for n in ("sigmoid_focal_loss", "nms"))
        }
        assert changed >= {
            ("torchvision.ops", "nms"),
            ("torchvision.ops.boxes", "nms"),
            ("torchvision.ops", "sigmoid_focal_loss"),
            ("torchvision.ops.focal_loss", "sigmoid_focal_loss"),
            ("torchvision.models.detection.fcos", "sigmoid_focal_loss"),
            ("torchvision.models.detection.retinanet", "sigmoid_focal_loss"),
        }
    assert changes(before, attributes()) == set()


def test_all_functions_are_patched_where_none_is_named():
    before = attributes()
    with retinanet_ext.patch("torchvision") as patch:
        assert patch.functions == (*FUNCTIONS, "retinanet")
        assert all(ours(name) for name in FUNCTIONS)
        changed = {name for owner, name in changes(before, attributes()) if owner == "RetinaNet"}
        assert changed == {*METHODS, "__prepare_scriptable__"}


def test_as_a_plain_call():
    patch = retinanet_ext.patch("torchvision", functions="nms")
    assert (patch.active, patch.functions, ours("nms"), ours("box_iou")) == (True, ("nms",), True, False)
    assert "torchvision: nms (active)" in repr(patch)
    patch.undo()
    assert not patch.active
    assert not ours("nms")
    assert "(undone)" in repr(patch)
    patch.undo()
    assert not ours("nms")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_overlapping_patches_are_undone_in_any_order(order):
    wanted = [["nms", "box_iou"], ["nms"], ["nms", "batched_nms"]]
    patches = [retinanet_ext.patch("torchvision", names) for names in wanted]
    for undone in range(3):
        held = {name for index in order[undone:] for name in wanted[index]}
        assert {name for name in FUNCTIONS if ours(name)} == held
        patches[order[undone]].undo()
        patches[order[undone]].undo()  # again: nothing
    assert not any(ours(name) for name in FUNCTIONS)


def test_nested_contexts():
    with retinanet_ext.patch("torchvision"):
        with retinanet_ext.patch("torchvision", ["nms"]):
            assert ours("nms")
        assert ours("nms")
    assert not ours("nms")


def test_an_exception_undoes_it():
    def failing():
        with retinanet_ext.patch("torchvision"):
            assert ours("nms")
            raise KeyError

    pytest.raises(KeyError, failing)
    assert not ours("nms")


def test_a_patch_serves_once():
    patch = retinanet_ext.patch("torchvision")
    with patch, pytest.raises(RuntimeError, match="has been entered already"), patch:
        pass
    patch = retinanet_ext.patch("torchvision")
    patch.undo()
    with pytest.raises(RuntimeError, match="has been undone already"), patch:
        pass


def test_undoing_inside_the_block():
    with retinanet_ext.patch("torchvision") as patch:
        patch.undo()
        assert not ours("nms")


def test_a_name_imported_under_the_patch_follows_it(monkeypatch):
    boxes, scores = torch.rand(5, 4), torch.rand(5)
    with retinanet_ext.patch("torchvision"):
        from torchvision.ops import nms
    used = []
    monkeypatch.setattr("retinanet_ext.ops.nms", lambda *arguments: used.append("ours") or torch.arange(1))
    nms(boxes, scores, 0.5)
    assert used == []
    with retinanet_ext.patch("torchvision"):
        nms(boxes, scores, 0.5)
    assert used == ["ours"]


def test_modules_loaded_under_the_patch_get_the_originals_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.late", types.ModuleType("torchvision.late"))
    late = sys.modules["torchvision.late"]
    with retinanet_ext.patch("torchvision"):
        late.suppress = torchvision.ops.nms
    assert late.suppress is ORIGINALS["nms"]


def test_what_somebody_else_has_put_there_stays():
    def somebodys(*arguments):
        return previous(*arguments)

    boxes, scores = torch.rand(5, 4), torch.rand(5)
    try:
        with retinanet_ext.patch("torchvision", ["nms"]):
            previous = torchvision.ops.nms
            torchvision.ops.nms = somebodys
        assert torchvision.ops.nms is somebodys
        assert torchvision.ops.boxes.nms is ORIGINALS["nms"]
        # what it keeps of ours is the original again
        assert torch.equal(torchvision.ops.nms(boxes, scores, 0.5), ORIGINALS["nms"](boxes, scores, 0.5))
    finally:
        torchvision.ops.nms = ORIGINALS["nms"]


def test_methods_that_somebody_else_has_put_there_stay():
    original = tv_detection.RetinaNet.forward
    try:
        with retinanet_ext.patch("torchvision", ["retinanet"]):
            tv_detection.RetinaNet.forward = len
        assert tv_detection.RetinaNet.forward is len
    finally:
        tv_detection.RetinaNet.forward = original


def test_threads_patch_and_undo_beside_each_other():
    boxes, scores = torch.rand(50, 4), torch.rand(50)
    expected = ORIGINALS["nms"](boxes, scores, 0.5)
    failures, start = [], threading.Barrier(8)

    def work(index):
        try:
            start.wait()
            for round_ in range(30):
                names = FUNCTIONS[: 1 + (index + round_) % 4]
                patch = retinanet_ext.patch("torchvision", names)
                assert all(ours(name) for name in names)
                assert torch.equal(torchvision.ops.nms(boxes, scores, 0.5), expected)
                patch.undo()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not any(ours(name) for name in FUNCTIONS)


@pytest.mark.parametrize("peer", ["torchvison", "detectron", "", None])
def test_an_unknown_peer(peer):
    with pytest.raises(ValueError, match=r"patch: peer: expected one of .*'torchvision'"):
        retinanet_ext.patch(peer)


@pytest.mark.parametrize("functions", ["roi_align", ["nms", "roi_align"], []])
def test_an_unknown_function(functions):
    with pytest.raises(ValueError, match=r"patch: functions: expected some of .*'nms'.*'retinanet'.*got"):
        retinanet_ext.patch("torchvision", functions)
    assert not ours("nms")


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("built", [True, False])
def test_a_build_without_cuda_is_said_where_there_is_a_gpu(monkeypatch, recwarn, gpu, built):
    """What computes on the GPU stays torchvision's: nobody would notice but by the time it takes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(drop_in, "CUDA_MISSING", None if built else "retinanet_ext was built without CUDA")
    with retinanet_ext.patch("torchvision", "nms"):
        said = [str(warning.message) for warning in recwarn if warning.filename == __file__]
    assert len(said) == (gpu and not built)
    assert all("patch: retinanet_ext was built without CUDA" in words and "stay" in words for words in said)
    recwarn.clear()
    with torch.device("meta"):
        retinanet_ext.accelerate(tv_detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None))
    said = [str(warning.message) for warning in recwarn if warning.filename == __file__]
    assert len(said) == (gpu and not built)
    assert all("accelerate: retinanet_ext was built without CUDA" in words for words in said)


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="patch: torchvision is not installed"):
        retinanet_ext.patch("torchvision")


def test_a_peer_that_does_not_load_says_why_itself(monkeypatch):
    def broken(name, package=None):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="PIL"):
        retinanet_ext.patch("torchvision")


def test_another_signature_is_refused_and_nothing_stays_patched(monkeypatch):
    def other(boxes, scores, iou_threshold, kind="hard"):
        pass

    def replacement(boxes, scores, iou_threshold):
        pass

    changed = FunctionReplacement("torchvision", other, replacement)
    monkeypatch.setitem(REPLACEMENTS, "batched_nms", changed)
    with pytest.raises(RuntimeError, match=r"other: expected \(boxes, scores, iou_threshold\).*kind='hard'"):
        retinanet_ext.patch("torchvision")
    assert not ours("nms")


def test_a_method_of_another_signature_is_refused(monkeypatch):
    def forward(self, images, masks):
        pass

    monkeypatch.setattr(tv_detection.RetinaNet, "forward", forward)
    with pytest.raises(
        RuntimeError, match=r"RetinaNet\.forward: expected \(self, images.*one has \(self, images, masks"
    ):
        retinanet_ext.patch("torchvision")
    assert tv_detection.RetinaNet.forward is forward
    assert not ours("nms")


def test_a_group_comes_and_goes_as_one():
    def other(boxes, kind):
        pass

    nms, box_iou = REPLACEMENTS["nms"], REPLACEMENTS["box_iou"]
    with Patch("torchvision", {"suppression": Group(nms, box_iou)}) as patch:
        assert patch.functions == ("suppression",)
        assert ours("nms")
        assert ours("box_iou")
        with retinanet_ext.patch("torchvision", "nms"):
            pass
        assert ours("nms")
    assert not ours("nms")
    assert not ours("box_iou")
    with pytest.raises(RuntimeError, match="other: expected"):
        Patch("torchvision", {"suppression": Group(nms, FunctionReplacement("torchvision", other, lambda boxes: None))})
    assert not ours("nms")


def test_functions_and_models_pickle_under_the_patch():
    with retinanet_ext.patch("torchvision"):
        packed = pickle.dumps(torchvision.ops.box_iou)
        assert pickle.loads(packed) is torchvision.ops.box_iou
        with pytest.raises(pickle.PicklingError):  # as docs/interop.md says: Python looks functions up by name
            pickle.dumps(ORIGINALS["box_iou"])
    assert pickle.loads(packed) is ORIGINALS["box_iou"]


@pytest.mark.parametrize("make", [tv_detection.fcos_resnet50_fpn, tv_detection.fasterrcnn_resnet50_fpn])
def test_other_detectors_give_the_same_under_the_patch(make):
    """Suppression, matching and the focal loss inside torchvision's own models."""
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    targets = [dict(boxes=torch.tensor([[5.0, 5, 40, 50]]), labels=torch.tensor([1])) for _ in images]

    def results():
        torch.manual_seed(1)  # weights, and the proposals that Faster R-CNN samples
        model = make(weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96)
        losses = {name: loss.item() for name, loss in model(images, targets).items()}
        model.score_thresh = 0.0  # FCOS's; Faster R-CNN keeps its own elsewhere
        with torch.no_grad():
            return losses, model.eval()(images)

    losses, detections = results()
    with retinanet_ext.patch("torchvision"):
        patched_losses, patched_detections = results()
    assert patched_losses == pytest.approx(losses, rel=2e-6)
    for found, expected in zip(patched_detections, detections, strict=True):
        assert len(expected["boxes"]) > 10
        assert all(torch.equal(found[key], expected[key]) for key in ("boxes", "scores", "labels"))
