from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime.errors import ManifestError
from qfae_runtime.manifest import Manifest, find_manifest
from qfae_runtime.quantities import QUANTITIES

from .tiny import export_tiny

LINK: dict[str, Any] = {
    "source": "PyTorch FP32",
    "target": "ONNX FP32",
    "images": 32,
    "contract": "fp32",
    "measured": dict.fromkeys(QUANTITIES, 0.9),
    "passed": False,
}

SIZES_EXPECTED = "expected 1 to 32 whole numbers in 1..4096, ascending, the first of them 1"

Change = Callable[[dict[str, Any]], None]


def test_saves_and_loads_the_same(engine_path: Path) -> None:
    manifest = Manifest.load(engine_path.with_suffix(".json"))
    richer = replace(manifest, provenance={"checkpoint": "ab", "lr": 1e-3})
    richer.save(engine_path.with_suffix(".json"))
    assert Manifest.load(engine_path.with_suffix(".json")) == richer
    assert sorted(path.name for path in engine_path.parent.iterdir()) == ["tiny.golden.npz", "tiny.json", "tiny.onnx"]


def test_numbers_that_are_not_finite_are_never_written(engine_path: Path) -> None:
    manifest = Manifest.load(engine_path.with_suffix(".json"))
    with pytest.raises(ManifestError, match=r"tiny\.json: cannot be written as JSON"):
        replace(manifest, provenance={"loss": float("nan")}).save(engine_path.with_suffix(".json"))


def put(*keys: Any, value: Any) -> Change:
    def change(stored: dict[str, Any]) -> None:
        place: Any = stored
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def rename_engine(name: str) -> Change:
    def change(stored: dict[str, Any]) -> None:
        stored["files"][name] = stored["files"].pop("tiny.onnx")

    return change


def drop(*keys: Any) -> Change:
    def change(stored: dict[str, Any]) -> None:
        place: Any = stored
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("schema_version", value=7), "schema_version is 7, this qfae reads 6; install a qfae that reads"),
        (put("schema_version", value=5), "schema_version is 5, this qfae reads 6; export the engine again, or use"),
        (put("schema_version", value="6"), "key 'schema_version': expected a whole number in 6..6, got '6'"),
        (drop("schema_version"), "key 'schema_version' is missing"),
        (drop("files"), "key 'files' is missing"),
        (put("batch_sizes", value=[]), f"key 'batch_sizes': {SIZES_EXPECTED}, got []"),
        (put("batch_sizes", value=32), "key 'batch_sizes': expected a list, got 32"),
        (put("batch_sizes", value=[0, 1]), f"key 'batch_sizes': {SIZES_EXPECTED}, got [0, 1]"),
        (put("batch_sizes", value=[True, 2]), f"key 'batch_sizes': {SIZES_EXPECTED}, got [True, 2]"),
        (put("batch_sizes", value=[1, 2.0]), f"key 'batch_sizes': {SIZES_EXPECTED}, got [1, 2.0]"),
        (put("batch_sizes", value=[2, 4]), f"key 'batch_sizes': {SIZES_EXPECTED}, got [2, 4]"),
        (put("batch_sizes", value=[1, 4, 2]), f"key 'batch_sizes': {SIZES_EXPECTED}, got [1, 4, 2]"),
        (put("batch_sizes", value=[1, 2, 2]), f"key 'batch_sizes': {SIZES_EXPECTED}, got [1, 2, 2]"),
        (put("batch_sizes", value=[1, 4097]), f"key 'batch_sizes': {SIZES_EXPECTED}, got [1, 4097]"),
        (put("batch_sizes", value=list(range(1, 34))), f"key 'batch_sizes': {SIZES_EXPECTED}"),
        (put("batch_sizes", value=["1"]), f"key 'batch_sizes': {SIZES_EXPECTED}, got ['1']"),
        (put("max_batch", value=32), "unknown key 'max_batch'; known here are"),
        (put("image_size", value=33), "key 'image_size': expected 32, as in 'preprocess.spec', got 33"),
        (put("colour", value="red"), "unknown key 'colour'; known here are"),
        (put("preprocess", "sha256", value="0" * 64), "key 'preprocess.sha256': expected"),
        (put("preprocess", "probe", value="abc"), "key 'preprocess.probe': expected a SHA-256"),
        (put("preprocess", "spec", "kind", value="crop"), "preprocess kind: got 'crop', accepted are 'resize'"),
        (put("files", "tiny.onnx", "sha256", value="xyz"), "key 'files.tiny.onnx.sha256': expected a SHA-256"),
        (put("files", "tiny.onnx", "role", value="virus"), "expected one of engine, weights, golden, got 'virus'"),
        (put("files", "tiny.onnx", "format", value=None), "expected one of onnx, plan, rtx-plan, got None"),
        (put("golden", value="other.npz"), "key 'golden': expected one of the names in 'files'"),
        (rename_engine("../tiny.onnx"), "file name '../tiny.onnx': expected a plain name"),
        (rename_engine("/etc/passwd"), "file name '/etc/passwd': expected a plain name"),
        (rename_engine("..\\tiny.onnx"), "expected a plain name"),
        (rename_engine("a..onnx"), "expected a plain name"),
        (put("name", value="../x"), "file name '../x': expected a plain name"),
        (put("inputs", 0, "shape", value=[1, 32]), "key 'inputs.0.shape': expected"),
        (put("certificate", 0, "images", value=0), "key 'certificate.0.images': expected a whole number in 1.."),
        (drop("certificate", 0, "measured", "map_abs"), "key 'certificate.0.measured.map_abs' is missing"),
        (put("certificate", 0, "measured", "score_worst", value=31), "key 'certificate.0.passed': expected false"),
        (
            put("certificate", 0, "stress_images", value=-1),
            "key 'certificate.0.stress_images': expected a whole number",
        ),
        (put("certificate", 0, "pytorch", value={}), "key 'certificate.0.pytorch.score_typical' is missing"),
        (put("certificate", 0, "images", value=31), "key 'certificate.0.images': expected 32 or more"),
        (put("certificate", 0, "reference", value=3), "key 'certificate.0.reference': expected"),
        (
            put("certificate", 0, "links", value=[{**LINK, "passed": True}]),
            "key 'certificate.0.links.0.passed': expected false, since a measured quantity breaks its bound",
        ),
        (
            put("certificate", 0, "links", value=[{**LINK, "contract": "mine"}]),
            "key 'certificate.0.links.0.contract': expected one of fp32, fp16, bf16",
        ),
        (put("certificate", 0, "measured", "spearman", value=None), "key 'certificate.0.passed': expected false"),
        (
            put("certificate", 0, "contract", "name", value="mine"),
            "'certificate.0.contract.name': expected one of fp32",
        ),
        (
            put("certificate", 0, "contract", "bounds", "score_worst", value=31),
            "key 'certificate.0.contract.bounds': expected bounds at least as strict as {'score_typical': 5.0",
        ),
        (drop("certificate", 0, "contract", "bounds", "spearman"), "bounds at least as strict as"),
        (
            put("certificate", 0, "contract", "bounds", "beauty", value=1),
            "unknown key 'certificate.0.contract.bounds.b",
        ),
        (put("certificate", 0, "links", value=[{}]), "key 'certificate.0.links.0.source' is missing"),
        (put("certificate", 0, "batches", value=[]), "key 'certificate.0.batches': expected a list of batch sizes"),
        (put("certificate", 0, "scale", "score_iqr", value="high"), "expected a finite number, got 'high'"),
        (
            put("certificate", 0, "scale", "factors", value=0),
            "key 'certificate.0.scale.factors': expected a whole number",
        ),
    ],
)
def test_hostile_manifests_are_refused(engine_path: Path, change: Change, says: str) -> None:
    path = engine_path.with_suffix(".json")
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ManifestError) as caught:
        Manifest.load(path)
    assert says in str(caught.value)
    assert "tiny.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ("[]", "key 'the whole file': expected an object, got []"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": 1, "a": 2}', "a key stands twice in one object"),
        ("[" * 100_000, "not valid JSON"),
        ("\x80", "not valid JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError) as caught:
        Manifest.load(path)
    assert says in str(caught.value)


def test_manifest_is_found_beside_every_engine_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "brats.json").touch()
    for name in ("brats.onnx", "brats.fp16.onnx", "brats.plan"):
        assert find_manifest(tmp_path / name) == tmp_path / "brats.json"
    with pytest.raises(ManifestError) as caught:
        find_manifest(tmp_path / "liver.fp16.onnx")
    assert str(caught.value) == (
        f"{tmp_path}/liver.fp16.onnx: no manifest beside it (looked for liver.fp16.json, liver.json); "
        "copy the .json that qfae-export wrote with the engine, or export again"
    )


def test_files_are_held_against_their_hashes(tmp_path: Path) -> None:
    engine = export_tiny(tmp_path)
    manifest = Manifest.load(tmp_path / "tiny.json")
    manifest.verify_files(tmp_path)
    with pytest.raises(ManifestError, match=r"does not list 'x\.onnx', only tiny\.onnx, tiny\.golden\.npz"):
        manifest.verify_files(tmp_path, ["x.onnx"])
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=r"its bytes do not match tiny\.json: SHA-256 "):
        manifest.verify_files(tmp_path)
    engine.unlink()
    with pytest.raises(ManifestError, match=r"listed in tiny\.json but not there; copy it beside the engine"):
        manifest.verify_files(tmp_path)
