"""The script of the GPU ring, without a GPU: its stages are replaced by small programs that fail, hang or print."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu_ring.py")
sys.path.insert(0, str(SCRIPT.parent))

import gpu_ring  # noqa: E402


def plain(ring, status, log):
    """The judge of a program: its exit status, and its last line as the summary."""
    return ("passed" if status == 0 else "failed"), log.splitlines()[-1]


def stage(name, program, *arguments, most=60.0, least=0.0, judge=plain):
    """A stage that runs a Python program."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return gpu_ring.Stage(name, f"about {name}", least, most, lambda ring: gpu_ring.Command(command), judge)


@pytest.fixture
def run(tmp_path):
    """Runs a ring of the given stages in this process: its exit status, and the results it wrote."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*stages, options=()):
        status = gpu_ring.main(["--out", str(tmp_path / "out"), *options], stages)
        (results,) = (tmp_path / "out").glob("gpu-ring-*")
        return status, json.loads(results.read_text())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_failing_stage_stops_no_other_and_shows_in_the_exit_status(run, tmp_path, capsys):
    status, results = run(
        stage("first", "print('fine')"),
        stage("second", "import sys; print('this went wrong'); sys.exit(3)"),
        stage("third", "print('fine too')"),
    )
    assert status == results["exit_status"] == 1
    assert [(s["name"], s["status"], s["summary"]) for s in results["stages"]] == [
        ("first", "passed", "fine"),
        ("second", "failed", "this went wrong"),
        ("third", "passed", "fine too"),
    ]
    assert (tmp_path / "out/second.log").read_text().endswith("this went wrong\n")
    printed = capsys.readouterr().out
    assert "--- the end of second.log" in printed
    table = printed[printed.index("stage ") :].splitlines()[1:4]
    assert [line.split()[:2] for line in table] == [["first", "passed"], ["second", "failed"], ["third", "passed"]]


def test_whatever_goes_wrong_around_a_stage_the_next_has_its_turn(run):
    def broken(*_):
        raise KeyError("unexpected")

    cannot_prepare = gpu_ring.Stage("prepare", "", 0, 60, broken, plain)
    not_there = gpu_ring.Stage("start", "", 0, 60, lambda ring: gpu_ring.Command(["/no/such/program"]), plain)
    status, results = run(cannot_prepare, not_there, stage("judge", "", judge=broken), stage("last", "print(2)"))
    assert status == 1
    assert [s["status"] for s in results["stages"]] == ["failed", "failed", "failed", "passed"]
    summaries = [s["summary"] for s in results["stages"]]
    assert summaries[0] == "not started: KeyError('unexpected')"
    assert "/no/such/program" in summaries[1]
    assert summaries[2] == "ended with status 0, and its results cannot be read: KeyError('unexpected')"


# Deaf to Ctrl-C. Its child has a process group of its own, as a build tool gives its compilers, and its grandchild a
# session of its own, as a daemon has.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
program, pids, depth = sys.argv[1], sys.argv[2], int(sys.argv[3])
if depth:
    apart = {"preexec_fn": os.setpgrp} if depth == 2 else {"start_new_session": True}
    subprocess.Popen([sys.executable, "-c", program, program, pids, str(depth - 1)], **apart)
with open(pids, "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(600)
"""


def test_a_time_limit_ends_a_stage_with_all_its_processes(run, tmp_path):
    pids = tmp_path / "pids"
    hangs = stage("hangs", STUBBORN, STUBBORN, pids, 2, most=5.0)
    status, results = run(hangs, stage("next", "print('fine')"))
    assert status == 1
    assert [s["status"] for s in results["stages"]] == ["timeout", "passed"]
    assert results["stages"][0]["summary"] == "stopped at its limit of 5 s"
    started = [int(line) for line in pids.read_text().split()]
    assert len(started) == 3
    assert not any(map(is_alive, started))


def test_what_a_stage_leaves_behind_is_ended_too(run, tmp_path):
    pids = tmp_path / "pids"
    leave = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[1], sys.argv[2], '0'], start_new_session=True)\n"
        "while not (os.path.exists(sys.argv[2]) and open(sys.argv[2]).read()): time.sleep(0.02)\n"
        "print('done')"
    )
    _, results = run(stage("leaves", leave, STUBBORN, pids))
    assert results["stages"][0]["status"] == "passed"
    assert not is_alive(int(pids.read_text()))


def test_a_stopped_stage_may_first_say_what_it_has(run, tmp_path):
    """Interrupted as by Ctrl-C: pytest then prints its summary, and the benchmarks write their results."""
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(600)\n")
    program = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    _, results = run(stage("slow", program, test, most=8.0, judge=gpu_ring.judge_tests))
    assert results["stages"][0]["summary"] == "stopped at its limit of 8 s; until then 1 passed"


def test_the_ring_ends_in_time_whatever_its_stages_take():
    """Every stage takes all that it may, or a little of it: none gets less than its least, and all end in time."""
    for share in (1.0, 0.5, 0.01):
        for minutes in (gpu_ring.MINUTES, 2.0, 30.0):
            seconds = 0.0
            for position, each in enumerate(gpu_ring.STAGES):
                limit = gpu_ring.time_limit(gpu_ring.STAGES[position:], minutes, seconds)
                assert each.least * minutes / gpu_ring.MINUTES - 1e-6 <= limit <= each.most * minutes / gpu_ring.MINUTES
                seconds += limit * share
            assert seconds <= minutes * 60 + 1e-6
    assert gpu_ring.MINUTES < 9


def test_a_stage_without_time_is_not_started_and_counts_as_failed(run, tmp_path):
    hangs = stage("hangs", STUBBORN, STUBBORN, tmp_path / "pids", 0, most=1e6)
    late = stage("late", "print('fine')", most=1e6)
    status, results = run(hangs, late, options=["--minutes", "0.03"])
    assert status == 1
    assert [s["status"] for s in results["stages"]] == ["timeout", "timeout"]
    assert results["stages"][1]["summary"] == "not started: the time for all stages is used up"


READ_RESULTS = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
(file,) = out.glob("gpu-ring-*")  # no second file that is being written
results = json.loads(file.read_text())
assert results["exit_status"] is None
print(*[f"{s['name']} {s['status']}" for s in results["stages"]], sep=", ")
"""


def test_results_are_whole_after_every_stage(run, tmp_path):
    _, results = run(
        stage("first", "print('fine')"),
        stage("second", READ_RESULTS, tmp_path / "out"),
        stage("third", READ_RESULTS, tmp_path / "out"),
    )
    assert [s["summary"] for s in results["stages"]] == ["fine", "first passed", "first passed, second passed"]
    assert results["date"].startswith("20")
    assert {"gpu", "driver", "commit", "environment", "seconds", "library"} <= results.keys()


def test_an_interrupted_ring_ends_its_stage_and_keeps_its_results(tmp_path):
    pids, out = tmp_path / "pids", tmp_path / "out"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import gpu_ring, test_gpu_ring as t\n"
        "stages = t.stage('first', 'print(1)'), t.stage('hangs', t.STUBBORN, t.STUBBORN, sys.argv[3], 2)\n"
        "sys.exit(gpu_ring.main(['--out', sys.argv[2]], stages))"
    )
    ring = subprocess.Popen([sys.executable, "-c", program, str(SCRIPT.parent), str(out), str(pids)])
    while not pids.exists() or len(pids.read_text().splitlines()) < 3:
        assert ring.poll() is None
        time.sleep(0.05)
    ring.send_signal(signal.SIGTERM)
    assert ring.wait(60) == 130
    assert not any(is_alive(int(line)) for line in pids.read_text().split())
    (file,) = out.glob("gpu-ring-*")
    results = json.loads(file.read_text())
    assert results["exit_status"] == 130
    assert [s["name"] for s in results["stages"]] == ["first"]


def test_only_picks_stages_in_their_order_and_the_environment_always_runs(run):
    stages = [stage(name, "print(1)") for name in ("environment", "build", "tests", "large")]
    _, results = run(*stages, options=["--only", "large,build"])
    assert [s["name"] for s in results["stages"]] == ["environment", "build", "large"]


def test_mistakes_in_the_options(capsys):
    for options, message in (
        (["--only", "tests,speed"], "there is no stage speed; the stages are environment, build, tests"),
        (["--minutes", "0"], "--minutes must be above 0, and is 0.0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            gpu_ring.main(options)
        assert message in capsys.readouterr().err


def test_list_names_every_stage(capsys):
    assert gpu_ring.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    gates = ["graphs", "sync", "identity", "large", "runs"]
    assert listed == ["environment", "build", "tests", *gates, *tools, "benchmarks"]


def test_without_a_gpu_every_stage_says_why_it_is_skipped(tmp_path):
    """The real stages."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--out", "out", "--commit", "abc"]
    ring = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ring.returncode == 3, ring.stdout + ring.stderr
    (file,) = (tmp_path / "out").glob("gpu-ring-*.json")
    results = json.loads(file.read_text())
    assert results["commit"] == "abc"
    assert results["gpu"] is None
    environment, build, *others = results["stages"]
    assert environment["status"] == "passed"
    assert environment["summary"].startswith("no GPU: torch 2.")
    assert build["summary"].startswith("no GPU to build for, and no TORCH_CUDA_ARCH_LIST: torch 2.")
    assert len(others) == len(gpu_ring.STAGES) - 2
    for record in others:
        assert record["status"] == "skipped"
        assert record["summary"] == environment["summary"]


@pytest.fixture
def ring(tmp_path):
    """A ring on a machine with a GPU and everything else, as far as its facts go."""
    ring = gpu_ring.Ring(gpu_ring.parse_options(["--out", str(tmp_path)], gpu_ring.STAGES))
    packages = dict.fromkeys(["pytest", "pytest-benchmark", "hypothesis", *gpu_ring.TRAIN_PACKAGES], "1.0")
    ring.facts = {"gpu": "a GPU", "capability": "9.0", "packages": packages, "nvcc": "release 13.0"}
    ring.facts["compute_sanitizer"] = "/bin/sanitizer"
    ring.library = tmp_path / "site/retinanet_ext"
    return ring


def prepare(ring, name):
    return next(each for each in gpu_ring.STAGES if each.name == name).prepare(ring)


def test_what_is_missing_is_the_reason_of_a_skip(ring):
    ring.facts["packages"] |= dict.fromkeys(["pytest-benchmark", *gpu_ring.TRAIN_PACKAGES])
    ring.facts["compute_sanitizer"] = None
    for name, reason in (("benchmarks", "pytest-benchmark is not installed"), ("memcheck", "is not on the PATH")):
        with pytest.raises(gpu_ring.Skip, match=reason):
            prepare(ring, name)
    with pytest.raises(gpu_ring.Skip, match="pillow and faster-coco-eval and matplotlib and tqdm is not installed"):
        prepare(ring, "runs")
    prepare(ring, "tests")
    ring.library, ring.no_library = None, "the stage `build` left no library"
    with pytest.raises(gpu_ring.Skip, match="the stage `build` left no library"):
        prepare(ring, "tests")


def test_commands(ring):
    assert ring.variables()["PYTHONPATH"].split(os.pathsep)[0] == str(ring.library.parent)
    memcheck, racecheck = prepare(ring, "memcheck"), prepare(ring, "racecheck")
    assert memcheck.arguments[:3] == ["/bin/sanitizer", "--tool", "memcheck"]
    assert memcheck.variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert racecheck.variables == {}
    build = prepare(ring, "build")
    assert build.variables == {"RETINANET_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert ring.library is None  # until it is built anew
    ring.library = ring.out
    benchmarks = prepare(ring, "benchmarks").arguments
    assert benchmarks[benchmarks.index("--results") + 1] == str(ring.out / f"{ring.stem}-benchmarks.json")
    ring.options.quick = True
    assert "--benchmark" not in prepare(ring, "benchmarks").arguments
    with pytest.raises(gpu_ring.Skip, match="--quick"):
        prepare(ring, "racecheck")


def test_a_library_that_loads_is_not_built(ring):
    ring.options.library = str(ring.library)
    with pytest.raises(gpu_ring.Skip, match="is taken, and loads"):
        prepare(ring, "build")
    ring.library = None  # what the first stage leaves where it does not load
    assert prepare(ring, "build").arguments[-3:] == ["-q", "build_ext", "--inplace"]


def test_every_mark_belongs_to_one_stage():
    """And to the sanitizer's, where it is marked so."""
    expressions = [text for name, text in gpu_ring.SELECTIONS.items() if name != "sanitizer"]
    for gate, sanitizer in itertools.product(["", *gpu_ring.GATES], [False, True]):
        marks = dict.fromkeys(gpu_ring.GATES, False) | {"cuda": True, "sanitizer": sanitizer, gate: True}
        assert sum(eval(text, {}, marks) for text in expressions) == 1
        assert eval(gpu_ring.SELECTIONS["sanitizer"], {}, marks) == sanitizer


COLLECT = """
import json, pathlib, pytest, sys

class Found:
    def pytest_collection_finish(self, session):
        self.tests = [item.nodeid for item in session.items]

selected = {}
for name, expression in json.loads(sys.argv[1]).items():
    found = Found()
    assert pytest.main([*sys.argv[2:], "-m", expression], plugins=[found]) == 0, expression
    selected[name] = found.tests
pathlib.Path("selected.json").write_text(json.dumps(selected))
"""


def test_every_cuda_test_runs_in_one_stage(tmp_path):
    """As pytest selects them. The sanitizer's are some of them, run once more."""
    files = gpu_ring.marked_files()
    assert str(SCRIPT.with_name("test_focal_loss_cuda.py")) in files
    assert str(Path(__file__)) not in files
    arguments = gpu_ring.pytest_command("--collect-only", "-qq", *files)[3:]
    command = [sys.executable, "-c", COLLECT, json.dumps({"every": "cuda", **gpu_ring.SELECTIONS}), *arguments]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    selected = json.loads((tmp_path / "selected.json").read_text())
    every, sanitizer = selected.pop("every"), selected.pop("sanitizer")
    assert all(selected.values())
    assert sanitizer
    assert set(sanitizer) <= set(every)
    stages = Counter(test for tests in selected.values() for test in tests)
    assert [test for test, count in stages.items() if count > 1] == []
    assert stages.keys() == set(every)


TESTS = {
    "passed": ("def test_a(): pass\ndef test_b(): pytest.skip('no such thing')", ("passed", "1 passed, 1 skipped")),
    "failed": ("def test_a(): assert False\ndef test_b(): pass", ("failed", "1 failed, 1 passed")),
    "all skipped": (
        "@pytest.mark.parametrize('n', range(3))\ndef test_a(n): pytest.skip('needs a thing')",
        ("skipped", "every test: needs a thing"),
    ),
    "none": ("", ("failed", "no test was selected")),
    "broken": ("import no_such_module", ("failed", "1 error")),
}


@pytest.mark.parametrize("name", TESTS)
def test_how_a_stage_of_tests_is_judged(run, tmp_path, name):
    code, (status, summary) = TESTS[name]
    file = tmp_path / "test_it.py"
    file.write_text(f"import pytest\n{code}\n")
    program = "import pytest, sys; sys.exit(pytest.main(['-ra', '-p', 'no:cacheprovider', sys.argv[1]]))"
    _, results = run(stage(name, program, file, judge=gpu_ring.judge_tests))
    record = results["stages"][0]
    assert (record["status"], record["summary"]) == (status, summary)
    assert record["skipped_tests"] == {"passed": {"no such thing": 1}, "all skipped": {"needs a thing": 3}}.get(
        name, {}
    )


PASSED, FAILED = "===== 16 passed in 9.31s =====\n", "===== 2 failed, 14 passed in 9.31s =====\n"
SANITIZER = {
    "clean": (0, PASSED + "========= ERROR SUMMARY: 0 errors\n", "passed", "0 errors; 16 passed"),
    "errors": (86, PASSED + "========= ERROR SUMMARY: 3 errors\n", "failed", "3 errors; 16 passed"),
    "a test failed": (1, FAILED + "========= ERROR SUMMARY: 0 errors\n", "failed", "0 errors; 2 failed, 14 passed"),
    "no hazards": (
        0,
        PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
        "passed",
        "0 hazards displayed (0 errors, 0 warnings); 16 passed",
    ),
    "a warning": (
        0,
        PASSED + "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n",
        "failed",
        "1 hazard displayed (0 errors, 1 warning); 16 passed",
    ),
    "refused": (
        1,
        "========= COMPUTE-SANITIZER\n========= Device not supported\n" + FAILED,
        "skipped",
        "compute-sanitizer refuses this machine: Device not supported",
    ),
    "no summary": (-9, PASSED, "failed", "compute-sanitizer left no summary (status -9); 16 passed"),
}


@pytest.mark.parametrize("name", SANITIZER)
def test_how_a_sanitizer_is_judged(ring, name):
    status, log, *verdict = SANITIZER[name]
    assert gpu_ring.judge_sanitizer(ring, status, log) == tuple(verdict)
