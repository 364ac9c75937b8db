"""Whole runs: what is written, and what damage does to them."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qfae_runtime.errors import OutputError
from qfae_runtime.run import Options, Summary, execute

from .conftest import write_png
from .test_cli import qfae_run
from .tiny import golden_images


def run(images: Path, engine: Path, out: Path, **options: Any) -> Summary:
    return execute(Options((images,), engine, out, **options))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_everything(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "heatmaps",
        "inputs.jsonl",
        "metrics.json",
        "report.html",
        "run.json",
        "scores.csv",
        "scores.jsonl",
    ]
    rows = table(out)
    assert list(rows[0]) == [
        *("source", "frame", "score", "threshold", "decision", "p_value", "status", "error", "label", "applied"),
        *("heatmap", "anomaly_map"),
    ]
    assert [row["source"] for row in rows] == sorted(row["source"] for row in rows)
    assert {row["label"] for row in rows} == {"good", "Ungood"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["image_auroc"] == 1.0
    assert 0.5 < metrics["pixel_auroc"] <= 1.0
    assert metrics["counts"]["images_with_pixel_truth"] == 12
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], record["certified"], record["counts"]["scored"]) == ("done", True, 12)
    assert record["self_test"]["status"] == "passed"
    assert record["inputs"]["mask_files"] == 6
    figures = sorted(path.relative_to(out / "heatmaps").as_posix() for path in (out / "heatmaps").rglob("*.png"))
    assert figures == [row["source"] for row in rows]


def test_the_record_says_where_the_time_went(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "out")
    seconds = json.loads((tmp_path / "out" / "run.json").read_text())["seconds"]
    steps = ["listing", "opening", "self_test", "preparing", "scoring", "results"]
    stages = [f"scoring_{stage}" for stage in ("decoding", "preprocessing", "engine", "drawing", "writing")]
    assert list(seconds) == [*steps, *stages, "total"]
    assert sum(seconds[step] for step in steps) == pytest.approx(seconds["total"], abs=0.01)
    assert 0 < seconds["scoring_engine"] < seconds["scoring"]
    assert all(seconds[stage] > 0 for stage in stages)


def test_jsonl_and_csv_hold_the_same_and_scores_are_exact(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    for line, row in zip(lines, table(tmp_path / "out"), strict=True):
        assert {key: "" if value is None else str(value) for key, value in line.items()} == row
        assert float(np.float32(row["score"])) == pytest.approx(float(row["score"]), abs=0, rel=1e-8)


def test_two_runs_are_byte_identical(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "a")
    run(dataset, engine_path, tmp_path / "b")
    assert (tmp_path / "a" / "scores.csv").read_bytes() == (tmp_path / "b" / "scores.csv").read_bytes()
    assert (tmp_path / "a" / "scores.jsonl").read_bytes() == (tmp_path / "b" / "scores.jsonl").read_bytes()


def test_batch_size_does_not_change_scores(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    for size in (1, 5, 32):
        run(dataset, engine_path, tmp_path / str(size), batch_size=size, maps=False)
    scores = {size: [float(row["score"]) for row in table(tmp_path / str(size))] for size in (1, 5, 32)}
    np.testing.assert_allclose(scores[5], scores[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores[32], scores[1], rtol=0, atol=1e-5)


def damage(dataset: Path) -> dict[str, str]:
    """Put bad files among the good; what each row must say."""
    good = dataset / "good" / "img"
    (good / "empty.png").touch()
    (good / "text.png").write_text("I am a text")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    write_png(good / "cut.png", noise)
    (good / "cut.png").write_bytes((good / "cut.png").read_bytes()[:900])
    return {
        "good/img/empty.png": "the file is empty (0 bytes)",
        "good/img/text.png": "not a PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI image",
        "good/img/cut.png": "damaged or truncated image",
    }


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_files_get_rows_and_the_others_are_scored(
    dataset: Path, engine_path: Path, tmp_path: Path, batch_size: int
) -> None:
    run(dataset, engine_path, tmp_path / "clean")
    bad = damage(dataset)
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out", "--batch-size", batch_size)
    assert shown.exit_code == 3
    assert "3 files could not be scored; see status and error in" in shown.stdout
    rows = {row["source"]: row for row in table(tmp_path / "out")}
    assert list(rows) == sorted(rows)
    for source, reason in bad.items():
        assert (rows[source]["status"], rows[source]["score"]) == ("error", "")
        assert rows[source]["error"].startswith(reason)
    for row in table(tmp_path / "clean"):
        assert float(rows[row["source"]]["score"]) == pytest.approx(float(row["score"]), abs=1e-5)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Could not be scored" in report
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["counts"]["labelled_but_not_scored"] == 3


def test_masks_that_cannot_be_used_are_told(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out, masks = tmp_path / "out", dataset / "Ungood" / "label"
    write_png(masks / "1.png", np.ones((40, 47), np.uint8))
    (masks / "2.png").write_text("no picture")
    (masks / "3.png").unlink()  # none at all is another matter
    shown = qfae_run(dataset, "--engine", engine_path, "--out", out)
    assert shown.exit_code == 0
    note = (
        "2 masks could not be used, the first is the mask of Ungood/img/1.png: got 47 x 40 pixels, expected 48 x 40, "
        "the size of its image"
    )
    assert f"note: {note}\n" in shown.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["notes"][0] == note
    counts = metrics["counts"]
    assert (counts["images_with_pixel_truth"], counts["images_without_pixel_truth"]) == (9, 3)
    assert counts["masks_unusable"] == 2
    write_png(masks / "1.png", np.ones((40, 48), np.uint8))
    summary = run(dataset, engine_path, out, overwrite=True)
    assert summary.metrics is not None
    assert summary.metrics["notes"][0] == (
        "1 mask could not be used, the first is the mask of Ungood/img/2.png: "
        "not a PNG, JPEG, BMP, TIFF or WebP image, whatever its name says"
    )


def test_only_bad_files_still_end_orderly(engine_path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    shown = qfae_run(tmp_path / "in", "--engine", engine_path, "--out", tmp_path / "out")
    assert shown.exit_code == 3
    assert table(tmp_path / "out")[0]["error"] == "the file is empty (0 bytes)"
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_without_maps(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "out", maps=False)
    assert not (tmp_path / "out" / "heatmaps").exists()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["pixel_auroc"] is None
    assert metrics["notes"][0] == "the pixel metrics need the anomaly maps; run without --no-maps"


def test_labels_from_a_file(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("source,label\ngood/img/0.png,anomalous\nUngood/img/0.png,normal\n")
    run(dataset, engine_path, tmp_path / "out", labels=tmp_path / "l.csv")
    labels = {row["source"]: row["label"] for row in table(tmp_path / "out")}
    assert (labels["good/img/0.png"], labels["Ungood/img/0.png"], labels["good/img/1.png"]) == ("Ungood", "good", "")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["image_auroc"] == 0.0


def test_results_are_not_overwritten_unasked(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    before = (out / "scores.csv").read_bytes()
    shown = qfae_run(dataset, "--engine", engine_path, "--out", out)
    assert shown.exit_code == 1
    assert shown.stderr == (
        f"qfae-run: {out}: already holds results (scores.csv, scores.jsonl, report.html, run.json, inputs.jsonl, "
        "metrics.json, heatmaps); add --resume to go on with that run, --overwrite to replace it, or choose another "
        "--out\n"
    )
    assert (out / "scores.csv").read_bytes() == before


def test_overwrite_removes_only_our_own_files(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    (out / "notes.txt").write_text("mine")
    write_png(out / "heatmaps" / "mine.png", np.zeros((4, 4), np.uint8))
    shutil.rmtree(dataset / "good")
    run(dataset, engine_path, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    left = sorted(path.relative_to(out / "heatmaps").as_posix() for path in (out / "heatmaps").rglob("*.png"))
    assert left == [*(f"Ungood/img/{n}.png" for n in range(6)), "mine.png"]
    assert len(table(out)) == 6


@pytest.mark.parametrize("option", ["overwrite", "resume", None])
def test_files_of_others_are_never_replaced(
    dataset: Path, engine_path: Path, tmp_path: Path, option: str | None
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("metrics.json", "report.html"):
        (out / name).write_text("{}")  # nothing says that a run of ours wrote them
    (out / "run.json").write_text('{"fingerprint": "of another program"}')
    with pytest.raises(OutputError) as caught:
        run(dataset, engine_path, out, **({option: True} if option else {}))
    assert str(caught.value) == (
        f"{out}: holds report.html, run.json, metrics.json, but no run.json of qfae-run, so they may be someone "
        "else's and are not touched; move them away or choose another --out"
    )
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "report.html", "run.json"]
    assert (out / "metrics.json").read_text() == "{}"


def test_a_clearing_that_was_cut_short_can_be_repeated(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    genuine = Path.unlink
    removed: list[Path] = []

    def cut_short(self: Path, missing_ok: bool = False) -> None:
        if len(removed) == 20:  # 12 heat maps, and of the 6 single files 4 with their temporary ones
            raise OSError(5, "Input/output error")
        removed.append(self)
        genuine(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", cut_short)
    with pytest.raises(OutputError, match="Input/output error"):
        run(dataset, engine_path, out, overwrite=True)
    monkeypatch.undo()
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "run.json"]
    run(dataset, engine_path, out, overwrite=True)
    assert len(table(out)) == 12


@pytest.mark.parametrize("place", ["heatmaps/good", "heatmaps/good/img/0.png", "maps/Ungood/img"])
def test_links_below_the_results_lead_nowhere(dataset: Path, engine_path: Path, tmp_path: Path, place: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    run(dataset / "good" / "img" / "1.png", engine_path, out)
    elsewhere.mkdir()
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).symlink_to(elsewhere / "file.png" if place.endswith("png") else elsewhere)
    with pytest.raises(OutputError) as caught:
        run(dataset, engine_path, out, overwrite=True, save_maps=True)
    assert str(caught.value) == f"{out}/{place}: is a symbolic link; remove it, results stay inside --out"
    assert not any(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["scores.jsonl", "metrics.json", "run.json"])
def test_results_that_are_links_are_refused(dataset: Path, engine_path: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    (out / name).rename(tmp_path / name)
    (out / name).symlink_to(tmp_path / name)
    for option in ("overwrite", "resume"):
        with pytest.raises(OutputError, match="is a symbolic link; remove it, results stay inside --out"):
            run(dataset, engine_path, out, **{option: True})


def test_output_inside_the_input_is_not_scored(dataset: Path, engine_path: Path) -> None:
    for _ in range(2):
        run(dataset, engine_path, dataset / "results", overwrite=True)
    assert len(table(dataset / "results")) == 12


def test_results_of_earlier_runs_are_not_scored(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, dataset / "first")
    run(dataset, engine_path, tmp_path / "out")
    assert len(table(tmp_path / "out")) == 12
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["inputs"]["ignored"] == {"results of qfae-run": 1}
    shown = qfae_run(dataset / "first", "--engine", engine_path, "--out", tmp_path / "other")
    assert shown.exit_code == 1
    assert "no image in it (ignored: 1 x results of qfae-run; mask files: 0)" in shown.stderr


def test_output_folder_that_is_an_input_is_refused(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dataset)
    for out in (dataset, tmp_path / "link"):
        shown = qfae_run(dataset, "--engine", engine_path, "--out", out)
        assert shown.exit_code == 2
        assert f"qfae-run: --out {out}: is the input folder {dataset} itself; choose another --out\n" in shown.stderr
    assert sorted(path.name for path in dataset.iterdir()) == ["Ungood", "good"]


def test_folder_that_cannot_be_written(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\); choose another --out"):
        run(dataset, engine_path, tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "heatmaps").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a symbolic link; remove it"):
        run(dataset, engine_path, tmp_path / "out", overwrite=True)


def test_output_folder_out_of_reach_is_told_in_words(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, genuine = tmp_path / "out", os.lstat

    def forbidden(path: Path, **given: Any) -> os.stat_result:
        if str(path).startswith(str(out)):
            raise PermissionError(13, "Permission denied", str(path))
        return genuine(path, **given)

    monkeypatch.setattr(Path, "exists", lambda path: bool(forbidden(path)))
    monkeypatch.setattr(Path, "is_symlink", lambda path: bool(forbidden(path)) and False)
    shown = qfae_run(dataset, "--engine", engine_path, "--out", out)
    assert shown.exit_code == 1
    assert shown.stderr == f"qfae-run: {out}: cannot be written (Permission denied); choose another --out\n"


def test_full_disk_is_told_in_words(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qfae_runtime.writers.heatmap.save", full)
    with pytest.raises(OutputError) as caught:
        run(dataset, engine_path, tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out: cannot be written (No space left on device); "
        "the rows written so far are whole, go on with --resume"
    )


def test_score_that_is_not_finite_becomes_an_error_row(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine

    genuine, golden = OnnxRuntimeEngine.run, {image.tobytes() for image in golden_images()}

    def spoilt(self: OnnxRuntimeEngine, images: Any, maps: bool = True) -> Any:
        scores = genuine(self, images, maps)
        if len(images) == 8 and images[3].tobytes() not in golden:  # a batch of the run, not of the self-test
            scores.score[3] = np.nan
        return scores

    monkeypatch.setattr(OnnxRuntimeEngine, "run", spoilt)
    summary = run(dataset, engine_path, tmp_path / "out")
    assert summary.counts.errors == 1
    # Twelve images and a golden one run as 1 + 4 + 8; which row it is depends on the golden one's place.
    odd = [row["error"] for row in table(tmp_path / "out") if row["error"]]
    assert odd == ["the engine returned a score that is not finite (nan); report the image and the engine"]
