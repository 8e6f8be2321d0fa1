"""What the benchmarks say of memory."""

import pytest
import torch
from peak_memory import peak_bytes

MEGABYTE = 1 << 20


@pytest.mark.parametrize("kept", [0, 20])
def test_the_most_that_a_call_holds_at_a_time(kept):
    """Neither the sum of what it allocates nor what it returns."""

    def call():
        for _ in range(3):
            torch.ones(60 * MEGABYTE, dtype=torch.uint8)
        return torch.ones(kept * MEGABYTE, dtype=torch.uint8)

    call()
    for _ in range(2):  # what the first has freed counts again
        peak = peak_bytes(call, torch.device("cpu"))
        if peak is None:
            pytest.skip("only Linux counts a process's pages")
        assert 58 * MEGABYTE < peak < 68 * MEGABYTE


def test_a_call_that_allocates_nothing():
    value = torch.ones(MEGABYTE)
    value.add_(1)
    peak = peak_bytes(lambda: value.add_(1), torch.device("cpu"))
    assert peak is None or peak < 2 * MEGABYTE
