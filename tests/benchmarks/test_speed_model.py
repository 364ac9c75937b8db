"""Which model is measured: one, and never an engine beside another model's PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.cli import parse_options
from benchmarks.speed.subject import SUBJECT, Asked, prepare
from qfae_export.errors import ExportError
from qfae_runtime.errors import UsageError
from qfae_runtime.hashing import sha256_of
from tests.benchmarks.test_speed_command import given
from tests.export.tiny import checkpoint_file, config_of


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        (
            {"random_weights": "0", "preset": "brats"},
            ["--engine, --random-weights: give one of them, not both"],
        ),
        (
            {"random_weights": "0"},
            [
                "--random-weights: name the architecture with --preset or --config",
                "--engine, --random-weights: give one of them, not both",
            ],
        ),
        (
            {"preset": "brats"},
            ["--preset: describes a checkpoint, and --engine needs none; pass --ckpt too, or leave it out"],
        ),
        (
            {"config": "my.toml"},
            ["--config: describes a checkpoint, and --engine needs none; pass --ckpt too, or leave it out"],
        ),
    ],
)
def test_an_engine_is_a_model_of_its_own(changes: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options([], given(engine="x.onnx", **changes))
    assert caught.value.faults == faults


def test_an_engine_beside_the_authors_checkpoint_takes_its_architecture() -> None:
    asked = parse_options([], given(engine="x.onnx", ckpt="last.pth", preset="liver")).asked
    assert asked == Asked(engine="x.onnx", ckpt="last.pth", config="liver")


def engine_in(folder: Path, measured: Path, **provenance: Any) -> Path:
    """Copy the tiny model's engine; `provenance` takes the place of what its manifest says of its source."""
    folder.mkdir()
    for path in (measured / "model").glob("model*"):
        shutil.copy(path, folder)
    manifest = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    manifest["provenance"] = provenance or manifest["provenance"]
    (folder / "model.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder / "model.onnx"


@pytest.mark.usefixtures("quick_export")
def test_an_engine_must_be_of_the_checkpoint_beside_it(tmp_path: Path, measured: Path) -> None:
    engine, folder = engine_in(tmp_path / "engine", measured), tmp_path / "model"
    prepare(Asked(ckpt=str(checkpoint_file(tmp_path / "own.pt"))), folder, ["onnx"], 4, lambda step: None)
    other = checkpoint_file(tmp_path / "other.pt", config_of(blocks=[1]))
    asked = Asked(ckpt=str(other), engine=str(engine))
    with pytest.raises(ExportError) as caught:
        prepare(asked, folder, ["onnx"], 4, lambda step: None)
    assert str(caught.value) == (
        f"{other}: SHA-256 {sha256_of(other)[:16]}..., but model.onnx was exported from "
        f"{sha256_of(measured.parent / 'tiny.pt')[:16]}...; pass the checkpoint it was exported from"
    )
    assert (folder / SUBJECT).exists(), "what was kept makes room for a model that can be measured alone"
    engine = engine_in(tmp_path / "random", measured, random_weights=3)
    with pytest.raises(ExportError, match=r"but model\.onnx was exported from random weights; pass the checkpoint it"):
        prepare(Asked(ckpt=str(other), engine=str(engine)), folder, ["onnx"], 4, lambda step: None)


@pytest.mark.usefixtures("quick_export")
def test_an_engine_beside_its_checkpoint_takes_the_place_of_the_file(tmp_path: Path, measured: Path) -> None:
    ckpt = str(measured.parent / "tiny.pt")
    for engine in (
        engine_in(tmp_path / "said", measured),
        engine_in(tmp_path / "unsaid", measured, exported_by="somebody"),  # nobody can tell
    ):
        subject = prepare(Asked(ckpt=ckpt, engine=str(engine)), tmp_path / "model", ["onnx"], 4, lambda step: None)
        assert subject.files == {"onnx": str(engine)}
