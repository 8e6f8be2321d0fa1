"""Mutation proof of the CUDA kernels: without one of its barriers, or with a bound shifted by one, a test must fail.

    python tests/mutate_kernels.py                                  # every kernel: more than an hour on two cores
    python tests/mutate_kernels.py --only focal_loss_kernel.cuh:__syncthreads
    python tests/mutate_kernels.py --list                           # what would be changed, and what is left out

Works on temporary copies. Each mutant (kernel_mutants.py) of each csrc/*/*_kernel.cuh, and of the .cuh headers they
include, is compiled into the emulator modules that include the file, and the tests that use these modules run until one
fails: the quick ones plain; the quick ones with AddressSanitizer and UndefinedBehaviorSanitizer, for the emulator's
buffers have their exact sizes, so that one element too far is an error there; and for survivors all others, plain and
with the sanitizers. A test that hangs has failed. Mutants that change nothing anyone can see are listed, with the
reason, in mutation_exceptions.json. Exit status: 0 when no other mutant survived.

As the tests themselves, it needs the installed package and pip install "retinanet_ext[test]".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from forked_tests import ALL, PLAIN, QUICK, REST, SANITIZED, Server
from kernel_mutants import LeftOut, Mutant, find_mutants

ROOT = Path(__file__).resolve().parents[1]
MODES = (PLAIN, SANITIZED)
# What a mutant meets, one after the other: most die of the first.
STAGES = [(PLAIN, QUICK), (SANITIZED, QUICK), (PLAIN, REST), (SANITIZED, REST)]
EXCEPTIONS = Path(__file__).with_name("mutation_exceptions.json")


@dataclass(frozen=True)
class Module:
    """An emulator module: its name, the headers it includes and the tests that use it."""

    target: str
    source: str
    headers: frozenset[str]
    tests: tuple[str, ...]


def included_headers(root: Path, file: str) -> set[str]:
    """The project's headers that a file includes, directly or not."""
    found: set[str] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', (root / path).read_text(), re.M):
            for folder in (Path(path).parent, Path("csrc"), Path("tests/emulator")):
                header = os.path.normpath(folder / name)
                if (root / header).is_file():
                    if header not in found:
                        found.add(header)
                        waiting.append(header)
                    break
    return found


def find_modules(root: Path) -> list[Module]:
    """The emulator modules; a test file belongs to a module when it names it."""
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.glob("tests/test_*.py"))}
    modules = []
    for path in sorted(root.glob("tests/emulator/*_module.cpp")):
        target = re.search(r"PYBIND11_MODULE\((\w+)", path.read_text())[1]
        source = path.relative_to(root).as_posix()
        tests = tuple(test for test, text in texts.items() if f'"{target}"' in text)
        modules.append(Module(target, source, frozenset(included_headers(root, source)), tests))
    return modules


def kernel_files(root: Path, modules: list[Module]) -> list[str]:
    """The kernels, emulated or not, and the CUDA headers that the emulated ones include."""
    kernels = {path.relative_to(root).as_posix() for path in root.glob("csrc/*/*_kernel.cuh")}
    return sorted(kernels | {header for module in modules for header in module.headers if header.endswith(".cuh")})


def modules_of(file: str, modules: list[Module]) -> list[Module]:
    """The modules that include a file, first the one of the file's own name."""
    own = Path(file).name.replace("_kernel.cuh", "_module.cpp")
    return sorted((m for m in modules if file in m.headers), key=lambda module: Path(module.source).name != own)


def find_all(root: Path, modules: list[Module]) -> tuple[list[Mutant], list[LeftOut]]:
    mutants: list[Mutant] = []
    left_out: list[LeftOut] = []
    files = kernel_files(root, modules)
    callers = "".join((root / path).read_text() for path in [*(m.source for m in modules), *files])
    called = {name for name in re.findall(r"\b(\w+)(?:<[^;(){}]*>)?\(", callers) if callers.count(name) > 1}
    for file in files:
        of_file, without = find_mutants(file, (root / file).read_text(), called)
        mutants += of_file
        left_out += without
    return mutants, left_out


@dataclass
class Result:
    mutant: Mutant
    outcome: str  # killed, survived, does not compile, equivalent
    mode: str = ""
    test: str = ""
    why: str = ""
    seconds: float = 0.0


class Workshop:
    """Temporary copies of the tree, the compiler's command lines, and the unchanged kernels' results."""

    def __init__(self, root: Path, folder: Path, modules: list[Module]):
        self.folder = folder
        self.modules = modules
        self.origin = folder / "origin"
        self._copy(root, self.origin)
        self.commands = {mode: self._compile_commands(mode) for mode in MODES}
        self.libraries: dict[str, dict[str, str]] = {}  # the unchanged kernels', by mode and target
        self.seconds: dict[str, float] = {}  # of each test, plain
        self.proven: set[tuple[str, str]] = set()
        self.locks = {mode: threading.Lock() for mode in MODES}

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        for name in ("csrc", "tests"):
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("CMakeLists.txt", "pyproject.toml"):
            shutil.copy(source / name, target / name)

    def copy(self, name: str) -> Path:
        self._copy(self.origin, self.folder / name)
        return self.folder / name

    def _compile_commands(self, mode: str) -> dict[str, list[str]]:
        """By module source: CMake's own command line, but as quick to compile as the emulator stays quick to run."""
        import pybind11

        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        tools = {name: shutil.which(name, path=path) or name for name in ("cmake", "ninja")}
        build = self.folder / f"cmake_{mode}"
        subprocess.run(
            [
                tools["cmake"],
                f"-S{self.origin}",
                f"-B{build}",
                "-GNinja",
                f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
                f"-DCMAKE_CXX_COMPILER={shutil.which(os.environ.get('CXX', 'c++'))}",
                "-DCMAKE_BUILD_TYPE=Release",
                "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
                "-DRETINANET_EXT_TESTS=ON",
                f"-DRETINANET_EXT_SANITIZE={int(mode == SANITIZED)}",
                f"-DRETINANET_EXT_PYTHON_INCLUDE={sysconfig.get_path('include')}",
                f"-DRETINANET_EXT_PYBIND11_INCLUDE={pybind11.get_include()}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        commands = {}
        for entry in json.loads((build / "compile_commands.json").read_text()):
            arguments = shlex.split(entry["command"])
            arguments = arguments[: arguments.index("-o")]
            arguments = [argument for argument in arguments if not re.fullmatch(r"-(O.|g|W.*)", argument)]
            commands[os.path.relpath(entry["file"], self.origin)] = [*arguments, "-Og", "-w", "-shared"]
        return commands

    def compile(self, tree: Path, module: Module, mode: str) -> tuple[str, str]:
        """Path of the module built from a tree, and the compiler's first error (empty: there was none)."""
        library = tree / f"{module.target}.{mode}.so"
        library.unlink(missing_ok=True)
        command = [a.replace(str(self.origin), str(tree)) for a in self.commands[mode][module.source]]
        command += ["-o", str(library), str(tree / module.source)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        error = re.search(r"error: (.*)", done.stderr)
        return str(library), "" if done.returncode == 0 else error[1] if error else done.stderr[-500:]

    def prove(self, mode: str, part: str) -> dict[str, str]:
        """The unchanged kernels' modules, by target. The first time, they must compile and pass this part of the tests.

        All tests, plain, come first: their times part the quick from the rest in both modes.
        """
        with self.locks[mode]:
            if mode not in self.libraries:
                self.libraries[mode] = self._compile_unchanged(mode)
            if (mode, part) not in self.proven:
                start = time.monotonic()
                count = self._test_unchanged(mode, part)
                self.proven |= {(mode, part)} | ({(mode, QUICK), (mode, REST)} if part == ALL else set())
                print(f"unchanged, {mode}: {count} tests ({part}) pass, {time.monotonic() - start:.0f} s", flush=True)
        return self.libraries[mode]

    def _compile_unchanged(self, mode: str) -> dict[str, str]:
        tree = self.copy(f"unchanged_{mode}")
        libraries = {}
        for module in self.modules:
            libraries[module.target], error = self.compile(tree, module, mode)
            if error:
                raise SystemExit(f"the unchanged {module.target} does not compile ({mode}): {error}")
        return libraries

    def _test_unchanged(self, mode: str, part: str) -> int:
        tree = self.folder / f"unchanged_{mode}"
        server = Server(mode, tree)
        count = 0
        for module in self.modules:
            reply = server.run(
                tree=str(tree),
                tests=module.tests,
                part=part,
                libraries=self.libraries[mode],
                seconds=self.seconds,
                silence=600.0,
            )
            if reply["outcome"] != "passed" or (part == ALL and module.target not in reply["loaded"]):
                raise SystemExit(
                    f"the unchanged kernels do not pass ({mode}, {', '.join(module.tests)}): "
                    f"{reply['outcome']} {reply['test']} {reply['why']}"
                )
            count += len(reply["seconds"])
            if part == ALL:
                self.seconds |= reply["seconds"]
        server.close()
        return count

    @property
    def silence(self) -> float:
        """Seconds after which a test without a word hangs."""
        return 20 + 20 * max(self.seconds.values(), default=0.0)


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
        return result

    def _judge(self, mutant: Mutant) -> Result:
        built: dict[tuple[str, str], str] = {}
        for mode, part in STAGES:
            libraries = self.workshop.prove(mode, part)
            for module in modules_of(mutant.file, self.workshop.modules):
                if (mode, module.target) not in built:
                    library, error = self.workshop.compile(self.tree, module, mode)
                    if error:
                        return Result(mutant, "does not compile", mode, module.target, error)
                    built[mode, module.target] = library
                if mode not in self.servers:
                    self.servers[mode] = Server(mode, self.tree)
                reply = self.servers[mode].run(
                    tree=str(self.tree),
                    tests=module.tests,
                    part=part,
                    libraries={**libraries, module.target: built[mode, module.target]},
                    seconds=self.workshop.seconds,
                    silence=self.workshop.silence,
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
    workshop.prove(PLAIN, ALL)
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
        results = judge_all(Workshop(ROOT, Path(folder), used), tried, options.jobs, show)
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
