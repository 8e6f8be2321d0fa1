"""Progress: a bar on a terminal; elsewhere quiet, but for a line now and then."""

import io
import sys

import pytest

pytest.importorskip("tqdm", reason="tqdm is not installed")

from retinanet_ext.engine import progress
from retinanet_ext.engine.progress import Progress, track


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
