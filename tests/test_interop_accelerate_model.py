"""What an accelerated model still is: copies, files, scripts, classes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import retinanet_ext

pytest.importorskip("torchvision", reason="accelerates torchvision's RetinaNet")

from peer_modules import record_calls
from torchvision.models import detection as tv_detection
from torchvision_models import (
    ALL,
    IMAGES,
    TARGETS,
    assert_same_results,
    results,
    tiny_retinanet,
)

from retinanet_ext import models
from retinanet_ext.interop import restore


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, ALL)


class OwnNothing(tv_detection.RetinaNet):
    """As people derive from it to add something of their own."""


def test_state_dicts_copies_and_files(tmp_path):
    torch.manual_seed(0)
    theirs = tiny_retinanet()
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    model = retinanet_ext.accelerate(theirs)
    assert model is theirs
    assert list(model.state_dict()) == list(state)
    assert not model.load_state_dict(state).missing_keys
    expected = results(model)
    torch.save(model, tmp_path / "model.pt")
    others = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in others:
        assert type(other) is type(model)
        assert_same_results(results(other), expected)
        assert_same_results(results(restore(other)), expected)
    assert type(model) is not type(other)


def test_accelerating_again_changes_nothing_and_restoring_gives_the_class_back():
    model = tiny_retinanet()
    cls, attributes = type(model), set(vars(model))
    assert retinanet_ext.accelerate(retinanet_ext.accelerate(model)) is model
    accelerated = type(model)
    assert issubclass(accelerated, tv_detection.RetinaNet)
    assert accelerated.__name__ == "AcceleratedRetinaNet"
    assert set(vars(model)) == attributes
    assert restore(model) is model
    assert restore(model) is model
    assert type(model) is cls
    assert set(vars(model)) == attributes
    assert type(retinanet_ext.accelerate(model)) is accelerated
    assert type(retinanet_ext.accelerate(tiny_retinanet())) is accelerated


def test_a_class_that_somebody_has_put_on_an_accelerated_model_is_not_taken_off():
    """As FSDP's `fully_shard` does: the model's own class would be without it."""
    model = retinanet_ext.accelerate(tiny_retinanet())
    accelerated = type(model)
    model.__class__ = type(f"Sharded{accelerated.__name__}", (accelerated,), {})
    sharded = type(model)
    with pytest.raises(TypeError, match=r"restore: model: .*got .*ShardedAcceleratedRetinaNet"):
        restore(model)
    assert type(model) is sharded
    model.__class__ = accelerated
    assert not isinstance(restore(model), accelerated)


@pytest.mark.parametrize("model", [None, nn.Linear(2, 2), tv_detection.RetinaNet, "retinanet_resnet50_fpn"])
def test_anything_else_is_refused(model):
    with pytest.raises(TypeError, match=r"accelerate: model: expected a torchvision.*RetinaNet, got \w+\.\w+"):
        retinanet_ext.accelerate(model)


def test_our_own_model_and_a_wrapped_one_are_refused():
    with torch.device("meta"):
        ours = models.retinanet_resnet18_fpn(3)
    for model in (ours, nn.DataParallel(tiny_retinanet()), torch.compile(tiny_retinanet())):
        with pytest.raises(TypeError, match=f"got {type(model).__module__}.{type(model).__qualname__}"):
            retinanet_ext.accelerate(model)


def test_scripting_takes_torchvisions_methods():
    torch.manual_seed(0)
    model = tiny_retinanet().eval()
    plain = torch.jit.script(model)
    accelerated = torch.jit.script(retinanet_ext.accelerate(copy.deepcopy(model)))
    with retinanet_ext.patch("torchvision"):
        patched = torch.jit.script(model)
    with torch.no_grad():
        _, expected = plain(IMAGES)
        for scripted in (accelerated, patched):
            assert "retinanet_ext::" not in str(scripted.inlined_graph)
            _, detections = scripted(IMAGES)
            for found, image in zip(detections, expected, strict=True):
                assert all(torch.equal(found[key], image[key]) for key in image)


def test_the_patch_does_the_same_for_every_model(calls):
    torch.manual_seed(0)
    model = tiny_retinanet(cls=OwnNothing)
    expected = results(model)
    assert calls == []
    with retinanet_ext.patch("torchvision", "retinanet"):
        assert_same_results(results(model), expected)
    assert calls == ALL
    assert_same_results(results(model), expected)
    assert calls == ALL


def test_accelerating_under_the_patch_outlives_it(calls):
    with retinanet_ext.patch("torchvision"):
        model = retinanet_ext.accelerate(tiny_retinanet())
    results(model)
    assert calls == ALL
    results(restore(model))
    assert calls == ALL


def test_modes_and_devices_switch():
    model = retinanet_ext.accelerate(tiny_retinanet())
    assert not model.eval().training
    assert model.train().training
    assert next(model.half().parameters()).dtype == torch.float16
    assert next(model.to("meta").parameters()).is_meta


def test_an_accelerated_model_can_be_collected():
    model = retinanet_ext.accelerate(tiny_retinanet())
    gone = weakref.ref(model)
    model(IMAGES, TARGETS)
    del model
    gc.collect()
    assert gone() is None
