"""Progress: a bar on a terminal; elsewhere quiet, but for a line now and then."""

import io
import os
import sys

import pytest
import torch

pytest.importorskip("tqdm", reason="tqdm is not installed")

from retinanet_ext.engine import progress
from retinanet_ext.engine.progress import Progress, memory_held, track


class Clock:
    """`time` of a machine on which every unit of work takes `seconds`."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self):
        return self.now

    def work(self, items):
        for item in items:
            self.now += self.seconds
            yield item


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(seconds=8.0)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_line_now_and_then(clock, capsys):
    with Progress(20, "step", done=2) as bar:
        bar.describe("epoch 1/2")
        for _ in clock.work(range(9)):
            bar.advance(cls="0.7", box="0.3")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    # 72 seconds: after the fourth unit (32 s) and the eighth (64 s).
    assert [line.split(" [")[0] for line in lines] == ["epoch 1/2:  30% 6/20", "epoch 1/2:  50% 10/20"]
    assert all("8.00s/step" in line and "cls=0.7, box=0.3" in line for line in lines)
    assert "00:32<01:52" in lines[0]
    assert not set(err) & {"\r", "\x1b"}


def test_what_is_done_soon_is_quiet(clock, capsys):
    assert list(track([1, 2, 3], "image")) == [1, 2, 3]
    assert list(clock.work(track([1, 2, 3], "image"))) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_tracked_items_are_counted_when_their_work_is_done(clock, capsys):
    list(clock.work(track(range(5), "image")))
    assert capsys.readouterr().err.startswith(" 80% 4/5 [00:32<00:08,  8.00s/image")


def test_a_data_set_that_is_being_opened_says_how_far_it_is(clock, capsys, tmp_path):
    from retinanet_ext.data import generate_shapes, open_dataset

    data = generate_shapes(tmp_path / "data", train_images=5, val_images=1, image_size=32)
    dataset = open_dataset(data, "train", progress=lambda images: clock.work(progress.reading(images)))
    assert len(dataset) == 5
    assert capsys.readouterr().err.startswith("reading the data set:  80% 4/5 [00:32<00:08,  8.00s/image")


def test_on_a_terminal_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3, "step") as bar:
        for _ in clock.work(range(3)):
            bar.advance(cls="0.5")
    assert "3/3" in terminal.getvalue()
    assert "cls=0.5" in terminal.getvalue()
    assert "\n" not in terminal.getvalue().rstrip("\n")


def test_the_memory_of_the_cpu_is_what_is_resident():
    def resident():
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("VmRSS:")) / 2**20

    assert float(memory_held(torch.device("cpu")).removesuffix("G")) == pytest.approx(resident(), abs=0.11)
    held = bytearray(os.urandom(1)) * 400_000_000
    assert float(memory_held(torch.device("cpu")).removesuffix("G")) == pytest.approx(resident(), abs=0.11)
    assert resident() > len(held) / 2**30


def test_the_memory_of_a_gpu_is_the_most_that_was_reserved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", {torch.device("cuda", 1): 7 * 2**29}.__getitem__)
    assert memory_held(torch.device("cuda", 1)) == "3.5G"


def test_the_bar_of_a_training(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    from retinanet_ext.engine.distributed import World
    from retinanet_ext.engine.loop import StepRecord
    from retinanet_ext.engine.recorder import Recorder
    from retinanet_ext.engine.run_folder import RunFolder

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    recorder = Recorder(RunFolder(tmp_path), World(), print)
    device = torch.device("cpu")
    with recorder.steps(2, 0, device), recorder.step_log() as log:
        for step in (1, 2):
            recorder.step(log, StepRecord(step, 0.25, 0.5, 0.75, 12.0, 1e-3, 0.1), epoch=1)
    shown = terminal.getvalue().rpartition("cls=")[2]
    assert shown.startswith("0.250, box=0.500, fg=12, lr=1.0e-03, mem=")
    assert float(shown.split("mem=")[1].split("G")[0]) > 0
