"""What the benchmarks say of memory: in a process of its own, in which nothing has changed the allocator."""

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


def test_the_most_that_a_call_holds_at_a_time():
    """Neither the sum of what it allocates nor what it returns."""
    ((nothing_kept, some_kept, in_place),) = in_processes(1, megabytes_held, start="spawn")
    if None in nothing_kept:
        pytest.skip("only Linux counts a process's pages")
    for peak in nothing_kept + some_kept:
        assert 58 < peak < 68
    for peak in in_place:
        assert peak < 2
