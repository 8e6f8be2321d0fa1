"""`retinanet-ext bench`: what the operators and a small model take on this machine, beside torchvision's."""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from retinanet_ext.diagnostics import processor, version_of

from .bench_cases import Case, make_cases
from .settings import SettingError

# Fewer rounds than this say little; more than this no more.
MIN_ROUNDS, MAX_ROUNDS = 3, 200
# A case ends after so many times its time, even with fewer rounds.
PATIENCE = 3


def run_bench(device: torch.device, *, seconds: float = 3.0, cases: Iterable[Callable[[], Case]] | None = None) -> int:
    """Print a line a case, with the medians of both sides in turns; 1 if a case's results differ, 0 otherwise."""
    if not seconds > 0:
        raise SettingError("seconds", f"expected a number > 0, got {seconds!r}")
    cases = make_cases(device) if cases is None else cases
    print(machine(device))
    print(f"{'milliseconds, median':<44} {'ours':>9} {'torchvision':>12} {'ratio':>7}")
    failed = False
    for make in cases:
        case = make()
        differs = check(case)
        failed = failed or differs is not None
        print(line(case, *measure(case, device, seconds)))
        if differs is not None:
            print(f"retinanet-ext bench: {case.name}: results differ: {differs}", file=sys.stderr)
    if importlib.util.find_spec("torchvision") is None:
        print("torchvision is not installed: add the release of your torch to see it beside ours")
    if failed:
        print("next: retinanet-ext env; please report both")
    else:
        print(
            "next: retinanet-ext demo; or this again where the ratios matter: other programs slow both sides, not alike"
        )
    return int(failed)


def machine(device: torch.device) -> str:
    """One line: processor or GPU, threads, versions."""
    where = f"{processor()}, threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    peer = version_of("torchvision")
    return f"{where}; torch {torch.__version__}, torchvision {peer or 'none'}"


def check(case: Case) -> str | None:
    """What differs between the sides of a case, in a line; None where they agree. Warms both up, too."""
    mine = case.ours()
    if case.theirs is None:
        return None
    try:
        case.agree(mine, case.theirs())
    except AssertionError as error:
        return (str(error) or "not equal").strip().splitlines()[0]
    return None


def measure(case: Case, device: torch.device, seconds: float) -> tuple[float, float | None]:
    """Medians in milliseconds of our side and of torchvision's, a call each in turns, for about `seconds` together."""
    sides = [case.ours] if case.theirs is None else [case.ours, case.theirs]
    times: list[list[float]] = [[] for _ in sides]
    start, rounds, spent = time.perf_counter(), 0, 0.0
    while rounds < MAX_ROUNDS and spent < (seconds if rounds >= MIN_ROUNDS else PATIENCE * seconds):
        for side, own in zip(sides, times, strict=True):
            own.append(_time(side, device))
        rounds, spent = rounds + 1, time.perf_counter() - start
    medians = [statistics.median(own) for own in times]
    return medians[0], medians[1] if len(medians) > 1 else None


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds from the call until its result is there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def line(case: Case, ours: float, theirs: float | None) -> str:
    beside = f"{theirs:>12.2f} {theirs / ours:>6.1f}x" if theirs is not None else f"{'-':>12} {'-':>7}"
    return f"{case.name:<44} {ours:>9.2f} {beside}"
