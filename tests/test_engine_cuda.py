"""Commands, loading and several processes on a GPU: what is the CPU's there is the GPU's here.

Whole runs are marked `runs`, a stage of the GPU ring by themselves: most of their time is the host's.
"""

import csv
import importlib.util
import json
import shutil

import pytest
import torch
from busy_checkpoint import model_config, save_busy_checkpoint
from rank_processes import in_processes
from small_retinanet import small_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.cli import main  # noqa: E402
from retinanet_ext.data import Batch, generate_shapes, make_loader, open_dataset  # noqa: E402
from retinanet_ext.engine.checkpoint import load_checkpoint, load_model  # noqa: E402
from retinanet_ext.engine.distributed import joined, started_world  # noqa: E402
from retinanet_ext.engine.export import export  # noqa: E402
from retinanet_ext.engine.export_modules import ExportedDetector  # noqa: E402
from retinanet_ext.engine.export_programs import check_compiler  # noqa: E402
from retinanet_ext.engine.schedule import make_optimizer, make_scheduler  # noqa: E402
from retinanet_ext.engine.settings import SettingError  # noqa: E402
from retinanet_ext.engine.stepper import Stepper  # noqa: E402

pytestmark = pytest.mark.cuda

SIZE = (64, 64)
CONFIG = model_config()
MODEL = "--arch resnet18 --norm group --min-size 64 --max-size 64 --anchor-sizes 8 16 32 64 128"
RECIPE = "--epochs 2 --batch-size 2 --ema 0.9 --workers 1"


@pytest.fixture
def without_tf32():
    """float32 convolutions as the CPU has them."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=4, val_images=3, image_size=64)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, without_pictures):
    run = tmp_path_factory.mktemp("runs") / "train"
    assert main(["train", str(data), *MODEL.split(), *RECIPE.split(), "--device", "cuda", "--run-dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_busy_checkpoint(tmp_path_factory.mktemp("weights"), CONFIG)


def run_val(trained, data, folder, *options):
    assert main(["val", str(trained), str(data), "--no-amp", "--run-dir", str(folder), *options]) == 0
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.runs
def test_train_on_a_gpu(trained):
    with open(trained / "results.csv", newline="") as stream:
        epochs = list(csv.DictReader(stream))
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert all(float(row["memory_mb"]) > 0 for row in epochs)
    assert all(float(row["val_total"]) > 0 for row in epochs)
    # Written from a GPU, read without one.
    checkpoint = load_checkpoint(trained / "weights" / "last.pt")
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.runs
def test_a_run_of_a_gpu_goes_on(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.runs
def test_val_on_a_gpu_has_the_cpus_figures(trained, data, tmp_path, without_tf32, without_pictures):
    on_gpu = run_val(trained, data, tmp_path / "cuda", "--device", "cuda", "--workers", "1")
    on_cpu = run_val(trained, data, tmp_path / "cpu", "--device", "cpu")
    assert on_gpu["images"] == on_cpu["images"] == 3
    for name in ("val_classification", "val_bbox_regression"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-3)


@pytest.mark.runs
def test_predict_on_a_gpu_finds_what_the_cpu_finds(weights, data, tmp_path, without_tf32):
    found = {}
    for device in ("cuda", "cpu"):
        options = ["--device", device, "--no-amp", "--run-dir", str(tmp_path / device)]
        assert main(["predict", str(weights), str(data / "val"), *options]) == 0
        found[device] = json.loads((tmp_path / device / "detections.json").read_text())["annotations"]
        assert len(list((tmp_path / device / "pictures").iterdir())) == 3
    # Rounding may swap or drop those of nearly one score.
    assert len(found["cpu"]) > 30
    assert abs(len(found["cuda"]) - len(found["cpu"])) <= 0.05 * len(found["cpu"])
    best = [max(annotation["score"] for annotation in found[device]) for device in ("cuda", "cpu")]
    assert best[0] == pytest.approx(best[1], rel=1e-3)


def assert_detects_as_the_model(program, weights):
    """The same network on the same GPU: the same detections, but for those that rounding may swap."""
    images = torch.rand(2, 3, *SIZE).cuda()
    own = ExportedDetector(load_model(weights, torch.device("cuda"))[0], SIZE)
    with torch.no_grad():
        expected, found = own(images), program(images)
    assert all(tensor.is_cuda for tensor in found)
    assert expected[3].min() > 10
    assert (found[3] - expected[3]).abs().max() <= 2
    torch.testing.assert_close(found[1][:, :10], expected[1][:, :10], rtol=1e-3, atol=1e-4)


@pytest.mark.runs
def test_a_pt2_program_runs_on_a_gpu(weights, tmp_path, without_tf32):
    path = tmp_path / "detector.pt2"
    assert main(["export", str(weights), "--format", "pt2", "--output", str(path), "--device", "cuda"]) == 0
    assert_detects_as_the_model(torch.export.load(path).module(), weights)


def test_pinned_batches_are_the_same(data):
    dataset = open_dataset(data, "train")
    loaders = [
        make_loader(dataset, 2, train=True, seed=3, workers=workers, pin_memory=pinned)
        for workers, pinned in ((0, False), (1, True))
    ]
    count = 0
    for plain, pinned in zip(*loaders, strict=True):
        assert isinstance(pinned, Batch)
        assert pinned.problems == plain.problems == []
        for image, expected in zip(pinned.images, plain.images, strict=True):
            assert image.is_pinned()
            assert not expected.is_pinned()
            assert torch.equal(image, expected)
            count += 1
        for target, expected in zip(pinned.targets, plain.targets, strict=True):
            assert target.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert target[name].is_pinned() or not len(value)
                    assert torch.equal(target[name], value)
                else:
                    assert target[name] == value
    assert count == 4


def make_batches():
    """Three batches of four images with a box or two."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(3):
        images, targets = [], []
        for number in range(4):
            corner = torch.rand(1 + number % 2, 2, generator=generator) * 16
            images.append(torch.rand(3, 32, 32, generator=generator))
            labels = torch.randint(0, 3, corner.shape[:1], generator=generator)
            targets.append({"boxes": torch.cat([corner, corner + 12], dim=1), "labels": labels, "image_id": number})
        batches.append(Batch(images, targets, []))
    return batches


def take_steps(model, device, world=None, replicate=False):
    """Numbers of each step, the gradient of the last, running statistics and the running normalizer."""
    model = model.to(device).train()
    optimizer = make_optimizer(model, "sgd", 0.01)
    stepper = Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), device, world=world)
    if replicate:  # one process is not wrapped by itself
        stepper.losses = DistributedDataParallel(stepper.losses, gradient_as_bucket_view=True)
    values = []
    for batch in make_batches():
        if world is not None:
            batch = batch._replace(
                images=batch.images[world.rank :: world.size], targets=batch.targets[world.rank :: world.size]
            )
        values.append(stepper.take([batch]).values.cpu())
    gradient = torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])
    statistics = torch.cat([buffer.flatten().float().cpu() for buffer in model.buffers()])
    return torch.stack(values), gradient, statistics


def steps_over_nccl():
    torch.backends.cudnn.allow_tf32 = False
    world = started_world()
    device = world.device(torch.device("cuda"))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_model(norm="batch", loss_normalizer="ema"))
    if world.size > 1:
        with joined(world):
            return take_steps(model, device, world)
    distributed.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    try:
        return take_steps(model, device, replicate=True)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
def test_steps_over_nccl_are_those_of_the_cpu(size):
    if not distributed.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    expected = take_steps(small_model(norm="batch", loss_normalizer="ema"), torch.device("cpu"))
    for found in in_processes(size, steps_over_nccl, start="spawn"):
        for mine, right in zip(found, expected, strict=True):
            assert (mine - right).norm() <= 1e-3 * right.norm()


@pytest.mark.runs
def test_an_aoti_program_runs_on_a_gpu(weights, tmp_path, without_tf32):
    """The last one: compiling takes longer than all others."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("AOTInductor needs triton for CUDA, and it is not installed")
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        pytest.skip("AOTInductor needs a CUDA toolkit to link its program, and CUDA_HOME is not set")
    try:
        check_compiler()
    except SettingError as error:
        pytest.skip(str(error))
    exported = export(weights, "aoti", tmp_path / "detector.pt2", batch_size=2, device="cuda")
    assert_detects_as_the_model(torch._inductor.aoti_load_package(str(exported.path)), weights)
