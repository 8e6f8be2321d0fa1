"""What the losses of a batch are divided by: the implementations differ, and so do their learning rates.

With f_b the number of foreground anchors of image b, of B images:

- "per_image": each image's loss by max(1, f_b), and the mean of that over the images (torchvision);
- "ema": all losses by a running mean over the batches of max(1, sum of f_b), which begins at 100 and takes a tenth of
  each batch (detectron2);
- "foreground": all losses by the sum of max(1, f_b) (mmdet);
- "foreground_plus_one": all losses by the sum of f_b + 1 (Detectron, with which the paper's models were trained).

Each process of a distributed training counts its own images, as it is in all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMALIZERS = ("per_image", "ema", "foreground", "foreground_plus_one")
EMA_START, EMA_MOMENTUM = 100.0, 0.9


class LossNormalizer(nn.Module):
    """The divisor of a batch's losses. The host never waits for the device.

    Args:
        kind: one of `NORMALIZERS`.

    Attributes:
        average: of "ema": the running mean, a float32 scalar. Not in the state dict, so that other implementations'
            weights load strictly; checkpoints of `retinanet_ext.engine` hold it beside the weights.

    Raises:
        ValueError: another ``kind``.
    """

    def __init__(self, kind: str = "per_image"):
        super().__init__()
        if kind not in NORMALIZERS:
            raise ValueError(f"loss_normalizer: expected one of {NORMALIZERS}, got {kind!r}")
        self.kind = kind
        if kind == "ema":
            self.register_buffer("average", torch.tensor(EMA_START), persistent=False)

    def forward(self, num_foreground: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Foreground anchors of each image, integers ``[B]``, to the divisor of its loss: ``[B]``, or a scalar for all.

        In training mode the running mean moves on; in evaluation mode it stays.
        """
        if self.kind == "per_image":
            return num_foreground.shape[0] * num_foreground.clamp(min=1).to(dtype)
        if self.kind == "foreground":
            return num_foreground.clamp(min=1).sum().to(dtype)
        if self.kind == "foreground_plus_one":
            return (num_foreground + 1).sum().to(dtype)
        if self.training:
            self._move_on(num_foreground)
        # A copy: backward reads it, maybe after the next batch has moved the mean on.
        return self.average.to(dtype, copy=True)

    @torch.no_grad()
    def _move_on(self, num_foreground: Tensor) -> None:
        of_batch = num_foreground.sum().clamp(min=1).to(self.average.dtype)
        self.average.mul_(EMA_MOMENTUM).add_(of_batch, alpha=1 - EMA_MOMENTUM)

    def extra_repr(self) -> str:
        return self.kind
