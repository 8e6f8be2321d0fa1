"""Several processes train as one does: gradients, batches, evaluation, files, resume. Two gloo processes on the CPU."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_processes import SECONDS, free_port, in_processes
from small_retinanet import PICTURES, build_small_model, small_model
from test_engine_losses import WAITING, Calls
from torch import distributed

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.cli import main  # noqa: E402
from retinanet_ext.data import Batch, Problem, generate_shapes, open_dataset  # noqa: E402
from retinanet_ext.engine.checkpoint import load_checkpoint  # noqa: E402
from retinanet_ext.engine.config import TrainConfig  # noqa: E402
from retinanet_ext.engine.distributed import World, joined, started_world  # noqa: E402
from retinanet_ext.engine.loop import NotFiniteError, train_steps  # noqa: E402
from retinanet_ext.engine.rank_evaluation import evaluate_together  # noqa: E402
from retinanet_ext.engine.schedule import make_optimizer, make_scheduler  # noqa: E402
from retinanet_ext.engine.settings import SettingError, UsageError  # noqa: E402
from retinanet_ext.engine.stepper import Stepper  # noqa: E402
from retinanet_ext.models.normalizers import NORMALIZERS, LossNormalizer  # noqa: E402

SIZE = 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=6, val_images=3, image_size=32)


def make_batch(count, first=0, bad=None):
    """`count` images, every third without objects; the pixels of number `bad` are not finite."""
    images, targets = [], []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        image = torch.rand(3, 32, 32, generator=generator, dtype=torch.float64)
        objects = number % 3
        corner = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * 16
        boxes = torch.cat([corner, corner + 12], dim=1)
        labels = torch.randint(0, 3, (objects,), generator=generator)
        images.append(image * math.nan if number == bad else image)
        targets.append({"boxes": boxes, "labels": labels, "image_id": number})
    return Batch(images, targets, [])


def share_of(batch, rank, size):
    return Batch(batch.images[rank::size], batch.targets[rank::size], [])


def make_stepper(model, world=None, **options):
    optimizer = make_optimizer(model, "sgd", 0.1)
    return Stepper(model, optimizer, make_scheduler(optimizer, 10, 0, "cosine"), CPU, world=world, **options)


def step_by_step(groups, world=None, normalizer="per_image", **options):
    """Gradients of each step, its numbers, the running normalizer after it, and the weights after all of them, in
    float64."""
    model = small_model(loss_normalizer=normalizer).double().train()
    model.loss_normalizer.float()
    stepper = make_stepper(model, world, **options)
    gradients, values, averages = [], [], []
    for group in groups:
        taken = stepper.take(group)
        gradients.append(None if taken is None else [p.grad.clone() for p in model.parameters()])
        values.append(None if taken is None else taken.values)
        averages.append(float(getattr(model.loss_normalizer, "average", 0)))
    return gradients, values, [p.detach().clone() for p in model.parameters()], averages


# Of two batches that are accumulated; of five images, three for one process and two for the other; of one image, which
# leaves a process without any; of none at all; of two images; of batches of one image, of none, and of two.
GROUPS = (
    [make_batch(4), make_batch(3, 4)],
    [make_batch(5, 7)],
    [make_batch(1, 2)],
    [make_batch(0)],
    [make_batch(2)],
    [make_batch(1, 4), make_batch(0), make_batch(2, 3)],
)


def steps_of_a_process():
    with joined(started_world()) as world:
        groups = [[share_of(batch, world.rank, world.size) for batch in group] for group in GROUPS]
        steps = {kind: step_by_step(groups, world, kind) for kind in NORMALIZERS}
        normalizer, foreground = LossNormalizer("ema"), torch.tensor([3, 0], dtype=torch.int32)
        with Calls() as calls:
            normalizer(foreground)
        assert torch.ops.c10d.allreduce_.default in calls.names
        assert not WAITING.intersection(calls.names)
        return steps, losses_without_the_others() if world.is_main else None


def losses_without_the_others():
    """Of the cause of a failure, of a validation: one process may have them to compute and the others not."""
    found = []
    for kind in NORMALIZERS:
        model, batch = small_model(loss_normalizer=kind).train(), make_batch(3)
        batch = batch._replace(images=[image.float() for image in batch.images])
        found.append(make_stepper(model).losses_in_float32(batch))
        assert model.loss_normalizer.training
        targets = [{name: target[name] for name in ("boxes", "labels")} for target in batch.targets]
        found.append(model.eval().detections_and_losses(batch.images, targets)[1])
    return [{name: float(value.detach().sum()) for name, value in losses.items()} for losses in found]


@pytest.fixture(scope="module")
def alone():
    return step_by_step(GROUPS)


@pytest.fixture(scope="module")
def processes():
    return in_processes(SIZE, steps_of_a_process)


def assert_close(mine, right):
    """To float32's rounding, which the losses' normaliser has even here."""
    for a, b in zip(mine, right, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_of_two_processes_are_those_of_one(normalizer, processes):
    """With a normalizer of the whole batch its foreground is that of both."""
    expected_gradients, expected_values, expected_weights, expected_averages = step_by_step(GROUPS, None, normalizer)
    assert normalizer != "ema" or len(set(expected_averages)) == len(GROUPS) - 1
    for of_kind, _ in processes:
        gradients, values, weights, averages = of_kind[normalizer]
        assert gradients[3] is None
        assert expected_gradients[3] is None
        for step in (0, 1, 2, 4, 5):
            assert_close(gradients[step], expected_gradients[step])
            torch.testing.assert_close(values[step], expected_values[step], rtol=1e-5, atol=1e-6)
        assert_close(weights, expected_weights)
        assert averages == expected_averages


def test_losses_outside_of_a_step_wait_for_no_other_process(processes):
    (_, found), _ = processes
    assert found == losses_without_the_others()


COMPILED = [[make_batch(2, 1)], [make_batch(1, 2)]]  # the second leaves a process without images


def compiled_steps_of_a_process():
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module, **options: compile_module(module, backend="aot_eager", **options)
    with joined(started_world()) as world:
        groups = [[share_of(batch, world.rank, world.size) for batch in group] for group in COMPILED]
        return step_by_step(groups, world, "ema", compiled=True)


def test_compiled_steps_of_two_processes_are_those_of_one():
    """One graph, the sum over the processes in it."""
    expected_gradients, expected_values, _, expected_averages = step_by_step(COMPILED, None, "ema")
    for gradients, values, _, averages in in_processes(SIZE, compiled_steps_of_a_process):
        for mine, right in zip(gradients, expected_gradients, strict=True):
            assert_close(mine, right)
        torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-6)
        assert averages == expected_averages


def synchronised_steps_of_a_process():
    """The images that a synchronised layer saw at each of its meetings, and the gradients of the last step."""
    seen = []

    def meet(self, features):
        assert features.dtype == torch.float64
        images = torch.tensor(len(features))
        distributed.all_reduce(images)  # a GPU's statistics; here a process that does not come is waited for, too
        seen.append(int(images))
        return features * self.weight[:, None, None] + self.bias[:, None, None]

    torch.nn.SyncBatchNorm.forward = meet
    torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # refuses the CPU
    with joined(started_world()) as world:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(small_model(norm="batch").double().train())
        stepper = make_stepper(model, world)
        empty = make_batch(0)
        for group in (*GROUPS, [empty, make_batch(1, 1), make_batch(2, 3), empty]):
            stepper.take([share_of(batch, world.rank, world.size) for batch in group])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stepper.own_losses()
        return seen, [p.grad.clone() for p in model.parameters()]


def test_synchronised_layers_meet_where_a_process_has_no_image():
    (seen, gradients), (others, same) = in_processes(SIZE, synchronised_steps_of_a_process)
    assert seen == others == [4, 3, 5, 1, 2, 1, 2, 1, 2, 0]
    assert all(map(torch.equal, gradients, same))
    assert any(gradient.any() for gradient in gradients)


def test_accumulated_batches_are_one_batch(alone):
    two = alone[0][0]
    (one,), *_ = step_by_step([[make_batch(7)]])
    assert_close(one, two)
    (with_none,), *_ = step_by_step([[make_batch(7), make_batch(0)]])
    assert_close(one, with_none)


def fail_in_one_process():
    with joined(started_world()) as world:
        return steps_until_failure(world)


def steps_until_failure(world):
    model = small_model()
    whole = [make_batch(2, first, bad=5) for first in (0, 2, 4, 6)]
    batches = [share_of(batch, world.rank, world.size) for batch in whole]
    batches = [batch._replace(images=[image.float() for image in batch.images]) for batch in batches]
    steps = train_steps(make_stepper(model, world), batches)
    done = [next(steps).step, next(steps).step]
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotFiniteError) as caught:
        next(steps)
    return done, str(caught.value), all(map(torch.equal, before, model.parameters())), caught.value.batches


def test_a_loss_that_is_not_finite_stops_all_processes_with_one_message():
    (first, second) = in_processes(SIZE, fail_in_one_process)
    assert first == second
    done, message, unchanged, batches = first
    assert done == [1, 2]
    assert batches == 2
    assert unchanged
    assert "is not finite at step 3" in message
    assert "images of the batch: 4, 5." in message
    assert "5 has pixels that are not finite" in message


def evaluation(world, data, normalizer):
    """Of images of several sizes, by batches of two."""
    dataset = open_dataset(data, "val")
    model = small_model(len(dataset.class_names), loss_normalizer=normalizer).eval()
    model.score_thresh = 0.0
    load = dataset.__getitem__

    class Cut:
        def __getattr__(self, name):
            return getattr(dataset, name)

        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            image, target = load(index)
            return image[:, : 32 - 8 * index], target

    return evaluate_together(world, model, Cut(), batch_size=2)


def evaluate_in_a_process(data):
    with joined(started_world()) as world:
        return [evaluation(world, data, normalizer) for normalizer in NORMALIZERS]


def test_each_image_is_evaluated_once(data):
    """With the images beside it, and thus the padding, that it has in one process."""
    every = in_processes(SIZE, evaluate_in_a_process, data)
    for normalizer, first, second in zip(NORMALIZERS, *every, strict=True):
        expected = evaluation(World(), data, normalizer)
        assert first.image_ids == expected.image_ids == [1, 2, 3]
        assert first.detections == expected.detections
        assert second.detections == []
        for result in (first, second):
            assert result.images == 3
            assert result.metrics == pytest.approx(expected.metrics, nan_ok=True)
            assert result.losses == pytest.approx(expected.losses, rel=1e-9)


def test_a_large_training_batch_is_not_evaluated_at_once(tmp_path):
    """Eight images at most, however many a step takes."""
    data = generate_shapes(tmp_path / "data", train_images=1, val_images=19, image_size=32)
    dataset = open_dataset(data, "val")
    model = small_model(len(dataset.class_names)).eval()
    sizes = []
    model.backbone.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    evaluate_together(World(), model, dataset, batch_size=32)
    assert sizes == [8, 8, 3]


class Killed(BaseException):
    pass


def train_in_a_process(argv, stop_after):
    """The command; the main process alone may write. `stop_after` checkpoints every process is gone."""
    from retinanet_ext.engine import run_folder, train

    saved = train.Training._save_last
    calls = []

    def save_and_stop(training):
        saved(training)
        calls.append(training.step)
        if len(calls) == stop_after:
            raise Killed

    def refuse(*_, **__):
        raise AssertionError("this process must not write")

    train.Training._save_last = save_and_stop
    train.build_model = build_small_model
    for name in PICTURES:
        module, function = name.split(".")
        setattr(importlib.import_module(f"retinanet_ext.engine.{module}"), function, lambda *_: None)
    if os.environ["RANK"] != "0":
        run_folder.write_atomically = run_folder._append_row = train.save_checkpoint = refuse
        run_folder.RunFolder.add_problems = run_folder.StepLog.__init__ = refuse
    try:
        return main(argv)
    except Killed:
        return calls


def options(data, run):
    shape = "--arch resnet18 --norm group --min-size 32 40 --max-size 64 --anchor-sizes 8 16 32 64 128 --batch-size 3"
    recipe = "--epochs 1 --save-every 1 --ema 0.9 --optimizer sgd --device cpu --workers 0"
    return ["train", str(data), *shape.split(), *recipe.split(), "--run-dir", str(run)]


def rows(path):
    with open(path, newline="") as stream:
        return [{**row, "seconds": ""} for row in csv.DictReader(stream)]


def test_torchrun_trains_and_writes_one_run(data, tmp_path_factory, tmp_path):
    """Also in a checkout, whose package is not compiled."""
    program = Path(sys.executable).with_name("retinanet-ext")
    if not program.is_file():
        pytest.skip("the command retinanet-ext is not installed beside this Python")
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "retinanet_ext").mkdir()
    (checkout / "retinanet_ext" / "__init__.py").write_text("raise ImportError('not compiled')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    process = subprocess.run(
        [*command, "--no-python", str(program), *options(data, tmp_path / "run")],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("2 processes, float32, 1 epochs of 2 steps of 3 images") == 1
    assert process.stdout.count("weights: ") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 3
    assert [row["step"] for row in rows(tmp_path / "run" / "steps.csv")] == ["1", "2"]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {"args.json", "labels.png", "results.png", "PR_curve.png"} <= {path.name for path in tmp_path.glob("run/*")}


def test_two_machines_write_one_run(data, tmp_path):
    """Two agents of torchrun, each in a folder of its own; that of the second machine stays empty."""
    port, folders, agents = free_port(), [tmp_path / "first", tmp_path / "second"], []
    try:
        for rank, folder in enumerate(folders):
            folder.mkdir()
            where = (
                f"--nnodes {SIZE} --nproc-per-node 1 --node-rank {rank} --master-addr 127.0.0.1 --master-port {port}"
            )
            agents.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "torch.distributed.run", *where.split(), "-m", "retinanet_ext"),
                        *(*options(data, "run"), "--preset", "detectron2"),
                    ],
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        outputs = [agent.communicate(timeout=SECONDS) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()  # an agent ends its processes then
                agent.wait(30)
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    (said, _), (said_by_second, _) = outputs
    assert said.count("2 processes, float32, 1 epochs of 2 steps of 3 images") == 1
    own = [line for line in said_by_second.splitlines() if not line.startswith("[Gloo]")]  # as torch 2.10's gloo does
    assert own == []
    assert {path.name for path in folders[0].iterdir()} == {"run"}
    assert not list(folders[1].iterdir())
    assert [row["step"] for row in rows(folders[0] / "run" / "steps.csv")] == ["1", "2"]
    assert json.loads((folders[0] / "run" / "metrics.json").read_text())["images"] == 3


def test_two_processes_that_are_killed_and_resumed_equal_those_that_were_not(data, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert in_processes(SIZE, train_in_a_process, options(data, whole), 0) == [0] * SIZE
    assert in_processes(SIZE, train_in_a_process, options(data, stopped), 1) == [[1]] * SIZE
    assert load_checkpoint(stopped / "weights" / "last.pt")["progress"]["batches"] == 1
    assert in_processes(SIZE, train_in_a_process, ["train", "--resume", str(stopped)], 0) == [0] * SIZE
    for name in ("last.pt", "best.pt"):
        mine, right = (load_checkpoint(run / "weights" / name) for run in (stopped, whole))
        assert all(torch.equal(value, right["model"][key]) for key, value in mine["model"].items())
    assert rows(stopped / "steps.csv") == rows(whole / "steps.csv")


def test_what_torchrun_says():
    assert started_world({}) == World()
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert started_world(said) == World(3, 4, 1, 2)
    assert not World(3, 4, 1, 2).is_main
    with pytest.raises(UsageError, match="expected the integers that torchrun puts into the environment, got RANK='3'"):
        started_world({**said, "LOCAL_RANK": "x"})
    with pytest.raises(UsageError, match=r"expected 0 <= RANK < WORLD_SIZE .* got 3 of 3"):
        started_world({**said, "WORLD_SIZE": "3"})


def test_a_gpu_for_each_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(3, 4, 1, 2).device(torch.device("cuda")) == torch.device("cuda", 1)
    assert World(3, 4, 1, 2).device(CPU) == CPU
    assert World().device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    with pytest.raises(
        SettingError, match="each of several processes takes a GPU of its own: expected cuda, got cuda:0"
    ):
        World(0, 2, 0, 2).device(torch.device("cuda", 0))
    with pytest.raises(SettingError, match="3 processes on this machine, and 2 CUDA devices"):
        World(0, 3, 0, 3).device(torch.device("cuda"))


def test_settings_that_do_not_fit_the_processes(data, tmp_path):
    from retinanet_ext.engine.train import Training

    config = TrainConfig(str(data), batch_size=1, device="cpu")
    with pytest.raises(SettingError, match="batch_size: expected an image for each of 2 processes at least, got 1"):
        Training(config, tmp_path / "run", world=World(0, 2, 0, 2))
    config = TrainConfig(str(data), sync_batch_norm=True, device="cpu")
    with pytest.raises(SettingError, match="sync_batch_norm: is for CUDA devices alone, got cpu"):
        Training(config, tmp_path / "run")
    with pytest.raises(SettingError, match="cuda_graph: is for CUDA devices alone, got cpu"):
        Training(TrainConfig(str(data), cuda_graph=True, device="cpu"), tmp_path / "run")
    with pytest.raises(SettingError, match=r"norm: sync_batch of several processes is for CUDA alone.* got cpu"):
        Training(TrainConfig(str(data), norm="sync_batch", device="cpu"), tmp_path / "run", world=World(0, 2, 0, 2))
    for other in ({"compile": True}, {"accumulate": 2}):
        with pytest.raises(SettingError, match=f"cuda_graph, {next(iter(other))}: a graph holds a whole step"):
            TrainConfig(str(data), cuda_graph=True, **other)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingError, match="sync_batch_norm: needs --norm batch, got group"):
        TrainConfig(str(data), sync_batch_norm=True, norm="group")


def tell_problems(data, folder):
    from retinanet_ext.engine.recorder import Recorder
    from retinanet_ext.engine.run_folder import RunFolder

    with joined(started_world()) as world:
        recorder = Recorder(RunFolder(folder), world, print)
        if world.is_main:
            recorder.begin({}, open_dataset(data))
        problems = [Problem("both.jpg", "", "broken image: x"), Problem(f"{world.rank}.jpg", "", "broken image: x")]
        recorder.broken_images(problems, strict=False)
        recorder.steps(1, 0, torch.device("cpu"))
        row = dict.fromkeys(("classification", "bbox_regression", "foreground", "lr", "mean_seconds_per_step"), 1.0)
        recorder.epoch({"epoch": 1, "step": 1, **row}, 1)
        assert not distributed.is_nccl_available() or distributed.get_backend() == "gloo" or torch.cuda.is_available()


def test_broken_images_of_every_process_are_written_down_once(data, tmp_path):
    in_processes(SIZE, tell_problems, data, tmp_path / "run")
    lines = Path(tmp_path / "run" / "problems.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["0.jpg", "1.jpg", "both.jpg"]
