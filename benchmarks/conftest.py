"""`pytest benchmarks/ --benchmark`: every case beside its peers in one run.

Without --benchmark each case runs once at a small size and checks that both sides agree, so that continuous
integration keeps the benchmarks alive. With it, the sides are timed in turns (A B A B ...), on CUDA by device events
with the L2 cache flushed before each run, on the CPU by the wall clock, a short call after one of the same side that is
not timed; and the results are written as json with the date, the machine, the versions and the commit.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
from peak_memory import out_of_memory, peak_bytes
from results_file import origin, write_results

HERE = Path(__file__).resolve().parent
MIN_ROUNDS, MAX_ROUNDS = 7, 200
# On the CPU a call shorter than this is led in by one of its own side. A call also pays for what the one before left:
# the C library gives freed memory back to the system when the next call frees any, and caches hold other things.
LEAD_IN_MS = 250.0


def pytest_addoption(parser):
    group = parser.getgroup("retinanet_ext")
    group.addoption("--benchmark", action="store_true", help="time the cases; without it each runs once, small")
    group.addoption("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA where there is a GPU")
    group.addoption("--quick", action="store_true", help="a quarter of the time for each case")
    group.addoption("--results", default=None, metavar="JSON", help="where to write the results")


def pytest_configure(config):
    config.stash[RESULTS] = []
    if config.getoption("--benchmark"):
        config.stash[ORIGIN] = origin()


RESULTS = pytest.StashKey[list]()
ORIGIN = pytest.StashKey[dict]()


@dataclass
class Timing:
    """Milliseconds of one side."""

    median: float
    minimum: float
    maximum: float
    rounds: int


@dataclass
class Result:
    """One case: ours, each peer, and what the work amounts to."""

    case: str
    device: str
    ours: Timing
    peers: dict[str, Timing]
    skipped: dict[str, str]
    elements: int
    bytes: int  # the fewest the case can move: each input read once, each output written once
    special_ops: float  # special-function operations of our CUDA kernel; 0 where none is claimed
    copy_gb_per_s: float
    peak_bytes: dict[str, int | None]  # by side: the most that a call holds at a time, beyond what was held before
    details: dict[str, object] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.ours.median / 1e6

    def speedups(self) -> dict[str, float]:
        return {name: timing.median / self.ours.median for name, timing in self.peers.items()}


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    name = request.config.getoption("--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda, and torch sees no GPU")
    return torch.device(name)


@pytest.fixture(scope="session")
def timed(request) -> bool:
    return request.config.getoption("--benchmark")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(autouse=True)
def compiled_anew(timed):
    """A peer that is compiled is so for its own case: after eight variants of one function, which cases of other shapes
    and types are, torch.compile gives up and runs it as it is."""
    if timed:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def copy_bandwidth(device, timed) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written; nan in a smoke run."""
    if not timed:
        return math.nan
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    times = [clock.time(lambda: target.copy_(source)) for _ in range(12)][2:]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e6


class Clock:
    """Milliseconds of one call: on the CPU by the wall clock, on CUDA by events after an L2 flush."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


@pytest.fixture
def captured(device):
    """captured(call): the same call replayed from a CUDA graph, which leaves out what launching it costs the host."""

    def capture(call: Callable[[], object]) -> Callable[[], object]:
        if device.type != "cuda":
            pytest.skip("a CUDA graph needs a GPU")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> object:
            graph.replay()
            return result

        replay.captured = graph
        return replay

    return capture


@pytest.fixture
def compare(request, device, timed, quick, copy_bandwidth):
    """compare(case, ours, peers, agree, ...): checks that the sides agree, then times them in turns.

    A peer is a call, or the reason why there is none. One that runs out of memory is left out for that reason, with
    `at`, the place on a curve. One whose first call takes more than `slow_ms` is called once more, which is its timing
    and its memory. Returns the reasons by peer.
    """

    def run(
        case: str,
        ours: Callable[[], object],
        peers: dict[str, Callable[[], object] | str],
        agree: Callable[[object, object], None],
        *,
        elements: int,
        bytes: int,
        special_ops: float = 0.0,
        at: str = "",
        slow_ms: float = math.inf,
        **details,
    ) -> dict[str, str]:
        running = {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
        skipped = {name: peer for name, peer in peers.items() if isinstance(peer, str)}
        slow = {}
        for name, peer in list(running.items()):
            begin = time.perf_counter()
            try:
                other = peer()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                del running[name]
                skipped[name] = f"out of memory{f' at {at}' if at else ''}"
                continue
            if (time.perf_counter() - begin) * 1e3 > slow_ms:
                slow[name] = running.pop(name)
            try:
                agree(ours(), other)
            except AssertionError as error:
                raise AssertionError(f"{case}: ours and {name} disagree: {error}") from error
            del other
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what a peer held when it ran out
        if not timed:
            ours()
            return skipped

        clock = Clock(device)
        budget = 0.75 if quick else 3.0
        times = {name: [] for name in running}
        for call in (ours, *running.values()):
            call()
        once = {call: clock.time(call) for call in (ours, *running.values())}
        led_in = {call for call, ms in once.items() if device.type == "cpu" and ms < LEAD_IN_MS}
        round_ms = sum(ms * (2 if call in led_in else 1) for call, ms in once.items())
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget * 1e3 / max(round_ms, 1e-3))))
        own_times = []

        def lead_in(call):
            if call in led_in:
                call()

        def peers_turn():
            for name, peer in running.items():
                lead_in(peer)
                times[name].append(clock.time(peer))
            lead_in(ours)

        def our_turn():
            own_times.append(clock.time(ours))

        # pytest-benchmark runs `setup` before every round without timing it: the sides take turns.
        request.getfixturevalue("benchmark").pedantic(our_turn, setup=peers_turn, rounds=rounds, warmup_rounds=2)
        # A captured call has had its memory since it was captured.
        held = {
            name: None if hasattr(call, "captured") else peak_bytes(call, device)
            for name, call in {"ours": ours, **running}.items()
        }
        timings = {name: summarise(values[2:]) for name, values in times.items()}
        for name, peer in slow.items():
            timings[name], held[name] = time_once(peer, clock, device)
        result = Result(
            case=case,
            device=device.type,
            ours=summarise(own_times[2:]),
            peers=timings,
            skipped=skipped,
            elements=elements,
            bytes=bytes,
            special_ops=special_ops,
            copy_gb_per_s=copy_bandwidth,
            peak_bytes=held,
            details=details,
        )
        request.config.stash[RESULTS].append(result)
        return skipped

    return run


def time_once(call: Callable[[], object], clock: Clock, device: torch.device) -> tuple[Timing, int | None]:
    """One call: how long it takes, and the most that it holds."""
    times = []
    held = peak_bytes(lambda: times.append(clock.time(call)), device)
    if held is None:  # nor was it called
        times.append(clock.time(call))
    return summarise(times), held


def summarise(values: list[float]) -> Timing:
    return Timing(statistics.median(values), min(values), max(values), len(values))


def pytest_sessionfinish(session):
    results = session.config.stash[RESULTS]
    if not results:
        return
    facts = session.config.stash[ORIGIN]
    default = HERE / "results" / f"{facts['date'][:10]}-{results[0].device}.json"
    path = Path(session.config.getoption("--results") or default)
    write_results(path, {**facts, "unit": "milliseconds", "results": [asdict(result) for result in results]})
    session.config.stash[RESULTS_PATH] = path


RESULTS_PATH = pytest.StashKey[Path]()


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if not results:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ours beside the peers (medians)")
    width = max(len(result.case) for result in results)
    for result in results:
        share = 100 * result.gb_per_s / result.copy_gb_per_s
        line = (
            f"{result.case:<{width}}  {result.ours.median:9.3f} ms  {result.gb_per_s:7.1f} GB/s  {share:4.0f} % of copy"
        )
        for name, factor in result.speedups().items():
            line += f"   {name} {result.peers[name].median:.3f} ms ({factor:.1f}x)"
        if "images" in result.details:
            line += f"   {result.details['images'] / result.ours.median * 1e3:.1f} images/s"
        write(line)
    for name, reason in sorted({pair for result in results for pair in result.skipped.items()}):
        write(f"peer {name} was skipped: {reason}")
    write(f"written to {config.stash[RESULTS_PATH]}")
