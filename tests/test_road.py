"""The whole road on the shipped model: slices, certified engine, scores; what it reaches and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qfae_runtime.contract import CONTRACTS
from qfae_runtime.quantities import QUANTITIES
from qfae_train.checkpoint import load as load_checkpoint
from qfae_train.checkpoint import portable_config
from qfae_train.config import load as load_config
from tests.commands import ROOT, run

BATCHES = (1, 3, 16)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves, made by its very program."""
    folder = tmp_path_factory.mktemp("demo")
    done = run("python", "-m", "demo.run", "--build", folder, cwd=ROOT, home=folder)
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def scores(results: Path) -> dict[str, float]:
    with (results / "scores.csv").open(encoding="utf-8", newline="") as file:
        return {row["source"]: float(row["score"]) for row in csv.DictReader(file) if row["status"] == "ok"}


def qfae_run(build: Path, out: Path, *arguments: object) -> tuple[int, str]:
    done = run("qfae-run", *arguments, "--out", out, cwd=build)
    return done.returncode, done.stderr


def test_the_shipped_model_is_the_presets() -> None:
    """`make demo-train` trains the preset: what it makes must be comparable with what is shipped."""
    shipped = load_checkpoint(ROOT / "demo/weights/demo.pt").config
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [epochs] = re.findall(r"qfae-train --preset demo --epochs (\d+) --validate-every 1 ", makefile)
    preset = load_config("demo")
    asked = replace(preset, train=replace(preset.train, epochs=int(epochs), validate_every=1))
    assert portable_config(shipped) == portable_config(asked)


def test_the_demo_finds_the_lesions(build: Path) -> None:
    metrics = json.loads((build / "results/metrics.json").read_text(encoding="utf-8"))
    results = json.loads((ROOT / "demo/results.json").read_text(encoding="utf-8"))
    printed = (build / "printed.txt").read_text(encoding="utf-8")

    assert len(scores(build / "results")) == 200
    assert len(list((build / "results/heatmaps").rglob("*.png"))) == 200
    assert (build / "results/report.html").stat().st_size > 100_000
    # What the repository says it reaches, on the same slices; another processor rounds otherwise.
    said = results["runs"][0]
    assert said["data_seed"] == 0
    assert metrics["image_auroc"] == pytest.approx(said["image_auroc"], abs=2e-3)
    assert metrics["pixel_auroc"] == pytest.approx(said["pixel_auroc"], abs=2e-3)
    assert said["baseline_image_auroc"] < 0.70
    assert f"image AUROC      {metrics['image_auroc']:.3f}   (blurred maximum intensity: 0." in printed
    assert f"report           {build / 'results/report.html'}" in printed


def test_the_engine_carries_its_certificate(build: Path) -> None:
    manifest = json.loads((build / "engine/demo.json").read_text(encoding="utf-8"))
    [certificate] = manifest["certificate"]

    assert sorted(path.name for path in (build / "engine").iterdir()) == ["demo.golden.npz", "demo.json", "demo.onnx"]
    assert certificate["batches"] == [1, 2, 4, 8, 16]
    assert certificate["contract"]["name"] == "fp32"
    for name, bound in CONTRACTS["fp32"].bounds.items():
        measured = certificate["measured"][name]
        assert certificate["contract"]["bounds"][name] == bound
        assert measured >= bound if QUANTITIES[name].larger_is_better else measured <= bound
    # What is right rounds about as PyTorch does, and PyTorch does not break these bounds itself.
    for name in ("score_typical", "map_typical"):
        assert 0.1 < certificate["measured"][name] < 2
        assert 0.1 < certificate["pytorch"][name] < 2
    assert (certificate["images"], certificate["stress_images"]) == (32, 14)
    assert certificate["reference"] == "PyTorch FP64"
    assert [(link["source"], link["target"]) for link in certificate["links"]] == [
        ("PyTorch FP32", "graph FP32"),
        ("graph FP32", "ONNX FP32"),
    ]


@pytest.fixture(scope="module")
def few(build: Path) -> Path:
    """Twelve of the test slices, with and without lesions."""
    for label in ("good", "Ungood"):
        folder = build / "few" / label / "img"
        folder.mkdir(parents=True)
        for path in sorted((build / "data/test" / label / "img").iterdir())[:6]:
            shutil.copy(path, folder)
    return build / "few"


def test_two_runs_are_byte_identical_and_batches_change_nothing(build: Path, few: Path, tmp_path: Path) -> None:
    engine = build / "engine/demo.onnx"
    runs = {}
    for size in BATCHES:
        code, err = qfae_run(build, tmp_path / f"{size}", few, "--engine", engine, "--batch-size", size)
        assert code == 0, err
        runs[size] = scores(tmp_path / f"{size}")
    qfae_run(build, tmp_path / "again", few, "--engine", engine, "--batch-size", BATCHES[-1])

    same = (tmp_path / "again/scores.csv").read_bytes() == (tmp_path / f"{BATCHES[-1]}/scores.csv").read_bytes()
    assert same
    assert len(runs[1]) == 12
    for size in BATCHES[1:]:
        assert max(abs(runs[1][name] - runs[size][name]) for name in runs[1]) < 1e-5
    # The same slices among others score alike.
    whole = scores(build / "results")
    assert max(abs(value - whole[name]) for name, value in runs[1].items()) < 1e-5


def test_odd_files_have_their_row_and_the_rest_is_scored(build: Path, few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    shutil.copytree(few / "good/img", folder)
    whole = next(folder.iterdir()).read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").touch()

    code, err = qfae_run(build, tmp_path / "out", folder, "--engine", build / "engine/demo.onnx")

    with (tmp_path / "out/scores.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["source"]: row for row in csv.DictReader(file)}
    failed = {name for name, row in rows.items() if row["status"] == "error"}
    assert code == 3, err
    assert failed == {"truncated.png", "text.png", "empty.png"}
    assert all(rows[name]["error"] and not rows[name]["score"] for name in failed)
    assert len(rows) == 9


def one_weight_changed(build: Path, folder: Path) -> Path:
    """A copy of the engine in which the largest of one layer's weights is a tenth larger."""
    shutil.copytree(build / "engine", folder)
    path = folder / "demo.onnx"
    model = onnx.load(path)
    matrix = next(t for t in model.graph.initializer if list(t.dims) == [128, 768])  # the decoder's last layer
    values: NDArray[np.float32] = numpy_helper.to_array(matrix).copy()
    values.flat[np.abs(values).argmax()] *= 1.1
    matrix.CopyFrom(numpy_helper.from_array(values, matrix.name))
    onnx.save(model, path)
    return path


def test_one_changed_weight_is_refused(build: Path, few: Path, tmp_path: Path) -> None:
    engine = one_weight_changed(build, tmp_path / "engine")

    code, err = qfae_run(build, tmp_path / "out", few, "--engine", engine)

    assert code == 1
    assert "do not match demo.json" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_one_changed_weight_with_the_hash_mended_fails_the_self_test(build: Path, few: Path, tmp_path: Path) -> None:
    engine = one_weight_changed(build, tmp_path / "engine")
    true, false = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (build / "engine/demo.onnx", engine))
    manifest = engine.with_suffix(".json")
    text = manifest.read_text(encoding="utf-8").replace(true, false)
    size = f'"bytes": {(build / "engine/demo.onnx").stat().st_size}'
    manifest.write_text(text.replace(size, f'"bytes": {engine.stat().st_size}'), encoding="utf-8")

    code, err = qfae_run(build, tmp_path / "out", few, "--engine", engine)

    assert code == 1
    assert "self-test" in err
    assert not (tmp_path / "out/scores.csv").exists()


def test_int8_keeps_its_contract_on_the_test_slices(build: Path, tmp_path: Path) -> None:
    """On 100 x 100 pairs, calibrated on other slices; this is where its AUROC is bounded."""
    images = ("--parity-images", build / "data/test", "--parity-count", "200")
    done = run("qfae-export", "--ckpt", ROOT / "demo/weights/demo.pt", "--int8", *images, "--out", "int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    certificates = json.loads((tmp_path / "int8/demo.json").read_text(encoding="utf-8"))["certificate"]
    [mine] = [one for one in certificates if one["engine"] == "demo.int8.onnx"]
    assert (mine["images"], mine["stress_images"]) == (200, 14)
    assert mine["contract"]["bounds"]["auroc_change"] == 0.003
    assert mine["measured"]["auroc_change"] <= 0.003
    assert mine["contract"]["bounds"]["flips_share"] == 0.05
    assert mine["measured"]["flips_share"] <= 0.05
    assert mine["measured"]["score_distance"] > 1e-5, "eight bits must show"
    assert mine["measured"]["spearman"] >= 0.995
