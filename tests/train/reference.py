"""The method in its plainest form, written from its description: full-depth timm models, one a patch size, FP32, eager.

It shares no code with the package: names are the authors', attention is written out, the queries run once per image,
nothing is folded, packed or cut. It is held against the authors' golden numbers like our own modules, and then serves
as the independent source for architectures of which there are none.

Letters: B images, L context tokens, Q queries, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from qfae_train.config import Config

Weights = Mapping[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    normed: Tensor = F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)
    return normed


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention written out, [B, H, N, K]; where the mask is False nothing is seen."""
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    attended: Tensor = weights.softmax(dim=-1) @ v
    return attended


class Reference:
    """A whole model of the authors' architecture, from their names, and the perceptual network's weights (timm's)."""

    def __init__(self, config: Config, weights: Weights, perceptual: Weights) -> None:
        self.config = config
        self.weights = weights
        size = config.model.image_size
        self.encoders = []
        for number, entry in enumerate(config.model.encoders):
            args = {"patch_size": entry.patch_size, "img_size": size, "num_classes": 0, **entry.args}
            model: Any = timm.create_model(entry.timm, **args)
            prefix = f"encoders.{number}.model."
            model.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
            self.encoders.append(model.eval())
        self.perceptual = {}
        for patch_size in {*config.loss.patch_sizes, *config.score.patch_sizes}:
            entry_args = {**config.perceptual.args, "patch_size": patch_size, "img_size": size, "num_classes": 0}
            trunk: Any = timm.create_model(config.perceptual.timm, **entry_args)
            trunk.load_state_dict(checkpoint_filter_fn(dict(perceptual), trunk))
            self.perceptual[patch_size] = trunk.eval()

    def context(self, x: Tensor) -> Tensor:
        parts = []
        for number, (entry, encoder) in enumerate(zip(self.config.model.encoders, self.encoders, strict=True)):
            states = encoder.forward_intermediates(
                x, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True, norm=False
            )
            wanted = entry.hidden_states or self.config.model.hidden_states
            tokens = [torch.cat([states[at][1], states[at][0]], dim=1) for at in wanted]
            parts.append(linear(torch.cat(tokens, dim=1), self.weights, f"encoders.{number}.final_projection"))
        return torch.cat(parts, dim=1)

    def junction(self, context: Tensor) -> Tensor:
        options = self.config.model.qformer
        x = self.weights["junction.queries"].expand(len(context), -1, -1)
        for number in range(options.blocks):
            at = f"junction.blocks.{number}"
            x = self.self_attention(x, at)
            if number % 2 == 0:
                x = self.cross_attention(x, context, f"{at}.cross_attn")
            x = linear(norm(x, self.weights, f"{at}.projection.0"), self.weights, f"{at}.projection.1")
            x = linear(F.gelu(x), self.weights, f"{at}.projection.3")
        return x

    def self_attention(self, x: Tensor, at: str) -> Tensor:
        heads = self.config.model.qformer.heads
        batch, count, dim = x.shape
        width = dim // heads
        q, k, v = linear(x, self.weights, f"{at}.attn.Wqkv").split([dim, width, width], dim=-1)
        q = q.reshape(batch, count, heads, width).transpose(1, 2)
        earlier = torch.arange(count)[:, None] >= torch.arange(count)[None, :]
        out = attend(q, k[:, None], v[:, None], earlier)  # one key and value head for all
        return linear(out.transpose(1, 2).reshape(batch, count, dim), self.weights, f"{at}.attn.out_proj")

    def cross_attention(self, x: Tensor, context: Tensor, at: str) -> Tensor:
        options = self.config.model.qformer
        heads, width = options.heads, options.cross_head_dim
        inner = heads * width

        def split(tokens: Tensor) -> Tensor:
            return tokens.reshape(len(tokens), -1, heads, width).transpose(1, 2)

        q = split(linear(norm(x, self.weights, f"{at}.norm"), self.weights, f"{at}.to_q"))
        both = linear(context, self.weights, f"{at}.to_kv")
        null = self.weights[f"{at}.null_kv"]
        first = (len(context), heads, 1, width)
        k = torch.cat([null[0].expand(first), split(both[..., :inner])], dim=2)
        v = torch.cat([null[1].expand(first), split(both[..., inner:])], dim=2)
        out = attend(q, k, v).transpose(1, 2).reshape(len(x), -1, inner)
        return norm(linear(out, self.weights, f"{at}.to_out.0"), self.weights, f"{at}.to_out.1")

    def decoder(self, tokens: Tensor) -> Tensor:
        options = self.config.model.decoder
        weights, batch = self.weights, len(tokens)
        x = linear(tokens, weights, "decoder.decoder_embed") + weights["decoder.decoder_pos_embed"]
        prefix = [weights["decoder.reg_tokens"]] if options.register_tokens else []
        prefix += [weights["decoder.cls_token"]]
        x = torch.cat([*(one.expand(batch, -1, -1) for one in prefix), x], dim=1)
        for number in range(options.depth):
            at = f"decoder.decoder_blocks.{number}"
            qkv = linear(norm(x, weights, f"{at}.norm1"), weights, f"{at}.attn.qkv")
            q, k, v = qkv.reshape(batch, x.shape[1], 3, options.heads, -1).permute(2, 0, 3, 1, 4)
            x = x + linear(attend(q, k, v).transpose(1, 2).flatten(2), weights, f"{at}.attn.proj")
            hidden = F.gelu(linear(norm(x, weights, f"{at}.norm2"), weights, f"{at}.mlp.fc1"))
            x = x + linear(hidden, weights, f"{at}.mlp.fc2")
        x = linear(norm(x, weights, "decoder.decoder_norm"), weights, "decoder.decoder_prediction")
        x = x[:, options.register_tokens + 1 :]
        p, size = options.patch_size, self.config.model.image_size
        side = size // p
        image = torch.zeros(batch, 3, size, size)
        for number in range(side * side):  # a patch's values are ordered (row, column, channel)
            row, column = divmod(number, side)
            patch = x[:, number].reshape(batch, p, p, 3).permute(0, 3, 1, 2)
            image[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p] = patch
        return image

    def distances(self, x: Tensor, y: Tensor, patch_sizes: Sequence[int], blocks: Sequence[int]) -> list[list[Tensor]]:
        """Distance maps at full size, per block a list over the patch sizes, each (B, S, S)."""
        size = self.config.model.image_size
        maps: list[list[Tensor]] = [[] for _ in blocks]
        for patch_size in patch_sizes:
            trunk = self.perceptual[patch_size]
            of_x, of_y = (
                trunk.forward_intermediates(one, output_fmt="NLC", intermediates_only=True, norm=False)
                for one in (x, y)
            )
            for number, block in enumerate(blocks):
                a, b = of_x[block - 1], of_y[block - 1]
                cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                grid = (1 - cosine).reshape(len(x), 1, size // patch_size, size // patch_size)
                maps[number].append(F.interpolate(grid, size=(size, size), mode="bilinear", align_corners=False)[:, 0])
        return maps

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score (B,) and pixel map (B, S, S) of uint8 (B, S, S, 3), as the configuration's [score] asks."""
        x = (images.permute(0, 3, 1, 2).float() / 255 - 0.449) / 0.226
        y = self.decoder(self.junction(self.context(x)))
        options = self.config.score
        per_block = self.distances(x, y, options.patch_sizes, options.blocks)
        if options.fusion == "product":
            maps = [torch.stack(row).prod(dim=0) for row in per_block]
        else:
            maps = [one for row in per_block for one in row]
        stack = torch.stack(maps)  # [maps, B, S, S]
        per_map = stack.flatten(2).amax(-1) if options.spatial == "max" else stack.flatten(2).mean(-1)
        score = per_map.mean(0) if options.across == "mean" else per_map.amax(0)
        pixel = stack.mean(0) if options.pixel_map == "mean" else stack.amax(0)
        return score, pixel
