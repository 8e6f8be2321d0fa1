"""Runs tests in forks of a process that has imported torch: a second or two less for each of the mutants.

Run as a program, it answers requests, a line of JSON each, on standard input and output.
"""

from __future__ import annotations

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
ALL, QUICK, REST = "all", "quick", "rest"
QUICK_SHARE = 0.3
NOTHING_TO_RUN = 5  # pytest's status


class Observer:
    """A pytest plugin: gives the tests the mutated modules, runs the quickest first and reports each.

    ``part``: all tests; or "quick", those that together take three tenths of the time; or "rest", the others.
    """

    def __init__(self, libraries: dict[str, str], seconds: dict[str, float], part: str, report):
        self.libraries = libraries
        self.seconds = seconds
        self.part = part
        self.report = report

    def pytest_collection_modifyitems(self, config, items):
        for plugin in config.pluginmanager.get_plugins():
            if hasattr(plugin, "build_test_module"):  # tests/conftest.py
                plugin.build_test_module = self.load
        of_file: dict[Path, float] = {}
        for item in items:
            of_file[item.path] = of_file.get(item.path, 0.0) + self.seconds.get(item.nodeid, 0.0)
        items.sort(key=lambda item: (of_file[item.path], self.seconds.get(item.nodeid, 0.0)))
        if self.part != ALL:
            until = list(accumulate(self.seconds.get(item.nodeid, 0.0) for item in items))
            quick = sum(time <= QUICK_SHARE * until[-1] for time in until)
            items[:] = items[:quick] if self.part == QUICK else items[quick:]

    def load(self, target: str):
        import importlib.util

        spec = importlib.util.spec_from_file_location(target, self.libraries[target])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.report(loaded=target)
        return module

    def pytest_runtest_logstart(self, nodeid):
        self.report(start=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.report(failed=report.nodeid, why=message.strip().splitlines()[0][:200])
        elif report.when == "call":
            self.report(passed=report.nodeid, seconds=report.duration)


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

            observer = Observer(request["libraries"], request["seconds"], request["part"], report)
            options = ["-q", "--import-mode=importlib", "--capture=sys", "-p", "no:cacheprovider", "--tb=short"]
            status = int(pytest.main(["-x", *options, *request["tests"]], plugins=[observer]))
            report(finished=status)
        finally:
            os._exit(status)
    os.close(writer)
    reply = {"outcome": "crashed", "test": "", "why": "", "seconds": {}, "loaded": []}
    pending = b""
    while True:
        if not select.select([reader], [], [], request["silence"])[0]:
            os.kill(child, signal.SIGKILL)
            reply |= {"outcome": "hung", "why": f"silent for {request['silence']:.0f} s"}
            break
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
            elif "loaded" in message:
                reply["loaded"].append(message["loaded"])
            elif "failed" in message and reply["outcome"] != "failed":
                reply |= {"outcome": "failed", "test": message["failed"], "why": message["why"]}
            elif "finished" in message and reply["outcome"] == "crashed":
                nothing = message["finished"] == NOTHING_TO_RUN and request["part"] != ALL
                reply["outcome"] = "passed" if message["finished"] == 0 or nothing else "error"
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
