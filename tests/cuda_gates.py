"""What the CUDA gates of all operators share: graphs, a host that must not wait, bits."""

import contextlib

import torch


def bits(tensor):
    """Bit patterns, so that NaN equals NaN and 0 differs from -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def capture(step):
    """A CUDA graph of `step`, and what it returned while it was captured, to be filled by each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture wants libraries, caches and allocations to be warm
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@contextlib.contextmanager
def host_must_not_wait():
    """torch's own check, and one that sees any wait: the stream is busy before the calls, and must still be after."""
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # cycles
    busy = torch.cuda.Event()
    busy.record()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    waited = busy.query()
    torch.cuda.synchronize()
    assert not waited, "the host waited for the device"
