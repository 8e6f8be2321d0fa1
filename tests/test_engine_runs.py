"""Run folders: what goes on with one, what is refused one, and that no command destroys what another wrote."""

import csv
import dataclasses
import json
import math
import os
import shutil

import pytest
import torch

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.cli import main  # noqa: E402
from retinanet_ext.data import Problem, generate_shapes  # noqa: E402
from retinanet_ext.engine.checkpoint import load_checkpoint, load_model  # noqa: E402
from retinanet_ext.engine.config import TrainConfig, resume_config  # noqa: E402
from retinanet_ext.engine.demo import run_demo  # noqa: E402
from retinanet_ext.engine.predict import Prediction, find_images  # noqa: E402
from retinanet_ext.engine.run_folder import RunFolder, RunFolderError, next_run_dir  # noqa: E402
from retinanet_ext.engine.train import Training  # noqa: E402

TINY = [
    *("--arch", "resnet18", "--min-size", "32", "--max-size", "64", "--batch-size", "2", "--device", "cpu"),
    *("--anchor-sizes", "8", "16", "32", "64", "128"),
]

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=4, val_images=2, image_size=32)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "train"
    assert main(["train", str(data), "--epochs", "1", "--run-dir", str(run_dir), *TINY]) == 0
    return run_dir


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(capsys, *argv):
    """Exit status, standard output, standard error."""
    status = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_best_follows_the_training_where_validation_has_nothing_to_count(tmp_path, capsys):
    data = generate_shapes(tmp_path / "data", train_images=4, val_images=2, image_size=32)
    json_file = data / "annotations" / "instances_val.json"
    content = json.loads(json_file.read_text())
    json_file.write_text(json.dumps({**content, "annotations": []}))
    assert main(["train", str(data), "--epochs", "2", "--run-dir", str(tmp_path / "run"), *TINY]) == 0
    out = capsys.readouterr().out
    assert out.count("no object to count") == 1
    assert out.count("AP -  AP50 -\n") == 2
    best, last = (load_checkpoint(tmp_path / "run" / "weights" / name) for name in ("best.pt", "last.pt"))
    assert best["epoch"] == 2
    assert best["best"] is None
    assert all(torch.equal(value, last["model"][name]) for name, value in best["model"].items())


def test_best_is_kept_where_a_later_validation_has_nothing_to_count(trained, tmp_path, monkeypatch):
    from retinanet_ext.engine import rank_evaluation

    shutil.copytree(trained, tmp_path / "run")
    evaluate = rank_evaluation.evaluate

    def without_truth(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        result.metrics["AP"] = math.nan
        return result

    monkeypatch.setattr(rank_evaluation, "evaluate", without_truth)
    config = resume_config(tmp_path / "run", epochs=2)
    Training(config, tmp_path / "run", resume=True, say=lambda _: None).fit()
    assert load_checkpoint(tmp_path / "run" / "weights" / "best.pt")["epoch"] == 1


def test_the_demo_leaves_an_earlier_run_as_it_is(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start({"data": "x"})
    generate_shapes(tmp_path / "run" / "data", train_images=1, val_images=1, image_size=32)
    before = contents(tmp_path / "run")
    with pytest.raises(RunFolderError, match="holds a run already"):
        run_demo(tmp_path / "run", epochs=1, train_images=2, val_images=1, device="cpu")
    assert contents(tmp_path / "run") == before


def test_resume_refuses_options_it_would_not_follow(trained, capsys):
    before = contents(trained)
    status, _, err = run(
        capsys,
        *("train", "--resume", trained, "--scale-lr", "--batch-size", "9", "--norm", "group", "--ema", "0.9"),
        *("--strict", "--epochs", "3", "--device", "cpu", "--workers", "0"),
    )
    assert status == 2
    named = err.split("cannot be changed")[0]
    assert all(option in named for option in ("--scale-lr", "--batch-size", "--norm", "--ema", "--strict"))
    assert "--vflip" not in named
    assert "--epochs" not in named
    assert contents(trained) == before


@pytest.mark.parametrize(
    "option",
    [("--batch-size", "4"), ("--hflip", "0.5"), ("--optimizer", "adamw"), ("--channels-last",), ("--seed", "0")],
    ids=" ".join,
)
def test_resume_refuses_an_option_typed_at_its_default(option, trained, capsys):
    before = contents(trained)
    status, out, err = run(capsys, "train", "--resume", trained, *option)
    assert (status, out) == (2, "")
    assert f"error: {option[0]}: cannot be changed: --resume goes on as the run began" in err
    assert contents(trained) == before


def test_a_run_from_before_some_figures_is_resumed_with_them(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    results, metrics = (tmp_path / "run" / name for name in ("results.csv", "metrics.json"))
    later = ("ARs", "ARm", "ARl")
    with open(results, newline="") as stream:
        (before,) = csv.DictReader(stream)
    assert all(name in before for name in later)
    kept = [name for name in before if name not in later]
    results.write_text("\n".join((",".join(kept), ",".join(before[name] for name in kept))) + "\n")
    content = json.loads(metrics.read_text())
    metrics.write_text(json.dumps({name: value for name, value in content.items() if name not in later}))
    status, out, _ = run(capsys, "train", "--resume", tmp_path / "run", "--epochs", "2")
    assert status == 0
    assert "ARl" in out
    with open(results, newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first == {**before, **dict.fromkeys(later, "")}
    assert all(second[name] for name in ("AP", "AR100"))
    assert list(second) == list(before)
    assert any(second[name] for name in later)


def test_resume_refuses_fewer_epochs_than_the_run_has_finished(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert run(capsys, "train", "--resume", tmp_path / "run", "--epochs", "3")[0] == 0
    before = contents(tmp_path / "run")
    status, out, err = run(capsys, "train", "--resume", tmp_path / "run", "--epochs", "2")
    assert (status, out) == (2, "")
    assert "error: --epochs: the run has finished 3 already, got 2" in err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("command", ["val", "predict"])
def test_results_do_not_go_over_those_of_another_run(command, trained, data, tmp_path, capsys):
    source = data if command == "val" else data / "val"
    argv = (command, trained / "weights" / "best.pt", source, "--device", "cpu", "--run-dir")
    before = contents(trained)
    status, _, err = run(capsys, *argv, trained)
    assert status == 1
    assert f"{trained}: is not empty: choose another --run-dir" in err
    assert contents(trained) == before
    # What a run that was refused for its data left behind is in nobody's way.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "problems.txt").write_text("old\n")
    assert run(capsys, *argv, tmp_path / "out")[0] == 0
    assert "old" not in (tmp_path / "out" / "problems.txt").read_text()
    before = contents(tmp_path / "out")
    assert run(capsys, *argv, tmp_path / "out")[0] == 1
    assert contents(tmp_path / "out") == before


def test_an_evaluation_that_could_read_no_image_has_failed(trained, tmp_path, capsys):
    data = generate_shapes(tmp_path / "data", train_images=1, val_images=1, image_size=32)
    picture = data / "val" / "000001.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-100])
    argv = ("val", trained, data, "--device", "cpu", "--run-dir", tmp_path / "out")
    status, out, err = run(capsys, *argv)
    assert status == 1
    assert "instances_val.json: no image could be read; all problems are in " in err
    assert "AP" not in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["problems.txt"]
    assert "000001.jpg: broken image" in (tmp_path / "out" / "problems.txt").read_text()
    picture.write_bytes(whole)
    assert run(capsys, *argv)[0] == 0


def test_a_run_folder_stands_for_its_weights(trained, data, tmp_path, capsys):
    assert run(capsys, "val", trained, data, "--device", "cpu", "--run-dir", tmp_path / "val")[0] == 0
    shutil.copytree(trained, tmp_path / "run")
    marked = {**load_checkpoint(trained / "weights" / "last.pt"), "class_names": ["a", "b", "c", "d"]}
    torch.save(marked, tmp_path / "run" / "weights" / "last.pt")
    assert load_model(tmp_path / "run")[1] == ["disc", "square", "triangle", "star"]
    (tmp_path / "run" / "weights" / "best.pt").unlink()
    assert load_model(tmp_path / "run")[1] == ["a", "b", "c", "d"]
    argv = ("predict", tmp_path / "run", data / "val", "--device", "cpu", "--no-pictures", "--run-dir")
    assert run(capsys, *argv, tmp_path / "out")[0] == 0
    (tmp_path / "run" / "weights" / "last.pt").unlink()
    status, _, err = run(capsys, *argv, tmp_path / "none")
    assert status == 1
    assert f"{tmp_path / 'run'}: a folder without weights/best.pt and weights/last.pt" in err


def test_two_runs_do_not_get_one_folder(tmp_path):
    parent = tmp_path / "runs"
    assert [next_run_dir(parent, "train").name for _ in range(3)] == ["train", "train2", "train3"]
    assert all((parent / name).is_dir() for name in ("train", "train2", "train3"))
    (parent / "val").write_text("a file is in the way too")
    assert next_run_dir(parent, "val") == parent / "val2"


def test_a_mistake_leaves_no_numbered_folder(trained, data, elsewhere, capsys):
    for argv, status in (
        (("train", "/nowhere"), 1),
        (("train", data, "--lr", "-1"), 2),
        (("val", trained, "/nowhere"), 1),
        (("val", "/nowhere.pt", data), 1),
        (("predict", "/nowhere.pt", data / "val"), 1),
    ):
        assert run(capsys, *argv)[0] == status
        assert not list(elsewhere.glob("runs/*"))
    assert run(capsys, "predict", trained, data / "val", "--device", "cpu", "--no-pictures")[0] == 0
    assert [path.name for path in elsewhere.glob("runs/*")] == ["predict"]


def test_a_run_resumes_from_another_folder(data, tmp_path, elsewhere, monkeypatch, capsys):
    shutil.copytree(data, tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    argv = ("train", "shapes/annotations/instances_train.json", "--images", "shapes/train", "--epochs", "1")
    more = ("--val-data", os.path.join("elsewhere", "..", "shapes"), "--val-images", "shapes/val", *TINY)
    assert run(capsys, *argv, *more, "--run-dir", "run")[0] == 0
    stored = json.loads((tmp_path / "run" / "args.json").read_text())
    assert stored["data"] == str(tmp_path / "shapes" / "annotations" / "instances_train.json")
    assert stored["val_data"] == str(tmp_path / "shapes")
    assert load_checkpoint(tmp_path / "run" / "weights" / "last.pt")["args"]["images"] == stored["images"]
    monkeypatch.chdir(elsewhere)
    status, out, _ = run(capsys, "train", "--resume", os.path.join("..", "run"))
    assert status == 0
    assert "after epoch 1 of 1" in out
    assert json.loads((tmp_path / "run" / "args.json").read_text()) == stored


def test_paths_that_are_not_given_stay_so():
    stored = TrainConfig("x").to_args()
    assert stored == {**dataclasses.asdict(TrainConfig("x")), "data": os.path.abspath("x")}
    assert stored["val_data"] is None


def test_a_list_of_images_that_is_no_text_is_reported(trained, data, tmp_path, capsys):
    bad, good = tmp_path / "bad.txt", tmp_path / "good.txt"
    bad.write_bytes("bild_ä.jpg\n".encode("latin-1"))
    good.write_bytes(b"\xef\xbb\xbf" + str(data / "val" / "000001.jpg").encode() + b"\r\n")
    paths, (problem,) = find_images([bad, good])
    assert paths == [data / "val" / "000001.jpg"]
    assert str(problem).startswith(f"{bad}: broken list: not a text file in UTF-8")
    argv = ("predict", trained, bad, good, "--device", "cpu", "--no-pictures", "--run-dir", tmp_path / "out")
    status, out, err = run(capsys, *argv)
    assert status == 1
    assert "1 images" in out
    assert str(bad) in err


@pytest.mark.parametrize("size", [math.nan, math.inf, 0.0, 0.5, -8.0])
def test_anchor_sizes_that_are_no_sizes(size):
    with pytest.raises(ValueError, match=r"anchor_sizes: expected five sizes of at least 1 pixel, .* got \(8, "):
        TrainConfig("x", anchor_sizes=(8, 16, size, 64, 128))


def test_a_prediction_holds_what_is_used():
    assert {field.name for field in dataclasses.fields(Prediction)} == {"content", "pictures", "problems"}


def test_a_problem_is_written_down_once(tmp_path):
    run = RunFolder(tmp_path)
    problems = [Problem(name, "", "broken image") for name in ("a.jpg", "b.jpg", "ö.jpg")]
    run.add_problems(problems[:2])
    run.add_problems([problems[0], problems[2], problems[2]])
    assert run.problems.read_text(encoding="utf-8").splitlines() == [str(problem) for problem in problems]
    run.problems.unlink()
    run.add_problems([])
    assert run.problems.read_text() == ""
