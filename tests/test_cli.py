"""The command, end to end on a tiny data set: exit status, files, messages."""

import dataclasses
import io
import json
import re
import shlex
import shutil
import sys

import pytest
import torch

for module in ("PIL.Image", "faster_coco_eval", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from retinanet_ext.cli import main, make_parser  # noqa: E402
from retinanet_ext.data import generate_shapes  # noqa: E402
from retinanet_ext.engine.config import TrainConfig  # noqa: E402

TINY = [
    *("--arch", "resnet18", "--min-size", "32", "--max-size", "64", "--batch-size", "2", "--device", "cpu"),
    *("--anchor-sizes", "8", "16", "32", "64", "128"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=4, val_images=2, image_size=32)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "train"
    assert main(["train", str(data), "--epochs", "1", "--run-dir", str(run_dir), *TINY]) == 0
    return run_dir


def run(capsys, *argv):
    """Exit status, standard output, standard error."""
    status = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_writes_a_run(trained):
    assert (trained / "weights" / "best.pt").is_file()
    assert json.loads((trained / "args.json").read_text())["arch"] == "resnet18"


def test_train_resumes_further(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    status, out, _ = run(capsys, "train", "--resume", tmp_path / "run", "--epochs", "2")
    assert status == 0
    assert "after epoch 1 of 2" in out
    assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 3


def test_train_ends_with_the_validation_of_its_best_epoch(trained, tmp_path, monkeypatch, capsys):
    from retinanet_ext.engine import rank_evaluation

    evaluate = rank_evaluation.evaluate
    scores = iter((0.75, 0.25))

    def scored(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        result.metrics["AP"] = result.per_class[0]["AP"] = next(scores)
        return result

    monkeypatch.setattr(rank_evaluation, "evaluate", scored)
    shutil.copytree(trained, tmp_path / "run")
    argv = ("train", "--resume", tmp_path / "run", "--epochs")
    status, out, _ = run(capsys, *argv, "3")
    assert status == 0
    end = out[out.index("validation of epoch 2 of 3, whose weights best.pt holds:") :]
    assert "AP 0.750" in end
    assert "AP 0.250" not in end
    assert f"weights: {tmp_path / 'run' / 'weights' / 'best.pt'} (epoch 2)" in end
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"AP50 {metrics['AP50']:5.3f}" in end
    assert [line.split()[0] for line in end.splitlines()[4:8]] == ["disc", "square", "triangle", "star"]
    assert end.splitlines()[4].split()[3] == "0.750"
    # With no epoch left the table is that of the files.
    status, out, _ = run(capsys, *argv, "3")
    assert status == 0
    assert out.endswith(end)


def test_train_without_validation_ends_without_a_table(data, tmp_path, capsys):
    status, out, _ = run(capsys, "train", data, "--epochs", "1", "--no-val", "--run-dir", tmp_path / "run", *TINY)
    assert status == 0
    assert "validation of epoch" not in out
    assert "best.pt (epoch 1)" in out


def test_val(trained, data, tmp_path, capsys):
    status, out, _ = run(
        capsys, "val", trained / "weights" / "best.pt", data, "--run-dir", tmp_path / "val", "--device", "cpu"
    )
    assert status == 0
    assert "AP50" in out
    assert "triangle" in out
    names = {path.name for path in (tmp_path / "val").iterdir()}
    pictures = {"PR_curve.png", "confusion_matrix.png", "scores.png", "val_batch0_labels.jpg", "val_batch0_pred.jpg"}
    assert names == {"problems.txt", "metrics.json", "per_class.csv", "detections.json", *pictures}
    assert json.loads((tmp_path / "val" / "metrics.json").read_text())["images"] == 2


def test_val_refuses_a_data_set_of_other_classes(trained, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "cells")
    json_file = tmp_path / "cells" / "annotations" / "instances_val.json"
    content = json.loads(json_file.read_text())
    for category in content["categories"]:
        category["name"] = f"cell{category['id']}"
    json_file.write_text(json.dumps(content))
    argv = ("val", trained, tmp_path / "cells", "--run-dir", tmp_path / "val", "--device", "cpu")
    status, out, err = run(capsys, *argv)
    assert status == 1
    assert out == ""
    assert "the model has disc, square, triangle, star; the data set has cell1, cell2, cell3, cell4" in err
    assert not (tmp_path / "val").exists()


def test_predict_on_folder_file_and_list(trained, data, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{data / 'val' / '000002.jpg'}\n")
    status, out, _ = run(
        capsys,
        *("predict", trained / "weights" / "best.pt", data / "val", data / "train" / "000001.jpg"),
        *(tmp_path / "list.txt", "--min-score", "0.001", "--score", "0.005", "--run-dir", tmp_path / "out"),
        *("--device", "cpu"),
    )
    assert status == 0
    assert "4 images" in out
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["000001.jpg", "000001_2.jpg", "000002.jpg", "000002_2.jpg"]
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["disc", "square", "triangle", "star"]
    assert len(content["annotations"]) > 0
    assert {"image_id", "category_id", "bbox", "score", "id"} <= content["annotations"][0].keys()
    assert len(content["images"]) == 4
    confident = [annotation for annotation in content["annotations"] if annotation["score"] >= 0.005]
    assert f"4 images, {len(content['annotations'])} detections, {len(confident)} of score 0.005 or more" in out
    assert "next: no score" not in out


def test_predict_says_where_no_score_is_high_enough(trained, data, tmp_path, capsys):
    argv = ("predict", trained, data / "val", "--min-score", "0.001", "--score", "0.99", "--device", "cpu")
    status, out, _ = run(capsys, *argv, "--run-dir", tmp_path / "out")
    assert status == 0
    best = max(a["score"] for a in json.loads((tmp_path / "out" / "detections.json").read_text())["annotations"])
    assert f"next: no score reaches --score 0.99; the best is {best:.2f}: draw more with a lower one" in out


def test_predict_goes_on_past_an_unreadable_image(trained, data, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    status, out, err = run(
        capsys,
        *("predict", trained / "weights" / "best.pt", tmp_path / "bad.png", tmp_path / "none.png"),
        *(data / "val" / "000001.jpg", "--run-dir", tmp_path / "out", "--device", "cpu"),
    )
    assert status == 1
    assert "1 images" in out
    assert "2 problems, first:" in err
    problems = (tmp_path / "out" / "problems.txt").read_text()
    assert "bad.png: broken image" in problems
    assert "none.png: missing image" in problems


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "/nowhere/at/all"], "/nowhere/at/all: no such file or folder"),
        (["train", "--resume", "/nowhere"], "not a run folder"),
        (["train", "{data}", "--val-split", "no", "--run-dir", "{tmp}"], "--no-val trains without one"),
        (["val", "/nowhere.pt", "{data}"], "/nowhere.pt: no such checkpoint"),
        (["val", "{data}/annotations/instances_val.json", "{data}"], "not a checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_status_1(argv, message, data, trained, tmp_path, capsys):
    places = {"data": data, "tmp": tmp_path / "run", "weights": trained / "weights" / "best.pt"}
    status, _, err = run(capsys, *(argument.format(**places) for argument in argv))
    assert status == 1
    assert message in err
    assert err.startswith(f"retinanet-ext {argv[0]}: error: ")
    assert "Traceback" not in err


TRAIN, VAL, PREDICT = ("train", "{data}"), ("val", "{weights}", "{data}"), ("predict", "{weights}", "{data}/val")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("train",), "DATA is missing"),
        (("train", "x", "--resume", "y"), "--resume takes DATA and --run-dir from the run"),
        (("train", "{data}/annotations/instances_train.json"), "--val-data: expected the validation set, as the json"),
        ((*TRAIN, "--lr", "-1"), "--lr: expected a number > 0, got -1.0"),
        ((*TRAIN, "--epochs", "0"), "--epochs: expected an integer >= 1, got 0"),
        ((*TRAIN, "--hflip", "2"), "--hflip: expected a probability in [0, 1], got 2.0"),
        ((*TRAIN, "--vflip", "nan"), "--vflip: expected a probability in [0, 1], got nan"),
        ((*TRAIN, "--min-size", "64", "0"), "--min-size: expected numbers of pixels >= 1, got 64, 0"),
        ((*TRAIN, "--max-size", "0"), "--max-size: expected an integer >= 1, got 0"),
        (
            (*TRAIN, "--min-size", "200", "400", "--max-size", "300"),
            "--min-size, --max-size: expected the first at most the second, got 200, 400 and 300",
        ),
        ((*TRAIN, "--aspect-ratios", "1", "-2"), "--aspect-ratios: expected numbers > 0, got (1.0, -2.0)"),
        ((*TRAIN, "--anchor-sizes", "8", "16", "32", "64", "0"), "--anchor-sizes: expected five sizes"),
        ((*TRAIN, "--val-every", "-1"), "--val-every: expected a number >= 0, got -1"),
        ((*TRAIN, "--seed", "-1"), "--seed: expected a number >= 0, got -1"),
        ((*TRAIN, "--workers", "-1"), "--workers: expected a number >= 0, got -1"),
        ((*TRAIN, "--device", "abacus"), "--device: expected auto, cpu or cuda[:N], got 'abacus'"),
        ((*VAL, "--batch-size", "0"), "--batch-size: expected an integer >= 1, got 0"),
        ((*VAL, "--workers", "-1"), "--workers: expected an integer >= 0, got -1"),
        ((*VAL, "--device", "abacus"), "--device: expected auto, cpu or cuda[:N], got 'abacus'"),
        ((*PREDICT, "--score", "3"), "--score: expected a score in [0, 1], got 3.0"),
        ((*PREDICT, "--min-score", "-1"), "--min-score: expected a score in [0, 1], got -1.0"),
        ((*PREDICT, "--device", "abacus"), "--device: expected auto, cpu or cuda[:N], got 'abacus'"),
        (("anchors", "{data}", "--max-size", "9"), "--min-size, --max-size: expected the first at most the second"),
        (("bench", "--device", "abacus"), "--device: expected auto, cpu or cuda[:N], got 'abacus'"),
        (("bench", "--seconds", "0"), "--seconds: expected a number > 0, got 0.0"),
        (("demo", "--seed", "-1"), "--seed: expected a number >= 0, got -1"),
        (("demo", "--device", "abacus"), "--device: expected auto, cpu or cuda[:N], got 'abacus'"),
    ],
)
def test_wrong_values_name_their_option_and_leave_nothing(argv, message, data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"data": data, "weights": trained / "weights" / "best.pt"}
    status, out, err = run(capsys, *(argument.format(**places) for argument in argv))
    assert (status, out) == (2, "")
    assert err.startswith(f"retinanet-ext {argv[0]}: error: {message}")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_the_defaults_in_the_help_are_those_of_a_run():
    (commands,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    shown = {}
    for action in commands["train"]._actions:
        if found := re.search(r"\(default: ([^);]*)\)", action.help):
            shown[action.dest] = found[1].split()
    for field in dataclasses.fields(TrainConfig):
        if any(field.default is value for value in (dataclasses.MISSING, None, False)):
            continue
        value = "yes" if field.default is True else field.default
        parts = value if isinstance(value, tuple) else (value,)
        assert shown[field.name] == [part if isinstance(part, str) else f"{part:g}" for part in parts], field.name


def test_predict_on_a_voc_folder_says_where_its_images_are(trained, data, tmp_path, capsys):
    shutil.copytree(data / "val", tmp_path / "voc" / "JPEGImages")
    argv = ("predict", trained, tmp_path / "voc", "--run-dir", tmp_path / "out", "--device", "cpu")
    status, _, err = run(capsys, *argv)
    assert status == 1
    assert f"empty folder: no image in it; the images of a VOC folder are in {tmp_path / 'voc' / 'JPEGImages'}" in err


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("RETINANET_EXT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="/nowhere: no such file or folder"):
        main(["train", "/nowhere"])


def test_a_log_gets_each_line_when_it_is_printed(monkeypatch):
    from retinanet_ext.engine import commands

    log = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(log))
    printed = []

    def run_env(arguments):
        print("one line")
        printed.append(log.getvalue())
        return 0

    monkeypatch.setattr(commands, "run_env", run_env)
    assert main(["env"]) == 0
    assert printed == [b"one line\n"]


def test_a_defect_is_not_hidden(monkeypatch):
    from retinanet_ext.engine import commands

    monkeypatch.setattr(commands, "run_env", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["env"])


def test_out_of_gpu_memory_is_explained(monkeypatch, capsys):
    from retinanet_ext.engine import commands

    def fail(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(commands, "run_train", fail)
    status, _, err = run(capsys, "train", "x")
    assert status == 1
    assert "try a smaller --batch-size" in err


def test_interruption(monkeypatch, data, tmp_path, capsys):
    from retinanet_ext.engine.train import Training

    def interrupt(self):
        raise KeyboardInterrupt

    run_dir = tmp_path / "my run"
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_epoch", interrupt)
        status, _, err = run(capsys, "train", data, "--run-dir", run_dir, "--no-val", "--epochs", "1", *TINY)
    assert status == 130
    program, *argv = shlex.split(err.split("go on with: ")[1])
    assert program == "retinanet-ext"
    status, out, _ = run(capsys, *argv)
    assert status == 0
    assert f"resuming {run_dir} from the start" in out
    assert len((run_dir / "results.csv").read_text().splitlines()) == 2
    assert (run_dir / "weights" / "last.pt").is_file()


@pytest.mark.parametrize("missing", ["PIL", "faster_coco_eval", "matplotlib", "tqdm"])
def test_a_missing_extra_is_named_with_its_command(missing, monkeypatch, data, tmp_path, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = run(capsys, "train", data, "--run-dir", tmp_path / "run", *TINY)
    assert status == 1
    assert 'pip install "retinanet_ext[train]"' in err
    assert {"PIL": "Pillow", "faster_coco_eval": "faster-coco-eval"}.get(missing, missing) in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", ["train", "val", "predict", "export", "anchors", "check-data", "bench", "demo", "env"]
)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_parser().parse_args([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"retinanet-ext {command}" in out


def test_wrong_arguments_are_status_2(capsys, monkeypatch):
    for argv in ([], ["fly"], ["train", "x", "--epochs", "many"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        program = "retinanet-ext train" if "train" in argv else "retinanet-ext"
        assert said.startswith(f"{program}: error: ")
        assert said.endswith(f"(see: {program} --help)\n")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        main(["fly"])
    assert (stopped.value.code, capsys.readouterr().err) == (2, "")


def test_env_prints_problems_and_fails_with_them(monkeypatch, capsys):
    from retinanet_ext import diagnostics

    for problems, expected in ((["no compiler"], 1), ([], 0)):
        monkeypatch.setattr(diagnostics, "environment_report", lambda _problems=problems: ("versions", _problems))
        assert diagnostics.print_report() == expected
        printed = capsys.readouterr().out
        assert run(capsys, "env") == (expected, printed, "")
        assert ("no compiler" in printed) == bool(problems)


def next_command(out):
    """What follows "next:", as the parser understands it, and all that is said there."""
    said = out.split("\nnext:")[1].strip()
    program, *argv = shlex.split(said.splitlines()[0].split(";")[0])
    assert program == "retinanet-ext"
    return make_parser().parse_args(argv), said


def test_every_command_says_what_to_do_next(trained, data, tmp_path, without_pictures_here, monkeypatch, capsys):
    from retinanet_ext import diagnostics
    from retinanet_ext.engine import bench, demo
    from retinanet_ext.engine.bench_cases import make_cases

    one = make_cases(torch.device("cpu"), image=(64, 64))[3]  # box_iou alone
    monkeypatch.setattr(bench, "make_cases", lambda device: [one])
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: demo.DemoResult(tmp_path, 0.4, 0.9, 1.0, ()))
    monkeypatch.setattr(diagnostics, "environment_report", lambda: ("versions", []))
    shutil.copytree(trained, tmp_path / "my run")
    weights = tmp_path / "my run" / "weights" / "best.pt"
    device = ("--device", "cpu")
    calls = {
        "train": (("--resume", tmp_path / "my run"), "predict"),
        "val": ((weights, data, "--run-dir", tmp_path / "my val", *device), "predict"),
        "predict": (
            (weights, data / "val", "--min-score", "0.001", "--score", "0.001", *device, "--run-dir", tmp_path / "p"),
            "export",
        ),
        "anchors": ((data, "--min-size", "64", "--max-size", "64"), "train"),
        "check-data": ((data, "--run-dir", tmp_path / "check"), "anchors"),
        "bench": (("--seconds", "0.001", *device), "demo"),
        "env": ((), "demo"),
        "demo": (("--run-dir", tmp_path / "my demo"), "predict"),
    }
    for command, (argv, then) in calls.items():
        status, out, _ = run(capsys, command, *argv)
        assert status == 0, command
        parsed, said = next_command(out)
        assert parsed.command == then, command
        if command in ("val", "predict"):
            assert parsed.weights == str(weights)
        if command == "val":
            assert said.endswith(f"; {tmp_path / 'my val' / 'scores.png'} shows where --score should lie")
    # An exported file is for other programs: two lines of Python.
    export = ("export", weights, "--format", "torchvision", "--output", tmp_path / "model.pth")
    status, out, _ = run(capsys, *export)
    assert status == 0
    assert "\nuse it:\n" in out
    (commands,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    assert {*calls, "export"} == set(commands)


def test_what_to_do_next_where_something_falls_short(trained, data, tmp_path, monkeypatch, capsys):
    from retinanet_ext import diagnostics
    from retinanet_ext.engine import bench
    from retinanet_ext.engine.bench_cases import Case

    def agree(mine, other):
        raise AssertionError("not equal")

    monkeypatch.setattr(bench, "make_cases", lambda device: [lambda: Case("x", float, float, agree)])
    monkeypatch.setattr(diagnostics, "environment_report", lambda: ("versions", ["no compiler"]))
    status, out, _ = run(capsys, "bench", "--seconds", "0.001")
    assert (status, next_command(out)[0].command) == (1, "env")
    status, out, _ = run(capsys, "env")
    assert (status, next_command(out)[0].command) == (1, "env")
    argv = ("predict", trained, data / "val", "--device", "cpu", "--no-pictures", "--min-score", "0.99", "--run-dir")
    status, out, _ = run(capsys, *argv, tmp_path / "nothing")
    assert status == 0
    assert "\nnext: nothing scores more than --min-score 0.99: try a lower one, or train longer\n" in out
    (tmp_path / "bad.png").write_text("no image")
    argv = ("predict", trained, tmp_path / "bad.png", "--device", "cpu", "--run-dir", tmp_path / "bad")
    status, out, err = run(capsys, *argv)
    assert status == 1
    assert "next:" not in out
    assert err.endswith(f"all in {tmp_path / 'bad' / 'problems.txt'}: mend these files, or leave them out\n")


def test_demo_in_small(tmp_path, capsys):
    """One step on four images, whose losses it makes smaller."""
    from retinanet_ext.data import make_loader, open_dataset
    from retinanet_ext.engine.checkpoint import load_model
    from retinanet_ext.engine.demo import demo_config, run_demo
    from retinanet_ext.engine.train import build_model

    run_dir = tmp_path / "demo"
    result = run_demo(run_dir, epochs=1, train_images=4, val_images=2, device="cpu", seed=1)
    assert 0.0 <= result.ap50 <= 1.0
    assert all(picture.is_file() for picture in result.pictures)
    assert "validation of epoch 1 of 1, whose weights best.pt holds:\nAP " in capsys.readouterr().out

    config = demo_config(run_dir / "data", epochs=1, device="cpu", seed=1)
    trained, names, _ = load_model(run_dir / "weights" / "best.pt")
    torch.manual_seed(config.seed)
    untrained = build_model(config.model_config(len(names)))
    (batch,) = make_loader(open_dataset(run_dir / "data", "train"), 4, train=False)
    with torch.no_grad():
        before, after = (model.train()(batch.images, batch.targets) for model in (untrained, trained))
    for name, loss in before.items():
        assert loss - after[name] > 1e-4, name


def test_demo_fails_if_it_falls_short(monkeypatch, tmp_path, capsys):
    from retinanet_ext.engine import demo

    for ap50, expected in ((0.5, 1), (float("nan"), 1), (0.9, 0)):
        result = demo.DemoResult(tmp_path, 0.4, ap50, 1.0, ())
        monkeypatch.setattr(demo, "run_demo", lambda *args, _result=result, **kwargs: _result)
        status, out, err = run(capsys, "demo", "--run-dir", tmp_path)
        assert status == expected
        assert "retinanet-ext predict" in out
        assert ("below the 0.8" in err) == bool(expected)
