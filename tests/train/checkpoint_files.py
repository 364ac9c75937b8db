"""Checkpoints of a tiny model, spoiled as a test asks, and what is said of them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qfae_train.autoencoder import build
from qfae_train.checkpoint import Checkpoint, CheckpointError, embed_frozen, load
from qfae_train.config import Config

from . import tiny

Entries = list[tuple[zipfile.ZipInfo, bytes]]


def entries_of(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def rewrite(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write an archive of torch.save again, by Python's zipfile."""
    entries = entries_of(path)
    with zipfile.ZipFile(path, "w", method) as archive:
        for info, content in entries:
            archive.writestr(info.filename, change(info.filename, content))


def with_pickle(path: Path, pickled: bytes) -> Path:
    rewrite(path, lambda name, content: pickled if name.endswith("/data.pkl") else content)
    return path


def make(config: Config) -> Checkpoint:
    torch.manual_seed(3)
    scorer, records = build(config)
    with torch.no_grad():
        for tensor in scorer.autoencoder.trained_state().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return Checkpoint(
        config=config,
        trained=scorer.autoencoder.trained_state(),
        frozen=records,
        embedded=embed_frozen(config, records),
        parity_images=images(),
        record={"epoch": 7, "loss": 0.25, "valid_image_auroc": None},
    )


def images() -> torch.Tensor:
    shape = (3, tiny.SIZE, tiny.SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def spoil(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite a checkpoint after `change` has been at its parts."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert caught.value.exit_code == 1
    return str(caught.value).removeprefix(f"checkpoint '{path}': ")
