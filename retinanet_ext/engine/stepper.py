"""One optimizer step: losses, gradients, over all processes and batches of the step, and the update."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from retinanet_ext.data import Batch

from .distributed import World
from .ema import ModelAverage
from .failure import Before
from .losses import PackedLosses, make_losses
from .schedule import current_rate


@dataclass
class Taken:
    """A step that was taken, its numbers perhaps still being computed. `values` float32 [5]: classification, box and
    total loss, mean foreground anchors an image (NaN where the model does not count them), norm of the gradient."""

    values: Tensor
    rate: float
    batches: Sequence[Batch]
    before: Before


class Stepper:
    """Takes the optimizer steps of a run, for any model with torchvision's training interface.

    The loss of a step is the mean over all its images: those of all processes, and of all the batches that are
    accumulated. Neither need have as many as another. A normalizer of the whole batch (`LossNormalizer`) counts each
    of the accumulated batches by itself, over all processes. On a GPU nothing in a step waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        device: torch.device,
        *,
        world: World | None = None,
        amp: bool = False,
        clip_grad_norm: float = 0.0,
        average: ModelAverage | None = None,
        compiled: bool = False,
    ):
        self.model, self.optimizer, self.scheduler, self.device = model, optimizer, scheduler, device
        self.world = World() if world is None else world
        self.amp, self.clip_grad_norm, self.average = amp, clip_grad_norm, average
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.own_losses = make_losses(model)
        if compiled:
            self.own_losses.compile(fullgraph=isinstance(self.own_losses, PackedLosses))
        self.losses: nn.Module = self.own_losses
        if self.world.size > 1:
            self.losses = DistributedDataParallel(self.losses, gradient_as_bucket_view=True)
        # A fused update is left out while this is 1: after a loss that is not finite, until the host has read it.
        self.failed = torch.zeros((), device=device)
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = self.failed

    def take(self, batches: Sequence[Batch]) -> Taken | None:
        """One step over `batches`; None where no process has any image. On the CPU the update is not made where a loss
        or gradient is not finite, on a GPU neither that nor any later one."""
        images = self.world.total(sum(len(batch.images) for batch in batches))
        if images == 0:
            return None
        if self.own_losses.synchronised and self.world.size > 1:
            # Statistics of no image at all would not be finite, and a running mean of foreground would move on.
            batches = [batch for batch in batches if self.world.total(len(batch.images))]
        before = Before(self.model, self.scheduler, self.average)
        rate = current_rate(self.scheduler)
        values = self._step(batches, images)
        on_cpu = self.device.type == "cpu"
        if not (on_cpu and self.failed):
            self.scheduler.step()
            if self.average is not None:
                self.average.update(self.model, None if on_cpu else self.failed)
        return Taken(values, rate, batches, before)

    def undo(self, taken: Taken) -> None:
        """Put back what a step has changed whose update was not made."""
        taken.before.restore(self.model, self.scheduler, self.average)
        self.failed.zero_()

    def losses_in_float32(self, batch: Batch) -> dict[str, Tensor]:
        """Of this process alone, without gradients."""
        return self.own_losses.alone(batch, self.device)

    def _step(self, batches: Sequence[Batch], images: int) -> Tensor:
        """Gradients and update of the weights; `Taken.values`."""
        values = self._gradients(batches, images)
        self._note_failure(values)
        if self.device.type != "cpu" or not self.failed:
            self._update(values[4])
        return values

    def _gradients(self, batches: Sequence[Batch], images: int) -> Tensor:
        """Leave the gradients of the step in the parameters; `Taken.values`."""
        self.optimizer.zero_grad(set_to_none=True)
        values = torch.zeros(4, device=self.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            # The others wait for this process at the last of its batches only, or in every layer.
            if not batch.images and (self.world.size == 1 or not (last or self.own_losses.synchronised)):
                continue
            together = nullcontext() if last or self.world.size == 1 else self.losses.no_sync()
            with together:
                losses, total = self._losses_of(self.own_losses.prepare(batch, self.device) if batch.images else ())
                # Gradients come out as the mean over the processes.
                share = len(batch.images) / images
                factor = share * self.world.size
                (total if factor == 1 else total * factor).backward()
            values += share * self._numbers(losses, total, bool(batch.images))
        return self._with_norm(self.world.add(values))

    def _losses_of(self, prepared: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The losses, and their sum."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            losses = self.losses(*prepared)
        return losses, losses["classification"] + losses["bbox_regression"]

    def _with_norm(self, values: Tensor) -> Tensor:
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return torch.cat([values, norm.float().reshape(1)])

    def _note_failure(self, values: Tensor) -> None:
        finite = values[2].isfinite() & values[4].isfinite()
        self.failed.copy_(torch.maximum(self.failed, (~finite).float()))

    def _numbers(self, losses: dict[str, Tensor], total: Tensor, counted: bool) -> Tensor:
        foreground = losses.get("foreground") if counted else total.new_zeros(1)
        numbers = [losses["classification"], losses["bbox_regression"], total]
        numbers.append(torch.full_like(total, math.nan) if foreground is None else foreground.float().mean())
        return torch.stack([number.detach().float() for number in numbers])

    def _update(self, norm: Tensor) -> None:
        if self.clip_grad_norm > 0:
            clip_grads_with_norm_(self.parameters, self.clip_grad_norm, norm)
        self.optimizer.step()
