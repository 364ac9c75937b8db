"""The decoder: from the Q-Former's tokens to pixels.

Letters: B images, N tokens (one per decoded patch), R prefix tokens, D width, P pixels per side of a patch.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from qfae_train import config
from qfae_train.positions import sincos_2d


class Decoder(nn.Module):
    """Pre-norm transformer blocks and one linear layer per patch."""

    positions: Tensor

    def __init__(self, options: config.Decoder, in_dim: int, image_size: int) -> None:
        super().__init__()
        self.side = image_size // options.patch_size
        self.patch_size = options.patch_size
        self.embed = nn.Linear(in_dim, options.dim)
        self.register_buffer("positions", sincos_2d(options.dim, self.side)[None], persistent=False)
        self.register_tokens = nn.Parameter(torch.randn(1, options.register_tokens, options.dim) * 1e-3)
        self.class_token = nn.Parameter(torch.randn(1, 1, options.dim) * 1e-3)
        self.blocks = nn.ModuleList(
            Block(options.dim, options.heads, options.mlp_ratio, qkv_bias=True, norm_layer=nn.LayerNorm)
            for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(options.dim)
        self.predict = nn.Linear(options.dim, options.patch_size**2 * 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return normalised images (B, 3, S, S) from tokens [B, N, in_dim]."""
        x = self.embed(tokens) + self.positions
        prefix = torch.cat([self.register_tokens, self.class_token], dim=1).expand(len(x), -1, -1)
        x = torch.cat([prefix.to(x.dtype), x], dim=1)  # [B, R + N, D]
        for block in self.blocks:
            x = block(x)
        patches = self.predict(self.norm(x[:, prefix.shape[1] :]))  # [B, N, P * P * 3]
        return unpatch(patches, self.side, self.patch_size)


def unpatch(patches: Tensor, side: int, patch_size: int) -> Tensor:
    """Return images (B, 3, S, S) from patches [B, side * side, P * P * 3], each ordered (row, column, channel)."""
    x = patches.reshape(-1, side, side, patch_size, patch_size, 3)
    x = x.permute(0, 5, 1, 3, 2, 4)  # [B, 3, side, P, side, P]
    return x.reshape(-1, 3, side * patch_size, side * patch_size)
