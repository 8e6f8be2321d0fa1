"""Several processes that train one model, as torchrun starts them; one process is the case of a world of size 1.

Batches, losses and weights are those of all processes together. Objects and numbers of the host travel over gloo, so
that no process waits for its GPU to exchange them; gradients travel over NCCL where the processes have GPUs.
"""

import datetime
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .settings import SettingError, UsageError

# Scoring a large validation set takes one process minutes, while the others wait.
TIMEOUT = datetime.timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """This process among those of the run. `rank` 0 is the main one, which alone writes the run folder; `local_*`:
    among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, number: int) -> int:
        """The sum of every process's `number`."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, dtype=torch.int64)
        distributed.all_reduce(numbers)
        return int(numbers)

    def add(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`, in place; on a GPU without waiting for it."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """The main process's `value`, on every process."""
        if self.size == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value` by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def gather_on_main(self, value: Any) -> list[Any] | None:
        """Every process's `value` by rank, on the main process; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        distributed.gather_object(value, values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """The main process's buffers (running statistics) for every process: each has seen other images."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)

    def device(self, chosen: torch.device) -> torch.device:
        """The device of this process where the run's is `chosen`: each process of a machine has a GPU of its own."""
        if self.size == 1 or chosen.type != "cuda":
            return chosen
        if chosen.index is not None:
            raise SettingError(
                "device", f"each of several processes takes a GPU of its own: expected cuda, got {chosen}"
            )
        if self.local_size > torch.cuda.device_count():
            raise SettingError(
                "device",
                f"{self.local_size} processes on this machine, and {torch.cuda.device_count()} CUDA devices: start at "
                "most one process a GPU (torchrun --nproc-per-node)",
            )
        return torch.device("cuda", self.local_rank)


def started_world(environment: Mapping[str, str] = os.environ) -> World:
    """What torchrun says of this process; alone where it says nothing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "WORLD_SIZE" not in environment or "RANK" not in environment:
        return World()
    try:
        rank, size, local_rank, local_size = (int(environment.get(name, "")) for name in names)
    except ValueError:
        given = ", ".join(f"{name}={environment.get(name)!r}" for name in names)
        raise UsageError(f"expected the integers that torchrun puts into the environment, got {given}") from None
    if not (0 <= rank < size and 0 <= local_rank < local_size):
        raise UsageError(
            f"expected 0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK < LOCAL_WORLD_SIZE, got {rank} of {size}"
        )
    return World(rank, size, local_rank, local_size)


@contextmanager
def joined(world: World) -> Iterator[World]:
    """The processes connected, for the length of the block, which leaves no DistributedDataParallel behind. Where it
    fails they stay connected until the process ends: others may be waiting, which torchrun ends then."""
    if world.size == 1:
        yield world
        return
    if torch.cuda.is_available() and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    distributed.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    yield world
    # A DistributedDataParallel that outlived its group would end gloo's threads while it holds the interpreter's lock,
    # which such a thread may be waiting for to free a tensor: a deadlock.
    gc.collect()
    distributed.destroy_process_group()
