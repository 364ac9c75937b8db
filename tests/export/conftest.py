from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import qfae_export.export
from qfae_export.export import Exported, Options, export
from tests.export.tiny import checkpoint_file


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_file(tmp_path_factory.mktemp("checkpoint") / "tiny.pt")


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The one real export that most tests look at; they must not change its files."""
    return export(Options(checkpoint, out=tmp_path_factory.mktemp("engine")))


@pytest.fixture
def quick(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the ONNX file by copying the real export's, which takes no time; all else happens as always."""

    def copy(graph: object, path: Path) -> list[Path]:
        shutil.copy(exported.engine, path)
        return [path]

    monkeypatch.setattr(qfae_export.export, "write_onnx", copy)
