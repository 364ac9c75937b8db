"""What is built for a candidate: once, whole, and with the seconds that it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import opening, torch_engine
from benchmarks.speed.candidates import KNOWN
from benchmarks.speed.opening import TOOK, build
from benchmarks.speed.subject import Asked, Subject, _clear
from benchmarks.speed.worker import Work
from qfae_export.graph import InferenceGraph
from tests.export.tiny import checkpoint_file, config_of, scorer_of

AOT, PLAN = KNOWN["aotinductor"], KNOWN["tensorrt"]


def subject_in(folder: Path, ckpt: str = "tiny.pt", **files: str) -> Path:
    """Leave a subject in a folder."""
    Subject(Asked(ckpt=ckpt), {}, 8, 32, 16, 1, (), {"onnx": "model.onnx", **files}).save(folder)
    return folder


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was packaged; each package takes 100 seconds by the clock."""
    made: list[Path] = []
    clock = [0.0]

    def package(module: object, device: str, path: Path) -> None:
        clock[0] += 100
        path.write_bytes(b"package")
        made.append(path)

    monkeypatch.setattr("benchmarks.speed.opening.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(opening, "_graph", lambda candidate, folder: None)
    monkeypatch.setattr(torch_engine, "package", package)
    return made


def test_what_is_kept_took_what_it_took_when_it_was_built(tmp_path: Path, packages: list[Path]) -> None:
    subject_in(tmp_path)
    assert build(AOT, tmp_path, "cpu", 8) == 100
    assert build(AOT, tmp_path, "cpu", 8) == 100
    assert Work(tmp_path, lambda answer: None).build("aotinductor", "cpu", 8) == {"seconds": 100}
    assert len(packages) == 1
    assert build(KNOWN["torch"], tmp_path, "cpu", 8) == 0, "there is nothing to build"


@pytest.mark.parametrize("left", [None, "", "soon\n"])
def test_a_file_without_its_seconds_is_built_anew(tmp_path: Path, packages: list[Path], left: str | None) -> None:
    subject_in(tmp_path)
    build(AOT, tmp_path, "cpu", 8)
    took = packages[0].with_name(packages[0].name + TOOK)
    if left is None:
        took.unlink()
    else:
        took.write_text(left, encoding="utf-8")
    assert build(AOT, tmp_path, "cpu", 8) == 100
    assert len(packages) == 2


def test_seconds_go_with_what_they_are_of(tmp_path: Path, packages: list[Path]) -> None:
    subject_in(tmp_path)
    build(AOT, tmp_path, "cpu", 8)
    packages[0].unlink()
    assert build(AOT, tmp_path, "cpu", 8) == 100
    assert len(packages) == 2, "the seconds alone are no package"
    _clear(tmp_path, ())
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_was_named_is_not_built(tmp_path: Path) -> None:
    named = tmp_path / "mine/x.plan"
    named.parent.mkdir()
    named.write_bytes(b"plan")
    subject_in(tmp_path, plan=str(named))
    assert build(PLAN, tmp_path, "cuda:0", 8) == 0
    assert list(named.parent.iterdir()) == [named], "nothing is written beside a user's file"


@pytest.mark.parametrize(
    ("name", "streams", "products"),
    [
        ("torch-graph-fp16", torch.float32, torch.float16),
        ("torch-compile-fp16", torch.float32, torch.float16),
        ("torch-bf16", torch.float32, torch.bfloat16),
        ("torch-graph-fp16-streams", torch.float16, torch.float16),
        ("torch-compile-fp16-streams", torch.float16, torch.float16),
        ("torch", torch.float32, torch.float32),
    ],
)
def test_a_candidate_has_its_streams_in_what_it_says(
    tmp_path: Path, name: str, streams: torch.dtype, products: torch.dtype
) -> None:
    subject_in(tmp_path, str(checkpoint_file(tmp_path / "tiny.pt")))
    graph = opening._graph(KNOWN[name], tmp_path)
    types = {unit: graph.get_submodule(unit).dtype for unit in graph.units()}
    wide = {
        types[unit] for unit in types if unit.rpartition(".")[2] in ("residual1", "norm2", "norm", "norm_out", "table")
    }
    assert wide == {streams}
    narrow = {
        types[unit] for unit in types if unit.rpartition(".")[2] in ("qkv", "fc1", "attention", "product", "head")
    }
    assert narrow == {products}


def test_a_package_that_is_cut_short_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(program: object, package_path: Any) -> None:
        package_path.write(b"half of a package")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", lambda *module, **how: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", cut_short)
    with pytest.raises(KeyboardInterrupt):
        torch_engine.package(InferenceGraph(scorer_of(config_of())), "cpu", tmp_path / "tiny.pt2")
    assert list(tmp_path.iterdir()) == []
