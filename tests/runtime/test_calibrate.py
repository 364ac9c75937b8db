"""qfae-run calibrate, and runs that decide by what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from qfae_runtime.calibrate_cli import calibrate_command
from qfae_runtime.errors import OutputError
from qfae_runtime.hashing import sha256_of

from .conftest import write_png
from .test_cli import qfae_run
from .test_run import run, table
from .tiny import as_int8

IMAGES = 39


@pytest.fixture
def normals(tmp_path: Path) -> Path:
    folder = tmp_path / "normals"
    rng = np.random.default_rng(11)
    for number in range(IMAGES):
        noise = rng.normal(100, 3 + number / 10, (40, 48))
        write_png(folder / f"{number:02}.png", np.clip(noise, 0, 255).astype(np.uint8))
    return folder


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(calibrate_command, [str(one) for one in arguments])


def scores_of(images: Path, engine: Path, out: Path) -> list[float]:
    run(images, engine, out, maps=False)
    return sorted(float(row["score"]) for row in table(out))


def test_the_threshold_is_the_score_that_the_rule_names(normals: Path, engine_path: Path, tmp_path: Path) -> None:
    scores = scores_of(normals, engine_path, tmp_path / "plain")
    shown = calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    assert shown.exit_code == 0, shown.stderr
    stored = json.loads((engine_path.parent / "tiny.onnx.calibration.json").read_text())
    assert stored["scores"] == scores
    assert stored["threshold"] == scores[35]  # the 36th of 39: 40 * 0.1 = 4 may lie above it, the new one included
    assert stored["engine_sha256"] == sha256_of(engine_path)
    assert shown.stdout.startswith(
        f"threshold {scores[35]:.6g}: split-conformal for a false positive rate of 0.1, from 39"
    )
    assert "a new normal image exceeds it with a probability of at most 0.1; with these 39 images" in shown.stdout
    assert shown.stdout.endswith(f"next: qfae-run IMAGES --engine {engine_path} --out results/\n")


def test_from_then_on_every_row_has_a_decision_and_a_p_value(
    normals: Path, dataset: Path, engine_path: Path, tmp_path: Path
) -> None:
    assert calibrate(normals, "--engine", engine_path, "--fpr", "0.1", "--quiet").stdout == ""
    scores = scores_of(normals, engine_path, tmp_path / "normal")
    run(dataset, engine_path, tmp_path / "out")
    rows = table(tmp_path / "out")
    for row in rows:
        score = float(row["score"])
        assert float(row["threshold"]) == scores[35]
        assert row["decision"] == ("anomalous" if score > scores[35] else "normal")
        assert float(row["p_value"]) == pytest.approx((1 + sum(one >= score for one in scores)) / 40, rel=1e-8)
    assert {row["decision"] for row in rows} == {"anomalous", "normal"}
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["calibration"]["fpr"], record["calibration"]["images"]) == (0.1, IMAGES)
    assert "scores" not in record["calibration"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "split-conformal for a false positive rate of 0.1, from 39 normal images" in report
    assert "decided anomalous, p 0.025" in report


def test_scores_are_what_they_were(normals: Path, dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "before")
    calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    run(dataset, engine_path, tmp_path / "after")
    assert [row["score"] for row in table(tmp_path / "before")] == [row["score"] for row in table(tmp_path / "after")]


def test_another_file_than_the_one_beside_the_engine(
    normals: Path, dataset: Path, engine_path: Path, tmp_path: Path
) -> None:
    calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    other = tmp_path / "strict.json"
    assert calibrate(normals, "--engine", engine_path, "--fpr", "0.025", "--calibration", other).exit_code == 0
    run(dataset, engine_path, tmp_path / "out", calibration=other)
    assert {float(row["threshold"]) for row in table(tmp_path / "out")} == {json.loads(other.read_text())["scores"][-1]}


def test_a_changed_calibration_is_another_run(normals: Path, dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    run(dataset, engine_path, tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    calibrate(normals, "--engine", engine_path, "--fpr", "0.2", "--overwrite")
    with pytest.raises(OutputError, match=r"cannot be resumed, this is another run than the one in it:\n  threshold: "):
        run(dataset, engine_path, tmp_path / "out", resume=True)


def test_files_that_cannot_be_scored_are_named_and_counted(normals: Path, engine_path: Path) -> None:
    (normals / "bad.png").write_bytes(b"no picture")
    shown = calibrate(normals, "--engine", engine_path, "--fpr", "0.1", "--json")
    assert shown.exit_code == 3
    assert "qfae-run calibrate: left out, 1 x: not a PNG" in shown.stderr
    assert "bad" not in shown.stderr  # a name may be a patient's
    values = json.loads(shown.stdout)
    assert (values["images"], values["unreadable"]) == (IMAGES, 1)


def test_few_images_are_warned_of(normals: Path, engine_path: Path) -> None:
    shown = calibrate(normals, "--engine", engine_path, "--fpr", "0.03")
    assert shown.exit_code == 0
    assert "warning: 39 images are few for a rate of 0.03: the threshold's own rate lies between 0.0006" in shown.stderr


def test_copies_are_warned_of(normals: Path, engine_path: Path) -> None:
    for number in range(10):
        (normals / f"copy{number}.png").write_bytes((normals / "03.png").read_bytes())
    shown = calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    assert "warning: only 38 of 49 scores differ: copies of an image are no further evidence; remove" in shown.stderr


def test_pictures_of_one_file_are_told_from_images_of_many(normals: Path, engine_path: Path) -> None:
    pages = [Image.open(path) for path in sorted(normals.iterdir())]
    pages[0].save(normals / "all.tif", save_all=True, append_images=pages[1:])
    for path in normals.glob("*.png"):
        path.unlink()
    shown = calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    assert "from 39 normal images in 1 files\n" in shown.stdout
    assert "warning: the 39 images come from 1 files: slices of a volume resemble one another" in shown.stderr


def test_what_gives_no_threshold_is_refused_and_writes_nothing(
    normals: Path, dataset: Path, engine_path: Path, tmp_path: Path
) -> None:
    before = sorted(engine_path.parent.iterdir())

    def refused(code: int, *arguments: object) -> str:
        shown = calibrate(*arguments)
        assert shown.exit_code == code
        return shown.stderr

    few = refused(1, normals, "--engine", engine_path, "--fpr", "0.01")
    assert few == (
        "qfae-run calibrate: 39 images give no threshold for a false positive rate of 0.01: 99 are needed, ten times "
        "as many are better; add normal images or raise --fpr\n"
    )
    mixed = refused(1, dataset, "--engine", engine_path, "--fpr", "0.5")
    assert "6 of 12 images lie in a folder Ungood; the threshold is found on normal images alone" in mixed
    wrong = refused(2, "--engine", engine_path, "--fpr", "5", "--bogus")
    assert wrong.splitlines() == [
        "qfae-run calibrate: --bogus: no such option; a file of that name is ./--bogus",
        "qfae-run calibrate: --fpr: got '5', expected a rate between 0 and 1, e.g. 0.05",
        "Try 'qfae-run calibrate --help'.",
    ]
    assert "--fpr: missing, expected a rate between 0 and 1" in refused(2, normals, "--engine", engine_path)
    assert sorted(engine_path.parent.iterdir()) == before


def test_nothing_is_replaced_unasked(normals: Path, engine_path: Path) -> None:
    calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    path = engine_path.parent / "tiny.onnx.calibration.json"
    before = path.read_bytes()
    shown = calibrate(normals, "--engine", engine_path, "--fpr", "0.2")
    assert shown.exit_code == 1
    assert f"{path}: exists already; pass --overwrite to replace it, or --calibration with another name" in shown.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"engine_sha256": "0" * 64}, "made with another engine (SHA-256 0000000000000000..., this one is "),
        ({"preprocess_sha256": "0" * 64}, "made with images that were prepared in another way; calibrate again"),
        (
            {"backend": "openvino-bf16"},
            "made with openvino-bf16, whose scores are not those of onnxruntime; ",
        ),
        (
            {"reading": {"window": [40.0, 400.0], "axis": "axial", "slices": None}},
            "made with images that were read in another way: window [40.0, 400.0], axis axial, slices None, here "
            "window None, axis axial, slices None; pass the same options, or calibrate again",
        ),
        ({"threshold": 1e9}, "key 'threshold': expected the one that its scores give, got 1000000000.0"),
        ({"fpr": 0.2}, "key 'threshold': expected the one that its scores give"),
        ({"fpr": 0.001}, "key 'scores': expected 999 scores or more"),
        ({"fpr": 2}, "key 'fpr': expected a rate between 0 and 1, got 2"),
        ({"scores": [2.0, 1.0]}, "key 'scores': expected numbers in ascending order"),
        ({"scores": ["a"]}, "key 'scores': expected numbers in ascending order"),
        ({"more": 1}, "unknown key 'more'"),
        ({"schema_version": 2}, "key 'schema_version': expected a whole number in 1..1, got 2"),
        (None, "not valid JSON: "),
    ],
)
def test_a_calibration_that_does_not_fit_stops_the_run(
    normals: Path, dataset: Path, engine_path: Path, tmp_path: Path, change: dict[str, Any] | None, says: str
) -> None:
    calibrate(normals, "--engine", engine_path, "--fpr", "0.1")
    path = engine_path.parent / "tiny.onnx.calibration.json"
    text = path.read_text()
    path.write_text(text[:-9] if change is None else json.dumps({**json.loads(text), **change}))
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out")
    assert shown.exit_code == 1
    assert says in shown.stderr
    assert "calibrat" in shown.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("int8", "code"), [(False, 0), (True, 1)])
def test_a_threshold_of_int8_scores_is_for_the_backend_that_gave_them(
    normals: Path, dataset: Path, engine_path: Path, tmp_path: Path, int8: bool, code: int
) -> None:
    """FP32 scores of two backends agree, so the threshold of one holds for the other."""
    if int8:
        as_int8(engine_path)
    assert calibrate(normals, "--engine", engine_path, "--fpr", "0.1").exit_code == 0
    assert qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "same").exit_code == 0
    path = engine_path.parent / "tiny.onnx.calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backend": "openvino"}))
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "other")
    assert shown.exit_code == code, shown.stderr
    said = (
        f"{path}: made with openvino, whose scores are not those of onnxruntime; pass --backend openvino, or calibrate "
        "again with qfae-run calibrate"
    )
    assert (said in shown.stderr) is int8


def test_help_tells_the_exit_codes() -> None:
    assert "130 interrupted (Ctrl-C, SIGTERM)." in calibrate("--help").stdout


def test_a_missing_calibration_that_was_named_is_told(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "o", "--calibration", tmp_path / "none")
    assert shown.exit_code == 1
    assert "none: cannot be read (No such file or directory); calibrate again with qfae-run calibrate" in shown.stderr
