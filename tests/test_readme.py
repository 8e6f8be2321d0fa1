"""What the README shows does what it says, pasted as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## )", README.read_text(encoding="utf-8"), re.M | re.S)[1]


def test_the_drop_in_snippet_runs_as_it_stands():
    (snippet,) = re.findall(r"```python\n(.*?)```", section("Drop in"), re.S)
    before, after = snippet.rsplit("loss = ", 1)
    names = {}
    exec(before, names)
    by_one_hot = names["loss"].item()
    exec("loss = " + after, names)
    torch.testing.assert_close(names["loss"].item(), by_one_hot, rtol=1e-5, atol=0.0)
    names["loss"].backward()
    assert names["logits"].grad.abs().sum() > 0


def test_the_torchvision_snippet_runs_as_it_stands():
    pytest.importorskip("torchvision", reason="the snippet accelerates torchvision's RetinaNet")
    (snippet,) = re.findall(r"```python\n(.*?)```", section("Other people's models"), re.S)
    names = {}
    exec(snippet, names)
    assert type(names["model"]).__name__ == "AcceleratedRetinaNet"
    names["model"].transform.min_size = (64,)
    target = {"boxes": torch.tensor([[5.0, 5, 50, 50]]), "labels": torch.tensor([1])}
    losses = names["model"]([torch.rand(3, 64, 64)], [target])
    assert all(loss.isfinite() for loss in losses.values())
