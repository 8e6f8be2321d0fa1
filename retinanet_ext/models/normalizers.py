"""What the losses of a batch are divided by: the implementations differ, and so do their learning rates.

With f_b the number of foreground anchors of image b, of B images:

- "per_image": each image's loss by max(1, f_b), and the mean of that over the images (torchvision);
- "ema": all losses by a running mean over the batches of max(1, sum of f_b), which begins at 100 and takes a tenth of
  each batch (detectron2);
- "foreground": all losses by the sum of max(1, f_b) (mmdet);
- "foreground_plus_one": all losses by the sum of f_b + 1 (Detectron, with which the paper's models were trained).

The batch is that of all processes of a training: the last three are summed over them, so that several processes have
the gradients of one. This differs by intention from detectron2, where each process divides by what it counted itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

NORMALIZERS = ("per_image", "ema", "foreground", "foreground_plus_one")
EMA_START, EMA_MOMENTUM = 100.0, 0.9


class LossNormalizer(nn.Module):
    """The divisor of a batch's losses. The host never waits for the device.

    In training mode, where a process group is initialised (`torch.distributed`) and has several processes, all kinds
    but "per_image" add up over the default group, by one collective of two integers: as with synchronised BatchNorm,
    every process has to take part in every step, one without images by an empty ``num_foreground``. In evaluation mode
    processes never meet.

    Args:
        kind: one of `NORMALIZERS`.

    Attributes:
        average: of "ema": the running mean, a float32 scalar, the same on every process. Not in the state dict, so that
            other implementations' weights load strictly; checkpoints of `retinanet_ext.engine` hold it beside the
            weights.

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

    @property
    def of_whole_batch(self) -> bool:
        """Whether an image's loss is divided by what is counted in all images of the batch."""
        return self.kind != "per_image"

    def forward(self, num_foreground: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Foreground anchors of each image, integers ``[B]``, to the divisor of its loss: ``[B]``, or a scalar for all.

        In training mode the running mean moves on; in evaluation mode it stays.

        Of several processes each gets its share of the divisor, that of its images among those of all. The mean of
        their losses, weighted by their images, is then the loss of one process with all images, and where all have as
        many (DistributedDataParallel's mean) without weights too.
        """
        if not self.of_whole_batch:
            return num_foreground.shape[0] * num_foreground.clamp(min=1).to(dtype)
        images = num_foreground.shape[0]
        count = self.count(num_foreground)
        together = self.training and _several_processes()
        if together:
            count, all_images = _sums_over_processes(count, images)
        if self.kind != "ema":
            return (count * images).to(dtype) / all_images if together else count.to(dtype)
        if self.training:
            self._move_on(count)
        if together:
            return self.average.to(dtype) * images / all_images
        # A copy: backward reads it, maybe after the next batch has moved the mean on.
        return self.average.to(dtype, copy=True)

    def count(self, num_foreground: Tensor) -> Tensor:
        """What a kind of the whole batch counts in these images, of this process alone, int64 scalar; of "ema" the sum
        of f_b, before the limit of 1."""
        if self.kind == "foreground":
            return num_foreground.clamp(min=1).sum()
        if self.kind == "foreground_plus_one":
            return (num_foreground + 1).sum()
        return num_foreground.sum()

    @torch.no_grad()
    def _move_on(self, count: Tensor) -> None:
        of_batch = count.clamp(min=1).to(self.average.dtype)
        self.average.mul_(EMA_MOMENTUM).add_(of_batch, alpha=1 - EMA_MOMENTUM)

    def extra_repr(self) -> str:
        return self.kind


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _sums_over_processes(count: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """`count` and `images` of all processes."""
    sums = torch.stack([count, torch.full_like(count, images)])
    distributed.all_reduce(sums)
    return sums[0], sums[1]
