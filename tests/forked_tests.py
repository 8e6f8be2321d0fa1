"""Runs tests in forks of a process that has imported torch: a second or two less for each of the mutants.

Run as a program, it answers requests, a line of JSON each, on standard input and output.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

PLAIN, SANITIZED = "plain", "sanitized"
ALL, KILLERS, QUICK, REST = "all", "killers", "quick", "rest"
QUICK_SHARE = 0.3
NOTHING_TO_RUN = 5  # pytest's status
PATIENCE = 3  # periods of silence granted to a process that computes little


class Observer:
    """A pytest plugin: gives the tests the mutated modules, runs the quickest first and reports each.

    ``part``: all tests, and each reports the mutants that it reaches; or, of ``only`` where they are given, "killers",
    those that the request names; or, without these, "quick", the tests that together take three tenths of the time, or
    "rest", the others.
    """

    def __init__(self, request: dict, report):
        self.libraries = request["libraries"]
        self.seconds = request["seconds"]
        self.part = request["part"]
        self.killers = request.get("killers", [])
        self.only = request.get("only")
        self.report = report
        self.mutants = request.get("mutants", 0)
        self.reached: list = []  # of each library, where the mutants are noted: a byte for each of their numbers

    def pytest_collection_modifyitems(self, config, items):
        for plugin in config.pluginmanager.get_plugins():
            if hasattr(plugin, "build_test_module"):  # tests/conftest.py
                plugin.build_test_module = self.load
        if self.only is not None:
            items[:] = [item for item in items if item.nodeid in self.only]
        of_file: dict[Path, float] = {}
        for item in items:
            of_file[item.path] = of_file.get(item.path, 0.0) + self.seconds.get(item.nodeid, 0.0)
        items.sort(key=lambda item: (of_file[item.path], self.seconds.get(item.nodeid, 0.0)))
        if self.part != ALL:
            until = list(accumulate(self.seconds.get(item.nodeid, 0.0) for item in items))
            quick = sum(time <= QUICK_SHARE * until[-1] for time in until) if items else 0
            if self.part == KILLERS:
                by_id = {item.nodeid: item for item in items}
                items[:] = [by_id[killer] for killer in self.killers if killer in by_id]
            else:
                part = items[:quick] if self.part == QUICK else items[quick:]
                items[:] = [item for item in part if item.nodeid not in self.killers]

    def load(self, target: str):
        import importlib.util

        spec = importlib.util.spec_from_file_location(target, self.libraries[target])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.report(loaded=target)
        if self.mutants:
            library = ctypes.CDLL(module.__file__)  # as it has been loaded: the same memory
            self.reached.append((ctypes.c_ubyte * (self.mutants + 1)).in_dll(library, "rnx_reached_mutants"))
        return module

    def pytest_runtest_logstart(self, nodeid):
        self.report(start=nodeid)

    def take_reached(self) -> list[int]:
        """Numbers of the mutants reached since the last call."""
        numbers = {number for noted in self.reached for number, is_reached in enumerate(noted) if is_reached}
        for noted in self.reached:
            ctypes.memset(noted, 0, ctypes.sizeof(noted))
        return sorted(numbers)

    def pytest_runtest_logreport(self, report):
        if reached := self.take_reached():
            # What a fixture reaches may serve every test of the file.
            self.report(reached=reached, by=report.nodeid if report.when == "call" else report.nodeid.split("::")[0])
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.report(failed=report.nodeid, why=message.strip().splitlines()[0][:200])
        elif report.when == "call":
            self.report(passed=report.nodeid, seconds=report.duration)


def cpu_seconds(process: int) -> float:
    """What a process has computed so far, its own threads included."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_in_fork(request: dict) -> dict:
    """Runs the tests of a request in a child process and says how they ended."""
    import pytest

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.close(reader)
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(request["tree"])

            def report(**message):
                os.write(writer, json.dumps(message).encode() + b"\n")

            os.environ["RETINANET_EXT_MUTANT"] = str(request.get("mutant", 0))  # tests/emulator/mutants.h
            observer = Observer(request, report)
            options = ["-q", "--import-mode=importlib", "--capture=sys", "-p", "no:cacheprovider", "--tb=short"]
            status = int(pytest.main(["-x", *options, *request["tests"]], plugins=[observer]))
            report(finished=status)
        finally:
            os._exit(status)
    os.close(writer)
    reply = {"outcome": "crashed", "test": "", "why": "", "seconds": {}, "loaded": [], "reached": {}}
    pending = b""
    longest = max(request["seconds"].values(), default=0.0)
    computed, waited = 0.0, 0  # at the last word; periods without one
    while True:
        silence = request["silence"] * (1 + request["seconds"].get(reply["test"], longest))
        if not select.select([reader], [], [], silence)[0]:
            waited += 1
            # On a busy machine, or stopped for a while, it may have had no time to compute.
            if waited < PATIENCE and cpu_seconds(child) - computed < silence / 2:
                continue
            os.kill(child, signal.SIGKILL)
            reply |= {"outcome": "hung", "why": f"silent for {silence:.0f} s"}
            break
        computed, waited = cpu_seconds(child), 0
        received = os.read(reader, 1 << 16)
        if not received:
            break
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "start" in message:
                reply["test"] = message["start"]
            elif "passed" in message:
                reply["seconds"][message["passed"]] = message["seconds"]
            elif "reached" in message:
                reply["reached"].setdefault(message["by"], set()).update(message["reached"])
            elif "loaded" in message:
                reply["loaded"].append(message["loaded"])
            elif "failed" in message and reply["outcome"] != "failed":
                reply |= {"outcome": "failed", "test": message["failed"], "why": message["why"]}
            elif "finished" in message and reply["outcome"] == "crashed":
                nothing = message["finished"] == NOTHING_TO_RUN and request["part"] != ALL
                reply["outcome"] = "passed" if message["finished"] == 0 or nothing else "error"
    reply["reached"] = {by: sorted(numbers) for by, numbers in reply["reached"].items()}
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if reply["outcome"] in ("crashed", "error"):
        log = Path(request["log"]).read_text(errors="replace")
        found = re.search(r"^.*(?:ERROR: AddressSanitizer: |runtime error: )(.*)$", log, re.M)
        number = os.waitstatus_to_exitcode(status)
        reply["why"] = found[1] if found else signal.Signals(-number).name if number < 0 else log[-2000:]
    return reply


def serve() -> None:
    """Answers requests, a line of JSON each, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import hypothesis
    import numpy
    import pytest
    import torch

    import retinanet_ext

    loaded = (hypothesis, numpy, pytest, torch, retinanet_ext)  # what the forks need not import
    answers.write(json.dumps({"ready": len(loaded)}) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(run_in_fork(json.loads(line))) + "\n")
        answers.flush()


class Server:
    """The process that runs tests; with the sanitizers' runtimes preloaded where they are wanted."""

    def __init__(self, mode: str, folder: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if mode == SANITIZED:
            compiler = os.environ.get("CXX", "c++")
            names = ("libasan.so", "libubsan.so", "libstdc++.so")
            runtimes = [subprocess.check_output([compiler, f"-print-file-name={n}"], text=True).strip() for n in names]
            environment |= {
                "LD_PRELOAD": " ".join(runtimes),
                "ASAN_OPTIONS": "detect_leaks=0",
                "RETINANET_EXT_SANITIZE": "1",
            }
        self.log = folder / f"{mode}.log"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{mode}.server.log").open("w"),
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"the test process ended: {Path(self.log.parent, self.log.stem + '.server.log').read_text()}"
            )
        return json.loads(line)

    def run(self, **request) -> dict:
        self.process.stdin.write(json.dumps({"log": str(self.log), **request}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    serve()
