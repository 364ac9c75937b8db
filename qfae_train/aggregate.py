"""From distance maps to the training loss, the image score and the anomaly map.

Letters: N images, S pixels per side, M maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qfae_train import config

Maps = Mapping[tuple[int, int], Tensor]
"""Distance grids (N, g, g) by (block, patch size)."""


class Anomaly(NamedTuple):
    """Result of scoring."""

    score: Tensor
    """(N,), float32, unitless, larger is more anomalous."""
    anomaly_map: Tensor
    """(N, S, S), float32, unitless, larger is more anomalous."""


def upsample(grid: Tensor, image_size: int) -> Tensor:
    """Return the grid (N, g, g) resized bilinearly (align_corners=False) to (N, S, S)."""
    resized = F.interpolate(grid[:, None], size=(image_size, image_size), mode="bilinear", align_corners=False)
    return resized[:, 0]


def fused_maps(maps: Maps, patch_sizes: Sequence[int], blocks: Sequence[int], fusion: str, image_size: int) -> Tensor:
    """Return the maps at full size, (N, M, S, S).

    `product`: per block, the product over the patch sizes (M = blocks). `separate`: every map stands apart
    (M = blocks * patch sizes).
    """
    per_block = [
        torch.stack([upsample(maps[block, patch_size], image_size) for patch_size in patch_sizes], dim=1)
        for block in blocks
    ]
    if fusion == "product":
        return torch.stack([stack.prod(dim=1) for stack in per_block], dim=1)
    return torch.cat(per_block, dim=1)


def perceptual_loss(maps: Maps, options: config.Loss, image_size: int) -> Tensor:
    """Return the training loss, a scalar (supplement 1.2, step 3)."""
    return fused_maps(maps, options.patch_sizes, options.blocks, "product", image_size).mean()


def anomaly(maps: Maps, options: config.Score, image_size: int) -> Anomaly:
    """Return score and anomaly map (supplement 1.3 and Table 2; RSNA's order of reductions is an option)."""
    fused = fused_maps(maps, options.patch_sizes, options.blocks, options.fusion, image_size)
    per_map = fused.amax(dim=(2, 3)) if options.spatial == "max" else fused.mean(dim=(2, 3))
    score = per_map.mean(dim=1) if options.across == "mean" else per_map.amax(dim=1)
    pixel_map = fused.mean(dim=1) if options.pixel_map == "mean" else fused.amax(dim=1)
    return Anomaly(score, pixel_map)


def factors(options: config.Score) -> int:
    """Return how many cosine distances a score multiplies."""
    return len(options.patch_sizes) if options.fusion == "product" else 1
