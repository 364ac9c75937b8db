"""Plans as a part of an export: when there is one, what the manifest says of it, and why there is none."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qfae_export.plans
from qfae_export.errors import ExportError
from qfae_export.export import Exported, export
from qfae_export.fusion import FusionReport
from qfae_export.options import Options
from qfae_export.parity_report import ParityError
from qfae_export.plans import wanted
from qfae_export.tensorrt_plan import Plan
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines import open_engine
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.cuda import Gpu
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import EngineError, ManifestError, OutputError
from qfae_runtime.manifest import Manifest
from tests.export.tiny import checkpoint_file, picture_folder

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 has no wheel for this machine")


@pytest.fixture(scope="module")
def half(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """FP32 and FP16, as --fp16 gives them where no plan can be built."""
    return export(Options(checkpoint, tmp_path_factory.mktemp("half"), fp16=True))


@pytest.fixture
def here(half: Exported, tmp_path: Path) -> Path:
    """A copy of those files, to be changed."""
    for file in half.files:
        shutil.copy(file, tmp_path)
    return tmp_path


def test_fp16_comes_certified_beside_fp32(half: Exported) -> None:
    assert half.engines == ("tiny.onnx", "tiny.fp16.onnx")
    manifest = Manifest.load(half.folder / "tiny.json")
    assert {name: (entry.format, entry.precision) for name, entry in manifest.files.items() if entry.format} == {
        "tiny.onnx": ("onnx", "fp32"),
        "tiny.fp16.onnx": ("onnx", "fp16"),
    }
    certificate = {one.engine: one for one in manifest.certificate}["tiny.fp16.onnx"]
    assert certificate.contract.name == "fp16"
    assert [link.target for link in certificate.links] == ["graph FP32", "ONNX FP32", "ONNX FP16", "graph FP16"]
    assert [link.contract for link in certificate.links] == ["fp32", "fp32", "fp16", "fp16"]
    assert manifest.precision["tiny.fp16.onnx"]["policy"] == "fp16"
    assert manifest.precision["tiny.fp16.onnx"]["rules"]["features to score"]["type"] == "float32"
    with open_engine(half.folder / "tiny.fp16.onnx") as opened:
        assert opened.certificate == certificate


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_without_tensorrt_the_reason_and_the_command_are_told(half: Exported) -> None:
    [note] = half.notes
    assert note.startswith("no plan: TensorRT is not installed: pip install tensorrt")
    assert note.endswith("on the machine with the GPU run: qfae-export --onnx tiny.fp16.onnx")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(Path("a.pt")), (None, None)),
        (Options(Path("a.pt"), fp16=True, format="onnx"), (None, None)),
        (Options(Path("a.pt"), fp16=True, part="scorer"), (None, None)),
        (Options(Path("a.pt"), fp16=True, format="rtx-plan"), ("rtx-plan", None)),
    ],
)
def test_which_plan_is_wanted(options: Options, expected: tuple[str | None, str | None]) -> None:
    assert wanted(options, "a.fp16.onnx") == expected


def test_where_tensorrt_can_build_fp16_means_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qfae_export.plans, "available", lambda kind, onnx: None)
    assert wanted(Options(Path("a.pt"), fp16=True), "a.fp16.onnx") == ("plan", None)


def test_a_plan_asked_for_that_cannot_be_built_is_told_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ExportError, match=r"^--format plan: TensorRT is not installed: pip install tensorrt") as caught:
        export(Options(checkpoint, tmp_path / "out", fp16=True, format="plan"), said.append)
    assert caught.value.exit_code == 1
    assert said == []
    assert not (tmp_path / "out").exists()


def test_an_rtx_plan_without_a_gpu_is_built_proven_and_not_certified(here: Path) -> None:
    said: list[str] = []
    done = export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan"), said.append)
    assert [file.name for file in done.written] == ["tiny.rtx.plan", "tiny.json"]
    assert any("9 of 9 attentions fused" in line for line in said)
    [note] = done.notes
    assert note.startswith("tiny.rtx.plan cannot run here, so it is not certified yet: device 'cuda:0': ")
    assert note.endswith("qfae-export verify --engine tiny.rtx.plan --ckpt CHECKPOINT --record")
    stored = json.loads((here / "tiny.json").read_text())
    assert (stored["files"]["tiny.rtx.plan"]["format"], stored["files"]["tiny.rtx.plan"]["precision"]) == (
        "rtx-plan",
        "fp16",
    )
    plan = stored["provenance"]["plans"]["tiny.rtx.plan"]
    assert plan["from"] == "tiny.fp16.onnx"
    assert plan["targets"] == ["SM80", "SM86", "SM89", "SM120"]
    assert plan["buckets"] == [1, 2, 4, 8, 16]
    assert stored["precision"]["tiny.rtx.plan"] == stored["precision"]["tiny.fp16.onnx"]
    assert {one["engine"] for one in stored["certificate"]} == {"tiny.onnx", "tiny.fp16.onnx"}
    with pytest.raises(EngineError, match=r"tiny\.json certifies nothing: it was never compared with PyTorch"):
        open_engine(here / "tiny.rtx.plan")
    with open_engine(here / "tiny.fp16.onnx"):  # the others are what they were
        pass
    with pytest.raises(OutputError, match=r"tiny\.rtx\.plan: exists already; pass --overwrite to replace it"):
        export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan"))


class Runs:
    """What a GPU would do with the plan: the ONNX file it was built from, in ONNX Runtime. Keeps to Engine."""

    backend, device, version = "tensorrt-rtx", "cuda:0", "1.0"

    def __init__(self, onnx: Path, image_size: int, max_batch: int, spoilt: float) -> None:
        self._engine = OnnxRuntimeEngine(onnx, image_size, max_batch, threads=1)
        self.image_size, self.max_batch, self.batches = image_size, max_batch, self._engine.batches
        self._spoilt = np.float32(spoilt)

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        scores = self._engine.run(images, maps)
        return scores._replace(score=scores.score * self._spoilt)

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def runs(onnx: Path, spoilt: float = 1.0) -> Any:
    def opened(plan: Any, manifest: Manifest) -> Engine:
        return Runs(onnx, manifest.image_size, manifest.max_batch, spoilt)

    return opened


def test_a_plan_that_runs_is_certified_with_its_link(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qfae_export.plans, "_open", runs(here / "tiny.fp16.onnx"))
    done = export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan"))
    assert done.notes == ()
    [entry] = [one for one in Manifest.load(here / "tiny.json").certificate if one.engine == "tiny.rtx.plan"]
    assert (entry.backend, entry.device, entry.contract.name) == ("tensorrt-rtx", "cuda:0", "fp16")
    assert entry.images_from == "32 brain slices that come with qfae"
    assert entry.reference == "tiny.onnx in ONNX Runtime"
    assert [(link.source, link.target) for link in entry.links] == [("ONNX FP32", "plan")]


@pytest.mark.parametrize(("count", "bounded"), [(None, False), (49, False), (50, True)])
def test_a_plans_flips_are_bounded_where_there_are_images_enough(
    here: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, bounded: bool
) -> None:
    monkeypatch.setattr(qfae_export.plans, "build_plan", as_it_is)
    monkeypatch.setattr(qfae_export.plans, "_open", runs(here / "tiny.fp16.onnx"))
    folder = picture_folder(here / "scans", 50)
    export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan", parity_images=folder, parity_count=count))
    [entry] = [one for one in Manifest.load(here / "tiny.json").certificate if one.engine == "tiny.rtx.plan"]
    assert entry.images == (count or 32)
    assert entry.contract.bounds.get("flips_share") == (0.02 if bounded else None)


def as_it_is(onnx: Path, path: Path, kind: str, max_batch: int, **more: Any) -> Plan:
    """A plan that was built in no time."""
    path.write_bytes(b"plan")
    report = FusionReport({"decoder": 1}, 1, {"fp32": 1}, "nowhere")
    return Plan(path, kind, "fp16", "none", "1", None, ("SM80",), (1,), (), 0.0, report)


def test_an_fp32_file_that_is_called_fp16_makes_no_plan(here: Path) -> None:
    stored = json.loads((here / "tiny.json").read_text())
    stored["files"]["tiny.onnx"]["precision"] = "fp16"
    (here / "tiny.json").write_text(json.dumps(stored))
    with pytest.raises(ManifestError, match=r"tiny\.onnx is fp16 in 'files', but the file computes in fp32 \("):
        export(Options(onnx=here / "tiny.onnx", format="rtx-plan"))


def test_an_export_goes_through_to_the_plan(checkpoint: Path, half: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    out = half.folder / "whole"
    monkeypatch.setattr(qfae_export.plans, "_open", runs(half.folder / "tiny.fp16.onnx"))
    done = export(Options(checkpoint, out, fp16=True, format="rtx-plan"))
    assert done.engine == out / "tiny.rtx.plan"
    assert [link.target for link in done.report.links] == ["graph FP32", "ONNX FP32", "ONNX FP16", "plan", "graph FP16"]
    assert sorted(path.name for path in out.iterdir()) == [
        "tiny.fp16.onnx",
        "tiny.golden.npz",
        "tiny.json",
        "tiny.onnx",
        "tiny.rtx.plan",
    ]


def test_a_plan_that_computes_something_else_is_not_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (here / "tiny.json").read_text()
    monkeypatch.setattr(qfae_export.plans, "_open", runs(here / "tiny.fp16.onnx", spoilt=1.2))
    with pytest.raises(ParityError) as caught:
        export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan"))
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "tiny.rtx.plan: tensorrt-rtx does not compute what tiny.onnx in ONNX Runtime computes, so nothing was written:"
    )
    assert lines[-2] == "the first step that is beyond its bounds: ONNX FP32 -> plan"
    assert lines[-1].startswith("the ONNX file it was built from keeps its contract: try another TensorRT")
    assert (here / "tiny.json").read_text() == before
    assert not (here / "tiny.rtx.plan").exists()


def test_onnx_files_that_are_not_ours(here: Path, tmp_path: Path) -> None:
    def said(onnx: Path) -> str:
        with pytest.raises((EngineError, ManifestError, ExportError)) as caught:
            export(Options(onnx=onnx, format="rtx-plan"))
        return str(caught.value)

    assert said(here / "none.fp16.onnx").endswith("no such file; name the NAME.fp16.onnx that qfae-export wrote")
    (here / "lone").mkdir()
    shutil.copy(here / "tiny.fp16.onnx", here / "lone" / "other.onnx")
    assert "no manifest beside it (looked for other.json)" in said(here / "lone" / "other.onnx")
    shutil.copy(here / "tiny.json", here / "lone" / "other.json")
    assert "tiny.json" in said(here / "lone" / "other.onnx") or "does not list it" in said(here / "lone" / "other.onnx")
    content = (here / "tiny.fp16.onnx").read_bytes()
    (here / "tiny.fp16.onnx").write_bytes(content[:-100])
    assert "its bytes do not match tiny.json" in said(here / "tiny.fp16.onnx")
    (here / "tiny.fp16.onnx").write_bytes(content)
    (here / "tiny.onnx").unlink()
    assert "tiny.onnx: not there; the plan is measured against this certified engine" in said(here / "tiny.fp16.onnx")


def test_an_overflow_that_the_cpu_does_not_show_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime computes this block in FP32 on a CPU, where nothing overflows; a GPU would give NaN."""
    path = checkpoint_file(tmp_path / "over.pt", change=overflowing)
    with pytest.raises(ParityError) as caught:
        export(Options(path, tmp_path / "out", fp16=True))
    text = str(caught.value)
    assert "graph FP16: rounded as FP16 rounds, the graph gives values that are not finite" in text
    assert "the first step that is beyond its bounds: graph FP32 -> graph FP16" in text
    assert not (tmp_path / "out").exists()


def overflowing(states: list[dict[str, torch.Tensor]]) -> None:
    """Scale one encoder block's hidden layer out of float16's range; every weight stays inside it."""
    states[0]["blocks.1.mlp.fc1.weight"].mul_(3e4 / float(states[0]["blocks.1.mlp.fc1.weight"].abs().max()))
    states[0]["blocks.1.mlp.fc2.weight"].mul_(1e-4)


def test_a_plan_that_does_not_open_on_its_own_card_is_not_handed_over(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (here / "tiny.json").read_bytes()
    monkeypatch.setattr(qfae_export.plans, "current_gpu", lambda: Gpu("RTX 4090", "8.9", None, None))
    monkeypatch.setattr(qfae_export.plans, "lacking", lambda backend, device: None)
    with pytest.raises(ExportError, match=r"^tiny\.rtx\.plan: was built, but cannot be opened: device 'cuda:0'"):
        export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan"))
    assert not (here / "tiny.rtx.plan").exists()
    monkeypatch.setattr(qfae_export.plans, "current_gpu", lambda: Gpu("H200", "9.0", None, None))
    assert "cannot run here" in export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan")).notes[0]
    assert (here / "tiny.json").read_bytes() != before


def test_a_plan_that_nobody_insisted_on_costs_no_engine(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise ExportError("TensorRT 10.7 is not used: it computes wrong")

    monkeypatch.setattr(qfae_export.plans, "available", lambda kind, onnx: None)
    monkeypatch.setattr(qfae_export.plans, "build_plan", fails)
    done = export(Options(checkpoint, tmp_path / "out", fp16=True))
    assert done.notes == ("no plan: TensorRT 10.7 is not used: it computes wrong",)
    assert done.engines == ("tiny.onnx", "tiny.fp16.onnx")
    open_engine(done.engine).close()
    with pytest.raises(ExportError, match=r"TensorRT 10\.7 is not used"):
        export(Options(checkpoint, tmp_path / "asked", fp16=True, format="plan"))
    assert not (tmp_path / "asked").exists()


def test_a_manifest_that_changed_while_a_plan_was_built_is_not_written_over(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = qfae_export.plans.add_plan

    def slow(*arguments: Any) -> Any:
        planned = genuine(*arguments)
        (here / "tiny.json").write_text((here / "tiny.json").read_text() + "\n")
        return planned

    monkeypatch.setattr(qfae_export.plans, "add_plan", slow)
    with pytest.raises(ExportError, match=r"tiny\.json: was changed while the plan was built; run the command again"):
        export(Options(onnx=here / "tiny.fp16.onnx", format="rtx-plan"))
    assert not (here / "tiny.rtx.plan").exists()
