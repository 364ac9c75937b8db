"""The frozen encoders: hidden states of vision transformers, projected to the Q-Former's width.

Letters: B images, L context tokens, S pixels per side, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """One frozen backbone and its trained projection.

    Blocks behind the last used hidden state are not kept: nothing reads them.
    """

    def __init__(self, backbone: nn.Module, hidden_states: Sequence[int], dim: int) -> None:
        super().__init__()
        vit: Any = backbone
        depth = len(vit.blocks)
        self.taps = [depth + state for state in hidden_states]  # indices of blocks, in the order of concatenation
        del vit.blocks[max(self.taps) + 1 :]
        vit.norm = nn.Identity()  # hidden states are taken before the final norm
        self.backbone = vit
        self.projection = nn.Linear(vit.embed_dim, dim)

    @property
    def context_tokens(self) -> int:
        """L: hidden states of one image, prefix tokens and all taps."""
        patches: int = self.backbone.patch_embed.num_patches
        return (self.backbone.num_prefix_tokens + patches) * len(self.taps)

    @torch.no_grad()
    def hidden(self, images: Tensor) -> Tensor:
        """Return the concatenated hidden states, prefix tokens kept: (B, L, width), from normalised (B, 3, S, S)."""
        tokens = self.backbone.norm_pre(self.backbone._pos_embed(self.backbone.patch_embed(images)))
        states = {}
        for number, block in enumerate(self.backbone.blocks):
            tokens = block(tokens)
            states[number] = tokens
        return torch.cat([states[tap] for tap in self.taps], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return context tokens (B, L, dim) from normalised images (B, 3, S, S)."""
        projected: Tensor = self.projection(self.hidden(images))
        return projected
