from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.speed.rows import Row, read
from tests.commands import run
from tests.export.tiny import checkpoint_file


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small measurement, made by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("bench")
    checkpoint_file(folder / "tiny.pt")
    names = "torch,onnxruntime,openvino,openvino-int8"
    done = run(
        "qfae-bench", "--ckpt", "tiny.pt", "--against", names, "--batches", "1,4", "--rounds", "2", "--seconds", "0.05",
        "--files", "12", "--threads", "1", "--out", "bench", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return folder / "bench"


@pytest.fixture
def rows(measured: Path) -> list[Row]:
    """The rows of that measurement."""
    return read(measured / "rows.jsonl")


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    """Return the rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture
def quick_export(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the ONNX file of the tiny model, for tracing its graph again takes long; all else happens as always."""

    def copied(graph: object, path: Path) -> list[Path]:
        shutil.copy(measured / "model/model.onnx", path)
        return [path]

    monkeypatch.setattr("qfae_export.onnx_file.write_onnx", copied)
    monkeypatch.setattr("qfae_export.export.write_onnx", copied)
