"""The losses of a step: the model's own to the bit, one graph for torch.compile, and a host that never waits."""

import contextlib

import pytest
import torch
from small_retinanet import small_model
from tiny_retinanet import tiny_retinanet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.data import Batch  # noqa: E402
from retinanet_ext.engine.losses import LEAST_CAPACITY, make_losses  # noqa: E402
from retinanet_ext.engine.schedule import make_optimizer, make_scheduler  # noqa: E402
from retinanet_ext.engine.settings import SettingError  # noqa: E402
from retinanet_ext.engine.stepper import Stepper  # noqa: E402
from retinanet_ext.models import AnchorGenerator  # noqa: E402

CPU = torch.device("cpu")
# What waits for a device, or copies from memory that is not pinned: reading a number, sizing a result by its values,
# a tensor made of the host's numbers.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
}
# These wait where an index is a mask, whose places have to be counted.
INDEXING = {
    torch.ops.aten.index,
    torch.ops.aten._unsafe_index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._unsafe_index_put,
    torch.ops.aten._index_put_impl_,
}


class Calls(TorchDispatchMode):
    """Notes every operator that is called, and of these what makes the host wait."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function)
        masked = function.overloadpacket in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or function in WAITING:
            self.waiting.append(function)
        return function(*args, **(kwargs or {}))


def make_batch(counts=(3, 0, 40), ignore=True, size=(40, 56)):
    generator = torch.Generator().manual_seed(sum(counts))
    images, targets = [], []
    for count in counts:
        images.append(torch.rand(3, *size, generator=generator))
        corner = torch.rand(count, 2, generator=generator) * 20
        target = {
            "boxes": torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=generator) * 16], dim=1),
            "labels": torch.randint(0, 3, (count,), generator=generator),
            "image_id": 1,
        }
        targets.append({**target, "ignore": torch.rand(count, generator=generator) < 0.3} if ignore else target)
    return Batch(images, targets, [])


@pytest.mark.parametrize(("box_loss", "normalizer"), [("l1", "per_image"), ("giou", "ema"), ("l1", "foreground")])
@pytest.mark.parametrize("counts", [(3, 0, 40), (60, 60), (0,)])
def test_packed_losses_are_the_models_own(counts, box_loss, normalizer):
    model = small_model(box_loss=box_loss, loss_normalizer=normalizer, min_size=(32, 48)).train()
    batch = make_batch(counts, ignore=len(counts) != 2)
    targets = [{k: v for k, v in t.items() if k != "image_id"} for t in batch.targets]
    torch.manual_seed(3)
    expected = model(batch.images, targets)
    foreground = model.last_num_foreground
    if normalizer == "ema":
        assert model.loss_normalizer.average != 100
        model.loss_normalizer.average.fill_(100)
    losses = make_losses(model)
    torch.manual_seed(3)
    prepared = losses.prepare(batch, CPU)
    assert prepared[2].shape[0] == max(LEAST_CAPACITY, 128 if sum(counts) > 64 else 0)
    mine = losses(*prepared)
    assert torch.equal(mine.pop("foreground"), foreground)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], value) for name, value in expected.items())
    gradients = [torch.autograd.grad(sum(losses.values()), list(model.parameters())) for losses in (mine, expected)]
    assert all(map(torch.equal, *gradients))


def test_images_and_targets_cross_to_the_device():
    """A device other than the host's, in a test that needs none."""
    batch = make_batch((3, 0, 4))
    batch = batch._replace(images=[(255 * image).to(torch.uint8) for image in batch.images])
    prepared = make_losses(small_model().train()).prepare(batch, torch.device("meta"))
    assert {tensor.device.type for tensor in prepared} == {"meta"}
    assert prepared[0].dtype == torch.float32


def test_wrong_targets_are_named_before_they_leave_the_host():
    batch = make_batch((2,))
    batch.targets[0]["boxes"][1, 2] = -1.0
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\]\[1\]: expected a finite"):
        make_losses(small_model()).prepare(batch, CPU)


def test_a_compiled_step_is_one_graph_and_takes_the_step(monkeypatch):
    def step(compiled):
        model = small_model(loss_normalizer="ema").train()
        optimizer = make_optimizer(model, "sgd", 0.1)
        scheduler = make_scheduler(optimizer, 10, 0, "cosine")
        stepper = Stepper(model, optimizer, scheduler, CPU, compiled=compiled)
        values = [stepper.take([make_batch(counts)]).values for counts in ((3, 0, 40), (1, 2, 4))]
        assert model.loss_normalizer.average != 100
        return values, {**model.state_dict(), "average": model.loss_normalizer.average}

    compile_module = torch.nn.Module.compile
    asked = []

    def note(module, **options):
        asked.append(options)
        compile_module(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    expected, weights = step(False)
    values, compiled_weights = step(True)
    assert asked == [{"fullgraph": True}]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert compiled_weights.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(compiled_weights[name], value, rtol=1e-3, atol=1e-5)


def test_three_graphs_take_images_of_any_size(monkeypatch):
    """Of the first size, of any width, of any width and height. (A level of a single cell would have its own.) Other
    numbers of images and of boxes do not come to torch.compile's limit of 8 either."""
    model = tiny_retinanet().train()
    model.transform.min_size, model.transform.max_size = (64,), 512
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compile_module(module, backend="aot_eager", **options)
    )
    optimizer = make_optimizer(model, "sgd", 0.0)
    torch.compiler.reset()
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 100, 0, "cosine"), CPU, compiled=True)

    def take(counts, size):
        batch = make_batch(counts, size=size)
        prepared = make_losses(model).prepare(batch, CPU)
        expected = make_losses(model)(*prepared)
        values = stepper.take([batch]).values
        assert values[0].item() == pytest.approx(expected["classification"].item(), rel=1e-4)
        return prepared[0].shape

    sizes = [(64, 64), (64, 96), (128, 64), (64, 192), (160, 64), (64, 224)]
    with torch._dynamo.config.patch(recompile_limit=3):
        assert len({take((3, 1), size) for size in sizes}) == 6
    with torch._dynamo.config.patch(recompile_limit=8):
        for counts in ((60, 60), (5,), (200, 3, 9), (0, 70), (1, 2, 3, 4), (300,)):
            take(counts, sizes[sum(counts) % 6])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_never_makes_the_host_wait(optimizer):
    """From the batch on the device to the updated weights."""
    model = small_model(norm="batch", loss_normalizer="ema").train()
    optimizer = make_optimizer(model, optimizer, 0.1)
    for group in optimizer.param_groups:  # as on a GPU; the CPU's own update reads its step count
        group["fused"] = True
    optimizer._step_supports_amp_scaling = True
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), CPU, clip_grad_norm=0.1)
    prepared = stepper.own_losses.prepare(make_batch(), CPU)
    stepper.own_losses.prepare = lambda batch, device: prepared
    with Calls() as calls:
        values = stepper._gradients([make_batch()], 3)
        stepper._note_failure(values)
        stepper._update(values[4])
    assert torch.ops.retinanet_ext.assign_targets.default in calls.names
    assert torch.ops.aten.convolution_backward.default in calls.names
    assert calls.waiting == []


def test_resizing_never_makes_the_host_wait():
    transform = small_model().train().transform
    with Calls() as calls:
        transform([torch.rand(3, 40, 56), torch.rand(3, 30, 30)])
    assert calls.waiting == []


def test_anchors_of_a_new_size_take_nothing_from_the_host():
    """A copy from memory that is not pinned waits for the device: the first call's alone, of the anchors of a cell."""

    class FromTheHost(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
            result = function(*args, **(kwargs or {}))
            if result.device.type == "meta" and any(tensor.device.type == "cpu" for tensor in tensors):
                self.found.append(function)
            return result

    generator = AnchorGenerator()
    grids = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    with FromTheHost() as first:
        generator((64, 96), grids, "meta")  # in the place of a GPU
    assert first.found
    with FromTheHost() as again:
        assert generator((96, 64), [grid[::-1] for grid in grids], "meta").is_meta
    assert again.found == []


def set_where(x, mask, values):
    x[mask] = values


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize(
    "action",
    [
        lambda x: x[0].item(),
        lambda x: bool((x > 0).all()),
        lambda x: torch.tensor([1.0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.view(2, 3)[:, torch.tensor([True, False, True])],
        lambda x: x[(x > 0).to(torch.uint8)],
        lambda x: set_where(x, x > 0, x[:1]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.arange(6)),
    ],
)
def test_what_makes_the_host_wait_is_seen(action):
    x = torch.arange(6.0)
    with Calls() as calls:
        x[torch.arange(2)] = x[torch.arange(2, 4)]  # places that the host need not know
        torch.where(x > 0, x, 0).masked_fill(x > 1, 0)
        assert calls.waiting == []
        action(x)
    assert calls.waiting


def test_detection_never_makes_the_host_wait():
    """Up to what is as long as the number of detections; the anchors of this size of image are known."""
    model = small_model(score_thresh=0.0).eval()
    images = [torch.rand(3, 40, 56), torch.rand(3, 30, 30)]
    expected = model.padded_detections(images)
    with Calls() as calls:
        found = model.padded_detections(images)
    assert calls.waiting == []
    assert torch.ops.retinanet_ext.detect.default in calls.names
    assert found.counts.min() > 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.cuda
@pytest.mark.sync
def test_a_step_never_makes_the_host_wait_on_a_gpu():
    from cuda_gates import host_must_not_wait

    device = torch.device("cuda")
    model = small_model(norm="batch").to(device).train()
    optimizer = make_optimizer(model, "adamw", 0.1)
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), device, clip_grad_norm=0.1)
    batch = make_batch()
    batch = batch._replace(images=[image.pin_memory() for image in batch.images])
    for _ in range(3):
        stepper.take([batch])
    model.anchor_generator._cache.clear()  # as of images of a size that was not there before
    with host_must_not_wait():
        taken = stepper.take([batch])
    assert taken.values.isfinite().all()


@pytest.mark.cuda
@pytest.mark.sync
def test_detection_never_makes_the_host_wait_on_a_gpu():
    from cuda_gates import host_must_not_wait

    model = small_model(score_thresh=0.0).cuda().eval()
    images = [torch.rand(3, 40, 56, device="cuda"), torch.rand(3, 30, 30, device="cuda")]
    with torch.no_grad():
        for _ in range(3):
            model.padded_detections(images)
        with host_must_not_wait():
            found = model.padded_detections(images)
    assert found.counts.min() > 0


def test_padding_to_few_shapes_adds_background_alone():
    """Features of a padded image are those of a batch with a larger neighbour; the same boxes are foreground."""
    losses = make_losses(small_model(min_size=64, max_size=96).eval())
    plain = losses.prepare(make_batch((3,)), CPU)
    losses.side = 128
    padded = losses.prepare(make_batch((3,)), CPU)
    assert plain[0].shape[-2:] == (64, 96)
    assert padded[0].shape[-2:] == (128, 128)
    height, width = plain[0].shape[-2:]
    assert torch.equal(padded[0][..., :height, :width], plain[0])
    assert not padded[0][..., height:, :].any()
    assert not padded[0][..., width:].any()
    assert all(torch.equal(a, b) for a, b in zip(padded[2:], plain[2:], strict=True))
    assert torch.equal(losses(*padded)["foreground"], losses(*plain)["foreground"])


def graph_cases(name, kind, device, tensor_rate):
    """Losses of steps with other images, counts and rates at each, two shapes in turn; weights; the stepper."""
    from retinanet_ext.engine.graphed_stepper import SIDE, WARM_UP

    batches = [make_batch((count, 1), size=(40, 56 if count % 2 else 200)) for count in range(4 * WARM_UP)]
    model = small_model(norm="batch", max_size=200).to(device).train()
    optimizer = make_optimizer(model, name, 0.01, tensor_rate=tensor_rate)
    scheduler = make_scheduler(optimizer, len(batches), 3, "cosine")
    stepper = kind(model, optimizer, scheduler, device, clip_grad_norm=1.0)
    stepper.own_losses.side = SIDE
    return torch.stack([stepper.take([batch]).values for batch in batches]), model.state_dict(), stepper


def assert_same_steps(mine, right):
    values, weights, stepper = mine
    assert len(stepper.captured) == 2
    torch.testing.assert_close(values, right[0], rtol=1e-3, atol=1e-4)
    for key, value in right[1].items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_is_around_the_graph_takes_the_same_steps(name, monkeypatch):
    """Without a GPU: streams do nothing, and a replay computes anew from the tensors that the graph would read."""
    from retinanet_ext.engine import graphed_stepper

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            pass

    class Step(graphed_stepper.CapturedStep):
        def __init__(self, stepper, prepared):
            self.inputs = tuple(torch.zeros_like(tensor) for tensor in prepared)

            class Graph:
                def replay(_):
                    self.values = stepper.step_on(self.inputs)

            self.graph = Graph()

    monkeypatch.setattr(graphed_stepper, "CapturedStep", Step)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    expected = graph_cases(name, Stepper, CPU, False)
    assert_same_steps(graph_cases(name, graphed_stepper.GraphedStepper, CPU, name == "sgd"), expected)


@pytest.mark.cuda
@pytest.mark.graph
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_graph_takes_the_steps_that_the_eager_one_takes(name):
    from retinanet_ext.engine.graphed_stepper import GraphedStepper

    device = torch.device("cuda")
    expected = graph_cases(name, Stepper, device, False)
    assert_same_steps(graph_cases(name, GraphedStepper, device, True), expected)


def test_a_graph_is_for_one_process_and_our_own_model(monkeypatch):
    from retinanet_ext.engine.distributed import World
    from retinanet_ext.engine.graphed_stepper import GraphedStepper

    model = torch.nn.Linear(1, 1)
    optimizer = make_optimizer(model, "sgd", 0.1)
    scheduler = make_scheduler(optimizer, 10, 0, "cosine")
    with pytest.raises(SettingError, match="cuda_graph: expected a RetinaNet of this library, got Linear"):
        GraphedStepper(model, optimizer, scheduler, CPU)
    monkeypatch.setattr("retinanet_ext.engine.stepper.DistributedDataParallel", lambda module, **_: module)
    with pytest.raises(SettingError, match="cuda_graph: captures the step of one process, got 2 processes"):
        GraphedStepper(model, optimizer, scheduler, CPU, world=World(0, 2, 0, 2))
