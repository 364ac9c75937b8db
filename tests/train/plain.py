"""Bilinear resizing written out, a reference."""

from __future__ import annotations

import torch
from torch import Tensor


def resized(grid: Tensor, size: int) -> Tensor:
    """Return the grid (N, g, g) resized bilinearly, half-pixel centres, borders repeated, written out: (N, S, S)."""
    count = grid.shape[-1]
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * count / size - 0.5).clamp(min=0)
    low = at.floor().long().clamp(max=count - 1)
    high = (low + 1).clamp(max=count - 1)
    share = at - low
    weights = torch.zeros(size, count, dtype=torch.float64)
    weights[torch.arange(size), low] += 1 - share
    weights[torch.arange(size), high] += share
    return weights @ grid.double() @ weights.T
