"""Checkpoints: whole, atomic, safe to load, and clear about files that are something else."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from full_disk import room_for
from torch import nn

from retinanet_ext.engine.checkpoint import (
    VERSION,
    CheckpointError,
    build_model,
    load_checkpoint,
    load_model,
    remove_temporaries,
    rng_state,
    save_checkpoint,
    set_rng_state,
    temporary_of,
    write_atomically,
)

CONFIG = {
    "arch": "resnet18",
    "num_classes": 2,
    "norm": "batch",
    "min_size": 32,
    "max_size": 64,
    "anchor_sizes": [[8, 10, 12], [16, 20, 25], [32, 40, 50], [64, 80, 101], [128, 161, 203]],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "last.pt"
    torch.manual_seed(0)
    model = build_model(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    save_checkpoint(
        path,
        model,
        CONFIG,
        ["cat", "dog"],
        optimizer=optimizer,
        scheduler=scheduler,
        epoch=3,
        step=7,
        best=0.25,
        args={"seed": 1, "min_size": (32,)},
    )
    return path, model


def test_holds_everything_and_loads_without_running_code(saved):
    path, model = saved
    content = torch.load(path, weights_only=True)
    loaded = load_checkpoint(path)
    assert content.keys() == loaded.keys()
    assert loaded["class_names"] == ["cat", "dog"]
    assert loaded["model_config"] == CONFIG
    assert (loaded["epoch"], loaded["step"], loaded["best"]) == (3, 7, 0.25)
    assert loaded["args"]["seed"] == 1
    assert loaded["scheduler"]["last_epoch"] == 1
    assert loaded["optimizer"]["param_groups"][0]["lr"] == 0.05
    assert set(loaded["rng"]) == {"torch", "cuda", "numpy", "python"}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded["model"][name], value), name


def test_load_model_predicts_as_the_saved_one(saved):
    path, model = saved
    loaded, class_names, _ = load_model(path, score_thresh=0.0)
    assert class_names == ["cat", "dog"]
    assert not loaded.training
    assert loaded.score_thresh == 0.0
    model.eval()
    model.score_thresh = 0.0
    image = torch.rand(3, 40, 50)
    with torch.no_grad():
        expected, got = model([image])[0], loaded([image])[0]
    assert len(expected["scores"]) > 0
    for key in expected:
        assert torch.equal(expected[key], got[key])


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.9, 0.9999])
def test_truncated_file(saved, tmp_path, part):
    content = saved[0].read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=r"cut\.pt: not a checkpoint, or one that was cut short"):
        load_checkpoint(path)


def test_damaged_inside(saved, tmp_path):
    content = bytearray(saved[0].read_bytes())
    content[200:2000] = bytes(1800)
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pt: cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "x.pt"
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint, or one that was cut short"):
        load_checkpoint(path)
    torch.save({"backbone.body.conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"it holds backbone\.body\.conv1\.weight\)\. A bare state dict"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="it holds list"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


class Harmful:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    torch.save({"format": Harmful(tmp_path / "harm")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "harm").exists()


def test_a_pickled_model_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"a pickled object \(torch\.nn\.modules\.linear\.Linear\)") as caught:
        load_checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 200


def test_a_later_format_is_refused(saved, tmp_path):
    content = load_checkpoint(saved[0])
    torch.save({**content, "version": 99}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="checkpoint format 99, and this retinanet_ext reads up to 2"):
        load_checkpoint(tmp_path / "x.pt")


def test_weights_of_another_model_are_refused(saved, tmp_path):
    content = load_checkpoint(saved[0])
    torch.save({**content, "model_config": {**CONFIG, "num_classes": 5}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="the weights do not fit the model they name"):
        load_model(tmp_path / "x.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    write_atomically(path, lambda stream: stream.write(b"old"))

    def fail(stream):
        stream.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_atomically(tmp_path / "a", lambda stream: stream.write(b"x"))
    assert calls[:2] == ["fsync", "replace"]


def test_rng_state_round_trip(tmp_path):
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"backbone: expected one of resnet18, resnet34, .*, got 'vgg'"):
        build_model({**CONFIG, "arch": "vgg"})


def many_weights():
    """A megabyte in so many tensors that most of the time of a checkpoint goes into writing them."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(60))).requires_grad_(False)


def write_for_ever(path, first):
    torch.set_num_threads(1)
    model = many_weights()
    for step in range(first, 1_000_000):
        for parameter in model.parameters():
            parameter.fill_(step)
        save_checkpoint(path, model, {}, ["a"], step=step)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the writing process")
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Again and again, until eight writes have been cut short, which half a file shows, and two have not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no kill is in it, however long a disk takes
    path = tmp_path / "last.pt"
    start = time.monotonic()
    save_checkpoint(path, many_weights(), {}, ["a"])
    seconds, size = time.monotonic() - start, path.stat().st_size
    moments, end = random.Random(0), start + 60
    cut_short, last = 0, 0
    while (cut_short < 8 or last < 2) and time.monotonic() < end:
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(path, last + 1)
            finally:
                os._exit(1)
        temporary = temporary_of(path, child)
        while not temporary.exists() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(moments.random() * 2 * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert set(tmp_path.iterdir()) <= {path, temporary}  # what was left before is gone
        cut_short += temporary.exists() and temporary.stat().st_size < size
        content = load_checkpoint(path)
        assert content["step"] == 0 or all((value == content["step"]).all() for value in content["model"].values())
        assert content["step"] >= last
        last = content["step"]
    assert cut_short >= 8
    assert last >= 2
    save_checkpoint(path, nn.Linear(1, 1), {}, ["a"])
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_nobody_writes_any_more_is_removed(tmp_path):
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    left, bracketed = (temporary_of(tmp_path / name, gone).name for name in ("a", "a[1]"))
    running, other = temporary_of(tmp_path / "a", os.getppid()).name, temporary_of(tmp_path / "b", gone).name
    elsewhere = f".a.another-host-{gone}.tmp"
    strangers = {".a.txt.tmp", f".a.{gone}.tmp", f".a.{gone}", left[1:], left.replace(f"-{gone}", "-1700000000000")}
    kept = {bracketed, running, other, elsewhere, *strangers}
    for name in (*kept, left):
        (tmp_path / name).write_text("x")
    write_atomically(tmp_path / "a", lambda stream: stream.write(b"x"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", *kept}
    write_atomically(tmp_path / "a[1]", lambda stream: stream.write(b"x"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a[1]", *kept} - {bracketed}
    (tmp_path / ".folder.a-1.tmp").mkdir()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a[1]", ".folder.a-1.tmp", *strangers}


def test_an_error_that_is_not_the_disk_s_stays_what_it_was(tmp_path):
    def write(stream):
        raise RuntimeError("not of the disk")

    try:
        raise OSError(25, "of somebody else")
    except OSError:
        with pytest.raises(RuntimeError, match="not of the disk"):
            write_atomically(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9999])
def test_a_full_disk_is_an_error_that_names_the_file(saved, tmp_path, part):
    """Also where torch.save, when it closes its archive, raises an error of its own over that of the disk."""
    content, path = load_checkpoint(saved[0]), tmp_path / "a.pt"
    write_atomically(path, lambda stream: stream.write(b"old"))
    with room_for(int(saved[0].stat().st_size * part)), pytest.raises(OSError, match="File too large") as caught:
        write_atomically(path, lambda stream: torch.save(content, stream))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_old_checkpoints_still_load(tmp_path):
    path = tmp_path / "old.pt"
    save_checkpoint(path, nn.Linear(1, 1), {}, ["a"])
    content = torch.load(path, weights_only=True)
    for name in ("ema", "progress"):
        del content[name]
    torch.save({**content, "version": 1}, path)
    loaded = load_checkpoint(path)
    assert (loaded["ema"], loaded["progress"]) == (None, None)
    assert VERSION == 2
