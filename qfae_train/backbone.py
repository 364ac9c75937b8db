"""Frozen vision transformers: made by timm, filled from weight files (`weights`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import timm
import torch
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from qfae_train.backbone_args import argument_faults
from qfae_train.config import Backbone
from qfae_train.weights import fit, hub_file, read_tensors


@dataclass(frozen=True)
class BackboneShape:
    """What a backbone's configuration amounts to."""

    depth: int
    patch_size: int
    parameters: int
    unlike_mae: tuple[str, ...]
    """What keeps the model from being a perceptual network; see `unlike_mae`."""


def create(backbone: Backbone, image_size: int) -> nn.Module:
    """Return timm's model without its head, for square images of `image_size` pixels, its weights random.

    Raises:
        ValueError: the name or an argument is not among those that are handed to timm (`backbone_args`).

    """
    for fault in argument_faults(backbone, "backbone"):  # a configuration was checked; this is for all other callers
        raise ValueError(fault)
    args: dict[str, Any] = {"num_classes": 0, "patch_size": backbone.patch_size, **backbone.args}
    model: nn.Module = timm.create_model(backbone.timm, img_size=image_size, **args)
    return model


def blank(backbone: Backbone, image_size: int) -> nn.Module:
    """Return the model of `create` with memory in place of weights: fill it. timm draws them for many seconds."""
    with torch.device("meta"):
        model = create(backbone, image_size)
    if all(name in model.state_dict() for name, _ in model.named_buffers()):
        return model.to_empty(device="cpu")
    return create(backbone, image_size)  # it has tables that are computed, not loaded


def describe(backbone: Backbone, image_size: int) -> BackboneShape:
    """Return what the configuration amounts to, without allocating weights.

    Raises:
        TypeError: timm's model is not a plain vision transformer.
        Exception: whatever timm raises at a name or arguments that it does not know.

    """
    args = json.dumps(backbone.args, sort_keys=True, default=str)
    return _describe(backbone.timm, backbone.patch_size, args, image_size)


@lru_cache(maxsize=64)
def _describe(name: str, patch_size: int, args: str, image_size: int) -> BackboneShape:
    with torch.device("meta"):
        model: Any = create(Backbone(name, patch_size, json.loads(args)), image_size)
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"it is a {type(model).__name__}, expected a VisionTransformer")
    parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    return BackboneShape(len(model.blocks), model.patch_embed.patch_size[0], parameters, tuple(unlike_mae(model)))


def unlike_mae(vit: Any) -> list[str]:
    """List what a vision transformer computes beyond MAE's, which is all that the perceptual network computes."""
    found = []
    if vit.num_prefix_tokens != 1 or vit.cls_token is None:
        found.append(f"{vit.num_prefix_tokens} prefix tokens, expected one class token")
    elif vit.pos_embed is None or vit.no_embed_class:
        found.append("a class token without a position")
    if not isinstance(vit.norm_pre, nn.Identity) or not isinstance(vit.patch_embed.norm, nn.Identity):
        found.append("a norm before the blocks")
    for block in vit.blocks:
        attention = getattr(block, "attn", None)
        if type(block) is not Block or type(attention) is not Attention:
            found.append(f"blocks of the kind {type(block).__name__}, expected timm's plain Block")
            break
        extras = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
        if any(extra is not None and not isinstance(extra, nn.Identity) for extra in extras):
            found.append("a norm or gate within the attention")
            break
    return found


def is_plain(block: Any) -> TypeGuard[Block]:
    """Say whether a block is timm's plain pre-norm block: GELU, LayerNorm, attention without norms or gates."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    attention, mlp = block.attn, block.mlp
    idle = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    idle += [getattr(mlp, "norm", None)]
    scales = (block.ls1, block.ls2)
    return (
        all(one is None or isinstance(one, nn.Identity) for one in idle)
        and all(isinstance(one, nn.Identity | LayerScale) for one in scales)
        and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2))
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and isinstance(mlp.fc1, nn.Linear)
        and attention.head_dim * attention.num_heads == attention.qkv.in_features
    )


def read_frozen(backbone: Backbone, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a backbone's tensors as its file holds them, and where they came from.

    The record holds `timm`, `source` ('hub' or the file's name) and `sha256` (of the file). `option` is the
    command-line option that would take a file in place of the hub's.

    Raises:
        WeightsError: the hub or the file cannot supply tensors.

    """
    path = Path(backbone.weights) if backbone.weights else hub_file(backbone.timm, option)
    state, digest = read_tensors(path)
    return state, {"timm": backbone.timm, "source": path.name if backbone.weights else "hub", "sha256": digest}


Make = Callable[[Backbone, int], nn.Module]
"""`create` or `blank`."""


def filled(
    backbone: Backbone, state: Mapping[str, Tensor], image_size: int, source: str, make: Make = create
) -> nn.Module:
    """Return the backbone for images of `image_size`, holding `state`, in eval mode and without gradients.

    Raises:
        WeightsError: the tensors do not fit.

    """
    model = make(backbone, image_size)
    fit(model, state, source)
    return model.eval().requires_grad_(False)


def own_image_size(backbone: Backbone, state: Mapping[str, Tensor], otherwise: int) -> int:
    """Return the image size that weights with one class token were trained at, from their position table.

    The perceptual network is made at that size, for it resamples the table to several grids and doing so twice would
    change it. `otherwise` where the table is missing or not square; `filled` then says what is wrong.
    """
    table = state.get("pos_embed")
    side = math.isqrt(table.shape[1] - 1) if table is not None and table.ndim == 3 and table.shape[1] > 1 else 0
    return side * backbone.patch_size if table is not None and side**2 + 1 == table.shape[1] else otherwise
