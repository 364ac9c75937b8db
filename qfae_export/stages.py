"""The stages of the inference graph, built from training's modules; the weights are folded once, here.

Where a stage joins what several units gave (torch.cat, a sum), one FP32 part makes the whole FP32: what a policy keeps
is rounded by the next FP16 unit and nowhere else.

Letters: B images, S pixels per side, L context tokens, Q queries, T tokens, D width, H heads, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from qfae_export.errors import ExportError
from qfae_export.layers import (
    Attend,
    CausalAttend,
    Constant,
    Embed,
    Linear,
    Norm,
    chained,
    entering_to_normalised,
    exact,
    exactly,
    inference_block,
    patch_kernel,
    patches,
)
from qfae_train.backbone import is_plain
from qfae_train.decoder import Decoder
from qfae_train.encoder import Encoder
from qfae_train.perceptual import Features, PerceptualNetwork
from qfae_train.qformer import QFormer, QFormerBlock


class _Positions(nn.Module):
    """What a backbone adds to its patches and puts before them, as a module."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, patches: Tensor) -> Tensor:
        """Return tokens [B, P + T, D] from patches [B, T, D]."""
        tokens: Tensor = self.vit._pos_embed(patches)
        return tokens


class EncoderStage(nn.Module):
    """Pixels to hidden states; blocks behind the last hidden state are not here."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        vit: Any = encoder.backbone
        embed = vit.patch_embed
        if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity):
            raise ExportError(
                f"the encoder's patch embedding is a {type(embed).__name__} with a norm or of another kind than timm's "
                "plain PatchEmbed, which is all that can be exported; choose another encoder"
            )
        self.patch_size: int = embed.patch_size[0]
        kernel, gain = patch_kernel(embed.proj.weight)
        bias = gain if embed.proj.bias is None else exact(embed.proj.bias) + gain
        # Positions are only added, prefix tokens only put in front: of no patches at all, both come out.
        free = getattr(vit, "dynamic_img_size", False)  # such a model wants its patches as a grid
        shape = (*embed.grid_size, vit.embed_dim) if free else (embed.num_patches, vit.embed_dim)
        own = {f"vit.{name}": one for name, one in vit.named_parameters(recurse=False)}  # not those of its blocks
        constant = exactly(_Positions(vit), torch.zeros(1, *shape), reads=own)
        prefix, table = constant.split([vit.num_prefix_tokens, embed.num_patches], dim=1)
        self.embed = Embed(Linear(kernel, None), table + bias, prefix)
        if not isinstance(vit.norm_pre, nn.LayerNorm | nn.Identity):
            raise ExportError(
                f"the encoder has a {type(vit.norm_pre).__name__} before its blocks, expected a LayerNorm or none, "
                "which is all that can be exported; choose another encoder"
            )
        self.norm_pre = Norm(vit.norm_pre) if isinstance(vit.norm_pre, nn.LayerNorm) else nn.Identity()
        for number, block in enumerate(vit.blocks, start=1):
            self.add_module(str(number), inference_block(block))
        self.depth = len(vit.blocks)
        self.taps = [tap + 1 for tap in encoder.taps]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return hidden states [B, L, D] from pixels [B, S, S, 3]."""
        x = self.norm_pre(self.embed(patches(pixels, self.patch_size)))
        states: dict[int, Tensor] = {}
        for number in range(1, self.depth + 1):
            x = self.get_submodule(str(number))(x, [x.shape[1]])
            states[number] = x
        taps = [states[tap] for tap in self.taps]
        return torch.cat(taps, dim=1) if len(taps) > 1 else taps[0]


class CrossBlock(nn.Module):
    """The queries read the context. Keys and values are one product with the encoder's projection before them."""

    def __init__(self, block: QFormerBlock, projections: Sequence[nn.Linear], queries: Tensor | None) -> None:
        """Take the queries [1, Q, D] after self-attention where they read no image, else None."""
        super().__init__()
        cross: Any = block.cross
        scale = 1 / math.sqrt(cross.head_dim)
        for number, projection in enumerate(projections, start=1):
            self.add_module(f"kv{number}", Linear(*chained(cross.to_kv, projection)))
        self.sources = len(projections)
        null = cross.null_kv.detach().repeat(1, cross.heads)  # [2, H * K]: every head has the same
        self.null = Constant(null.flatten()[None, None])  # [1, 1, 2 * H * K], keys first
        self.q: nn.Module
        if queries is None:
            self.norm_q: nn.Module = Norm(cross.norm)
            self.q = Linear(exact(cross.to_q.weight) * scale, None)
        else:
            self.norm_q = nn.Identity()
            self.q = Constant(exactly(cross.to_q, exactly(cross.norm, queries)) * scale)
        self.attention = Attend(cross.heads, constant_q=queries is not None)
        self.out = Linear(cross.out.weight, None)
        self.norm_out = Norm(cross.out_norm)

    def forward(self, queries: Tensor | None, hidden: Sequence[Tensor]) -> Tensor:
        """Return [B, Q, D] from queries [B, Q, D] (None: a constant) and every encoder's hidden states [B, L, D]."""
        parts = [self.get_submodule(f"kv{number}")(states) for number, states in enumerate(hidden, start=1)]
        null = self.null().expand(parts[0].shape[0], -1, -1)
        kv = torch.cat([null, *parts], dim=1)  # [B, 1 + L, 2 * H * K]
        k, v = kv.chunk(2, dim=2)
        q = self.q() if queries is None else self.q(self.norm_q(queries))
        out: Tensor = self.norm_out(self.out(self.attention(q, k, v)))
        return out


class QueryBlock(nn.Module):
    """One block of the Q-Former; the last one's `fc2` is part of the decoder's embedding."""

    def __init__(self, block: QFormerBlock, projections: Sequence[nn.Linear], queries: Tensor | None, *, last: bool):
        """Take the queries [1, Q, D] that enter if they read no image (the first block), else None; see CrossBlock."""
        super().__init__()
        attention = block.attention
        self.fixed = queries is not None
        if queries is None:
            self._attend(attention)
        else:
            queries = exactly(attention, queries)
        if block.cross is not None:
            self.cross: CrossBlock | None = CrossBlock(block, projections, queries)
        else:
            self.cross = None
        self.norm = Norm(block.norm)
        self.fc1 = Linear(block.fc1.weight, block.fc1.bias)
        self.fc2 = nn.Identity() if last else Linear(block.fc2.weight, block.fc2.bias)

    def _attend(self, attention: Any) -> None:
        dim, width = attention.heads * attention.head_dim, attention.head_dim
        scale = torch.ones(dim + 2 * width, dtype=torch.float64)
        scale[:dim] = 1 / math.sqrt(width)
        self.split = [dim, width, width]
        self.qkv = Linear(exact(attention.qkv.weight) * scale[:, None], exact(attention.qkv.bias) * scale)
        self.attention = CausalAttend(attention.heads)
        self.out = Linear(attention.out.weight, attention.out.bias)

    def forward(self, queries: Tensor | None, hidden: Sequence[Tensor]) -> Tensor:
        """Return [B, Q, D], or [B, Q, D * mlp_ratio] of the last block."""
        if queries is not None:
            queries = self.out(self.attention(*self.qkv(queries).split(self.split, dim=2)))
        if self.cross is not None:
            queries = self.cross(queries, hidden)
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(queries))))
        return out


class QFormerStage(nn.Module):
    """Hidden states to queries. What the queries do before they meet an image is a constant."""

    def __init__(self, qformer: QFormer, projections: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.depth = len(qformer.blocks)
        for number, block in enumerate(qformer.blocks, start=1):
            queries = qformer.queries.detach() if number == 1 else None
            last = number == self.depth
            self.add_module(str(number), QueryBlock(block, projections, queries, last=last))  # type: ignore[arg-type]

    def forward(self, hidden: Sequence[Tensor]) -> Tensor:
        """Return the last block's hidden layer [B, Q, D * mlp_ratio] from every encoder's states [B, L, D]."""
        queries: Any = None
        for number in range(1, self.depth + 1):
            queries = self.get_submodule(str(number))(queries, hidden)
        out: Tensor = queries
        return out


class DecoderStage(nn.Module):
    """Queries to pixels."""

    def __init__(self, decoder: Decoder, before: nn.Linear) -> None:
        """Take the Q-Former's last layer, with which the decoder's first makes one product."""
        super().__init__()
        weight, bias = chained(decoder.embed, before)
        prefix = torch.cat([decoder.register_tokens, decoder.class_token], dim=1)
        self.embed = Embed(Linear(weight, None), exact(decoder.positions) + bias, prefix)
        self.prefix = prefix.shape[1]
        for number, block in enumerate(decoder.blocks, start=1):
            self.add_module(str(number), inference_block(block))
        self.depth = len(decoder.blocks)
        self.norm = Norm(decoder.norm)
        factor, offset = entering_to_normalised()
        predict = decoder.predict
        self.head = Linear(exact(predict.weight) / factor, (exact(predict.bias) - offset) / factor)
        self.side, self.patch_size = decoder.side, decoder.patch_size

    def forward(self, queries: Tensor) -> Tensor:
        """Return pixels [B, S, S, 3] from [B, Q, D * mlp_ratio]."""
        x = self.embed(queries)
        for number in range(1, self.depth + 1):
            x = self.get_submodule(str(number))(x, [x.shape[1]])
        cut: Tensor = self.head(self.norm(x[:, self.prefix :]))
        cut = cut.reshape(-1, self.side, self.side, self.patch_size, self.patch_size * 3)
        return cut.transpose(2, 3).reshape(-1, self.side * self.patch_size, self.side * self.patch_size, 3)


class PerceptualStage(nn.Module):
    """Pixels to features at several patch sizes: one trunk, every product over the packed tokens of all sizes."""

    def __init__(self, network: PerceptualNetwork, patch_sizes: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.patch_sizes, self.blocks = list(patch_sizes), list(blocks)
        if not all(is_plain(block) for block in network.blocks[: max(blocks)]):
            raise ExportError(
                "the perceptual network's blocks have another activation or norm than timm's plain block (GELU, "
                "LayerNorm), which is all that can be exported; choose another perceptual network"
            )
        for size in self.patch_sizes:
            kernel = network.get_buffer(f"kernel_{size}")
            kernel, gain = patch_kernel(kernel.unflatten(1, (3, size, size)))
            table = exact(network.get_buffer(f"table_{size}")) + gain
            self.add_module(f"embed{size}", Embed(Linear(kernel, None), table, network.get_buffer(f"first_{size}")))
        self.depth = max(self.blocks)
        for number in range(1, self.depth + 1):
            self.add_module(str(number), inference_block(network.blocks[number - 1]))

    def forward(self, pixels: Tensor) -> Features:
        """Return patch tokens [B, T, D] by (block, patch size) from pixels [B, S, S, 3]."""
        packs = [self.get_submodule(f"embed{size}")(patches(pixels, size)) for size in self.patch_sizes]
        lengths = [pack.shape[1] for pack in packs]
        x = torch.cat(packs, dim=1) if len(packs) > 1 else packs[0]
        features: Features = {}
        for number in range(1, self.depth + 1):
            x = self.get_submodule(str(number))(x, lengths)
            if number in self.blocks:
                cut = x.split(lengths, dim=1) if len(lengths) > 1 else [x]
                for size, tokens in zip(self.patch_sizes, cut, strict=True):
                    features[number, size] = tokens[:, 1:]
        return features
