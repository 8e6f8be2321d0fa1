"""A program under a time limit, with everything that it starts, for gpu_ring.py.

Compilers run in process groups of their own, daemons in sessions of their own, and either may outlive what started it.
So each program gets a mark in its environment, which its descendants inherit, and by which they are found in /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import BinaryIO

GRACE = 5.0  # seconds at the end of a time limit in which an interrupted program may still write what it has
MARK = "RETINANET_EXT_GPU_RING_STAGE"


def marked_processes(mark: str) -> list[int]:
    """Every process that inherited the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
    return found


def end_processes(mark: str) -> list[int]:
    """Ends the marked processes; returns those that would not die within five seconds."""
    give_up = time.monotonic() + 5
    while left := marked_processes(mark):
        if time.monotonic() > give_up:
            return left
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    return []


def run_process(
    arguments: list[str], folder: Path, environment: dict[str, str], output: BinaryIO, limit: float
) -> tuple[int | str | None, list[int]]:
    """Runs a program in `folder`, for at most `limit` seconds, and ends all that it started.

    Returns:
        The exit status; None where it was stopped at the limit; a text, why, where it could not be started. And the
        processes that could not be ended.
    """
    mark = uuid.uuid4().hex
    grace = min(GRACE, limit / 4)
    status: int | str | None
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment | {MARK: mark},
            start_new_session=True,
        )
    except OSError as error:
        return str(error), []
    try:
        try:
            status = process.wait(limit - grace)
        except subprocess.TimeoutExpired:
            status = None
            # As Ctrl-C would: pytest then reports, and the benchmarks write, what they have so far.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    finally:
        alive = end_processes(mark)
        process.poll()
    return status, alive
