"""The perceptual reading in its plainest form: one whole timm model per patch size, FP32, eager, nothing shared.

The reference that the packed trunk is tested against. Weights of another patch size come through timm's own loading
(`checkpoint_filter_fn`), as they do for the authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from qfae_train.config import Backbone
from qfae_train.perceptual import Features


class PlainPerceptual(nn.Module):
    """One complete vision transformer per patch size.

    Args:
        backbone: the configuration of the model the weights belong to.
        state: its weights, under timm's names.
        image_size: pixels per side of the input.
        patch_sizes: the patch sizes to read.

    """

    def __init__(
        self, backbone: Backbone, state: dict[str, Tensor], image_size: int, patch_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.models = nn.ModuleDict()
        for patch_size in patch_sizes:
            args = {**backbone.args, "patch_size": patch_size, "img_size": image_size, "num_classes": 0}
            model: Any = timm.create_model(backbone.timm, **args)
            model.load_state_dict(checkpoint_filter_fn(dict(state), model))
            self.models[str(patch_size)] = model
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, blocks: Sequence[int]) -> Features:
        """Return patch tokens (N, grid * grid, D) by (block numbered from 1, patch size), without the final norm."""
        features: Features = {}
        for name, model in self.models.items():
            read: Any = model
            states = read.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)
            features.update({(block, int(name)): states[block - 1] for block in blocks})
        return features


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
