"""What a dense detector's head returns for each level of the pyramid, as convolutions leave it or permuted to rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Levels = Sequence[Tensor]  # [B, A * K, H, W] or [B, n, K] each; deltas with 4 in place of K


def join_levels(levels: Levels, columns: int) -> Tensor:
    """[B, N, columns], in the order level, row, column, anchor of the cell."""
    rows = []
    for level in levels:
        if level.dim() == 4:
            batch, _, height, width = level.shape
            level = level.view(batch, -1, columns, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, columns)
        rows.append(level)
    return torch.cat(rows, dim=1)


def unweighted(level: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas [B, 4 * A, H, W] or [B, n, 4] for a coder whose weights are all 1."""
    if all(weight == 1 for weight in weights):
        return level
    weights = torch.tensor(weights, dtype=level.dtype, device=level.device)
    if level.dim() == 3:
        return level / weights
    return level / weights.repeat(level.shape[1] // 4)[:, None, None]


def rows_at(levels: Levels, indices: Tensor, columns: int) -> Tensor:
    """[B, D, columns]: of each image the rows [B, D] of what `join_levels` would be, which is not made.

    Indices that are no row's give any row. Gradients flow into the levels.
    """
    image = torch.arange(len(indices), device=indices.device)[:, None]
    rows, start = levels[0].new_zeros((*indices.shape, columns)), 0
    for level in levels:
        batch, channels, height, width = level.shape
        per_cell = channels // columns
        count = per_cell * height * width
        if count == 0:
            continue
        local = (indices - start).clamp(0, count - 1)
        cell, anchor = local // per_cell, local % per_cell
        found = level.view(batch, per_cell, columns, height, width)[image, anchor, :, cell // width, cell % width]
        rows = torch.where((indices >= start)[:, :, None], found, rows)  # a later level's replace these
        start += count
    return rows
