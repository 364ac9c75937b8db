"""The whole method at 32 pixels, its frozen weights made up, and a data set to train it on; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from qfae_runtime.arrays import UInt8
from qfae_train.backbone import create
from qfae_train.config import Backbone, Config, from_dict

SIZE = 32
TIMM = "vit_tiny_patch16_224"
ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def table(weights: Path | str = "", **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny configuration as plain tables; `sections` are merged into it, one level deep."""
    backbone = {"timm": TIMM, "patch_size": 8, "args": dict(ARGS), "weights": str(weights)}
    tables: dict[str, dict[str, Any]] = {
        "model": {
            "image_size": SIZE,
            "hidden_states": [-1, -2],
            "encoders": [dict(backbone)],
            "qformer": {"dim": 32, "queries": 16, "heads": 2, "cross_head_dim": 16, "query_init": "sincos"},
            "decoder": {"dim": 32, "depth": 1, "heads": 2, "patch_size": 8},
        },
        "perceptual": dict(backbone),
        "loss": {"patch_sizes": [8, 16], "blocks": [2, 3]},
        "score": {"patch_sizes": [8, 16], "blocks": [1, 2, 3]},
        "augment": {"enabled": False},
        "train": {"epochs": 4, "batch_size": 8, "lr": 3e-3, "validate_every": 1, "workers": 0},
    }
    for name, section in sections.items():
        tables[name] = {**tables.get(name, {}), **section}
    return tables


def config(weights: Path | str = "", **sections: dict[str, Any]) -> Config:
    return from_dict(table(weights, **sections))


def write_weights(path: Path, seed: int = 0) -> Path:
    """Write made-up backbone weights, large enough that features differ between images."""
    generator = torch.Generator().manual_seed(seed)
    state = create(Backbone(TIMM, 8, dict(ARGS)), SIZE).state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def picture(rng: np.random.Generator, height: int = 40, width: int = 48) -> UInt8:
    """A soft blob whose centre and brightness vary: uint8 (H, W)."""
    rows, cols = np.mgrid[:height, :width]
    row, col = rng.uniform(0.35, 0.65) * height, rng.uniform(0.35, 0.65) * width
    blob = np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (0.08 * height * width))
    return np.asarray(40 + rng.uniform(120, 160) * blob + rng.normal(0, 2, blob.shape), dtype=np.uint8)


def write_png(path: Path, pixels: UInt8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_data(root: Path, train: int = 20, valid: int = 6) -> Path:
    """Write a BMAD-layout data set: `train` normal images, `valid` normal and as many anomalous ones with masks."""
    rng = np.random.default_rng(5)
    for number in range(train):
        write_png(root / "train" / "good" / "img" / f"{number}.png", picture(rng))
    for number in range(valid):
        write_png(root / "valid" / "good" / "img" / f"{number}.png", picture(rng))
        image, mask = picture(rng), np.zeros((40, 48), np.uint8)
        mask[8:18, 10:24] = 255
        image[mask > 0] = 255
        write_png(root / "valid" / "Ungood" / "img" / f"{number}.png", image)
        write_png(root / "valid" / "Ungood" / "label" / f"{number}.png", mask)
    return root
