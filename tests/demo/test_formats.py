"""What is said of each format: thresholds and errors by hand, planted faults, and a tiny model in every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo import formats, spread
from demo.formats import Comparison, Measured, Row, Slices, measure, right, table, threshold
from qfae_export.describe import manifest_of, provenance_of
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages
from qfae_export.onnx_file import write_onnx
from qfae_export.precision import FP16, INT8
from qfae_export.reference import Measured64
from qfae_runtime.agreement import Reference, Scale, measure_agreement
from qfae_runtime.engines.base import Scores
from qfae_runtime.errors import EngineError
from qfae_runtime.yardstick import Yardstick, heights_of
from qfae_train.checkpoint import build_scorer, load
from qfae_train.data import DataError
from tests.export.tiny import SIZE, checkpoint_file, pictures


def data_set(root: Path, normal: int = 6, anomalous: int = 6) -> Path:
    """Pictures in BMAD's layout, the bright spot of the anomalous ones marked."""
    for number, image in enumerate(pictures(normal + anomalous)):
        folder = root / "test" / ("good" if number < normal else "Ungood")
        for place in (folder / "img", folder / "label"):
            place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "img" / f"{number:02}.png")
        if number >= normal:
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[8:16, 8:15] = 255
            Image.fromarray(mask).save(folder / "label" / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.pt and what an export of it leaves, all but the proof, which nothing here reads.

    The FP32 engine stands under the names of the others, too: each takes as long again to write.
    """
    folder = tmp_path_factory.mktemp("formats")
    checkpoint = load(checkpoint_file(folder / "tiny.pt"))
    graph = InferenceGraph(build_scorer(checkpoint))
    written = write_onnx(graph, folder / "tiny.onnx")
    engines = {"tiny.onnx": (written, graph.precision)}
    for name, policy in (("tiny.fp16.onnx", FP16), ("tiny.int8.onnx", INT8)):
        shutil.copy(folder / "tiny.onnx", folder / name)
        engines[name] = ([folder / name], policy)
    provenance = provenance_of(checkpoint, "tiny.pt")
    manifest_of("tiny", checkpoint.config, "full", 16, engines, None, [], provenance).save(folder / "tiny.json")
    return folder


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [(100, 1, 99.5), (100, 5, 95.5), (100, 10, 90.5), (40, 5, 38.5), (10, 1, 9.5), (2, 10, 1.5)],
)
def test_thresholds_lie_halfway_between_two_normal_scores(count: int, percent: float, expected: float) -> None:
    normal = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert threshold(normal, percent) == expected


def scores_of(values: list[float], maps: Any = None) -> Scores:
    """Outputs whose maps are 1 in the first row and 0 elsewhere, times the score."""
    score = np.array(values, np.float32)
    pixels = np.zeros((len(values), 4, 4), np.float32)
    pixels[:, 0] = score[:, None] if maps is None else maps
    return Scores(score, pixels, np.zeros((len(values), 4, 4, 3), np.uint8))


def comparison() -> tuple[Comparison, Scores]:
    """Ten normal images of scores 1 to 10, and ten anomalous ones of 8.2 to 17.2, marked where their maps are high."""
    truth = scores_of([*range(1, 11), *(number + 8.2 for number in range(10))])
    anomalous = np.arange(20) >= 10
    masks = np.zeros((20, 4, 4), np.uint8)
    masks[10:, 0] = 1
    slices = Slices(np.zeros((20, 4, 4, 3), np.uint8), anomalous, masks)
    images = ParityImages(
        slices.pixels, tuple(f"slice {number}" for number in range(20)), "", tuple(anomalous.tolist())
    )
    errors = 1e-6 * heights_of(truth)
    reference = Reference(truth, Scale.of(truth, images.labels), Yardstick(errors, errors))
    exact = Measured64(reference, tuple(range(20)), truth, truth, measure_agreement(truth, truth))
    return Comparison(slices, images, exact), truth


def test_the_truth_itself_is_without_change() -> None:
    compared, truth = comparison()
    row = compared.row("PyTorch FP64", None, truth)
    # Of 100 pairs, an anomalous 8.2 is below 9 and 10, and 9.2 below 10.
    assert row.image_auroc == pytest.approx(0.97)
    assert row.spearman == pytest.approx(1)
    assert (row.image_auroc_change, row.pixel_auroc_change, row.largest_error, row.broken) == (0, 0, 0, ())
    assert row.flips == {"1": 0, "5": 0, "10": 0}
    assert compared.thresholds == {"1": 9.5, "5": 9.5, "10": 9.5}


def test_errors_are_counted_as_they_were_planted() -> None:
    compared, truth = comparison()
    moved = truth.score.copy()
    moved[9] = 9.4  # was 10, and above the threshold 9.5
    moved[11] = 9.7  # was 9.2, below
    moved[0] = 2.5  # was 1; the normal scores' 95th percentile, 9.55, is what the error is a share of
    moved[19] = 15.2  # was 17.2, of which the error is a share
    row = compared.row("planted", "fp16", truth._replace(score=moved))
    assert row.flips == {"1": 2, "5": 2, "10": 2}
    assert row.largest_error == pytest.approx(1.5 / 9.55, rel=1e-6)
    # 9.7 is above 9.4 now; 8.2 is below 9 and 9.4 as it was below 9 and 10.
    assert row.image_auroc == pytest.approx(0.98)
    assert row.image_auroc_change == pytest.approx(0.01)
    assert row.pixel_auroc_change == 0
    assert row.tolerances == "fp16"
    assert any(said.startswith("score error as distance, mean: ") for said in row.broken)


def test_pixel_auroc_falls_where_maps_are_wrong() -> None:
    compared, truth = comparison()
    wrong = truth.anomaly_map.copy()
    wrong[10:, 0] = 0
    assert compared.row("planted", "fp16", truth._replace(anomaly_map=wrong)).pixel_auroc_change < -0.3


def test_outputs_that_are_not_finite_are_not_compared() -> None:
    compared, truth = comparison()
    odd = truth.score.copy()
    odd[3] = np.nan
    with pytest.raises(EngineError, match="score: the engine has 1 values that are not finite, the first at index"):
        compared.row("planted", "fp16", truth._replace(score=odd))


def test_every_format_of_a_folder_is_measured(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {"openvino-bf16": "this processor does not compute in BF16"}
    monkeypatch.setattr(formats, "lacking", lambda backend, device: lacks.get(backend))
    said: list[str] = []
    measured = measure(exported, exported / "tiny.pt", data_set(tmp_path), said.append)
    titles = [row.title for row in measured.rows]
    assert titles[:3] == ["PyTorch FP64", "PyTorch FP32", "FP16, as a GPU rounds"]
    assert titles[3:] == [
        *("FP32, ONNX Runtime", "FP16, ONNX Runtime", "FP32, OpenVINO"),
        *("INT8, ONNX Runtime", "INT8, OpenVINO"),
    ]
    assert measured.skipped == {"BF16, OpenVINO": "this processor does not compute in BF16"}
    assert (measured.images, measured.normal) == (12, 6)
    rows = dict(zip(titles, measured.rows, strict=True))
    for title in ("PyTorch FP32", "FP32, ONNX Runtime", "FP32, OpenVINO"):
        assert (rows[title].tolerances, rows[title].broken, set(rows[title].flips.values())) == ("fp32", (), {0})
        assert rows[title].largest_error < 1e-4
    assert [rows[title].tolerances for title in titles[2:]] == ["fp16", "fp32", "fp16", "fp32", "int8", "int8"]
    assert rows["FP16, as a GPU rounds"].largest_error > 10 * rows["FP32, OpenVINO"].largest_error
    assert said[0] == f"scoring {12 + 14} images with PyTorch in FP64 and FP32"
    assert Measured.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_what_was_not_exported_or_fails_is_left_out_with_a_word(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise EngineError("no memory")

    manifest = json.loads((exported / "tiny.json").read_text())
    for name in ("tiny.fp16.onnx", "tiny.int8.onnx"):
        manifest["files"].pop(name)
        manifest["precision"].pop(name)
    (tmp_path / "tiny.json").write_text(json.dumps(manifest))
    (tmp_path / "tiny.onnx").write_bytes((exported / "tiny.onnx").read_bytes())
    monkeypatch.setattr(formats, "load_onnx", fails)
    monkeypatch.setattr(formats, "lacking", lambda backend, device: None)
    measured = measure(tmp_path, exported / "tiny.pt", data_set(tmp_path))
    assert len(measured.rows) == 3
    assert measured.skipped == {
        "FP32, ONNX Runtime": "no memory",
        "FP16, ONNX Runtime": "no tiny.fp16.onnx",
        "FP32, OpenVINO": "no memory",
        "BF16, OpenVINO": "no memory",
        "INT8, ONNX Runtime": "no tiny.int8.onnx",
        "INT8, OpenVINO": "no tiny.int8.onnx",
    }


def test_engines_of_another_checkpoint_are_refused(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny.pt"
    checkpoint_file(other, parity_images=pictures(33)[1:])
    with pytest.raises(ExportError, match=r"tiny\.pt: SHA-256 .*, but tiny\.onnx was exported from .*; pass the check"):
        measure(exported, other, data_set(tmp_path))


def test_slices_without_normal_ones_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        measure(exported, exported / "tiny.pt", data_set(tmp_path, normal=1, anomalous=2))
    assert str(caught.value) == (
        f"data '{tmp_path}': 1 normal test images and 2 anomalous ones with a mask; expected 2 and 1 at least: "
        "thresholds and AUROC are made of both"
    )


def row(title: str, tolerances: str | None, flips: int = 0, broken: tuple[str, ...] = ()) -> Row:
    counts = {"1": 0, "5": flips, "10": 0}
    return Row(title, 0.95, 0.99, -0.00012, 0.0, 0.99987, counts, 1.5e-3, tolerances, broken)


def test_the_table_says_in_words_whether_a_format_is_right() -> None:
    rows = (
        row("PyTorch FP64", None),
        row("FP16", "fp16"),
        row("BF16", "bf16", 2),
        row("INT8", "int8", 5, ("decisions flipped / images: 0.03 exceeds 0.02, worst at image 3", "another")),
    )
    measured = Measured(rows, {"INT8, OpenVINO": "not installed"}, 200, 100, {"1": 3.0, "5": 2.0, "10": 1.0})
    lines = table(measured).splitlines()
    assert lines[2] == "| PyTorch FP64 | 0.9500 | 0.9900 | 0.99987 | 0, 0, 0 | 1.5e-03 | the truth |"
    assert lines[3] == (
        "| FP16 | 0.9500 (-0.0001) | 0.9900 (+0.0000) | 0.99987 | 0, 0, 0 | 1.5e-03 | yes: every decision is the same |"
    )
    assert lines[4].endswith("| 0, 2, 0 | 1.5e-03 | yes, within its tolerances; up to 2 of 200 decisions change |")
    assert lines[5].endswith("| no: decisions flipped / images: 0.03 exceeds 0.02, and 1 more |")
    assert lines[7].startswith("On 200 slices, 100 of them normal; ")
    assert lines[-1] == "- not measured: INT8, OpenVINO: not installed"
    assert right(rows[1], 200) == "yes: every decision is the same"


def test_a_refused_fp16_engine_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def refuses_fp16(*command: str) -> int:
        asked.append(command)
        return int("--fp16" in command)

    monkeypatch.setattr(spread, "exit_code", refuses_fp16)
    monkeypatch.setattr(spread, "step", refuses_fp16)
    measured: list[tuple[Path, Path, Path]] = []
    monkeypatch.setattr(formats, "measure", lambda folder, ckpt, data, say: measured.append((folder, ckpt, data)))
    spread.of_formats(tmp_path)
    assert measured == [(tmp_path / "formats", Path("demo/weights/demo.pt"), tmp_path / "data")]
    assert [command[-1] for command in asked] == ["--fp16", str(tmp_path / "formats")]
