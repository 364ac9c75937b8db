"""Further backends: which are measured on request, what certifies them, and what happens to one that breaks."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import qfae_export.backends
from qfae_export.export import Exported
from qfae_runtime import open_engine
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines import openvino
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import EngineError
from qfae_runtime.manifest import Manifest
from qfae_runtime.selftest import self_test
from tests.export.test_cli import Ran, run

# Looked for, not imported: an import by anyone but the engine sends telemetry.
pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")


class Off(OnnxRuntimeEngine):
    """OpenVINO's place, taken by an engine whose maps are off by a little, or are not finite."""

    by = 3e-4

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        scores = super().run(images, maps)
        scores.anomaly_map[:, 3, 5] += self.by
        return scores


def in_its_place(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    def load(path: Path, image_size: int, max_batch: int, backend: str) -> Engine:
        engine = Off(path, image_size, max_batch)
        engine.backend, engine.version, engine.by = backend, "1.0", by
        return engine

    monkeypatch.setattr(qfae_export.backends, "load_onnx", load)


def export(capsys: pytest.CaptureFixture[str], checkpoint: Path, out: Path, *more: object) -> Ran:
    return run(capsys, "--ckpt", checkpoint, "--out", out, *more)


@pytest.mark.usefixtures("quick")
def test_each_backend_has_a_certificate_of_its_own(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    ran = export(capsys, checkpoint, tmp_path, "--backends", "onnxruntime,openvino")
    assert ran.code == 0, ran.err
    assert "qfae-export: comparing tiny.onnx in openvino with PyTorch" in ran.err
    assert "openvino: keeps its contract (fp32) and is certified" in ran.out
    one, two = Manifest.load(tmp_path / "tiny.json").certificate
    assert [(entry.backend, entry.device, entry.contract.name, entry.passed) for entry in (one, two)] == [
        ("onnxruntime", "cpu", "fp32", True),
        ("openvino", "cpu", "fp32", True),
    ]
    assert two.batches == one.batches == (1, 2, 4, 8, 16)
    assert two.backend_version == openvino.version()
    assert [link.target for link in two.links] == ["graph FP32", "ONNX FP32", "tiny.onnx in openvino"]
    assert two.links[:2] == one.links
    with open_engine(tmp_path / "tiny.onnx", backend="openvino") as opened:
        assert self_test(opened).status == "passed"
    with open_engine(tmp_path / "tiny.onnx") as fastest:
        assert fastest.choice is not None
        timed = {one.backend: one.images_per_second for one in fastest.choice.candidates if one.images_per_second}
    assert timed.keys() == {"onnxruntime", "openvino"}
    assert fastest.engine.backend == max(timed, key=timed.__getitem__)


@pytest.mark.usefixtures("quick")
def test_by_default_only_the_reference_is_measured(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qfae_export.backends, "load_onnx", None)
    assert export(capsys, checkpoint, tmp_path).code == 0
    [entry] = Manifest.load(tmp_path / "tiny.json").certificate
    assert entry.backend == "onnxruntime"


@pytest.mark.usefixtures("quick")
def test_one_that_breaks_its_contract_is_told_and_does_not_fail_the_export(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_its_place(monkeypatch, 3e-3)
    ran = export(capsys, checkpoint, tmp_path, "--backends", "openvino,onnxruntime")
    assert ran.code == 0, ran.err
    assert "openvino: batch 16: map error, worst pixel / PyTorch's own: " in ran.out
    assert "openvino: breaks its contract (fp32) and is not certified; qfae-run does not take it" in ran.out
    manifest = Manifest.load(tmp_path / "tiny.json")
    assert [(entry.backend, entry.passed) for entry in manifest.certificate] == [
        ("onnxruntime", True),
        ("openvino", False),
    ]
    assert manifest.certified("tiny.onnx", "openvino", "cpu") is None
    with pytest.raises(EngineError, match=r"its comparison with PyTorch failed on openvino, cpu \(map error, "):
        open_engine(tmp_path / "tiny.onnx", backend="openvino")
    with open_engine(tmp_path / "tiny.onnx") as opened:
        assert opened.engine.backend == "onnxruntime"


@pytest.mark.usefixtures("quick")
def test_values_that_are_not_finite_leave_nothing_to_record(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_its_place(monkeypatch, np.nan)
    ran = export(capsys, checkpoint, tmp_path, "--backends", "onnxruntime,openvino")
    assert ran.code == 0, ran.err
    assert "values that are not finite" in ran.out
    [entry] = Manifest.load(tmp_path / "tiny.json").certificate
    assert entry.backend == "onnxruntime"


def test_faults_of_the_option_are_told_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(capsys, "--ckpt", "a.pt", "--backends", "onnxruntime,tensorflow,tensorrt")
    accepted = "accepted are onnxruntime, openvino, openvino-bf16"
    assert ran.err.splitlines()[:-1] == [
        f"qfae-export: --backends: got 'tensorflow', {accepted}",
        f"qfae-export: --backends: got 'tensorrt', {accepted}",
    ]
    monkeypatch.setattr("qfae_export.options.lacking", lambda *_: "not installed")
    ran = run(capsys, "--ckpt", "a.pt", "--backends", "openvino", "--part", "scorer")
    assert ran.code == 2
    assert ran.err.splitlines()[:-1] == [
        "qfae-export: --backends: onnxruntime is missing, the reference that every export is measured on; add it",
        "qfae-export: --backends: openvino: not installed: pip install 'qfae[openvino]'",
        "qfae-export: --backends: means nothing with --part, for half an engine scores nothing",
    ]


def test_verify_measures_a_named_backend_and_records_it(
    capsys: pytest.CaptureFixture[str], exported: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    for file in exported.files:
        shutil.copy(file, tmp_path)
    engine = tmp_path / "tiny.onnx"
    with pytest.raises(EngineError) as caught:
        open_engine(engine, backend="openvino")
    command = f"qfae-export verify --engine {engine} --ckpt NAME.pt --backend openvino --record"
    assert str(caught.value).endswith(f"not for openvino on cpu; measure it here: {command}")
    words = [str(checkpoint) if word == "NAME.pt" else word for word in command.split()[1:]]
    ran = run(capsys, *words)
    assert ran.code == 0, ran.err
    assert f"comparing tiny.onnx on openvino {openvino.version()}, cpu" in ran.err
    with open_engine(engine, backend="openvino") as opened:
        assert opened.certificate is not None
    assert len(Manifest.load(tmp_path / "tiny.json").certificate) == 2
    # A named one is measured, not the fastest; by default it is what the file was exported for.
    ran = run(capsys, "verify", "--engine", engine)
    assert (ran.code, "comparing tiny.onnx on onnxruntime " in ran.err) == (0, True)
    ran = run(capsys, "verify", "--engine", engine, "--backend", "auto")
    assert (ran.code, "--backend: got 'auto', accepted are onnxruntime, onnxruntime-tensorrt," in ran.err) == (2, True)


@pytest.mark.skipif(not openvino.has_bf16(), reason="this processor does not compute in BF16")
def test_bf16_is_held_against_its_own_contract(
    capsys: pytest.CaptureFixture[str], exported: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    for file in exported.files:
        shutil.copy(file, tmp_path)
    ran = run(
        capsys, "verify", "--engine", tmp_path / "tiny.onnx", "--ckpt", checkpoint, "--backend", "openvino-bf16",
        "--record",
    )  # fmt: skip
    assert "contract bf16" in ran.out
    entries = json.loads((tmp_path / "tiny.json").read_text())["certificate"]
    [recorded] = [entry for entry in entries if entry["backend"] == "openvino-bf16"]
    assert (recorded["contract"]["name"], recorded["passed"]) == ("bf16", ran.code == 0)
