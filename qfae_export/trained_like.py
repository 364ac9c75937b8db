"""Weights drawn so that a network of random numbers is conditioned as a trained one is.

A plain draw (every matrix N(0, 1 / inputs) and nothing more) has faults that trained networks lack. Its attention is
nearly uniform, so that tokens become alike with depth (Dong et al., ICML 2021) and hidden states span a handful of
directions; little of them depends on the image, so that scores differ little, and rounding moves them by much of that.
The facts that this draw is made from:

published initialisations
    Gains: N(0, 0.02), of timm, DINOv2 and BEiT, is a gain of 0.64 at a width of 1024, Glorot's, of MAE, 0.7 to 1.3;
    here it is 1. torch's own of a linear layer is 1 / sqrt(3): of the encoders' projections, which no norm precedes.
    Sub-layers scaled by 1 / sqrt(2 depth) (GPT-2: Radford et al. 2019; BEiT, by a block's own number: Bao et al., ICLR
    2022) make the residual stream's growth independent of the depth. LayerScale (Touvron et al., ICCV 2021), 1e-5 at
    DINOv2's start, when a block does nothing, is learned by channel: here it has what others have as such a scale.
    MAE's positions are a sine-cosine table: 0.71 in the root mean square, of the size of an image's own part.
trained transformers
    Keys resemble queries (W_q^T W_k has a positive diagonal), and attention takes away a part of what it reads (that of
    W_proj W_v is negative): Trockman and Kolter, ICML 2023. So tokens attend to similar ones and stay apart.
    Attention is neither uniform nor on single tokens (entropy collapse: Zhai et al., ICML 2023): logits of order 1.
    The stream carries several times what a branch adds (Raghu et al., NeurIPS 2021).
    Features have a mean that they share (anisotropy: Ethayarajh, EMNLP 2019; in images too: Godey et al., EACL 2024).
    Positions are smooth, filters of the patch embedding are low cosine waves (Dosovitskiy et al., ICLR 2021, figure 7).
images
    Amplitudes fall with the spatial frequency, as 1 / f (Field, JOSA A 1987). Filters that grow as f, up to a limit,
    see all frequencies alike (Atick and Redlich, Neural Computation 1992). Patches that are drawn fall as 1 / f.

Where the sources say of which sign or order something is, the constants below say how much: they were chosen by what
tests/export/test_trained_like.py asks. Left out are massive activations (Sun et al., COLM 2024), which DINOv2 has in
few channels of its register tokens: INT8 meets larger ranges in a trained encoder.

Letters: D width, H heads, K width of a head, T tokens, P pixels per side of a patch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from qfae_train.qformer import CrossAttention, QueryAttention

READING = 1.5
"""Gain of the queries that read the encoders' tokens, which are not normalised; the keys' is 1."""

ALIKE = 0.3
"""Correlation of the keys' weights with the queries'."""

TAKEN_AWAY = 0.1
"""Correlation of the weights behind an attention with the values', negative."""

BRANCHES = 2.0
"""Root of the sum of squares of all residual branches' gains."""

SCALES = 0.5
"""Standard deviation of LayerScale's logarithm over channels."""

NORMS = 0.2
"""Standard deviation of the norms' gains, which are 1 in the mean."""

BIAS = 0.05
"""Standard deviation of biases; what they are added to has about 1."""

COMMON = 2.5
"""Root mean square of what all patches of all images share: the bias of a patch embedding."""

IMAGES = 1.5
"""Root mean square of what a patch embedding makes of grey images of variance 1 that fall as 1 / f."""

TOKENS = 0.7
"""Standard deviation of tokens that stand for no patch."""

OWN = 0.3
"""Standard deviation of what tables of positions have besides smooth waves; those have 0.71."""

CYCLES = 2.0
"""Standard deviation of these waves' frequencies, in cycles over the image's side."""

LIMIT = 4.0
"""Frequency, in half cycles of a patch, of which filters have the most."""

GELU = 0.65
"""Root mean square of GELU(x), x of a standard normal distribution."""

GREY = 0.9
"""Correlation of the colours of a drawn patch."""


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], seed: str) -> None:
    """Fill tensors of a model in place, float32; `tensors` are those to be filled, by the names they have in it.

    The model is a timm vision transformer or a QFormerAutoencoder. Each tensor has a generator of its own, named after
    it, so that neither their order nor threads matter; besides them, no more is held than twice the largest.
    """
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        _shape(name, tensor.normal_(generator=generator))
    for name, module in model.named_modules():
        if isinstance(module, Attention) and f"{name}.qkv.weight" in tensors:
            _relate(module.qkv.weight, module.proj.weight)
        elif isinstance(module, QueryAttention):
            _relate_shared(module.qkv.weight, module.heads)
        elif isinstance(module, CrossAttention):
            module.to_q.weight.mul_(READING)
        elif isinstance(module, nn.Sequential | nn.ModuleList) and f"{name}.0.mlp.fc2.weight" in tensors:
            for block in module:
                if isinstance(block, Block):
                    _weaken(block, BRANCHES / math.sqrt(2 * len(module)))


def _shape(name: str, x: Tensor) -> None:
    """Give standard normal numbers the scale and form of the tensor of that name, in place."""
    if name.endswith("patch_embed.proj.bias"):
        x.mul_(COMMON)
    elif name.endswith("bias"):
        x.mul_(BIAS)
    elif x.ndim == 1:
        x.mul_(NORMS).add_(1)
    elif name.endswith("patch_embed.proj.weight"):
        _filters(x)
    elif name.endswith("decoder.predict.weight"):
        _patches(x)
    elif name.endswith(("pos_embed", "queries")):
        _positions(x)
    elif not name.endswith("weight"):
        x.mul_(TOKENS)
    else:
        gain = 3**-0.5 if name.endswith("projection.weight") else 1 / GELU if name.endswith("fc2.weight") else 1.0
        x.mul_(gain * x[0].numel() ** -0.5)


def _filters(x: Tensor) -> None:
    """Make filters [D, colours, P, P] for grey images that fall as 1 / f; see IMAGES."""
    waves, frequency, falling = _waves(x.shape[-1])
    amplitude = frequency * torch.exp(-frequency / LIMIT)
    amplitude *= IMAGES / (x.shape[1] * (amplitude * falling).square().sum()).sqrt()
    x.copy_(torch.einsum("dcuv,ui,vj->dcij", x.double() * amplitude, waves, waves))


def _patches(x: Tensor) -> None:
    """Make a last layer [P * P * 3, D] that gives patches of variance 1, nearly grey, which fall as 1 / f."""
    side = math.isqrt(x.shape[0] // 3)
    waves, _, falling = _waves(side)
    drawn = x.double().unflatten(0, (side, side, 3))
    grey = GREY**0.5 * drawn[:, :, :1] + (1 - GREY) ** 0.5 * drawn.roll(1, dims=-1)
    x.copy_(torch.einsum("uvcd,uv,ui,vj->ijcd", grey, falling, waves, waves).flatten(0, 2))
    x.mul_(x.shape[1] ** -0.5)


def _waves(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosine waves [wave, pixel], orthonormal, the frequency of their products, and 1 / f with mean square 1.

    Frequencies are in half cycles of a patch; the constant counts as a quarter of one.
    """
    at = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi * at[:, None] * (at + 0.5) / side) * (2 / side) ** 0.5
    waves[0] *= 0.5**0.5
    frequency = torch.hypot(*torch.meshgrid(at, at, indexing="ij")).clamp(min=0.25)
    falling = 1 / frequency
    return waves, frequency, falling / falling.square().mean().sqrt()


def _positions(x: Tensor) -> None:
    """Make a table [1, T, D] smooth over its grid, if it has one, with a class token before it or without."""
    side = math.isqrt(x.shape[1])
    before = x.shape[1] - side**2
    if side < 2 or before > 1:
        x.mul_(TOKENS)
        return
    grid = x[0, before:]
    along, down, phase = grid[:3].double()  # drawn numbers, of which more is not needed
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    turns = CYCLES * (at[None, :, None] * along + at[:, None, None] * down) + phase
    grid.mul_(OWN).add_(torch.cos(2 * math.pi * turns).flatten(0, 1))
    x[0, :before].mul_(TOKENS)


def _relate(qkv: Tensor, proj: Tensor) -> None:
    """Make keys resemble queries, and what an attention gives the negative of its values, in part."""
    q, k, v = qkv.chunk(3)
    k.mul_(_rest(ALIKE)).add_(q, alpha=ALIKE)
    proj.mul_(_rest(TAKEN_AWAY)).add_(v.t(), alpha=-TAKEN_AWAY)


def _relate_shared(qkv: Tensor, heads: int) -> None:
    """Make every head's queries resemble the one key head, in the weight [(H + 2) * K, D]."""
    width = qkv.shape[0] // (heads + 2)
    k = qkv[heads * width : (heads + 1) * width]
    qkv[: heads * width].unflatten(0, (heads, width)).mul_(_rest(ALIKE)).add_(k, alpha=ALIKE)


def _rest(share: float) -> float:
    return math.sqrt(1 - share**2)


def _weaken(block: Any, gain: float) -> None:
    """Give both residual branches of a block that gain: in its LayerScale, if it has one, or in their last weights."""
    for scale, last in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
        if isinstance(scale, LayerScale):
            drawn = (scale.gamma - 1) / NORMS
            scale.gamma.copy_(gain * torch.exp(SCALES * drawn - SCALES**2))  # its mean square is the gain's
        else:
            last.weight.mul_(gain)
            if last.bias is not None:
                last.bias.mul_(gain)
