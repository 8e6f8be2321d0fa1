"""What the benchmarks say of memory: in a process of its own, in which nothing has changed the allocator."""

import peak_memory
import pytest
import torch
from peak_memory import peak_bytes
from rank_processes import in_processes

MEGABYTE = 1 << 20


def ones(megabytes):
    return torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)


def passing(kept):
    """Three tensors of 60 MB, one after the other, and one that is returned."""
    for _ in range(3):
        ones(60)
    return ones(kept)


def megabytes_held():
    """Twice of each call: what the first has freed counts again."""
    value = ones(8)
    calls = (lambda: passing(0), lambda: passing(20), lambda: value.add_(1))
    peaks = [[peak_bytes(call, torch.device("cpu")) for _ in range(2)] for call in calls for _ in range(2)]
    return [[None if peak is None else peak / MEGABYTE for peak in pair] for pair in peaks[1::2]]


@pytest.mark.parametrize(("limit", "expected"), [(None, (3, 8)), ("max", (3, 8)), (6, (2, 6)), (100, (3, 8))])
def test_what_a_process_may_take(tmp_path, monkeypatch, limit, expected):
    """The machine's memory, or that of its container where it has less."""
    monkeypatch.setattr(peak_memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(peak_memory, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:    8192 kB\nMemFree:  1 kB\nMemAvailable:   3072 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit if limit == 'max' else limit * MEGABYTE}\n")
        (tmp_path / "memory.current").write_text(f"{4 * MEGABYTE}\n")
    assert peak_memory.system_memory() == tuple(MEGABYTE * part for part in expected)


def test_the_most_that_a_call_holds_at_a_time():
    """Neither the sum of what it allocates nor what it returns."""
    ((nothing_kept, some_kept, in_place),) = in_processes(1, megabytes_held, start="spawn")
    if None in nothing_kept:
        pytest.skip("only Linux counts a process's pages")
    for peak in nothing_kept + some_kept:
        assert 58 < peak < 68
    for peak in in_place:
        assert peak < 2
