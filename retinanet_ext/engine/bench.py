"""`retinanet-ext bench`: what the operators and a small model take on this machine, beside torchvision's."""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from retinanet_ext.diagnostics import processor, version_of

from .bench_cases import Case, make_cases
from .settings import SettingError

# Fewer rounds than this say little; more than this no more.
MIN_ROUNDS, MAX_ROUNDS = 3, 200
# A case ends after so many times its time, even with fewer rounds.
PATIENCE = 3
# Seconds for each case by default, and for all of them with what comes before each: less than two minutes, on a slow
# machine too. In proportion where longer is asked for.
SECONDS, LIMIT = 3.0, 110.0


def run_bench(
    device: torch.device, *, seconds: float = SECONDS, cases: Iterable[Callable[[], Case]] | None = None
) -> int:
    """Print a line a case, with the medians of both sides in turns; 1 if a case's results differ, 0 otherwise.

    Cases that would end after the time for all are left out, each taken to need as long as the longest before it.
    """
    if not seconds > 0:
        raise SettingError("seconds", f"expected a number > 0, got {seconds!r}")
    cases = list(make_cases(device) if cases is None else cases)
    start = time.perf_counter()
    deadline, longest = start + LIMIT * max(1.0, seconds / SECONDS), 0.0
    print(machine(device))
    print(f"{'milliseconds, median':<44} {'ours':>9} {'torchvision':>12} {'ratio':>7}")
    failed = False
    for number, make in enumerate(cases):
        begun = time.perf_counter()
        if begun + longest > deadline:
            minutes = "two minutes" if seconds <= SECONDS else f"{deadline - start:.0f} s"
            print(f"{len(cases) - number} of {len(cases)} cases left out: they would take more than {minutes}")
            break
        case = make()
        differs, cold = check(case, device)
        failed = failed or differs is not None
        longest = max(longest, time.perf_counter() - begun)
        print(line(case, *measure(case, device, seconds, cold, deadline)))
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


def check(case: Case, device: torch.device) -> tuple[str | None, list[float]]:
    """What differs between the sides of a case, in a line, None where they agree; and the milliseconds of these calls,
    each side's first."""
    mine, ours = _timed(case.ours, device)
    if case.theirs is None:
        return None, [ours]
    other, theirs = _timed(case.theirs, device)
    try:
        case.agree(mine, other)
    except AssertionError as error:
        return (str(error) or "not equal").strip().splitlines()[0], [ours, theirs]
    return None, [ours, theirs]


def measure(
    case: Case, device: torch.device, seconds: float, cold: Sequence[float], deadline: float
) -> tuple[float, float | None]:
    """Medians in milliseconds of our side and of torchvision's, a call each in turns, for about `seconds` together.

    No round is begun that would end after `deadline` (of `time.perf_counter`) if it took as long as the one before;
    `cold`, the milliseconds of each side's first call, are the result where there is no time for any round.
    """
    sides = [case.ours] if case.theirs is None else [case.ours, case.theirs]
    rounds: list[Sequence[float]] = []
    start, spent, last = time.perf_counter(), 0.0, sum(cold) / 1e3
    while len(rounds) < MAX_ROUNDS and spent < (seconds if len(rounds) >= MIN_ROUNDS else PATIENCE * seconds):
        if start + spent + last > deadline:
            break
        rounds.append([_timed(side, device)[1] for side in sides])
        spent, last = time.perf_counter() - start, sum(rounds[-1]) / 1e3
    medians = [statistics.median(own) for own in zip(*(rounds or [cold]), strict=True)]
    return medians[0], medians[1] if len(medians) > 1 else None


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call gives, and the milliseconds until it is there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, (time.perf_counter() - start) * 1e3


def line(case: Case, ours: float, theirs: float | None) -> str:
    beside = f"{theirs:>12.2f} {theirs / ours:>6.1f}x" if theirs is not None else f"{'-':>12} {'-':>7}"
    return f"{case.name:<44} {ours:>9.2f} {beside}"
