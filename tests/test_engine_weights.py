"""Training from given weights: whose, what they become, and what a run keeps of them."""

import hashlib
import json
import re

import pytest
import torch
from rank_processes import in_processes

from retinanet_ext import models

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.cli import main  # noqa: E402
from retinanet_ext.data import generate_shapes  # noqa: E402
from retinanet_ext.engine.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from retinanet_ext.engine.config import TrainConfig, resume_config  # noqa: E402
from retinanet_ext.engine.distributed import joined, started_world  # noqa: E402
from retinanet_ext.engine.train import Training  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_pictures")

LAST = "head.classification_head.cls_logits"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=4, val_images=1, image_size=32)


def tiny(data, **changes):
    shape = {"arch": "resnet18", "min_size": (32,), "max_size": 64, "anchor_sizes": (8, 16, 32, 64, 128)}
    recipe = {"epochs": 1, "batch_size": 2, "validate_every": 0, "device": "cpu"}
    return TrainConfig(str(data), **{**shape, **recipe, **changes})


def quiet(_):
    pass


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A ResNet's weights that no seed makes."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    body = models.retinanet_resnet18_fpn(2).backbone.body
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: value + 0.01 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in body.state_dict().items()
    }
    torch.save({**weights, "fc.weight": torch.ones(1000, 512)}, path)
    return path


def body_of(path):
    return {f"backbone.body.{name}": value for name, value in torch.load(path).items() if name != "fc.weight"}


def test_the_backbone_starts_from_a_classifier(data, classifier, tmp_path):
    said = []
    training = Training(tiny(data, weights=str(classifier), ema=0.9), tmp_path / "run", say=said.append)
    plain = Training(tiny(data), tmp_path / "plain", say=quiet)
    expected = {**plain.model.state_dict(), **body_of(classifier)}
    for state in (training.model.state_dict(), training.average.model.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
    [report] = [line for line in said if line.startswith(f"{classifier}: ")]
    assert "tensors of a checkpoint in resnet's layout were loaded" in report
    assert "without a place: fc.weight" in report


def test_other_classes_keep_all_but_the_last_layer(data, tmp_path):
    """From the folder of another run."""
    torch.manual_seed(7)
    sizes = [[size, round(size * 1.26), round(size * 1.587)] for size in (8, 16, 32, 64, 128)]
    source = models.retinanet_resnet18_fpn(9, anchor_sizes=sizes)
    save_checkpoint(tmp_path / "coco" / "weights" / "best.pt", source, {"backbone": "resnet18"}, list("abcdefghi"))
    training = Training(tiny(data, weights=str(tmp_path / "coco")), tmp_path / "run", say=quiet)
    plain = Training(tiny(data), tmp_path / "plain", say=quiet)
    for name, value in training.model.state_dict().items():
        expected = plain.model if name.startswith(LAST) else source
        assert torch.equal(value, expected.state_dict()[name]), name


@pytest.mark.parametrize("preset", [None, "detectron2"])
def test_torchvisions_file_comes_into_the_models_order(preset, data, tmp_path):
    plain = Training(tiny(data, preset=preset), tmp_path / "plain", say=quiet).model
    weights = {name: torch.rand_like(value) for name, value in plain.state_dict().items() if LAST in name}
    torch.save(weights, tmp_path / "theirs.pth")
    training = Training(tiny(data, preset=preset, weights=str(tmp_path / "theirs.pth")), tmp_path / "run", say=quiet)
    for name, value in weights.items():
        classes = len(training.train_set.class_names)
        by_ratio = value.reshape(3, 3, classes, *value.shape[1:])
        expected = value if preset is None else by_ratio.transpose(0, 1).reshape(value.shape)
        assert torch.equal(training.model.state_dict()[name], expected)


def test_a_resumed_run_needs_the_file_no_more(data, classifier, tmp_path):
    weights = tmp_path / "resnet18.pth"
    weights.write_bytes(classifier.read_bytes())
    Training(tiny(data, epochs=2, weights=str(weights)), tmp_path / "whole", say=quiet).fit()

    def stop(training):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Training(tiny(data, epochs=2, weights=str(weights)), run, say=quiet).fit(on_epoch_end=stop)
    assert json.loads((run / "args.json").read_text())["weights"] == str(weights)
    weights.unlink()
    Training(resume_config(run), run, resume=True, say=quiet).fit()
    mine, right = (load_checkpoint(folder / "weights" / "last.pt")["model"] for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(mine[name], value) for name, value in right.items())


def test_a_run_without_a_checkpoint_starts_from_the_file_again(data, classifier, tmp_path):
    run = tmp_path / "run"
    Training(tiny(data, weights=str(classifier)), run, say=quiet)
    resumed = Training(resume_config(run), run, resume=True, say=quiet).model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in body_of(classifier).items())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"fc.weight": torch.zeros(2)}, "expected names of a RetinaNet .* or of a ResNet, got fc.weight"),
        ({"layer1.0.conv1.weight": torch.zeros(2)}, "none of the checkpoint's weights fits this model"),
        (None, "no such file"),
        ("text", "holds no weights"),
    ],
)
def test_a_file_that_does_not_do_leaves_nothing_behind(content, text, data, tmp_path, capsys):
    path = tmp_path / "some.pth"
    if content is not None:
        torch.save(content, path)
    arguments = f"train {data} --arch resnet18 --device cpu --weights {path} --run-dir {tmp_path / 'run'}"
    assert main(arguments.split()) == 1
    said = capsys.readouterr().err
    assert str(path) in said
    assert said.count("some.pth") == 1
    assert re.search(text, said), said
    # What was wrong with the data set may have been written down before the model was made.
    assert {path.name for path in tmp_path.glob("run/*")} <= ({"problems.txt"} if "fits" in text else set())


def test_a_run_folder_without_weights(data, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder without weights/best\.pt"):
        Training(tiny(data, weights=str(tmp_path / "empty")), tmp_path / "run", say=quiet)


def digest(value):
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()


def weights_of_a_process(data, classifier, folder):
    """Only the main process finds the file."""
    with joined(started_world()) as world:
        weights = str(classifier if world.is_main else folder / "elsewhere.pth")
        training = Training(tiny(data, weights=weights), folder / "run", say=quiet, world=world)
        return {name: digest(value) for name, value in training.model.state_dict().items()}


def test_every_process_has_the_main_ones_weights(data, classifier, tmp_path):
    first, second = in_processes(2, weights_of_a_process, data, classifier, tmp_path)
    assert first == second
    for name, value in body_of(classifier).items():
        assert first[name] == digest(value), name
