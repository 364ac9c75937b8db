"""What a configuration may hand to timm: names of models, and the arguments that shape a vision transformer.

A configuration may come from a stranger's checkpoint, and `timm.create_model` takes more than shapes: folders and hubs
in a model's name, `checkpoint_path`, `pretrained_cfg` and others that read files (timm 1.0.22 to 1.0.25 ran pickled
code of such a file). So only what is listed here passes; everything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from qfae_train.config import Backbone, shown

LARGEST_WIDTH, LARGEST_DEPTH, LARGEST_HEADS, LARGEST_MLP_RATIO = 8192, 128, 256, 16
"""Bounds of every transformer here; the widest of timm's own vision transformers has 3072, the deepest 48 blocks."""

LARGEST_PATCH = 128
"""Pixels per side. Resampling a kernel takes a matrix of its pixels by the new one's."""

NUMBERS: dict[str, tuple[type, float, float]] = {
    "embed_dim": (int, 1, LARGEST_WIDTH),
    "depth": (int, 1, LARGEST_DEPTH),
    "num_heads": (int, 1, LARGEST_HEADS),
    "mlp_ratio": (float, 0.1, LARGEST_MLP_RATIO),
    "init_values": (float, 1e-12, 100),
    "reg_tokens": (int, 0, 256),
}
"""Arguments that are numbers: type, smallest, largest. A `float` may be written as a whole number."""

SWITCHES = (
    "qkv_bias",
    "qk_norm",
    "proj_bias",
    "class_token",
    "no_embed_class",
    "pre_norm",
    "scale_attn_norm",
    "scale_mlp_norm",
)
"""Arguments that are true or false."""

POOLS = ("token", "avg", "max", "")
"""Of `global_pool`: nothing here pools, but a model without a class token is not made with the default."""

ACCEPTED = ("patch_size", *NUMBERS, *SWITCHES, "global_pool")

_NAME = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_-]{1,100})?", re.ASCII)


def argument_faults(backbone: Backbone, key: str) -> Iterator[str]:
    """Yield one sentence per name or argument that is not handed to timm; `key` is the entry's place in the config."""
    if not _NAME.fullmatch(backbone.timm):
        yield (
            f"{key}.timm: got {shown(backbone.timm)}; accepted are names of timm's own models, such as "
            "'vit_large_patch16_224.mae'; its weights come from timm's hub or from a file (weights = 'FILE')"
        )
    for name, value in backbone.args.items():
        if name not in ACCEPTED:
            yield f"{key}.args: got {shown(name)} = {shown(value)}; accepted are {', '.join(ACCEPTED)}"
        elif name == "patch_size":
            if not _is_patch_size(value):
                yield f"{key}.args.patch_size: got {shown(value)}; accepted are 1 to {LARGEST_PATCH} pixels"
        elif name == "global_pool":
            if value not in POOLS:
                yield f"{key}.args.global_pool: got {shown(value)}; accepted are {', '.join(map(repr, POOLS))}"
        elif name in SWITCHES:
            if not isinstance(value, bool):
                yield f"{key}.args.{name}: got {shown(value)}; accepted are true and false"
        else:
            kind, low, high = NUMBERS[name]
            fits = type(value) is int or (kind is float and type(value) is float)
            if not fits or not low <= value <= high:
                numbers = "whole numbers" if kind is int else "numbers"
                yield f"{key}.args.{name}: got {shown(value)}; accepted are {numbers} from {low} to {high}"


def _is_patch_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(type(side) is int and 1 <= side <= LARGEST_PATCH for side in sides) and len(set(sides)) == 1
