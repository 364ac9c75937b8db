"""The fixed two-dimensional sine-cosine table of MAE."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(dim: int, side: int) -> Tensor:
    """Return the table (side * side, dim), float32, rows in raster order.

    As in MAE (He et al. 2022): the first half of the channels encodes the position along the width, the second half
    along the height; each half is sines, then cosines, of the position times 10000^(-2k / (dim / 2)).
    """
    if dim % 4:
        raise ValueError(f"sine-cosine table: the width {dim} is not a multiple of 4")
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4.0))
    at = torch.arange(side, dtype=torch.float64)
    angles = at[:, None] * omega  # (side, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    along_width = axis[None, :, :].expand(side, side, -1)
    along_height = axis[:, None, :].expand(side, side, -1)
    return torch.cat([along_width, along_height], dim=2).reshape(side * side, dim).float()
