"""The perceptual network: one frozen trunk that looks at an image through several patch sizes at once.

The blocks of the published MAE are the same weights for every patch size; only the patch embedding's kernel and the
position table are resampled (by timm's own functions). So the tokens of all sizes are packed into one sequence, every
matrix product runs once over the pack, and only the attention is taken per size.

Letters: N images, T tokens of one patch size (1 + grid), W sum of T over the patch sizes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from qfae_train.backbone import unlike_mae

Features = dict[tuple[int, int], Tensor]
"""Patch tokens (N, grid * grid, D) by (block numbered from 1, patch size)."""


class PerceptualNetwork(nn.Module):
    """Frozen features of a vision transformer at several patch sizes.

    Args:
        backbone: timm's ViT with its weights, at the patch size and the image size they were trained with.
        image_size: pixels per side of the images to come.
        patch_sizes: every patch size that loss or score will ask for.
        last_block: the last block that will be asked for, numbered from 1; later ones are not kept.

    Raises:
        ValueError: the backbone computes what the trunk here does not.

    """

    def __init__(self, backbone: nn.Module, image_size: int, patch_sizes: Sequence[int], last_block: int) -> None:
        super().__init__()
        vit: Any = backbone
        faults = unlike_mae(vit)
        if faults:
            raise ValueError(f"perceptual network: the backbone has {'; '.join(faults)}")
        self.blocks = vit.blocks[:last_block]
        bias = vit.patch_embed.proj.bias
        for patch_size in sorted(set(patch_sizes)):
            grid = image_size // patch_size
            kernel = resample_patch_embed(vit.patch_embed.proj.weight, [patch_size, patch_size])
            table = resample_abs_pos_embed(vit.pos_embed, new_size=[grid, grid], num_prefix_tokens=1)
            first = vit.cls_token + table[:, :1]
            # The bias of the patch embedding is part of the table: one addition for both.
            self.register_buffer(f"kernel_{patch_size}", kernel.detach().flatten(1).clone(), persistent=False)
            self.register_buffer(f"first_{patch_size}", first.detach().clone(), persistent=False)
            self.register_buffer(f"table_{patch_size}", (table[:, 1:] + bias).detach().clone(), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualNetwork:
        """Stay in eval mode whatever the surrounding module does: the network is frozen."""
        return super().train(False)

    def embed(self, images: Tensor, patch_size: int) -> Tensor:
        """Return tokens [N, T, D] from normalised images (N, 3, S, S)."""
        # A convolution whose stride is its size is one matrix product over flattened patches; written so, the
        # gradient with respect to the image is a product too, where the convolution's is several times slower.
        patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [N, 3, g, p, g, p]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [N, g * g, 3 * p * p]
        tokens = F.linear(patches, self.get_buffer(f"kernel_{patch_size}")) + self.get_buffer(f"table_{patch_size}")
        first = self.get_buffer(f"first_{patch_size}").expand(len(images), -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)

    def forward(self, images: Tensor, patch_sizes: Sequence[int], blocks: Sequence[int]) -> Features:
        """Return the features of normalised images (N, 3, S, S) after the given blocks, numbered from 1."""
        packs = [self.embed(images, patch_size) for patch_size in patch_sizes]
        lengths = [pack.shape[1] for pack in packs]
        x = torch.cat(packs, dim=1)  # [N, W, D]
        features: Features = {}
        for number, block in enumerate(self.blocks[: max(blocks)], start=1):
            x = _packed_block(block, x, lengths)
            if number in blocks:
                for patch_size, tokens in zip(patch_sizes, x.split(lengths, dim=1), strict=True):
                    features[number, patch_size] = tokens[:, 1:]
        return features


def _packed_block(block: Any, x: Tensor, lengths: list[int]) -> Tensor:
    """Run one timm block over packed sequences: shared matrix products, attention within each sequence."""
    attention = block.attn
    normed = block.norm1(x)
    qkv = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1))  # [N, W, 3, H, K]
    attended = []
    for part in qkv.split(lengths, dim=1):
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each [N, H, T, K]
        attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    x = x + block.ls1(attention.proj(torch.cat(attended, dim=1)))
    out: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return out


SMALLEST_NORM = 1e-8
"""Features shorter than this count as if they were that long, as in PyTorch's cosine similarity."""


def distance_maps(of_image: Features, of_reconstruction: Features, image_size: int) -> dict[tuple[int, int], Tensor]:
    """Return 1 - cosine similarity per patch, as grids (N, g, g), by (block, patch size) (supplement 1.2, step 2).

    Computed as half the squared distance of the features at unit length, which is the same number: 1 - cosine is the
    difference of two numbers close to 1 where the features are alike, and has an error of 6e-8 in float32 whatever is
    left; distances of well-rebuilt patches are 1e-5, and three or four of them are multiplied. In float32 at least,
    whatever the features' type.
    """
    maps = {}
    for key, features in of_image.items():
        grid = image_size // key[1]
        dtype = torch.promote_types(features.dtype, torch.float32)
        difference = _unit_length(features.to(dtype)) - _unit_length(of_reconstruction[key].to(dtype))
        maps[key] = (difference.square().sum(-1) / 2).unflatten(1, (grid, grid))
    return maps


def _unit_length(features: Tensor) -> Tensor:
    """Return features (N, T, D), each at unit length."""
    unit: Tensor = features / features.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    return unit
