"""Optimizer and learning rate of a run."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step")
# SGD: the paper's 0.01 for 16 images, scaled linearly. AdamW: fixed, from training small sets from random
# weights.
RATE_IMAGES = 16
SGD_RATE_PER_IMAGE = 0.01 / RATE_IMAGES
ADAMW_RATE = 3e-4
WEIGHT_DECAY = {"adamw": 0.01, "sgd": 1e-4}
# AdamW does not care about the size of gradients, but one far above the usual throws it off: without a limit,
# training from random weights loses at 3e-4 what it learned during warm-up.
CLIP_GRAD_NORM = {"adamw": 1.0, "sgd": 0.0}
# Of a parameter group: how its update is computed.
_IMPLEMENTATION = ("lr", "fused", "foreach", "capturable")
# Where the step schedule divides by ten, as parts of the run: epochs 8 and 11 of 12.
MILESTONES = (8 / 12, 11 / 12)


def default_rate(optimizer: str, batch_size: int) -> float:
    """The learning rate used where none is given; `batch_size`: images a step, over all processes and batches of it."""
    return SGD_RATE_PER_IMAGE * batch_size if optimizer == "sgd" else ADAMW_RATE


def scaled_rate(rate: float, batch_size: int) -> float:
    """`rate`, meant for 16 images a step, for a step of `batch_size`: linear."""
    return rate * batch_size / RATE_IMAGES


def default_warmup(total_steps: int) -> int:
    """A tenth of the run, at most 500 steps."""
    return min(500, total_steps // 10)


def make_optimizer(
    model: nn.Module, name: str, rate: float, weight_decay: float | None = None, tensor_rate: bool = False
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9. Biases and the parameters of norms take no weight decay.

    Parameters without gradient (frozen) are left out. On a GPU the update is fused and never waits for the device;
    with `tensor_rate` the learning rate is on the device too, for a CUDA graph. Raises ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    decay = WEIGHT_DECAY[name] if weight_decay is None else weight_decay
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    device = trained[0].device
    # The fused update skips where the loss was not finite, see `Stepper`; the CPU's step checks before it updates.
    fused = True if device.type == "cuda" else None
    lr = torch.tensor(rate, dtype=torch.float32, device=device) if tensor_rate else rate
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, fused=fused, capturable=tensor_rate and device.type == "cuda")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, but how and where the update is computed stays as it was made."""
    kept = [{name: group[name] for name in _IMPLEMENTATION if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        loaded = float(group["lr"])
        group.update(own)
        set_rate(group, loaded)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """The learning rate of a parameter group; one on a device stays where it is."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def rate_factor(
    step: int, total_steps: int, warmup_steps: int, schedule: str, milestones: Sequence[float] | None = None
) -> float:
    """What the learning rate is multiplied by at `step` (from 0): linear warm-up, then cosine to 0, or a tenth at each
    of `milestones` (steps; default: 8/12 and 11/12 of the run).

    The first step is taken at 1 / warmup_steps of the rate. Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "step":
        milestones = [part * total_steps for part in MILESTONES] if milestones is None else milestones
        return 0.1 ** sum(step >= milestone for milestone in milestones)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_steps: int,
    schedule: str,
    milestones: Sequence[float] | None = None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """`rate_factor` as a scheduler that is stepped once an optimizer step."""
    rate_factor(0, total_steps, warmup_steps, schedule)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, total_steps, warmup_steps, schedule, milestones)
    )
    # Numbers of the host, also where the rate itself is on a device: nothing waits for it.
    change_rate(scheduler, rates)
    return scheduler


def change_rate(scheduler: torch.optim.lr_scheduler.LambdaLR, rates: Sequence[float]) -> None:
    """Other rates for the groups, from the scheduler's present step on."""
    scheduler.base_lrs = list(rates)
    for group, rate, factor in zip(scheduler.optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = rate
        set_rate(group, rate * factor(scheduler.last_epoch))


def current_rate(scheduler: torch.optim.lr_scheduler.LambdaLR) -> float:
    """The learning rate of the next step, known to the host."""
    return scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch)
