from __future__ import annotations

from pathlib import Path

import pytest

from qfae_train.checkpoint import Checkpoint, save

from . import tiny
from .checkpoint_files import make


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of made-up backbone weights."""
    return tiny.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set; tests must not change it."""
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(weights: Path) -> Checkpoint:
    return make(tiny.config(weights))


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "tiny.pt"
    save(path, checkpoint)
    return path
