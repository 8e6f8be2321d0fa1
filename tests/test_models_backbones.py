"""ResNeXt and deeper ResNets beside torchvision's; BatchNorm over processes where there is one process, or several."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from retinanet_ext import models
from retinanet_ext.models import resnet
from retinanet_ext.models.resnet import BACKBONES, make_resnet

NEW = ("resnet152", "resnext50_32x4d", "resnext101_64x4d")


def test_names_of_the_builders():
    assert all(callable(getattr(models, f"retinanet_{name}_fpn")) for name in BACKBONES)
    with torch.device("meta"):
        built = {name: getattr(models, f"retinanet_{name}_fpn")(2, norm="group") for name in BACKBONES}
    assert {name: model.config.backbone for name, model in built.items()} == {name: name for name in BACKBONES}
    assert all(model.config.norm == "group" for model in built.values())


@pytest.mark.parametrize("name", NEW)
def test_bodies_are_torchvisions(name):
    """The same keys, parameters in the same order, and the same bits of C3, C4 and C5."""
    torchvision_models = pytest.importorskip("torchvision.models", reason="compares with torchvision")
    with torch.device("meta"):
        theirs, ours = getattr(torchvision_models, name)(weights=None), make_resnet(name)
    theirs.fc = nn.Identity()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in theirs.state_dict().items():
        if value.dim() > 1:
            state[key] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        else:
            state[key] = 0.5 + torch.rand(value.shape, generator=generator).to(value.dtype)
    for model in (theirs, ours):
        model.load_state_dict(state, strict=True, assign=True)
        model.eval()
    x = torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        found = ours(x)
        level = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
        for stage, mine in zip((theirs.layer2, theirs.layer3, theirs.layer4), found, strict=True):
            level = stage(level)
            assert torch.equal(mine, level)
            assert level.isfinite().all()
            assert level.std() > 0
    assert ours.out_channels == tuple(mine.shape[1] for mine in found) == (512, 1024, 2048)


def test_parameters_of_resnext():
    """25,028,904 and 83,455,272 are those of torchvision's classifiers, whose last layer has 2048 x 1000 + 1000."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in make_resnet(name).parameters()) for name in NEW[1:]}
    assert counts == {"resnext50_32x4d": 25_028_904 - 2_049_000, "resnext101_64x4d": 83_455_272 - 2_049_000}


def test_a_basic_block_has_no_groups():
    with pytest.raises(ValueError, match="groups, group_width: a basic block has 1 and 64, got 32, 4"):
        resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), groups=32, group_width=4)


@pytest.fixture
def norms():
    """A layer of each kind with the same weights, and an input."""
    synced, plain = resnet.NORMS["sync_batch"](4), nn.BatchNorm2d(4)
    assert isinstance(synced, nn.SyncBatchNorm)
    return synced, plain, torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))


def assert_same_step(norms):
    synced, plain, x = norms
    for training in (True, False):
        assert torch.equal(synced.train(training)(x), plain.train(training)(x))
    assert synced.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(synced.state_dict()[key], value), key


def test_sync_batch_norm_of_one_process_is_batch_norm(norms):
    assert_same_step(norms)


def test_sync_batch_norm_compiles_as_one_graph(norms):
    synced, _, x = norms
    torch.compiler.reset()
    compiled = torch.compile(synced, fullgraph=True, backend="eager")
    for training in (True, False):
        synced.train(training)
        torch.testing.assert_close(compiled(x), synced(x))


def test_sync_batch_norm_in_a_group_of_one(norms, tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo, by which processes on CPUs talk")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert_same_step(norms)
    finally:
        dist.destroy_process_group()


def test_sync_batch_norm_of_several_processes_on_the_cpu(norms, monkeypatch):
    synced, _, x = norms
    monkeypatch.setattr(resnet, "_group_size", lambda group: 2)
    with pytest.raises(ValueError, match=r'norm: "sync_batch" .* got an input on the CPU in a group of 2: use "batch"'):
        synced.train()(x)
    synced.eval()(x)


def test_a_model_of_sync_batch_norm_trains_on_the_cpu():
    torch.manual_seed(0)
    model = models.retinanet_resnet18_fpn(2, norm="sync_batch", min_size=64, max_size=96)
    kinds = {type(module) for module in model.backbone.body.modules()}
    assert models.SyncBatchNorm2d in kinds
    assert nn.BatchNorm2d not in kinds
    target = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.backbone.body.bn1.running_mean, torch.zeros(64))
