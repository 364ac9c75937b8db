"""Made-up checkpoints of the authors' form for small architectures, as files, with the plain reference beside them."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from qfae_train.autoencoder import perceptual_backbone
from qfae_train.backbone import create
from qfae_train.config import Config, from_dict
from qfae_train.official import expected_shapes
from qfae_train.weight_files import WeightFiles

from .official import made_up_state, recipe
from .reference import Reference

DINOV2 = "vit_small_patch14_reg4_dinov2.lvd142m"
DINO = "vit_small_patch8_224.dino"
MAE = "vit_base_patch16_224.mae"
SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def config(size: int = 112, **sections: dict[str, Any]) -> Config:
    """A small architecture; `sections` are merged into it, one level deep, `qformer` and `decoder` as sections too."""
    model = {
        "image_size": size,
        "hidden_states": [-1, -3],
        "encoders": [{"timm": DINOV2, "patch_size": 14, "args": dict(SMALL)}],
        "qformer": {"dim": 48, "queries": (size // 8) ** 2, "heads": 4, "cross_head_dim": 8},
        "decoder": {"dim": 36, "depth": 2, "heads": 3},
    }
    for name in ("qformer", "decoder"):
        model[name].update(sections.pop(name, {}))  # type: ignore[attr-defined]
    tables: dict[str, dict[str, Any]] = {
        "model": model,
        "perceptual": {"timm": MAE, "args": dict(SMALL)},
        "loss": {"patch_sizes": [14, 28], "blocks": [3, 4]},
        "score": {"patch_sizes": [16, 28, 56], "blocks": [2, 3, 4]},
    }
    for name, section in sections.items():
        tables[name] = {**tables.get(name, {}), **section}
    return from_dict(tables)


def toml(config: Config) -> str:
    """The configuration as a user would write it."""

    def value(one: Any) -> str:
        if isinstance(one, dict):
            return "{ " + ", ".join(f"{key} = {value(item)}" for key, item in one.items()) + " }"
        if isinstance(one, list):
            return "[" + ", ".join(value(item) for item in one) + "]"
        return json.dumps(one)

    def table(name: str, entries: dict[str, Any]) -> list[str]:
        below = {key: one for key, one in entries.items() if isinstance(one, dict) and key != "args"}
        lines = [f"[{name}]", *(f"{key} = {value(one)}" for key, one in entries.items() if key not in below)]
        for key, one in below.items():
            lines += table(f"{name}.{key}", one)
        return lines

    return "\n".join(line for name, entries in config.to_dict().items() for line in table(name, entries)) + "\n"


ARCHITECTURES: dict[str, Config] = {
    "one encoder": config(),
    "two encoders": config(
        model={"encoders": [{"timm": DINOV2, "patch_size": 14, "args": SMALL},
                            {"timm": DINO, "patch_size": 8, "args": {**SMALL, "embed_dim": 32, "num_heads": 2}}]}
    ),
    "hidden states of its own": config(
        model={"encoders": [{"timm": DINOV2, "patch_size": 14, "args": SMALL, "hidden_states": [-2]},
                            {"timm": DINO, "patch_size": 16, "args": SMALL}]}
    ),
    "two blocks": config(qformer={"blocks": 2}),
    "three blocks": config(qformer={"blocks": 3}),
    "no register tokens": config(decoder={"register_tokens": 0, "patch_size": 16}, qformer={"queries": 49}),
    "another MLP": config(qformer={"mlp_ratio": 2.0}, decoder={"mlp_ratio": 3.0}),
    "separate maps": config(score={"fusion": "separate", "spatial": "mean", "across": "max", "pixel_map": "max"}),
    "published size": config(224, score={"patch_sizes": [8, 16]}),
}  # fmt: skip


class MadeUp(NamedTuple):
    """What a user holds: the authors' checkpoint, the perceptual network's file; and what they hold, for the tests."""

    config: Config
    checkpoint: Path
    files: WeightFiles
    state: dict[str, Tensor]
    perceptual: dict[str, Tensor]

    def reference(self) -> Reference:
        return Reference(self.config, self.state, self.perceptual)


def made_up(folder: Path, config: Config, seed: int = 7) -> MadeUp:
    """Write a checkpoint and a weight file of the MAE's own 224 pixels, every weight made from its name."""
    decoder = config.model.decoder
    side = config.model.image_size // decoder.patch_size
    shapes = expected_shapes(config)
    state = made_up_state({name: list(shape) for name, shape in shapes.items()}, seed, decoder.dim, side)
    mae = create(dataclasses.replace(perceptual_backbone(config)), 224)
    perceptual = {name: recipe(name, list(t.shape), seed + 1000) for name, t in mae.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(state), folder / "last_ckpt.pth")
    save_file(perceptual, folder / "mae.safetensors")
    files = WeightFiles(perceptual=folder / "mae.safetensors")
    return MadeUp(config, folder / "last_ckpt.pth", files, state, perceptual)


def images(count: int, size: int) -> Tensor:
    """Smooth random images, uint8 (count, size, size, 3)."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
