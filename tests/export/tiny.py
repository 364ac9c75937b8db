"""Whole models of a few thousand random weights, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qfae_runtime.arrays import UInt8
from qfae_train.autoencoder import AnomalyScorer, assemble, perceptual_backbone
from qfae_train.backbone import create
from qfae_train.checkpoint import Checkpoint, save
from qfae_train.config import Config, from_dict
from qfae_train.weights import tensors_sha256

SIZE = 32


def vit(width: int = 32, depth: int = 3, **args: Any) -> dict[str, Any]:
    shape = {"patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2, **args}
    return {"timm": "vit_tiny_patch16_224", "patch_size": 8, "args": shape}


def config_of(
    encoders: list[dict[str, Any]] | None = None,
    hidden_states: tuple[int, ...] = (-1, -2),
    qformer_blocks: int = 1,
    register_tokens: int = 4,
    **score: Any,
) -> Config:
    """A valid configuration in which encoder, perceptual network and loss hold blocks that the score never reads."""
    return from_dict(
        {
            "model": {
                "image_size": SIZE,
                "hidden_states": list(hidden_states),
                "encoders": encoders or [vit()],
                "qformer": {"blocks": qformer_blocks, "dim": 32, "queries": 16, "heads": 2, "cross_head_dim": 16},
                "decoder": {"dim": 32, "depth": 1, "heads": 2, "patch_size": 8, "register_tokens": register_tokens},
            },
            "perceptual": vit(),
            "loss": {"patch_sizes": [16, 32], "blocks": [3]},
            "score": {"patch_sizes": [8, 16], "blocks": [1, 2], **score},
        }
    )


def scorer_of(config: Config, seed: int = 0) -> AnomalyScorer:
    """Random weights, spread wide enough that every part of the model shows in the score."""
    torch.manual_seed(seed)
    entries = [*config.model.encoders, perceptual_backbone(config)]
    backbones = [create(entry, config.model.image_size) for entry in entries]
    scorer = assemble(config, backbones[:-1], backbones[-1]).eval()
    with torch.no_grad():
        for name, tensor in scorer.autoencoder.trained_state().items():
            if name.endswith(("queries", "_token", "_tokens", "bias")):
                tensor.normal_(std=0.3)
    return scorer


def checkpoint_file(
    path: Path,
    config: Config | None = None,
    parity_images: UInt8 | None = None,
    change: Callable[[list[dict[str, Tensor]]], None] = lambda states: None,
) -> Path:
    """A checkpoint as the trainer writes it, its frozen weights embedded; `change` may spoil those first."""
    config = config or config_of()
    torch.manual_seed(1)
    entries = [*config.model.encoders, perceptual_backbone(config)]
    states = [create(entry, config.model.image_size).state_dict() for entry in entries]
    change(states)
    digests = [tensors_sha256(state) for state in states]
    records = [
        {"timm": entry.timm, "source": "tiny.safetensors", "sha256": digest}
        for entry, digest in zip(entries, digests, strict=True)
    ]
    content = Checkpoint(
        config=config,
        trained=scorer_of(config).autoencoder.trained_state(),
        frozen=records,
        embedded=dict(zip(digests, states, strict=True)),
        parity_images=torch.from_numpy(pictures(32) if parity_images is None else parity_images),
        record={"epoch": 3, "loss": float("nan")},
    )
    save(path, content)
    return path


def pictures(count: int, size: int = SIZE) -> UInt8:
    """Smooth pictures with a bright spot, all different: uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(11)
    coarse = rng.integers(20, 180, (count, 4, 4, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in coarse]
    images = np.stack(smooth)
    for number, image in enumerate(images):
        top = 2 + number % (size // 2)
        image[top : top + 6, 8:15] = 255 - number
    return images


def picture_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pictures(count, size=40)):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    return folder
