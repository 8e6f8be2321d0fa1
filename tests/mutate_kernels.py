"""Mutation proof of the CUDA kernels: without one of its barriers, or with a bound shifted by one, a test must fail.

    python tests/mutate_kernels.py -j 2                             # every kernel: half an hour to an hour on two cores
    python tests/mutate_kernels.py --only focal_loss_kernel.cuh:__syncthreads
    python tests/mutate_kernels.py --list                           # what would be changed, and what is left out

Works on temporary copies. Each mutant (kernel_mutants.py) of each csrc/*/*_kernel.cuh, and of the .cuh headers they
include, meets the tests that reach it until one fails: those that killed its like, the quick ones, the others, each
time plain and then with AddressSanitizer and UndefinedBehaviorSanitizer, for the emulator's buffers have their exact
sizes, so that one element too far is an error there. All are compiled at once, each behind a number; what must be
constant is compiled alone. A test that hangs has failed. Mutants that change nothing anyone can see are listed, with
the reason, in mutation_exceptions.json. Exit status: 1 where another one survived, an exception is of no line any
more, or (--check-exceptions) a listed one was killed; else 0.

As the tests themselves, it needs the installed package and pip install "retinanet_ext[test]".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from forked_tests import ALL, KILLERS, PLAIN, QUICK, REST, SANITIZED, Server
from kernel_mutants import Mutant
from mutant_builds import (
    MODES,
    Compiler,
    Module,
    SwitchedTree,
    copy_tree,
    find_all,
    find_modules,
    first_error,
    modules_of,
)

ROOT = Path(__file__).resolve().parents[1]
# What a mutant meets, one after the other: most die of the first.
STAGES = [(mode, part) for part in (KILLERS, QUICK, REST) for mode in MODES]
KILLER_COUNT = 6  # tests of the stage of killers
SILENCE = 20.0  # seconds, and as many times what it takes, after which a test without a word hangs
EXCEPTIONS = Path(__file__).with_name("mutation_exceptions.json")


@dataclass
class Result:
    mutant: Mutant
    outcome: str  # killed, survived, does not compile, equivalent
    mode: str = ""
    test: str = ""
    why: str = ""
    seconds: float = 0.0


class Workshop:
    """Temporary copies of the tree, the modules with all mutants at once, and what is known of the tests."""

    def __init__(self, root: Path, folder: Path, modules: list[Module], mutants: list[Mutant]):
        self.folder = folder
        self.modules = modules
        self.origin = copy_tree(root, folder / "origin")
        self.compiler = Compiler(self.origin, folder)
        self.switched = SwitchedTree(self.compiler, folder / "switched", mutants)
        self.libraries: dict[str, dict[str, str]] = {}  # by mode and target
        self.seconds: dict[str, float] = {}  # of each test, plain
        self.reached: dict[str, set[int]] = {}  # by test, or file where a fixture did: the mutants it comes across
        self.kills: list[tuple[Mutant, str]] = []  # mutants and the tests they died of
        self.locks = {mode: threading.Lock() for mode in MODES}

    def copy(self, name: str) -> Path:
        return copy_tree(self.origin, self.folder / name)

    def prove(self, mode: str) -> dict[str, str]:
        """The modules, by target. The first time, they must compile, and with no mutant chosen pass all their tests."""
        with self.locks[mode]:
            if mode not in self.libraries:
                start = time.monotonic()
                libraries = {module.target: self.switched.build(module, mode) for module in self.modules}
                compiled = time.monotonic()
                count = self._test_unchanged(mode, libraries)
                print(
                    f"unchanged, {mode}: compiled in {compiled - start:.0f} s; "
                    f"{count} tests pass, {time.monotonic() - compiled:.0f} s",
                    flush=True,
                )
                self.libraries[mode] = libraries
        return self.libraries[mode]

    def _test_unchanged(self, mode: str, libraries: dict[str, str]) -> int:
        server = Server(mode, self.switched.tree)
        count = 0
        for module in self.modules:
            reply = server.run(
                tree=str(self.switched.tree),
                tests=module.tests,
                part=ALL,
                mutants=self.switched.most if mode == PLAIN else 0,
                libraries=libraries,
                seconds=self.seconds,
                silence=600.0,
            )
            if reply["outcome"] != "passed" or module.target not in reply["loaded"]:
                raise SystemExit(
                    f"the unchanged kernels do not pass ({mode}, {', '.join(module.tests)}): "
                    f"{reply['outcome']} {reply['test']} {reply['why']}"
                )
            count += len(reply["seconds"])
            if mode == PLAIN:
                self.seconds |= reply["seconds"]
                for by, numbers in reply["reached"].items():
                    self.reached.setdefault(by, set()).update(numbers)
        server.close()
        return count

    def tests_of(self, mutant: Mutant) -> list[str] | None:
        """The tests that reach a mutant's place, the only ones that it can change; None where that is unknown."""
        number = self.switched.numbers.get(mutant)
        if number is None:
            return None
        reaching = {by for by, numbers in self.reached.items() if number in numbers}
        return [test for test in self.seconds if test in reaching or test.split("::")[0] in reaching]

    def killers(self, mutant: Mutant) -> list[str]:
        """Tests that others of its function, then of its file, died of: those that killed most, and their latest."""
        chosen: list[str] = []
        for alike in ("function", "file"):
            counts = Counter(test for other, test in self.kills if getattr(other, alike) == getattr(mutant, alike))
            chosen += [test for test, _ in counts.most_common(KILLER_COUNT // 2) if test not in chosen]
        if self.kills and self.kills[-1][1] not in chosen:
            chosen.append(self.kills[-1][1])
        return chosen[:KILLER_COUNT]


class Worker:
    """One copy of the tree and its test processes."""

    def __init__(self, workshop: Workshop, name: str):
        self.workshop = workshop
        self.tree = workshop.copy(name)
        self.servers: dict[str, Server] = {}

    def judge(self, mutant: Mutant) -> Result:
        start = time.monotonic()
        path = self.tree / mutant.file
        original = path.read_text()
        path.write_text(mutant.apply(original))
        try:
            result = self._judge(mutant)
        finally:
            path.write_text(original)
        result.seconds = time.monotonic() - start
        if result.outcome == "killed":
            self.workshop.kills.append((mutant, result.test))
        return result

    def _judge(self, mutant: Mutant) -> Result:
        alone: dict[tuple[str, str], str] = {}  # libraries of this mutant, where it is not among the others
        killers = self.workshop.killers(mutant)
        only = self.workshop.tests_of(mutant)
        if only == []:
            return Result(mutant, "survived", why="no test reaches it")
        for mode, part in STAGES if killers else STAGES[len(MODES) :]:
            libraries = self.workshop.prove(mode)
            number = self.workshop.switched.numbers.get(mutant)
            for module in modules_of(mutant.file, self.workshop.modules):
                wanted = killers if part == KILLERS else only
                if wanted is not None and not any(test.startswith(module.tests) for test in wanted):
                    continue
                if number is None and (mode, module.target) not in alone:
                    library, stderr = self.workshop.compiler.compile(self.tree, module, mode)
                    if stderr:
                        return Result(mutant, "does not compile", mode, module.target, first_error(stderr))
                    alone[mode, module.target] = library
                if mode not in self.servers:
                    self.servers[mode] = Server(mode, self.tree)
                reply = self.servers[mode].run(
                    tree=str(self.tree),
                    tests=module.tests,
                    part=part,
                    killers=killers,
                    only=only,
                    mutant=number or 0,
                    libraries=libraries | {target: path for (of, target), path in alone.items() if of == mode},
                    seconds=self.workshop.seconds,
                    silence=SILENCE,
                )
                if reply["outcome"] == "error":
                    raise SystemExit(f"{mutant}: the tests could not be run: {reply['why']}")
                if reply["outcome"] != "passed":
                    return Result(mutant, "killed", mode, reply["test"], reply["why"])
        return Result(mutant, "survived")

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


def read_exceptions(path: Path = EXCEPTIONS) -> dict[tuple, str]:
    entries = json.loads(path.read_text()) if path.is_file() else []
    return {
        (entry["file"], entry["function"], entry["line"], entry["becomes"], entry.get("occurrence", 1)): entry["reason"]
        for entry in entries
    }


def is_wanted(mutant: Mutant, only: list[str]) -> bool:
    """FILE[:TEXT]: part of the file's path, and text of the line, before or after, or of the function's name."""
    for wanted in only:
        file, _, text = wanted.partition(":")
        if file in mutant.file and any(text in part for part in (mutant.function, mutant.line, mutant.becomes)):
            return True
    return not only


def judge_all(workshop: Workshop, mutants: list[Mutant], jobs: int, show) -> list[Result]:
    workshop.prove(PLAIN)  # the times of the tests part the quick from the rest
    workers: SimpleQueue[Worker] = SimpleQueue()
    made = [Worker(workshop, f"worker_{i}") for i in range(jobs)]
    for worker in made:
        workers.put(worker)

    def judge(mutant: Mutant) -> Result:
        worker = workers.get()
        try:
            result = worker.judge(mutant)
            show(result)
            return result
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(jobs) as pool, contextlib.ExitStack() as stack:
        for worker in made:
            stack.callback(worker.close)
        try:
            return list(pool.map(judge, mutants))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def summary(results: list[Result]) -> str:
    """A table by file, and every mutant that was not killed."""
    columns = {
        "mutants": lambda r: True,
        "killed": lambda r: r.outcome == "killed",
        "by sanitizer": lambda r: r.outcome == "killed" and r.mode == SANITIZED,
        "equivalent": lambda r: r.outcome == "equivalent",
        "no compile": lambda r: r.outcome == "does not compile",
        "survived": lambda r: r.outcome == "survived",
    }
    width = max(len(r.mutant.file) for r in results)
    lines = [f"{'':{width}}  " + "  ".join(columns)]
    for file in sorted({r.mutant.file for r in results}):
        counts = [sum(map(test, (r for r in results if r.mutant.file == file))) for test in columns.values()]
        lines.append(f"{file:{width}}  " + "  ".join(f"{c:{len(n)}}" for c, n in zip(counts, columns, strict=True)))
    for outcome in ("does not compile", "survived"):
        lines += [f"{outcome.upper()}: {r.mutant} {r.why}" for r in results if r.outcome == outcome]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], metavar="FILE[:TEXT]", help="mutants of these lines alone"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and what is left out, and run nothing")
    parser.add_argument(
        "--check-exceptions", action="store_true", help="run the exceptions too; a killed one is an error"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every mutant's result there")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="mutants at a time (default: 1)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies are removed
    modules = find_modules(ROOT)
    everything, left_out = find_all(ROOT, modules)
    mutants = [mutant for mutant in everything if is_wanted(mutant, options.only)]
    if options.list:
        print(*mutants, *(f"left out: {found}" for found in left_out), sep="\n")
        return 0
    exceptions = read_exceptions()
    stale = sorted(set(exceptions) - {mutant.key for mutant in everything})
    for key in stale:
        print(f"exception for nothing (the line has changed or is gone): {key}", flush=True)
    excepted = [] if options.check_exceptions else [mutant for mutant in mutants if mutant.key in exceptions]
    tried = [mutant for mutant in mutants if mutant not in excepted]
    print(f"{len(mutants)} mutants, {len(excepted)} of them known to be equivalent", flush=True)

    def show(result: Result) -> None:
        by = f" by {result.test} ({result.mode}): {result.why}" if result.test else ""
        print(f"{result.outcome:9} {result.seconds:5.1f} s  {result.mutant}{by}", flush=True)

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate_kernels_") as folder:
        used = [module for module in modules if any(module in modules_of(mutant.file, modules) for mutant in tried)]
        workshop = Workshop(ROOT, Path(folder), used, everything)
        results = judge_all(workshop, tried, options.jobs, show)
    wrong = [r for r in results if r.outcome == "killed" and r.mutant.key in exceptions]
    for result in results:
        if result.outcome == "survived" and result.mutant.key in exceptions:
            result.outcome = "equivalent"
    results += [Result(mutant, "equivalent") for mutant in excepted]
    if options.json:
        rows = [{**vars(result), "mutant": vars(result.mutant)} for result in results]
        options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(summary(results) if results else "no mutant is wanted")
    for result in wrong:
        print(f"NOT EQUIVALENT: {result.mutant} was killed by {result.test}: {result.why}")
    print(f"{time.monotonic() - start:.0f} s")
    return int(bool(stale or wrong or any(result.outcome == "survived" for result in results)))


if __name__ == "__main__":
    sys.exit(main())
