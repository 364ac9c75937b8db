"""--backend auto: the fastest of what is installed and certified, by measured rates, and why not the others."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime import open_engine
from qfae_runtime.engines import Candidate, OpenedEngine
from qfae_runtime.engines import auto as module
from qfae_runtime.engines import backends as table
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.files import EngineFile
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import EngineError, ManifestError, SelfTestError
from qfae_runtime.selftest import self_test

from .test_cli import qfae_run
from .tiny import as_int8, certify_too, edit_manifest, export_tiny

OTHERS = {"openvino", "openvino-bf16"}


class Slowed:
    """The toy engine under another backend's name, slower by so many seconds an image; its scores may be shifted."""

    def __init__(self, engine: Engine, backend: str, seconds: float, shift: float) -> None:
        self.image_size, self.max_batch, self.batches = engine.image_size, engine.max_batch, engine.batches
        self.device, self.version, self.backend = "cpu", "1.0", backend
        self._engine, self._seconds, self._shift = engine, seconds, shift

    def run(self, images: Any, maps: bool = True) -> Scores:
        time.sleep(self._seconds * len(images))
        scores = self._engine.run(images, maps)
        return scores._replace(score=scores.score + self._shift)

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Slowed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Backends:
    """What stands in for the backends: seconds an image, shifts of scores, what lacks; and which were opened."""

    def __init__(self) -> None:
        self.seconds = {"onnxruntime": 0.004, "openvino": 0.002, "openvino-bf16": 0.0}
        self.shift = dict.fromkeys(self.seconds, 0.0)
        self.lacks: dict[str, str] = {}
        self.opened: list[str] = []

    def load(self, file: EngineFile, backend: str, device: str, threads: int | None) -> Engine:
        self.opened.append(backend)
        genuine = OnnxRuntimeEngine(file.model, file.manifest.image_size, file.manifest.max_batch, threads)
        return Slowed(genuine, backend, self.seconds[backend], self.shift[backend])

    def lacking(self, backend: str, device: str) -> str | None:
        return "not installed" if device != "cpu" else self.lacks.get(backend)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Backends:
    double = Backends()
    monkeypatch.setattr(module, "load", double.load)
    monkeypatch.setattr("qfae_runtime.engines.opening.load", double.load)
    monkeypatch.setattr(module, "lacking", double.lacking)
    monkeypatch.setattr(module, "version_of", lambda backend: "1.0")
    return double


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = export_tiny(tmp_path / "engine")
    certify_too(path, "openvino")
    certify_too(path, "openvino-bf16")
    return path


def chosen(opened: OpenedEngine) -> tuple[str, dict[str, Candidate]]:
    assert opened.choice is not None
    assert (opened.choice.backend, opened.choice.device) == (opened.engine.backend, opened.engine.device)
    return opened.engine.backend, {one.backend: one for one in opened.choice.candidates if one.device == "cpu"}


def test_the_fastest_by_measured_rate_is_taken_and_remembered(backends: Backends, path: Path) -> None:
    with open_engine(path) as opened:
        backend, candidates = chosen(opened)
    assert backend == "openvino-bf16"
    assert opened.certificate is not None
    assert opened.certificate.contract.name == "bf16"
    assert backends.opened == ["onnxruntime", "openvino", "openvino-bf16", "openvino-bf16"]
    for name in ("onnxruntime", "openvino"):
        rate, slowest = candidates[name].images_per_second, backends.seconds[name]
        assert rate is not None
        assert rate <= 1 / slowest
        assert candidates[name].not_taken == f"slower, {rate:.3g} images a second"
    assert candidates["openvino-bf16"].not_taken is None
    assert opened.choice is not None
    assert opened.choice.why.startswith("the fastest of the 3 installed and certified here, ")
    assert opened.choice.why.endswith(" images a second in batches of 16")

    backends.opened.clear()
    with open_engine(path) as again:
        assert chosen(again) == (backend, candidates)
    assert backends.opened == ["openvino-bf16"]


def test_a_new_candidate_alone_is_timed(backends: Backends, path: Path) -> None:
    backends.lacks = {"openvino-bf16": "not installed"}
    open_engine(path).close()
    backends.opened.clear()
    backends.lacks = {}
    open_engine(path).close()
    assert backends.opened == ["openvino-bf16", "openvino-bf16"]


@pytest.mark.parametrize("change", [{"threads": 1}, {"batch_size": 3}])
def test_rates_are_of_one_number_of_threads_and_one_batch_size(
    backends: Backends, path: Path, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfae_runtime.verdicts._cores", lambda: 2)
    open_engine(path).close()
    backends.opened.clear()
    open_engine(path, **change).close()  # type: ignore[arg-type]
    assert len(backends.opened) == 4


def test_a_single_candidate_is_taken_without_any_timing(backends: Backends, path: Path, cache: Path) -> None:
    backends.lacks = dict.fromkeys(OTHERS, "not installed")
    with open_engine(path) as opened:
        backend, candidates = chosen(opened)
    assert (backend, backends.opened) == ("onnxruntime", ["onnxruntime"])
    assert opened.choice is not None
    assert opened.choice.why == "the only one installed and certified here"
    assert {name: one.not_taken for name, one in candidates.items()} == {
        "onnxruntime": None, "openvino": "not installed", "openvino-bf16": "not installed"
    }  # fmt: skip
    assert opened.choice.sentence() == "onnxruntime on cpu, the only one installed and certified here"
    assert not cache.exists()


def test_what_is_not_certified_is_not_taken_however_fast(backends: Backends, tmp_path: Path) -> None:
    path = export_tiny(tmp_path / "engine")
    certify_too(path, "openvino-bf16", passed=False)
    with open_engine(path) as opened:
        backend, candidates = chosen(opened)
    assert backend == "onnxruntime"
    assert candidates["openvino"].not_taken == "no certificate"
    assert candidates["openvino-bf16"].not_taken == "broke its contract when it was compared with PyTorch"
    assert opened.choice is not None
    assert opened.choice.sentence() == (
        "onnxruntime on cpu, the only one installed and certified here (openvino on cpu: no certificate; "
        "openvino-bf16 on cpu: broke its contract when it was compared with PyTorch)"
    )


def test_one_that_fails_its_self_test_is_passed_over_and_not_tried_again(backends: Backends, path: Path) -> None:
    backends.shift["openvino-bf16"] = 0.5
    with open_engine(path) as opened:
        backend, candidates = chosen(opened)
    assert backend == "openvino"
    said = candidates["openvino-bf16"].not_taken
    assert said is not None
    assert said.startswith("self-test failed: score error as distance, ")
    backends.opened.clear()
    with open_engine(path) as opened:
        backend, candidates = chosen(opened)
    assert (backend, backends.opened) == ("openvino", ["openvino"])
    said = candidates["openvino-bf16"].not_taken
    assert said is not None
    assert said.startswith("self-test failed before: score error as distance, ")
    # Named, it is tested again, whatever was remembered.
    with open_engine(path, backend="openvino-bf16") as named, pytest.raises(SelfTestError, match="self-test failed on"):
        self_test(named)


def test_where_all_fail_the_reference_says_why(backends: Backends, path: Path) -> None:
    backends.shift = dict.fromkeys(backends.shift, 0.5)
    for _ in range(2):
        with open_engine(path) as opened:
            assert opened.engine.backend == "onnxruntime"
            assert opened.choice is not None
            assert opened.choice.why == "for all have failed their self-test"
            with pytest.raises(SelfTestError, match=r"self-test failed on onnxruntime 1\.0, cpu: 5 golden"):
                self_test(opened)


def test_one_that_cannot_be_opened_is_passed_over(
    backends: Backends, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(file: EngineFile, backend: str, device: str, threads: int | None) -> Engine:
        if backend == "openvino-bf16":
            raise EngineError("its library is damaged\nand more")
        return backends.load(file, backend, device, threads)

    monkeypatch.setattr(module, "load", load)
    with open_engine(path) as opened:
        backend, candidates = chosen(opened)
    assert backend == "openvino"
    assert candidates["openvino-bf16"].not_taken == "its library is damaged"


def test_a_certificate_of_another_contract_does_not_count(backends: Backends, tmp_path: Path) -> None:
    path = export_tiny(tmp_path / "engine")
    stored = json.loads(path.with_suffix(".json").read_text())["certificate"]
    # The looser contract for the FP32 backend, and the FP32 one for the backend that rounds.
    edit_manifest(path, certificate=[*stored, {**stored[0], "backend": "openvino-bf16"}])
    with open_engine(path) as opened:
        assert opened.manifest.certified(path.name, "openvino-bf16", "cpu") is None
    certify_too(path, "openvino")
    with open_engine(path) as opened:
        entry = opened.manifest.certified(path.name, "openvino", "cpu")
        assert entry is not None
        half = replace(entry, contract=replace(entry.contract, name="bf16"))
        laxer = replace(opened.manifest, certificate=(half,))
    assert laxer.certified(path.name, "openvino", "cpu") is None


def test_fp16_files_are_not_for_openvino(backends: Backends, path: Path) -> None:
    files = json.loads(path.with_suffix(".json").read_text())["files"]
    files[path.name]["precision"] = "fp16"
    edit_manifest(path, files=files)
    for name, kinds in (("openvino", "fp32, int8"), ("openvino-bf16", "fp32")):
        with pytest.raises(EngineError) as caught:
            open_engine(path, backend=name)
        assert str(caught.value) == (
            f"{path}: {name} runs {kinds} files, this one is fp16; name tiny.onnx, or leave out the backend"
        )


@pytest.mark.parametrize("backend", ["auto", None, "onnxruntime"])
def test_int8_files_are_not_for_gpus(backends: Backends, path: Path, backend: str | None) -> None:
    """Neither asked for nor offered, not even where the manifest certifies it."""
    certify_too(path, "onnxruntime", "cuda:0")
    as_int8(path)
    with pytest.raises(EngineError) as caught:
        open_engine(path, backend=backend, device="cuda:0")
    assert str(caught.value) == (
        f"{path}: INT8 files are for processors, got device cuda:0, expected cpu; leave out the device, or name "
        "tiny.onnx, which onnxruntime runs there"
    )
    with open_engine(path, backend=backend) as opened:
        assert opened.engine.device == "cpu"
    if opened.choice is not None:
        assert [(one.backend, one.device) for one in opened.choice.candidates] == [
            ("onnxruntime", "cpu"), ("openvino", "cpu")
        ]  # fmt: skip


def test_other_files_are_offered_gpus(backends: Backends, path: Path) -> None:
    with open_engine(path) as opened:
        assert opened.choice is not None
        assert ("onnxruntime", "cuda:0") in [(one.backend, one.device) for one in opened.choice.candidates]


def test_a_backend_or_device_that_does_not_run_the_file(path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        open_engine(path, backend="tensorrt")
    assert str(caught.value) == (
        f"{path}: format 'onnx' is run by onnxruntime or onnxruntime-tensorrt or openvino or openvino-bf16, "
        "not by tensorrt; leave out the backend"
    )
    with pytest.raises(EngineError) as caught:
        open_engine(path, backend="openvino", device="cuda:0")
    assert str(caught.value) == f"{path}: openvino runs format 'onnx' on cpu, not on cuda:0; leave out the device"


def test_a_named_backend_that_broke_its_contract_is_refused_with_the_numbers(tmp_path: Path) -> None:
    path = export_tiny(tmp_path / "engine")
    entry = json.loads(path.with_suffix(".json").read_text())["certificate"][0]
    measured = {**entry["measured"], "map_cosine_p1": -0.2, "spearman": 0.5, "map_angle": 0.3, "score_distance": None}
    certify_too(path, "openvino-bf16", passed=False, measured=measured)
    with pytest.raises(EngineError) as caught:
        open_engine(path, backend="openvino-bf16")
    assert str(caught.value) == (
        f"{path}: its comparison with PyTorch failed on openvino-bf16, cpu (score error as distance, mean "
        "undefined; score ranks, Spearman 0.5, bound 0.999; map error as angle, mean 0.3, bound 0.001); "
        "name another backend"
    )


def test_a_run_says_what_was_taken_and_keeps_it(backends: Backends, path: Path, dataset: Path, tmp_path: Path) -> None:
    ran = qfae_run(dataset, "--engine", path, "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.stderr
    [line] = [line for line in ran.stderr.splitlines() if "installed and certified" in line]
    assert line.startswith("qfae-run: openvino-bf16 on cpu, the fastest of the 3 installed and certified here, ")
    assert "\nself-test passed: " in ran.stdout  # it was run a moment ago, to choose
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (stored["self_test"]["status"], stored["self_test"]["remembered"]) == ("passed", True)
    assert stored["self_test"]["seconds"] > 0
    kept = stored["backend_choice"]
    assert (kept["backend"], kept["device"]) == ("openvino-bf16", "cpu")
    by_name = {one["backend"]: one for one in kept["candidates"] if one["device"] == "cpu"}
    assert by_name["onnxruntime"]["not_taken"].startswith("slower, ")
    assert by_name["openvino-bf16"]["not_taken"] is None
    assert stored["self_test"]["images_per_second"] > 0
    assert (stored["self_test"]["batch_size"], stored["fingerprint"]["backend"]) == (16, "openvino-bf16")
    assert set(kept) == {"backend", "device", "why", "candidates"}
    again = qfae_run(dataset, "--engine", path, "--out", tmp_path / "again")
    assert "\nself-test passed before: " in again.stdout
    other = qfae_run(dataset, "--engine", path, "--out", tmp_path / "forced", "--selftest")
    assert "\nself-test passed: " in other.stdout
    for option in ("--quiet", "--backend=onnxruntime"):
        ran = qfae_run(dataset, "--engine", path, "--out", tmp_path / option, option)
        assert (ran.exit_code, "certified" in ran.stderr) == (0, False), (option, ran.stderr)
    assert json.loads((tmp_path / "--backend=onnxruntime" / "run.json").read_text())["backend_choice"] is None


def test_what_this_machine_lacks() -> None:
    assert table.lacking("onnxruntime", "cpu") is None
    before = sys.modules.get("tensorrt")
    assert table.lacking("tensorrt", "cuda:0") in (None, "not installed")
    assert sys.modules.get("tensorrt") is before  # it was looked for, not imported


@pytest.mark.parametrize("backend", [name for name in table.BACKENDS if name != "tensorrt"])
@pytest.mark.parametrize("how", ["altered", "cut short", "another manifest"])
def test_no_backend_is_handed_what_does_not_fit_the_manifest(
    path: Path, backend: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Engine:
        raise AssertionError("loaded before it was checked")

    monkeypatch.setattr(module, "load", never)
    monkeypatch.setattr("qfae_runtime.engines.opening.load", never)
    content = bytearray(path.read_bytes())
    if how == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut short":
        path.write_bytes(content[:-9])
    else:
        other = export_tiny(path.parent / "other", size=16).with_suffix(".json")
        path.with_suffix(".json").write_bytes(other.read_bytes())
    with pytest.raises(ManifestError, match=r"its bytes do not match tiny\.json: .*copy both again, or export again"):
        open_engine(path, backend=backend)


def test_one_that_is_left_over_is_told_as_such(backends: Backends, path: Path) -> None:
    backends.shift |= {"openvino": 0.5, "openvino-bf16": 0.5}
    with open_engine(path) as opened:
        assert opened.engine.backend == "onnxruntime"
    assert opened.choice is not None
    assert opened.choice.why.startswith("the only one that passed its self-test, ")
