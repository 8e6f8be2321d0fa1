"""The exponential moving average of the weights, which often detects better than the weights themselves."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import other_buffers


class ModelAverage:
    """A second model, whose weights and running statistics follow those of the first.

    After update n (from 1) the average keeps a share of min(decay, n / (n + 9)): early in a run, when the weights are
    far from where they will be, it forgets faster. What no state dict has, a running normalizer of the losses, is the
    model's as it is.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module, failed: Tensor | None = None) -> None:
        """One step towards `model`; nothing that waits for a device.

        `failed`: float [], 1 where the step was not made, which the host does not know yet: the weights then stay to
        the bit. Running statistics that are not finite come in nevertheless; `failure.Before` puts them back.
        """
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        mine, theirs = self.model.state_dict(), model.state_dict()
        averaged = [name for name, value in mine.items() if value.is_floating_point()]
        own, new = [mine[name] for name in averaged], [theirs[name] for name in averaged]
        if failed is None:
            torch._foreach_lerp_(own, new, 1 - decay)
        else:
            kept = decay + (1 - decay) * failed
            torch._foreach_mul_(own, kept)
            torch._foreach_add_(own, torch._foreach_mul(new, 1 - kept))
        for name in mine.keys() - set(averaged):
            mine[name].copy_(theirs[name])
        theirs = other_buffers(model)
        for name, buffer in other_buffers(self.model).items():
            buffer.copy_(theirs[name])

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
