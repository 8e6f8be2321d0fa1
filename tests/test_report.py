"""docs/performance.md is written by `python -m benchmarks.report` from the results files alone."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # for this test alone: the package under test is the installed one
    return importlib.import_module("benchmarks.report")


@pytest.fixture
def folder(tmp_path):
    def timing(median, rounds=9):
        return {"median": median, "minimum": median, "maximum": median, "rounds": rounds}

    def result(case, ours, peers, **details):
        return {"case": case, "ours": timing(ours), "peers": peers, "skipped": {}, "details": details}

    machine = {
        "processor": "A processor",
        "processors": 2,
        "torch_threads": 1,
        "torch": "2.11.0",
        "torchvision": "0.26.0",
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
    }
    results = [
        result("nms 1000", 0.5, {"torchvision": timing(2.0), "compiled": timing(0.25)}),
        result("nms 5000", 0.00001234, {"torchvision": timing(1234.0)}),
        result("detect small", 3.0, {}),
    ]
    content = {"date": "2026-01-02T03:04:05+00:00", "machine": machine, "results": results}
    (tmp_path / "some-cpu.json").write_text(json.dumps(content))
    return tmp_path


def test_the_page_says_what_the_results_files_say_without_importing_the_package():
    code = (
        "import sys; from benchmarks.report import main; status = main(['--check']);"
        "assert not {'retinanet_ext', 'torch', 'matplotlib'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_page_that_is_not_current_is_an_error(report, monkeypatch, tmp_path, folder, capsys):
    page = tmp_path / "page.md"
    page.write_text("Prose.\n\n<!-- cases some-cpu: nms 1000 -->\n<!-- end -->\n\nMore.\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "RESULTS", folder)
    assert report.main(["--check"]) == 1
    assert "run python -m benchmarks.report" in capsys.readouterr().err
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("Prose.\n\n<!-- cases")
    assert text.endswith("<!-- end -->\n\nMore.\n")
    assert "| `nms` 1000 | 0.5 | 2 (4×) | 0.25 (0.5×) |" in text


def test_curves_are_drawn_from_the_results(report, folder):
    points = []
    for x, peer in ((10, 2.0), (100, None)):
        timing = {"median": x / 10, "minimum": 1.0, "maximum": 1.0, "rounds": 9}
        details = {"curve": "nms of N boxes", "axis": "boxes N", "x": x}
        sides = {} if peer is None else {"torchvision": {**timing, "median": peer}}
        skipped = {} if sides else {"torchvision": "left out beyond 10: seconds"}
        points.append({"case": f"{x}", "ours": timing, "peers": sides, "skipped": skipped, "details": details})
    content = json.loads((folder / "some-cpu.json").read_text())
    (folder / "curves.json").write_text(json.dumps({**content, "results": points[::-1]}))
    page = "<!-- scaling curves -->\n<!-- end -->\n"
    text = report.fill(page, folder)
    assert "![nms of N boxes](images/scaling-nms-of-n-boxes.png)\n\n- torchvision: left out beyond 10" in text
    (drawn,) = report.draw(text, folder, folder / "images")
    assert drawn == folder / "images" / "scaling-nms-of-n-boxes.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_memory_is_drawn_where_the_results_say_it(report, folder):
    plots = importlib.import_module("benchmarks.report_plots")
    timing = {"median": 1.0, "minimum": 1.0, "maximum": 1.0, "rounds": 9}
    point = {"ours": timing, "peers": {"torchvision": timing}, "details": {"axis": "boxes N", "x": 10}}
    held = {**point, "peak_bytes": {"ours": 0, "torchvision": 3 << 20, "other": None}}
    assert plots.mebibytes(point) == {}
    assert plots.mebibytes(held) == {"ours": 1.0, "torchvision": 3.0}
    widths = []
    for number, points in enumerate(([point], [held])):
        path = folder / f"{number}.png"
        plots.draw_curve("nms", points, "caption", path)
        assert plots.digest_in(path) == plots.digest("nms", points, "caption")
        widths.append(int.from_bytes(path.read_bytes()[16:20], "big"))
    assert widths[1] == 2 * widths[0]


def test_where_a_peer_was_timed_once(report, folder):
    content = json.loads((folder / "some-cpu.json").read_text())
    for result, x in zip(content["results"], (10, 1000, 10_000), strict=True):
        result["details"] = {"curve": "nms", "axis": "boxes N", "x": x}
        result["peers"] = {"torchvision": {**result["ours"], "rounds": 9 if x == 10 else 1}}
    (folder / "some-cpu.json").write_text(json.dumps(content))
    assert report.scaling("some-cpu", folder) == (
        "![nms](images/scaling-nms.png)\n\n- torchvision: timed once at boxes N = 1,000 and 10,000\n"
    )


def test_a_plot_of_other_results_is_an_error(report, folder, monkeypatch, capsys):
    content = json.loads((folder / "some-cpu.json").read_text())
    for result, x in zip(content["results"], (10, 100, 1000), strict=True):
        result["details"] = {"curve": "nms of N boxes", "axis": "boxes N", "x": x}
    path = folder / "some-cpu.json"
    path.write_text(json.dumps(content))
    for name, value in (("PAGE", folder / "page.md"), ("RESULTS", folder), ("IMAGES", folder / "images")):
        monkeypatch.setattr(report, name, value)
    report.PAGE.write_text("<!-- scaling some-cpu -->\n<!-- end -->\n")
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    content["results"][0]["ours"]["median"] *= 2  # which no line of the page shows
    path.write_text(json.dumps(content))
    assert report.main(["--check"]) == 1
    picture = report.IMAGES / "scaling-nms-of-n-boxes.png"
    assert capsys.readouterr().err.startswith(f"{picture}: not what the results files say")
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    picture.write_bytes(picture.read_bytes()[:60])
    assert report.main(["--check"]) == 1
    picture.unlink()
    assert report.main(["--check"]) == 1


def test_plots_without_matplotlib(report, folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(report.ReportError, match="pip install matplotlib"):
        report.draw("", folder, folder / "images")


def test_rows_in_the_order_of_the_patterns(report, folder):
    text = report.cases("some-cpu: detect*, nms*", folder)
    header, _, *rows = text.splitlines()
    assert header == "| case, milliseconds | ours | torchvision | compiled |"
    assert rows == [
        "| `detect` small | 3 |  |  |",
        "| `nms` 1000 | 0.5 | 2 (4×) | 0.25 (0.5×) |",
        "| `nms` 5000 | 0.0000123 | 1234 (100000000×) |  |",
    ]


def test_why_a_peer_is_absent(report, folder):
    content = json.loads((folder / "some-cpu.json").read_text())
    for result, reasons in zip(content["results"], ({"apex": "not there"}, {}, {"compiled": "breaks"}), strict=True):
        result["skipped"] = {"mmcv": "mmcv is not installed", **reasons}
    (folder / "some-cpu.json").write_text(json.dumps(content))
    text = report.cases("some-cpu", folder)
    assert text.split("Not beside ours:\n\n")[1].splitlines() == [
        "- apex (`nms`): not there",
        "- compiled (`detect`): breaks",
        "- mmcv: not installed",
    ]
    assert "apex" not in report.cases("some-cpu: detect*", folder)


def test_memory_in_whole_megabytes(report, folder):
    content = json.loads((folder / "some-cpu.json").read_text())
    for result, own in zip(content["results"], (3 << 20, 9, None), strict=True):
        result["peak_bytes"] = {"ours": own, **dict.fromkeys(result["peers"], 48 << 20)}
    (folder / "some-cpu.json").write_text(json.dumps(content))
    header, _, *rows = report.memory("some-cpu: nms*, detect*", folder).splitlines()
    assert header == "| case, MiB | ours | torchvision | compiled |"
    assert rows == ["| `nms` 1000 | 3 | 48 (16×) | 48 (16×) |", "| `nms` 5000 | 0 | 48 |  |"]
    with pytest.raises(report.ReportError, match="detect\\*: these results say nothing of memory"):
        report.memory("some-cpu: detect*", folder)


def test_the_machine_and_the_day_stand_with_the_figures(report, folder):
    assert report.machine("some-cpu", folder) == (
        "A processor; 2 cores, 1 thread; torch 2.11.0, torchvision 0.26.0; 2026-01-02, commit 012345678; medians of 9 "
        "rounds, the sides in turns; [results](../benchmarks/results/some-cpu.json).\n"
    )


def test_one_case_in_several_runs(report, folder):
    content = json.loads((folder / "some-cpu.json").read_text())
    for result in content["results"]:
        result["copy_gb_per_s"] = 12.3
    (folder / "before.json").write_text(json.dumps(content))
    content["results"][0]["ours"]["median"] = 1.0
    content["results"][0]["peers"].pop("compiled")
    (folder / "after.json").write_text(json.dumps(content))
    header, _, before, after = report.runs("before, after: nms 1000", folder).splitlines()
    assert header == "| run | processor | copy, GB/s | ours, milliseconds | torchvision | compiled |"
    assert before == ("| [before](../benchmarks/results/before.json) | A processor | 12 | 0.5 | 2 (4×) | 0.25 (0.5×) |")
    assert after.endswith(" | 12 | 1 | 2 (2×) |  |")
    with pytest.raises(report.ReportError, match="before: 0 cases are called 'nms'"):
        report.runs("before: nms", folder)


def test_differences_of_pairs(report, folder):
    for seed, (own, theirs) in enumerate(((0.5, 0.51), (0.53, 0.51), (0.5, 0.5))):
        sides = {"retinanet_ext": {"AP": own, "AP50": 0.5}, "torchvision": {"AP": theirs, "AP50": 0.75}}
        (folder / f"pair{seed}.json").write_text(json.dumps({"recipe": {"seed": seed}, "machine": {}, **sides}))
    header, _, *rows = report.differences("pair0, pair1, pair2", folder).splitlines()
    assert header.startswith("| ours less torchvision's, 3 pairs | mean | its standard error |")
    # -0.01, 0.02 and 0: a sample's standard deviation of 0.01528, by the root of 3
    assert rows[0] == "| AP | +0.0033 | 0.0088 | -0.010 to +0.020 | 1 | 1 |"
    assert rows[1] == "| AP50 | -0.2500 | 0.0000 | -0.250 to -0.250 | 3 | 0 |"


def test_twins(report, folder):
    side = {"AP": 0.51, "AP50": 0.8729, "AP75": 0.5}
    content = {"recipe": {"seed": 3}, "machine": {}, "one": side, "one, last places changed": {**side, "AP75": 0.528}}
    (folder / "twins.json").write_text(json.dumps(content))
    lines = report.twins("twins", folder).splitlines()
    assert lines[0] == "| seed 3 | AP | AP50 | AP75 |"
    assert lines[2:] == ["| one | 0.510 | 0.873 | 0.500 |", "| one, last places changed | 0.510 | 0.873 | 0.528 |"]


@pytest.fixture
def predicted(report, monkeypatch, tmp_path):
    """predicted(rows, key=...): the table of a prediction at 2 bytes and 3 × 4 × 0.5 / 1000 slots a picosecond."""

    def write(rows, **others):
        rates = {
            "memory": {"per_picosecond": 2, "unit": "bytes", "from": "a copy"},
            "special_functions": {"per_picosecond": 1, "unit": "results", "from": "a guess"},
            "issue": {"multiprocessors": 3, "a_clock": 4, "gigahertz": 0.5, "unit": "slots", "from": "lanes"},
        }
        shown = {
            "columns": {key: key for row in rows for key in row} | {"predicted": "ps", "bound": "by"},
            "rows": rows,
        }
        content = {"gpu": "a GPU", "rates": rates, "tables": {"some": {**shown, **others}}}
        (tmp_path / "gpu.json").write_text(json.dumps(content))
        monkeypatch.setattr(importlib.import_module("benchmarks.report_predictions"), "PREDICTIONS", tmp_path)
        return report.predictions("gpu: some", tmp_path)

    return write


def test_predictions_are_computed_from_what_a_kernel_asks_for(predicted):
    rows = [
        {"kernel": "copy", "bytes": 6, "special_functions": 1, "slots": 0.012},
        {"kernel": "mathematics", "bytes": 6, "special_functions": 3.625},
        {"kernel": "branches", "bytes": 6, "slots": [0.03, 0.024]},
    ]
    columns = {"kernel": "kernel", "memory_time": "memory", "issue_time": "issue", "predicted": "ps", "bound": "by"}
    text = predicted(rows, columns=columns, decimals={"memory_time": 1, "issue_time": 1, "predicted": 2}, note="So.")
    title, _, header, _, *lines = text.splitlines()
    assert title == "Predicted for a GPU, not measured:"
    assert header == "| kernel | memory | issue | ps | by |"
    assert lines == [
        "| copy | 3.0 | 2.0 | 3.00 | memory |",
        "| mathematics | 3.0 |  | 3.63 | special functions |",  # half is rounded up
        "| branches | 3.0 | 5.0 / 4.0 | 5.00 | issue |",
        "",
        "So.",
    ]


def test_what_a_prediction_says_is_not_computed(predicted):
    rows = [
        {"case": "large", "megabytes": 6, "memory_time": "1 to 3", "predicted": 1080, "bound": "launches"},
        {"case": "small", "megabytes": 0.5, "bound": "latency"},
    ]
    assert predicted(rows).splitlines()[4:] == [
        "| large | 6 | 1 to 3 | 1,080 | launches |",
        "| small | 0.5 | 0.25 | 0.25 | memory |",
    ]


def test_rates_of_a_gpu(report, predicted, tmp_path):
    predicted([{"bytes": 1}])
    assert report.rates("gpu", tmp_path).splitlines()[2:] == [
        "| memory | 2 bytes | a copy |",
        "| special functions | 1 results | a guess |",
        "| issue | 0.006 slots | 3 multiprocessors × 4 a clock × 0.5 GHz: lanes |",
    ]


def test_pairs_that_matching_looks_at(report, folder):
    shares = {"the box meets the tile": 0.5, "first pass": 0.0482, "second pass": 0.0165}
    counted = [{"image": [64, 96], "anchors": 1234, "boxes": 5, "shares": shares}]
    (folder / "counted.json").write_text(json.dumps({"pairs": counted}))
    assert report.pairs("counted", folder).splitlines() == [
        "| image | boxes | of all pairs: the box meets the tile | first pass | second pass |",
        "| --- | --- | --- | --- | --- |",
        "| 64×96, 1,234 anchors | 5 | 50.0 % | 4.8 % | 1.7 % |",
        "",
        "Counted, not timed: [results](../benchmarks/results/counted.json).",
    ]


def test_goals_are_met_or_missed(report, folder):
    lines = report.goals("some-cpu: nms 1000 >= 4; some-cpu: nms 1000 >= 4.1", folder).splitlines()
    row = "| `nms` 1000 | {}× | 0.5 | 2 (4×) | {} | [results](../benchmarks/results/some-cpu.json) |"
    assert lines[2:] == [row.format("4", "met"), row.format("4.1", "missed")]
    with pytest.raises(report.ReportError, match="expected FILE: CASE >= NUMBER, got 'some-cpu: nms 1000'"):
        report.goals("some-cpu: nms 1000", folder)


def test_images_a_second(report, folder):
    content = json.loads((folder / "some-cpu.json").read_text())
    content["results"] = [{**content["results"][0], "case": "loader, 2 workers", "details": {"images": 32}}]
    content["results"][0]["ours"]["median"] = 250.0
    (folder / "loading.json").write_text(json.dumps(content))
    assert report.images("loading", folder).splitlines()[2:] == ["| loader, 2 workers | 128 |"]


def test_a_row_a_training_run_and_what_they_have_together(report, folder):
    facts = {name: json.loads((folder / "some-cpu.json").read_text())[name] for name in ("date", "machine")}
    for seed, score in ((0, 0.5), (1, 0.25)):
        side = {"AP": score, "AP50": 2 * score, "seconds_per_step_median": 1.5 - score}
        theirs = {**side, "AP": score - 0.125}
        run = {**facts, "recipe": {"seed": seed}, "retinanet_ext": side, "torchvision": theirs}
        (folder / f"run{seed}.json").write_text(json.dumps(run))
    _, _, first, _, mean, extent = report.training("run0, run1", folder).splitlines()
    assert first.split(" | ")[1:] == ["0.500", "0.375", "1.000", "1.000", "1.000", "1.000 |"]
    assert mean.split(" | ")[:3] == ["| mean", "0.375", "0.250"]
    assert extent.split(" | ")[:3] == ["| lowest to highest", "0.250 to 0.500", "0.125 to 0.375"]
    assert "commit 012345678; [results]" in report.machine("run0", folder)


def test_what_a_training_run_holds(report, folder):
    for name, recipe, peaks in (("new", {"seed": 0, "arch": "resnet50"}, (3 << 20, None)), ("old", {"seed": 1}, ())):
        side = {"AP": 0.5, "AP50": 0.75, "seconds_per_step_median": 1.0}
        run = {"recipe": recipe, "retinanet_ext": {**side}, "torchvision": {**side}}
        for key, peak in zip(("retinanet_ext", "torchvision"), peaks, strict=False):
            run[key]["peak_bytes"] = peak
        (folder / f"{name}.json").write_text(json.dumps(run))
    header, _, new, old, *_ = report.training("new, old", folder).splitlines()
    assert header.endswith("| peak memory, MiB, ours | torchvision |")
    assert new.startswith("| 0 (resnet50, [results]")
    assert new.endswith("| 1.000 | 3 |  |")
    assert old.endswith("| 1.000 |  |  |")
    assert "memory" not in report.training("old", folder)


def test_what_the_weights_score_in_the_other_model(report, folder):
    side = {"AP": 0.5, "AP50": 0.75, "seconds_per_step_median": 1.0}
    run = {"recipe": {"seed": 0}, "retinanet_ext": side, "torchvision": {**side, "AP": 0.25}}
    (folder / "old.json").write_text(json.dumps(run))
    assert "other" not in report.training("old", folder)
    run["weights_in_the_other_model"] = {"retinanet_ext": side, "torchvision": {"AP": 0.25, "AP50": 0.7483}}
    (folder / "new.json").write_text(json.dumps(run))
    *_, sentence = report.training("old, new", folder).splitlines()
    assert sentence.endswith("in the other side's model: AP and AP50 differ by 0.0017 at most.")


def test_the_operators_and_their_plain_pytorch(report, folder):
    seconds = {"operators": 0.001, "reference": 0.02}
    images = {
        "images": 2,
        "images_with_the_same_labels_in_the_same_order": 2,
        "detections": 1234,
        "largest_difference_of_a_coordinate": 6e-5,
        "largest_difference_of_a_score": 6e-8,
        "postprocess_seconds_median": seconds,
    }
    steps = {
        "steps": 5,
        "largest_relative_difference_of_a_loss": 2e-7,
        "loss_forward_seconds_median": seconds,
        "loss_backward_seconds_median": {"operators": 0.002, "reference": 0.03},
        "step_seconds_median": {"operators": 1.5, "reference": 1.8},
    }
    (folder / "some.json").write_text(json.dumps({"training": steps, "prediction": images}))
    forward, backward, step, *_ = report.reference("some", folder).splitlines()[2:]
    assert forward == "| matching and both losses of a batch, forward, median | 1 ms | 20 ms (20×) |"
    assert backward == "| their backward pass, median | 2 ms | 30 ms (15×) |"
    assert step == "| a whole training step, median | 1500 ms | 1800 ms (1.2×) |"


def test_the_shares_of_the_operators(report, folder):
    sides = {"ours": {"convolutions": 75.0, "ReLU": 25.0}, "torchvision": {"convolutions": 90.0, "pooling": 110.0}}
    content = json.loads((folder / "some-cpu.json").read_text())
    (folder / "parts.json").write_text(json.dumps({**content, "operators": {"training": sides, "inference": sides}}))
    training, inference = report.operators("parts", folder).split("\n\n")
    assert training.splitlines() == [
        "| training step | ours | torchvision |",
        "| --- | --- | --- |",
        "| convolutions | 75.0 % | 45.0 % |",
        "| ReLU | 25.0 % | 0.0 % |",
        "| pooling | 0.0 % | 55.0 % |",
        "| all, milliseconds | 100 | 200 |",
    ]
    assert inference.startswith("| inference | ours | torchvision |")
    with pytest.raises(report.ReportError, match="some-cpu: measured without --profiler"):
        report.operators("some-cpu", folder)


def test_runs_in_lockstep(report, folder):
    def row(step, **held):
        return {"step": step, **{f"difference_of_the_{name}_over_their_change": value for name, value in held.items()}}

    some = [row(step, weights=step / 8, running_statistics=step / 16) for step in (1, 2)]
    twins = [row(step, weights=step / 8) for step in range(1, 6)]
    for name, precision, rows in (("some", "float64", some), ("twins", "float32", twins)):
        content = {"sides": ["ours", name], "precision": precision, "lockstep": rows}
        (folder / f"{name}.json").write_text(json.dumps(content))
    header, _, *rows = report.lockstep("some, twins", folder).splitlines()
    some_columns = "ours and some, float64: weights | ours and some, float64: running statistics"
    assert header == f"| after step | {some_columns} | ours and twins, float32: weights |"
    cells = ["| 1 | 1.2e-01 | 6.2e-02 | 1.2e-01 |", "| 2 | 2.5e-01 | 1.2e-01 | 2.5e-01 |", "| 5 |  |  | 6.2e-01 |"]
    assert rows == cells


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- cases other: nms* -->\n<!-- end -->\n", "other.json: there is no such results file"),
        ("<!-- cases some-cpu: focal* -->\n<!-- end -->\n", "no case matches 'focal\\*'"),
        ("<!-- chart some-cpu -->\n<!-- end -->\n", "expected one of cases, memory, images, machine"),
        ("<!-- cases some-cpu: nms* -->\n", "1 blocks begin, and 0 end"),
        ("<!-- cases some-cpu: nms* -->\n<!-- end -->\n\n| by | hand |\n", "a table in no block: \\| by \\| hand \\|"),
        ("<!-- predictions other: some -->\n<!-- end -->\n", "other.json: there is no such results file"),
        ("<!-- predictions h200: some -->\n<!-- end -->\n", "h200: expected one of focal losses, .*, got 'some'"),
    ],
)
def test_errors(report, folder, page, message):
    with pytest.raises(report.ReportError, match=message):
        report.fill(page, folder)


def test_the_parts_of_a_step(report, folder):
    sides = {"ours": {"subnets": 12.5, "all": 100.0}, "torchvision": {"subnets": 13.5, "all": 1234.0}}
    content = json.loads((folder / "some-cpu.json").read_text())
    del content["results"]
    (folder / "parts.json").write_text(json.dumps({**content, "rounds": 9, "training": sides, "inference": sides}))
    training, inference = report.profile("parts", folder).split("\n\n")
    assert training.splitlines()[0] == "| training step, milliseconds | ours | torchvision |"
    assert training.splitlines()[2:] == ["| subnets | 12.5 | 13.5 |", "| all | 100 | 1234 |"]
    assert inference.startswith("| inference, milliseconds |")
    assert "medians of 9 rounds" in report.machine("parts", folder)


def test_the_evaluations_rows(report, tmp_path):
    took = {"seconds": 9.5, "processor_seconds": 8.0}
    content = {
        "images": 5000,
        "detections": 500000,
        "objects": 36604,
        "classes": 80,
        "score_detections": took,
        "match_detections": took,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    header, _, *rows = report.evaluation("a", tmp_path).splitlines()
    assert header == "| 5,000 images, 500,000 detections, 36,604 objects, 80 classes | seconds | of the processor |"
    assert rows == ["| `score_detections` | 9.5 | 8 |", "| `match_detections` | 9.5 | 8 |"]
    content.update(pycocotools={"seconds": 80.0, "processor_seconds": 70.0}, machine={"pycocotools": "2.0.11"})
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert report.evaluation("a", tmp_path).splitlines()[-1] == "| pycocotools 2.0.11 | 80 | 70 |"
