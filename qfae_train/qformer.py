"""The Q-Former: trained queries read the encoder's context tokens.

Letters: B images, L context tokens, Q queries, D width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfae_train import config
from qfae_train.positions import sincos_2d


class QueryAttention(nn.Module):
    """Self-attention of the queries: H query heads share one key head and one value head, causally.

    Query i sees the queries up to i (the behaviour of the released checkpoints).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, dim + 2 * self.head_dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor) -> Tensor:
        """Return attended queries [B, Q, D]."""
        batch, count, dim = queries.shape
        q, k, v = self.qkv(queries).split([dim, self.head_dim, self.head_dim], dim=-1)
        q = q.view(batch, count, self.heads, self.head_dim).transpose(1, 2)  # [B, H, Q, K]
        # Expanding costs no memory and lets every backend of the attention take the shared head.
        k = k[:, None].expand(batch, self.heads, count, self.head_dim)
        v = v[:, None].expand(batch, self.heads, count, self.head_dim)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        merged: Tensor = self.out(attended.transpose(1, 2).reshape(batch, count, dim))
        return merged


class CrossAttention(nn.Module):
    """The queries read the context; a learned null token stands before it, for queries that find nothing."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, head_dim))
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.out_norm = nn.LayerNorm(dim)

    def _split_heads(self, tokens: Tensor) -> Tensor:
        heads: Tensor = tokens.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # [B, H, tokens, K]
        return heads

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return [B, Q, D] from queries [B, Q, D] and context [B, L, D]."""
        q = self._split_heads(self.to_q(self.norm(queries)))
        k, v = (self._split_heads(part) for part in self.to_kv(context).chunk(2, dim=-1))
        null = self.null_kv[:, None, None, None, :].expand(2, k.shape[0], self.heads, 1, self.head_dim)
        k = torch.cat([null[0].to(k.dtype), k], dim=2)  # [B, H, 1 + L, K]
        v = torch.cat([null[1].to(v.dtype), v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.out_norm(self.out(attended.transpose(1, 2).flatten(2)))
        return merged


class QFormerBlock(nn.Module):
    """Self-attention of the queries, cross-attention in every other block, MLP; no residuals anywhere."""

    def __init__(self, options: config.QFormer, *, cross: bool) -> None:
        super().__init__()
        dim, hidden = options.dim, int(options.dim * options.mlp_ratio)
        self.attention = QueryAttention(dim, options.heads)
        self.cross = CrossAttention(dim, options.heads, options.cross_head_dim) if cross else None
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return [B, Q, D]; the first block's queries have B = 1 and meet the batch in the cross-attention."""
        queries = self.attention(queries)
        if self.cross is not None:
            queries = self.cross(queries.expand(len(context), -1, -1), context)
        out: Tensor = self.dropout(self.fc2(F.gelu(self.fc1(self.norm(queries)))))
        return out


class QFormer(nn.Module):
    """Trained queries and the blocks that let them read the context."""

    def __init__(self, options: config.QFormer) -> None:
        super().__init__()
        self.queries = nn.Parameter(_initial_queries(options))
        self.blocks = nn.ModuleList(QFormerBlock(options, cross=n % 2 == 0) for n in range(options.blocks))

    def forward(self, context: Tensor) -> Tensor:
        """Return [B, Q, D] from context tokens [B, L, D]."""
        # The first block's self-attention reads no image, so it runs once, whatever the batch.
        queries: Tensor = self.queries
        for block in self.blocks:
            queries = block(queries, context)
        return queries


def _initial_queries(options: config.QFormer) -> Tensor:
    if options.query_init != "normal":
        return sincos_2d(options.dim, round(options.queries**0.5))[None]
    return torch.randn(1, options.queries, options.dim) * 1e-3
