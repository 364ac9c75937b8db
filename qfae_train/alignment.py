"""An initialisation for small models trained briefly: every query starts by reading the image under it.

With the paper's initialisation the attention of the queries is uniform at first, all of them read the same mean, and
a model trained for minutes instead of days stays at the mean image. The parts start here as

- queries: the sine-cosine table (`query_init = "aligned"` does that in `qformer`);
- projections: whitening of the encoder's hidden states, whose scale and correlations differ by orders of magnitude, as
  far as rounding to FP16 bears it;
- self-attention of the queries: nearly the identity;
- cross-attention: keys and queries are linear read-outs of the position, fitted by least squares, so that a query
  attends to the context tokens around its own place;
- the MLP and the decoder: Glorot's uniform weights, as MAE's decoder has them;
- the decoder's last layer: the principal components of image patches, so that a step along one of its inputs changes a
  patch by what is common in the data.

Everything remains trained; only the start differs. Letters: B images, L context tokens, Q queries, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qfae_train.autoencoder import QFormerAutoencoder
from qfae_train.decoder import Decoder
from qfae_train.encoder import Encoder
from qfae_train.qformer import CrossAttention, QueryAttention

SHARPNESS = 10.0
"""Weight of the positional read-out in the attention logits: e-folds within about a tenth of the image's side."""

LARGEST_GROWTH = 8.0
"""The most that whitening multiplies a direction of the hidden states by, in units of 1 / r, r their root mean square.

FP16 rounds each value of a state by up to 2^-11 of it (0.05 %), so a direction by up to about 2^-11 r. Whitening
divides by the direction's standard deviation s, and the Q-Former sees it with an error of 2^-11 r / s: at most 8 times
0.05 % are 0.4 %. Measured on the demo's slices, the root mean square of that error is 0.42 of the bound, 0.16 %. Hidden
states that use all of their dimensions (the demo's: r / s of 0.8 to 1.8) are whitened whole.
"""

RIDGE = 1e-3
"""Regularisation of the least-squares fits, in units of the mean square of the inputs."""


@torch.no_grad()
def align(autoencoder: QFormerAutoencoder, images: Tensor) -> None:
    """Initialise projections, the first block's attention and the last layer on normalised images (B, 3, S, S)."""
    hidden = autoencoder.hidden(images)
    encoders = [encoder for encoder in autoencoder.encoders if isinstance(encoder, Encoder)]
    for encoder, states in zip(encoders, hidden, strict=True):
        whiten(encoder, states)
    qformer = autoencoder.qformer
    side = math.isqrt(qformer.queries.shape[1])
    block = qformer.blocks[0]
    attention, cross = block.attention, block.cross
    assert isinstance(attention, QueryAttention)
    assert isinstance(cross, CrossAttention)
    align_queries(attention, qformer.queries[0], side)
    read_out(cross, attention(qformer.queries)[0], grid(side), autoencoder.context(hidden), context_grid(encoders))
    for layer in (block.fc1, block.fc2, *autoencoder.decoder.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    principal_patches(autoencoder.decoder, images)


def grid(side: int) -> Tensor:
    """Return the places (side * side, 2) of a raster grid, in units of the image's side, 0 to 1."""
    at = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1).reshape(-1, 2)


def context_grid(encoders: Sequence[Encoder]) -> Tensor:
    """Return the places (L, 2) of all context tokens; prefix tokens, which have none, are NaN."""
    parts = []
    for encoder in encoders:
        nowhere = torch.full((encoder.backbone.num_prefix_tokens, 2), math.nan)
        parts += [nowhere, grid(encoder.backbone.patch_embed.grid_size[0])] * len(encoder.taps)
    return torch.cat(parts)


def code(places: Tensor, width: int) -> Tensor:
    """Return a positional code (N, width) of places (N, 2) whose inner products fall with the distance."""
    octaves = max(1, width // 4)
    angles = math.pi * places[:, :, None] * 2.0 ** torch.arange(octaves)  # (N, 2, octaves)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) / octaves**0.5
    flat = waves.flatten(1)[:, :width]
    return torch.nn.functional.pad(flat, (0, width - flat.shape[1]))


def fit_linear(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the matrix (outputs, inputs) of the ridge regression from inputs (N, I) to targets (N, O)."""
    x, y = inputs.double(), targets.double()
    penalty = RIDGE * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(x.T @ x + penalty, x.T @ y).T
    return solution.to(inputs.dtype)


def whiten(encoder: Encoder, states: Tensor) -> None:
    """Make the projection's outputs uncorrelated with unit variance, the largest components first.

    Components that would grow by more than LARGEST_GROWTH grow by just that, and keep a variance below one.
    """
    flat = states.flatten(0, 1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    keep = min(encoder.projection.out_features, len(values))
    smallest = flat.square().mean() / LARGEST_GROWTH**2
    largest = values.flip(0)[:keep].clamp_min(smallest)
    matrix = vectors.flip(1)[:, :keep].T / largest.sqrt()[:, None]
    weight, bias = encoder.projection.weight, encoder.projection.bias
    weight[:keep] = matrix.to(weight.dtype)
    bias[:keep] = (-matrix @ mean).to(bias.dtype)


def align_queries(attention: QueryAttention, queries: Tensor, side: int) -> None:
    """Make the self-attention of queries (Q, D) nearly the identity on them."""
    dim, width = queries.shape[1], attention.head_dim
    weight, out = attention.qkv.weight, attention.out.weight
    # Scaled by sqrt(width) because the attention divides by it; four times as sharp as the cross-attention.
    own = fit_linear(queries, code(grid(side), width) * (4 * SHARPNESS * width**0.5) ** 0.5)
    weight[: attention.heads * width] = own.repeat(attention.heads, 1)
    weight[dim : dim + width] = own
    # The values are the leading components of the table; the first head alone brings them back.
    leading = torch.linalg.svd(queries, full_matrices=False)[2][:width]
    weight[dim + width :] = leading
    out.zero_()
    out[:, :width] = leading.T
    attention.qkv.bias.zero_()
    attention.out.bias.zero_()


def read_out(cross: CrossAttention, queries: Tensor, places: Tensor, context: Tensor, context_places: Tensor) -> None:
    """Fit the cross-attention's queries and keys to the positions of queries (Q, D) and context (B, L, D)."""
    target = code(places, cross.head_dim) * (SHARPNESS * cross.head_dim**0.5) ** 0.5
    cross.to_q.weight.copy_(fit_linear(cross.norm(queries), target).repeat(cross.heads, 1))
    known = ~context_places.isnan().any(dim=1)
    wanted = code(context_places[known], cross.head_dim) * (SHARPNESS * cross.head_dim**0.5) ** 0.5
    keys = fit_linear(context[:, known].flatten(0, 1), wanted.repeat(len(context), 1))
    cross.to_kv.weight[: cross.heads * cross.head_dim] = keys.repeat(cross.heads, 1)


def principal_patches(decoder: Decoder, images: Tensor) -> None:
    """Make the last layer's inputs coefficients of the principal components of patches, each of unit variance."""
    p = decoder.patch_size
    patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)  # [B, g, g, p, p, 3]
    flat = patches.flatten(3).flatten(0, 2)
    mean = flat.mean(0)
    _, spread, components = torch.linalg.svd(flat - mean, full_matrices=False)
    keep = min(len(components), decoder.predict.in_features)
    decoder.predict.weight.zero_()
    decoder.predict.weight[:, :keep] = components[:keep].T * (spread[:keep] / len(flat) ** 0.5)
    decoder.predict.bias.copy_(mean)
