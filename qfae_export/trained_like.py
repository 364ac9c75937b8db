"""Weights drawn so that a network of random numbers is conditioned as a trained one is.

A plain draw (every matrix N(0, 1 / inputs), nothing more) has two faults that trained networks lack. Its attention is
nearly uniform, so that tokens become alike with depth (Dong et al., ICML 2021): hidden states span a handful of
directions. And what is left of the image is small beside what is the same for all images, so that scores of different
images differ by little, and rounding moves them by much of that. The facts that this draw is made from:

published initialisations
    Gains: N(0, 0.02) for a width of 1024 (timm, DINOv2, BEiT) is a gain of 0.64, Glorot's (MAE) 0.7 to 1.3: about 1.
    torch's own for a linear layer is 1 / sqrt(3); the projections, which nothing normalises before, have it.
    LayerScale (Touvron et al., ICCV 2021) starts at 1e-5 in DINOv2 and is learned per channel: at its start the blocks
    would do nothing, so this draw has it where residual branches end up. Sub-layers scaled by 1 / sqrt(2 depth)
    (GPT-2, Radford et al. 2019; by a block's own number in BEiT, Bao et al., ICLR 2022) keep a residual stream's
    growth independent of the depth.
    MAE's table of positions is sine-cosine: 0.71 in the root mean square, beside about 1 of an image's own.
trained transformers
    Keys resemble queries, W_q^T W_k having a positive diagonal, and what is read from a token is in part subtracted
    from it, W_proj W_v having a negative one (Trockman and Kolter, ICML 2023): tokens attend to similar ones and are
    kept apart, which is what keeps their rank.
    Attention is neither uniform nor on one token (entropy collapse: Zhai et al., ICML 2023): logits of order 1.
    The skip connection carries several times what a branch adds (Raghu et al., NeurIPS 2021), and the stream grows
    moderately.
    Tables of positions are smooth, filters of the patch embedding look like low cosine waves (Dosovitskiy et al.,
    ICLR 2021, figure 7).
images
    Their amplitudes fall with the spatial frequency as 1 / f (Field, JOSA A 1987). Filters that grow with it up to a
    limit see every frequency alike (Atick and Redlich, Neural Computation 1992); a reconstruction has the 1 / f.

Every tensor has a generator of its own, named after it: order and threads do not matter, and no more memory is needed
than for the largest tensor.

Letters: D width, H heads, K width of a head, T tokens, p pixels per side of a patch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

from qfae_train.qformer import QueryAttention

QUERY_GAIN = 1.25
"""Of queries and keys: their logits' standard deviation between unlike tokens is its square."""

ALIKE = 0.3
"""Correlation of a head's keys with its queries."""

SUBTRACTED = 0.5
"""Share of what an attention gives back that is the negative of what it read."""

BRANCHES = 2.5
"""Root of the sum of squares that all residual branches have for gains."""

SPREAD = 0.2
"""Standard deviation of the norms' gains."""

BIAS = 0.05

POSITIONS = 0.5**0.5
"""Root mean square of tables of positions, MAE's."""

WAVES = 4.0
"""Positions: cycles over the side of an image, at most. Filters: the frequency, in half cycles of a patch, from which they fall."""


def draw(model: nn.Module, seed: str) -> None:
    """Fill every tensor of a vision transformer or autoencoder's trained parts in place."""


@torch.no_grad()
def fill(tensors: dict[str, Tensor], model: nn.Module, seed: str) -> None:
    """Fill tensors of `model` in place, by name; those of frozen parts may be left out."""
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        tensor.normal_(generator=generator)
        _rule(name, tensor)(tensor)
    for name, module in model.named_modules():
        if isinstance(module, Attention) and f"{name}.qkv.weight" in tensors:
            _like_trained_attention(module.qkv.weight, module.proj.weight, module.num_heads, module.num_heads)
        elif isinstance(module, QueryAttention):
            _like_trained_attention(module.qkv.weight, module.out.weight, module.heads, 1)
    for name, module in model.named_modules():
        blocks: Any = module
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and hasattr(module[0], "mlp") and f"{name}.0.mlp.fc2.weight" in tensors:
            for block in blocks:
                _scale_branches(block, BRANCHES / (2 * len(blocks)) ** 0.5)


def _rule(name: str, tensor: Tensor) -> Callable[[Tensor], object]:
    if name.endswith("bias"):
        return lambda x: x.mul_(BIAS)
    if tensor.ndim == 1:
        return lambda x: x.mul_(SPREAD).add_(1)
    if name.endswith("patch_embed.proj.weight"):
        return _filters
    if name.endswith("predict.weight"):
        return _patches
    if name.endswith(("pos_embed", "queries")):
        return _positions
    if not name.endswith("weight"):
        return lambda x: x.mul_(POSITIONS)
    gain = 1.0
    if name.endswith("projection.weight"):
        gain = 3**-0.5
    elif name.endswith("to_q.weight"):
        gain = 1.5
    elif name.endswith("fc2.weight"):
        gain = 1.5
    return lambda x: x.mul_(gain * x[0].numel() ** -0.5)


def _filters(x):
    d, c, p, _ = x.shape
    f = _freq(p)
    amp = f * torch.exp(-f / WAVES)
    amp[0, 0] = 0.25
    wave = _cosines(p)
    x.copy_(torch.einsum("dcuv,ui,vj->dcij", x.double() * amp, wave, wave))
    x.mul_(PATCH_GAIN / p)


PATCH_GAIN = 1.0


def _patches(x):
    p = math.isqrt(x.shape[0] // 3)
    f = _freq(p)
    amp = 1 / f.clamp(min=0.7)
    amp = amp / (amp**2).mean().sqrt()
    z = x.double().unflatten(0, (p, p, 3))
    z = z.mean(-2, keepdim=True) * 0 + z  # colour
    z = 0.95 * z[:, :, :1] + 0.3 * z
    wave = _cosines(p)
    x.copy_(torch.einsum("uvcd,ui,vj->ijcd", z * amp[:, :, None, None], wave, wave).flatten(0, 2))
    x.mul_(x.shape[1] ** -0.5)


def _freq(p):
    at = torch.arange(p, dtype=torch.float64)
    return torch.hypot(at[:, None].expand(p, p), at[None].expand(p, p))


def _cosines(p):
    at = torch.arange(p, dtype=torch.float64)
    w = torch.cos(math.pi * at[:, None] * (at + 0.5) / p) * (2 / p) ** 0.5
    w[0] /= 2**0.5
    return w


def _positions(x):
    t, d = x.shape[-2:]
    side = math.isqrt(t)
    first = t - side * side
    if first > 1:
        x.mul_(POSITIONS)
        return
    # uses the first rows of the draw for frequencies and phases
    rest = x[0, first:]
    fx, fy, ph = rest[0].double(), rest[1].double(), rest[2].double() * math.pi
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    ang = 2 * math.pi * WAVES / 2 * (at[:, None, None] * fy + at[None, :, None] * fx) + 2 * math.pi * ph
    smooth = torch.cos(ang).flatten(0, 1)
    rest.mul_(0.3).add_(smooth)
    rest.mul_(1.0)
    x[0, :first].mul_(POSITIONS)


def _like_trained_attention(qkv, out, heads, kv):
    d = out.shape[0]
    k = d // heads
    q, key, v = qkv.split([d, kv * k, kv * k])
    q.mul_(QUERY_GAIN)
    key.mul_(QUERY_GAIN)
    if kv == 1:
        q.unflatten(0, (heads, k)).mul_((1 - ALIKE**2) ** 0.5).add_(key, alpha=ALIKE)
    else:
        key.mul_((1 - ALIKE**2) ** 0.5).add_(q, alpha=ALIKE)
        out.mul_((1 - SUBTRACTED**2) ** 0.5).add_(v.T, alpha=-SUBTRACTED)


def _scale_branches(block, gain):
    for scale, last in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
        if isinstance(scale, LayerScale):
            scale.gamma.sub_(1).mul_(0.5 / SPREAD).exp_().mul_(gain)
        else:
            last.weight.mul_(gain)
            last.bias.mul_(gain)
