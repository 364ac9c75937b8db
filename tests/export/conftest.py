from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qfae_export.export
from qfae_export.export import Exported, Options, export
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages, choose
from qfae_export.parity import measure
from qfae_export.parity_report import ParityReport
from qfae_export.reference import Measured64, reference_of
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.preprocess import PreprocessSpec
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import build_scorer, load
from tests.commands import ROOT
from tests.export.in_torch import BATCH, Answer, Judge, Torch, remembered
from tests.export.tiny import checkpoint_file


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


@pytest.fixture(scope="session")
def scorer() -> AnomalyScorer:
    """The demonstration's trained model; tests must not change it."""
    return build_scorer(load(ROOT / "demo/weights/demo.pt"))


@pytest.fixture(scope="session")
def images() -> ParityImages:
    """Grey slices that the trainer stored, and stress images."""
    stored = load(ROOT / "demo/weights/demo.pt").parity_images.numpy()
    return choose(None, PreprocessSpec("resize", 112), BATCH, stored, "demo.pt")


@pytest.fixture(scope="session")
def measured(scorer: AnomalyScorer, images: ParityImages) -> Measured64:
    return reference_of(scorer, InferenceGraph(scorer), images)


@pytest.fixture(scope="session")
def judge(images: ParityImages, measured: Measured64) -> Judge:
    def reports(answer: Answer, precisions: tuple[str, ...] = ("fp32", "fp16")) -> list[ParityReport]:
        engine = Torch(remembered(answer), 112)
        return [
            measure(engine, images, measured.reference, CONTRACTS[precision], measured.pytorch)
            for precision in precisions
        ]

    return reports
