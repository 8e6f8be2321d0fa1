"""Runs a function in several processes that are connected as those of torchrun are."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import traceback
from multiprocessing import connection

import torch
from started_anew import load, place_of

# Of a whole test; a process that waits for one that has gone would wait for an hour.
SECONDS = 100
# A fork has imported everything already. But autograd refuses to work in one whose parent has started its threads for
# devices, which a build for CUDA has.
START = "spawn" if torch.backends.cuda.is_built() else "fork"


def _in_process(rank, size, port, pipe, function, arguments):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # what it waits for is in the test's output
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        pipe.send_bytes(pickle.dumps((True, load(*function)(*arguments))))  # by value: this process is soon gone
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise SystemExit(1) from None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(size, function, *arguments, start=START):
    """What ``function(*arguments)`` returns in each of ``size`` processes, by rank; their errors fail the test.
    ``function`` is a module's own, by its name."""
    context = multiprocessing.get_context(start)
    function = place_of(function)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_in_process, args=(rank, size, port, pipe[1], function, arguments))
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, other_end) in zip(processes, pipes, strict=True):
        process.start()
        other_end.close()  # so that one that ends without a word is noticed
    try:
        results = {}
        waiting = {pipe[0]: rank for rank, pipe in enumerate(pipes)}
        while waiting:
            ready = connection.wait(list(waiting), timeout=SECONDS + 20)
            assert ready, f"processes {sorted(waiting.values())} hang"
            for end in ready:
                done, result = pickle.loads(end.recv_bytes())
                rank = waiting.pop(end)
                assert done, f"process {rank}:\n{result}"
                results[rank] = result
    finally:
        for process in processes:
            process.join(0 if len(results) < size else 20)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(size)]
