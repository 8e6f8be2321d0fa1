"""The whole optimizer step (forward, matching, losses, backward, update) as one CUDA graph for each shape of a batch.

A step of a small network is many launches of a few microseconds each; replayed, they cost the host one call.
Images are padded to few shapes and boxes travel in tensors of fixed capacity, so that a graph serves other batches by
new contents of its inputs. What the host decides stays outside: the learning rate is a tensor that is filled before a
replay, the average of the weights and the schedule follow it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retinanet_ext.data import Batch

from .losses import PackedLosses
from .settings import SettingError
from .stepper import Stepper

# Sides of a batch are rounded up to this: few shapes, each of which is captured once.
SIDE = 128
# Real steps of a shape before it is captured: libraries choose their algorithms, the optimizer makes its state.
WARM_UP = 3
# More shapes than this are taken without a graph.
MOST_GRAPHS = 16

Shapes = tuple[torch.Size, ...]


class CapturedStep:
    """A graph, the tensors that it reads, and `values`, which a replay fills."""

    def __init__(self, stepper: "GraphedStepper", prepared: Sequence[Tensor]):
        self.inputs = tuple(tensor.clone() for tensor in prepared)
        self.graph = torch.cuda.CUDAGraph()
        stepper.optimizer.zero_grad(set_to_none=True)
        # Nothing in the pool outlives a replay but `values`, so graphs of all shapes can share its memory.
        with torch.cuda.graph(self.graph, pool=stepper.pool, stream=stepper.stream):
            self.values = stepper.step_on(self.inputs)
        # Gradients of the capture are the graph's own; steps without one get theirs anew.
        stepper.optimizer.zero_grad(set_to_none=True)

    def replay(self, prepared: Sequence[Tensor]) -> Tensor:
        for mine, given in zip(self.inputs, prepared, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.values.clone()


class GraphedStepper(Stepper):
    """A Stepper of one process on a CUDA device; the learning rate has to be a tensor, see `make_optimizer`."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if self.world.size > 1:
            raise SettingError("cuda_graph", f"captures the step of one process, got {self.world.size} processes")
        if not isinstance(self.own_losses, PackedLosses):
            raise SettingError("cuda_graph", f"expected a RetinaNet of this library, got {type(self.model).__name__}")
        self.own_losses.side = SIDE
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Shapes, CapturedStep] = {}
        self.warm: dict[Shapes, int] = {}

    def step_on(self, prepared: Sequence[Tensor]) -> Tensor:
        """A step on what `PackedLosses.prepare` returned; `Taken.values`."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, total = self._losses_of(prepared)
        total.backward()
        values = self._with_norm(self._numbers(losses, total, True))
        self._note_failure(values)
        self._update(values[4])
        return values

    def _step(self, batches: Sequence[Batch], images: int) -> Tensor:
        (batch,) = batches
        prepared = self.own_losses.prepare(batch, self.device)
        shapes = tuple(tensor.shape for tensor in prepared)
        if shapes not in self.captured:
            if self.warm.get(shapes, 0) < WARM_UP or len(self.captured) == MOST_GRAPHS:
                self.warm[shapes] = self.warm.get(shapes, 0) + 1
                return self._without_graph(prepared)
            self.captured[shapes] = CapturedStep(self, prepared)
        return self.captured[shapes].replay(prepared)

    def _without_graph(self, prepared: Sequence[Tensor]) -> Tensor:
        """On the stream that captures, as a capture wants it of what comes before."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            values = self.step_on(prepared)
        current.wait_stream(self.stream)
        return values
