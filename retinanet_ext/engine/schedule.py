"""Optimizer and learning rate of a run."""

import math

import torch
from torch import nn

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step")
# SGD: the paper's 0.01 for 16 images, scaled linearly. AdamW: fixed, from training small sets from random
# weights.
SGD_RATE_PER_IMAGE = 0.01 / 16
ADAMW_RATE = 3e-4
WEIGHT_DECAY = {"adamw": 0.01, "sgd": 1e-4}
# AdamW does not care about the size of gradients, but one far above the usual throws it off: without a limit,
# training from random weights loses at 3e-4 what it learned during warm-up.
CLIP_GRAD_NORM = {"adamw": 1.0, "sgd": 0.0}
# Where the step schedule divides by ten, as parts of the run: epochs 8 and 11 of 12.
MILESTONES = (8 / 12, 11 / 12)


def default_rate(optimizer: str, batch_size: int) -> float:
    """The learning rate used where none is given."""
    return SGD_RATE_PER_IMAGE * batch_size if optimizer == "sgd" else ADAMW_RATE


def default_warmup(total_steps: int) -> int:
    """A tenth of the run, at most 500 steps."""
    return min(500, total_steps // 10)


def make_optimizer(
    model: nn.Module, name: str, rate: float, weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9. Biases and the parameters of norms take no weight decay.

    Parameters without gradient (frozen) are left out. Raises ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    decay = WEIGHT_DECAY[name] if weight_decay is None else weight_decay
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=rate)


def rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """What the learning rate is multiplied by at `step` (from 0): linear warm-up, then cosine to 0 or two
    steps down.

    The first step is taken at 1 / warmup_steps of the rate. Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "step":
        return 0.1 ** sum(step >= milestone * total_steps for milestone in MILESTONES)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def make_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, schedule: str
) -> torch.optim.lr_scheduler.LambdaLR:
    """`rate_factor` as a scheduler that is stepped once an optimizer step."""
    rate_factor(0, total_steps, warmup_steps, schedule)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, total_steps, warmup_steps, schedule)
    )
