"""The GPU ring of the tests in one command: what only a GPU can show, without a network, in less than nine minutes.

    python tests/gpu_ring.py --out ring

Builds the library for this machine's GPU (or takes one: --library), runs every test marked `cuda`, then the gates on
CUDA graphs, host synchronisation, identical bits and more than 2^31 elements, compute-sanitizer's four tools, and the
benchmarks. Each stage is a process of its own with a log and a time limit. A stage that fails or runs out of time does
not stop the next ones, and one that cannot run here is skipped with its reason. The results, one JSON file with the
date in its name, are written anew after every stage.

Exit status: 0 nothing failed; 1 a stage failed or ran out of time; 3 every stage was skipped, or there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_ring_facts import TRAIN_PACKAGES
from gpu_ring_process import run_process

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
MINUTES = 8.75  # all stages together; --minutes stretches or shortens every limit with it
# What compute-sanitizer prints where it cannot work: under some virtual machines, and on GPUs that it does not know.
REFUSED = re.compile(
    r"^.*(?:device not supported|unsupported (?:device|gpu|driver)|ERR_NVGPUCTRPERM).*$",
    re.IGNORECASE | re.MULTILINE,
)


class Skip(Exception):
    """A stage cannot run here; the text says why."""


@dataclass
class Command:
    arguments: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None  # where it runs; by default an empty folder, so that no checkout is imported by chance


@dataclass
class Record:
    """One stage in the results."""

    name: str
    status: str  # passed, failed, timeout, skipped
    summary: str
    seconds: float = 0.0
    limit: float = 0.0
    log: str | None = None
    command: str | None = None
    skipped_tests: dict[str, int] = field(default_factory=dict)  # reason: how many


Verdict = tuple[str, str]  # status and summary


@dataclass(frozen=True)
class Stage:
    """`least` seconds are kept free for a stage whatever those before it take; `most` is its time limit."""

    name: str
    about: str
    least: float
    most: float
    prepare: Callable[[Ring], Command]  # raises Skip
    judge: Callable[[Ring, int, str], Verdict]  # from the exit status and the log


class Ring:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.started = time.monotonic()
        self.date = datetime.datetime.now(datetime.timezone.utc)
        self.out = Path(options.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.stem = f"gpu-ring-{self.date:%Y-%m-%d-%H%M%S}"
        self.results = self.out / f"{self.stem}.json"
        self.facts_file = self.out / "environment.json"
        self.facts: dict[str, object] = {}
        self.library: Path | None = None  # the package folder under test
        self.no_library = "the stage `environment` found no library"
        self.records: list[Record] = []
        self.exit_status: int | None = None

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def need(self, *packages: str) -> None:
        """Raises Skip where there is no GPU, no library or not the packages that a stage needs."""
        if not self.facts.get("gpu"):
            raise Skip(f"no GPU: {self.facts.get('no_gpu', 'the stage `environment` left no facts')}")
        missing = [name for name in packages if not self.facts["packages"].get(name)]
        if missing:
            raise Skip(f"{' and '.join(missing)} is not installed")
        if self.library is None:
            raise Skip(self.no_library)

    def variables(self) -> dict[str, str]:
        """What the processes of the stages get on top of this one's environment."""
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        variables = {"PYTHONUNBUFFERED": "1", "PATH": os.pathsep.join(path)}
        if self.library is not None:
            python_path = [str(self.library.parent), os.environ.get("PYTHONPATH", "")]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, python_path))
        return variables

    def run(self, stage: Stage, limit: float) -> Record:
        try:
            command = stage.prepare(self)
        except Skip as reason:
            return Record(stage.name, "skipped", str(reason))
        except Exception as error:  # whatever it is, the next stages have their turn
            return Record(stage.name, "failed", f"not started: {error!r}")
        log = self.out / f"{stage.name}.log"
        record = Record(stage.name, "failed", "", limit=round(limit, 1), log=log.name)
        added = self.variables() | command.variables
        shown = {name: value for name, value in added.items() if name not in ("PATH", "PYTHONUNBUFFERED")}
        record.command = " ".join([f"{k}={shlex.quote(v)}" for k, v in shown.items()] + [shlex.join(command.arguments)])
        log.write_text(f"$ {record.command}\n", encoding="utf-8")
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="retinanet_ext-ring-") as empty, log.open("ab") as stream:
            folder = command.folder or Path(empty)
            status, alive = run_process(command.arguments, folder, os.environ | added, stream, limit)
        record.seconds = round(time.monotonic() - begin, 1)
        text = log.read_text(encoding="utf-8", errors="replace")
        record.skipped_tests = skip_reasons(text)
        if isinstance(status, str):
            record.summary = status
        elif status is None:
            record.status = "timeout"
            counts = test_counts(text)
            record.summary = f"stopped at its limit of {limit:.0f} s" + (f"; until then {counts}" if counts else "")
        else:
            try:
                record.status, record.summary = stage.judge(self, status, text)
            except Exception as error:
                record.summary = f"ended with status {status}, and its results cannot be read: {error!r}"
        if alive:
            record.status, record.summary = "failed", f"{record.summary}; processes {alive} could not be ended"
        return record

    def write(self) -> None:
        """Under another name first: whoever reads the results never sees half a file."""
        report = {
            "date": self.date.isoformat(timespec="seconds"),
            "seconds": round(self.seconds(), 1),
            "exit_status": self.exit_status,  # null while the ring runs
            "gpu": self.facts.get("gpu"),
            "driver": self.facts.get("driver"),
            "commit": self.facts.get("commit"),
            "library": str(self.library) if self.library else None,
            "environment": self.facts,
            "stages": [asdict(record) for record in self.records],
        }
        partial = self.results.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, self.results)


def test_counts(log: str) -> str:
    """pytest's last line, such as "3 passed, 1 skipped"; empty where it wrote none."""
    lines = re.findall(r"^(?:=+ )?((?:\d+ [a-z]+(?:, )?)+) in \d+\.\d+s\b.*$", log, re.MULTILINE)
    parts = lines[-1].split(", ") if lines else []
    return ", ".join(part for part in parts if not part.endswith(("deselected", "warning", "warnings")))


def skip_reasons(log: str) -> dict[str, int]:
    """pytest's short summary of skipped tests: how many for each reason."""
    reasons: dict[str, int] = {}
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] (?:\S+:\d+|\S+): (.+)$", log, re.MULTILINE):
        reasons[reason] = reasons.get(reason, 0) + int(count)
    return reasons


def judge_tests(ring: Ring, status: int, log: str) -> Verdict:
    counts = test_counts(log)
    if status == 5:
        return "failed", "no test was selected"
    if status != 0:
        return "failed", counts or f"pytest ended with status {status} and no summary"
    if " passed" not in counts:
        return "skipped", "every test: " + ("; ".join(skip_reasons(log)) or "pytest named no reason")
    return "passed", counts


def judge_sanitizer(ring: Ring, status: int, log: str) -> Verdict:
    refused = REFUSED.search(log)
    if refused:
        return "skipped", f"compute-sanitizer refuses this machine: {refused[0].strip('= ')}"
    found = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: ((\d+) .+)$", log, re.MULTILINE)
    counts = test_counts(log) or "pytest left no summary"
    if not found:
        return "failed", f"compute-sanitizer left no summary (status {status}); {counts}"
    clean = all(int(number) == 0 for _, number in found)
    summary = f"{'; '.join(text for text, _ in found)}; {counts}"
    return "passed" if clean and judge_tests(ring, status, log)[0] == "passed" else "failed", summary


def marked_files() -> list[str]:
    """The test files that hold tests marked `cuda`: others may need packages that are not here."""
    mark = "mark." + "cuda"
    return [str(path) for path in sorted(TESTS.glob("test_*.py")) if mark in path.read_text(encoding="utf-8")]


def pytest_command(*arguments: str) -> list[str]:
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "--color=no"]
    return [sys.executable, "-m", "pytest", *options, "--tb=short", *arguments]


GATES = ("graph", "sync", "identity", "large", "runs")
SELECTIONS = {
    "tests": " and ".join(["cuda", *(f"not {gate}" for gate in GATES)]),
    **{gate: f"cuda and {gate}" for gate in GATES},
    "sanitizer": "cuda and sanitizer",
}


def prepare_tests(selection: str, *packages: str) -> Callable[[Ring], Command]:
    def prepare(ring: Ring) -> Command:
        ring.need("pytest", "hypothesis", *packages)
        return Command(pytest_command("--maxfail=30", "-m", SELECTIONS[selection], *marked_files()))

    return prepare


def prepare_sanitizer(tool: str) -> Callable[[Ring], Command]:
    def prepare(ring: Ring) -> Command:
        ring.need("pytest", "hypothesis")
        if ring.options.quick and tool != "memcheck":
            raise Skip("--quick")
        program = ring.facts["compute_sanitizer"]
        if program is None:
            raise Skip("compute-sanitizer is not on the PATH, nor in CUDA_HOME or /usr/local/cuda")
        # API errors are not reported: torch probes for driver functions that need not be there.
        options = ["--tool", tool, "--target-processes", "all", "--report-api-errors", "no"]
        options += ["--error-exitcode", "86", "--print-limit", "20"]
        tests = pytest_command("--maxfail=5", "-m", SELECTIONS["sanitizer"], *marked_files())
        # Without torch's cache every tensor is an allocation of its exact size, whose bounds the tool knows.
        exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
        return Command([str(program), *options, *tests], exact)

    return prepare


def prepare_environment(ring: Ring) -> Command:
    ring.facts_file.unlink(missing_ok=True)
    candidate = Path(ring.options.library or ROOT / "retinanet_ext").resolve()
    return Command([sys.executable, str(TESTS / "gpu_ring_facts.py"), str(ring.facts_file), str(candidate)])


def judge_environment(ring: Ring, status: int, log: str) -> Verdict:
    try:
        ring.facts = json.loads(ring.facts_file.read_text())
    except (OSError, ValueError) as error:
        return "failed", f"no facts about this machine (status {status}): {error}"
    if ring.options.commit:
        ring.facts["commit"] = ring.options.commit
    if ring.facts.get("library_loads"):
        ring.library = Path(str(ring.facts["library"]))
    else:
        error = ring.facts.get("library_error", f"loading {ring.facts['library']} ended with status {status}")
        ring.no_library = f"no CUDA library: {error}"
    if not ring.facts["gpu"]:
        return "passed", f"no GPU: {ring.facts['no_gpu']}"
    gpu = "{gpu}, compute capability {capability}, driver {driver}".format(**ring.facts)
    return "passed", f"{gpu}, torch {ring.facts['torch']}"


def prepare_build(ring: Ring) -> Command:
    if ring.options.library and ring.library is not None:
        raise Skip(f"{ring.library} is taken, and loads")
    architecture = ring.facts.get("capability") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not architecture:
        raise Skip(f"no GPU to build for, and no TORCH_CUDA_ARCH_LIST: {ring.facts.get('no_gpu', 'no facts')}")
    # What an earlier build left here is not what the next stages are to test.
    ring.library, ring.no_library = None, "the stage `build` left no library"
    variables = {"RETINANET_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": str(architecture)}
    if not ring.facts.get("nvcc") and Path("/usr/local/cuda/bin/nvcc").is_file():  # installed, and not on the PATH
        variables["CUDA_HOME"] = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return Command([sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--inplace"], variables, ROOT)


def judge_build(ring: Ring, status: int, log: str) -> Verdict:
    if status != 0:
        lines = [line for line in log.splitlines() if line.strip()]
        return "failed", lines[-1] if len(lines) > 1 else f"setup.py ended with status {status}"
    ring.library = ROOT / "retinanet_ext"
    info = json.loads((ring.library / "_build_info.json").read_text())
    built = f"CUDA {info['cuda_version']}, {' '.join(info['cuda_archs'])}, against torch {info['torch']}"
    if ring.options.library:
        built += f"; {ring.options.library} does not load here: {ring.facts.get('library_error')}"
    return "passed", built


def prepare_benchmarks(ring: Ring) -> Command:
    ring.need("pytest", "pytest-benchmark")
    timed = [] if ring.options.quick else ["--benchmark", "--quick"]
    results = ["--results", str(ring.out / f"{ring.stem}-benchmarks.json")]
    return Command(pytest_command(str(ROOT / "benchmarks"), *timed, "--device", "cuda", *results))


STAGES = (
    Stage("environment", "GPU, driver, versions, library", 10, 45, prepare_environment, judge_environment),
    Stage("build", "the library for this GPU", 60, 230, prepare_build, judge_build),
    Stage("tests", "every test marked cuda but the gates below", 60, 150, prepare_tests("tests"), judge_tests),
    Stage("graphs", "CUDA graphs, replayed with other inputs", 20, 50, prepare_tests("graph"), judge_tests),
    Stage("sync", "the host never waits for the device", 20, 50, prepare_tests("sync"), judge_tests),
    Stage("identity", "the same bits in 100 runs", 20, 50, prepare_tests("identity"), judge_tests),
    Stage("large", "more than 2^31 elements", 25, 70, prepare_tests("large"), judge_tests),
    Stage(
        "runs", "train, val, predict and export on the GPU", 30, 90, prepare_tests("runs", *TRAIN_PACKAGES), judge_tests
    ),
    *(
        Stage(tool, f"compute-sanitizer: {about}", 25, 75, prepare_sanitizer(tool), judge_sanitizer)
        for tool, about in {
            "memcheck": "accesses out of bounds or misaligned",
            "racecheck": "hazards in shared memory",
            "initcheck": "reads of memory that nothing wrote",
            "synccheck": "barriers",
        }.items()
    ),
    Stage("benchmarks", "every case beside its peers", 80, 190, prepare_benchmarks, judge_tests),
)


def parse_options(arguments: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Exit status: 0 nothing failed; 1 a stage failed or ran out of time; 3 all were skipped, or no GPU.",
    )
    parser.add_argument("--out", default="gpu-ring", help="folder for the logs and the results (default: %(default)s)")
    parser.add_argument("--only", metavar="A,B", help="these stages alone; `environment` always runs")
    parser.add_argument("--library", metavar="DIR", help="a built retinanet_ext package folder, in place of building")
    parser.add_argument("--quick", action="store_true", help="memcheck alone of the four tools, benchmarks once, small")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together (default: %(default)s)")
    parser.add_argument("--commit", help="the commit under test, where the sources come without their repository")
    parser.add_argument("--list", action="store_true", help="name the stages and end")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in stages]
    chosen = options.only.split(",") if options.only else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only: there is no stage {', '.join(unknown)}; the stages are {', '.join(names)}")
    options.chosen = [stage for stage in stages if stage.name in chosen or stage.name == "environment"]
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, and is {options.minutes}")
    return options


def table(records: Sequence[Record]) -> str:
    width = max(len(record.name) for record in records)
    lines = [f"{'stage':<{width}}  {'status':<7}  seconds  summary"]
    lines += [f"{r.name:<{width}}  {r.status:<7}  {r.seconds:7.1f}  {r.summary[:200]}" for r in records]
    return "\n".join(lines)


def report(ring: Ring) -> None:
    for record in ring.records:
        if record.status in ("failed", "timeout") and record.log:
            tail = (ring.out / record.log).read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
            print(f"\n--- the end of {record.log}\n" + "\n".join(tail))
        if record.name == "benchmarks" and record.log:
            log = (ring.out / record.log).read_text(encoding="utf-8", errors="replace")
            print("\n" + "".join(re.findall(r"^=+ ours beside the peers.*?(?=^=)", log, re.MULTILINE | re.DOTALL)))
    print(f"\n{table(ring.records)}")
    for record in ring.records:
        for reason, count in record.skipped_tests.items():
            print(f"{record.name}: {count} tests skipped: {reason}")
    print(f"\n{ring.seconds():.0f} s in all; written to {ring.results}", flush=True)


def time_limit(stages: Sequence[Stage], minutes: float, seconds: float) -> float:
    """Seconds for the first of `stages`, `seconds` after the ring began: at most its own limit, and no more than leaves
    the stages behind it their least."""
    scale = minutes / MINUTES
    kept = sum(later.least for later in stages[1:]) * scale
    return min(stages[0].most * scale, minutes * 60 - seconds - kept)


def run_ring(ring: Ring, stages: Sequence[Stage]) -> int:
    for position, stage in enumerate(stages):
        limit = time_limit(stages[position:], ring.options.minutes, ring.seconds())
        print(f"{ring.seconds():5.0f} s  {stage.name}: {stage.about} (at most {max(limit, 0):.0f} s)", flush=True)
        if limit <= 0:
            record = Record(stage.name, "timeout", "not started: the time for all stages is used up")
        else:
            record = ring.run(stage, limit)
        ring.records.append(record)
        ring.write()
        print(f"{ring.seconds():5.0f} s  {stage.name}: {record.status}: {record.summary}", flush=True)
    if any(record.status in ("failed", "timeout") for record in ring.records):
        return 1
    tested = any(record.status == "passed" and record.name != "environment" for record in ring.records)
    return 0 if tested and ring.facts.get("gpu") else 3


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    options = parse_options(arguments, stages)
    if options.list:
        print("\n".join(f"{stage.name:<12} {stage.about}" for stage in stages))
        return 0
    # A shell starts background jobs with SIGINT ignored, and the stages would inherit that.
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    ring = Ring(options)
    try:
        ring.exit_status = run_ring(ring, options.chosen)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        ring.exit_status = 130
    ring.write()
    if ring.records:
        report(ring)
    return ring.exit_status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # whatever a log holds, the table gets printed
    sys.exit(main())
