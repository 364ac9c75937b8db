"""Runs with golden images in their batches: how one that is wrong ends them, and how they are resumed byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import CanaryError, RunInterruptedError
from qfae_runtime.resuming import restart_of
from qfae_runtime.run import Counts, Options, execute
from qfae_runtime.writers.records import read_rows

from .conftest import write_png
from .dicom_files import write_dicom
from .test_calibrate import calibrate
from .test_cli import qfae_run
from .test_run import run
from .tiny import edit_manifest, export_tiny

COUNT = 230
Spoil = Callable[[int, Scores], None]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(8)
    for number in range(COUNT):
        write_png(tmp_path / "in" / f"{number:03}.png", rng.integers(0, 256, (16, 16), dtype=np.uint8))
    return tmp_path / "in"


def record_of(out: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((out / "run.json").read_text())
    return stored


def spoil_runs(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> list[int]:
    """Spoil what ONNX Runtime gives, call by call from 1; those of the self-test are passed over. Their sizes."""
    genuine, sizes = OnnxRuntimeEngine._run, list[int]()

    def spoilt(self: OnnxRuntimeEngine, batch: Any, maps: bool) -> Scores:
        scores = genuine(self, batch, maps)
        sizes.append(len(batch))
        spoil(len(sizes), scores)
        return scores

    def tested(*arguments: Any, **options: Any) -> Any:
        verdict = self_test(*arguments, **options)
        sizes.clear()
        monkeypatch.setattr(OnnxRuntimeEngine, "_run", spoilt)
        return verdict

    from qfae_runtime.selftest import self_test

    monkeypatch.setattr("qfae_runtime.run.self_test", tested)
    monkeypatch.setattr("qfae_runtime.calibrate.self_test", tested)
    return sizes


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize(("batch_size", "sizes"), [(16, [16] * 14 + [8]), (8, [8] * 28 + [8])])
def test_the_record_says_which_batches_ran_and_how_many_golden_images_were_read(
    images: Path, engine_path: Path, tmp_path: Path, maps: bool, batch_size: int, sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = spoil_runs(monkeypatch, lambda number, scores: None)
    run(images, engine_path, tmp_path / "out", maps=maps, batch_size=batch_size)
    record = record_of(tmp_path / "out")
    assert seen == sizes  # 230 images, one golden one behind the first 208 (200), and one in the last batch
    assert record["batches"] == {str(size): sizes.count(size) for size in sorted(set(sizes), reverse=True)}
    assert (record["canaries"], record["untrusted_from_row"]) == (2, None)
    assert record["canaries"] <= COUNT / 100


def test_a_batch_size_that_was_not_measured_is_told_and_recorded(
    images: Path, engine_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shown = qfae_run(images, "--engine", engine_path, "--out", out, "--batch-size", 31, "--no-maps")
    assert shown.exit_code == 0, shown.stderr
    told = "qfae-run: --batch-size 31: runs in batches of 16, the largest size up to it that was measured\n"
    assert shown.stderr.count(told) == 1
    record = record_of(out)
    assert (record["fingerprint"]["batch_size"], record["options"]["batch_size"]) == (16, 31)
    assert record["batches"] == {"16": 14, "8": 1}
    shown = qfae_run(images, "--engine", engine_path, "--out", tmp_path / "b", "--batch-size", 16, "--no-maps")
    assert "--batch-size" not in shown.stderr
    shown = calibrate(images, "--engine", engine_path, "--fpr", "0.1", "--batch-size", 31)
    assert "qfae-run calibrate: --batch-size 31: runs in batches of 16" in shown.stderr


# From which call on, the first row that is not to be trusted, and the golden images read: behind 208 images the first,
# whose batch has 15 of them.
@pytest.mark.parametrize(
    ("calls", "untrusted", "read"), [((1, 99), 1, 1), ((5, 99), 1, 1), ((15, 99), 224, 2), ((15, 15), 224, 2)]
)
@pytest.mark.parametrize("maps", [True, False])
def test_an_engine_that_goes_wrong_ends_the_run(
    images: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    calls: tuple[int, int], untrusted: int, read: int, maps: bool,
) -> None:  # fmt: skip
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(images, engine_path, whole, maps=maps)
    with monkeypatch.context() as patched:

        def spoil(number: int, scores: Scores) -> None:
            if calls[0] <= number <= calls[1]:
                scores.score[:] *= np.float32(1.01)

        spoil_runs(patched, spoil)
        options = ["--engine", engine_path, "--out", out] + ([] if maps else ["--no-maps"])
        shown = qfae_run(images, *options)
    assert shown.exit_code == 1
    [line] = [line for line in shown.stderr.splitlines() if "canary" in line]
    assert line.startswith(
        "qfae-run: canary: a golden image in a batch no longer gives PyTorch's outputs (score error, worst image / "
        "PyTorch's own: "
    )
    assert line.endswith(
        f"); do not trust the scores from row {untrusted} of {out}/scores.jsonl on; the rows before it were followed "
        "by a right golden image, which excludes a fault that lasts, not one that came and went; --resume keeps them, "
        "and takes back the others and scores them again"
    )
    record = record_of(out)
    assert (record["status"], record["untrusted_from_row"], record["canaries"]) == ("failed", untrusted, read)
    assert record["parts"][0]["untrusted_from_row"] == untrusted
    assert not (out / "report.html").exists()
    rows, right = (list(read_rows(folder / "scores.jsonl")) for folder in (out, whole))
    assert rows[: untrusted - 1] == right[: min(untrusted - 1, len(rows))]
    assert 208 - 2 * 16 <= len(rows) <= 223  # the pictures of some were still being drawn
    assert maps or len(rows) == {1: 208, 224: 223}[untrusted]
    # What is not to be trusted is taken back, and is right the second time.
    monkeypatch.undo()
    summary = run(images, engine_path, out, maps=maps, resume=True)
    assert summary.counts.resumed == min(untrusted - 1, len(rows))
    assert (out / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()
    after = record_of(out)
    assert (after["status"], after["untrusted_from_row"]) == ("done", None)
    assert [part["status"] for part in after["parts"]] == ["failed", "done"]
    # Both were tested: that the engine had passed before it went wrong says nothing.
    assert [part["self_test"] for part in after["parts"]] == ["passed before", "passed"]
    assert after["canaries"] == sum(part["canaries"] for part in after["parts"])


def test_nan_in_the_last_batch_alone_ends_the_run(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = spoil_runs(
        monkeypatch, lambda number, scores: scores.score.fill(np.nan) if len(scores.score) == 8 else None
    )
    with pytest.raises(CanaryError, match="values that are not finite") as caught:
        run(dataset, engine_path, tmp_path / "out")
    assert (sizes, caught.value.first, caught.value.exit_code) == ([1, 4, 8], 1, 1)


def test_calibrate_writes_nothing_where_the_engine_goes_wrong(
    images: Path, engine_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(number: int, scores: Scores) -> None:
        scores.score[:] += np.float32(number > 3)

    spoil_runs(monkeypatch, spoil)
    shown = calibrate(images, "--engine", engine_path, "--fpr", "0.1")
    assert shown.exit_code == 1
    assert "canary: a golden image in a batch no longer gives PyTorch's outputs" in shown.stderr
    assert not list(engine_path.parent.glob("*.calibration.json"))


def test_without_golden_images_none_are_read(dataset: Path, tmp_path: Path) -> None:
    path = export_tiny(tmp_path / "bare", certified=False)
    edit_manifest(path, golden=None)
    run(dataset, path, tmp_path / "out", allow_uncertified=True)
    record = record_of(tmp_path / "out")
    assert (record["canaries"], record["batches"]) == (0, {"8": 1, "4": 1})


# --- resumed as if it had not been interrupted ---


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Pictures, films and damaged files, and one picture whose score is NaN: its batch would begin elsewhere else."""
    rng, folder = np.random.default_rng(2), tmp_path / "mixed"
    for number in range(90):
        path = folder / f"{number:03}.png"
        if number % 11 == 3 or 60 <= number < 80:
            path.touch()
        elif number % 23 == 5:
            write_dicom(path, rng.integers(0, 256, (70, 16, 16), dtype=np.uint8))
        else:
            write_png(path, rng.integers(0, 256, (16, 16), dtype=np.uint8))
    return folder


def depends_on_the_batch(scores: Scores) -> None:
    """Move scores by the size of the batch, the place in it, and its company."""
    size, company = len(scores.score), float(scores.score.sum() % 1)
    scores.score[:] += np.float32(1e-6) * (np.arange(size) + size + 10 * company).astype(np.float32)


@pytest.mark.parametrize("maps", [True, False])
def test_a_resumed_run_composes_the_batches_of_an_uninterrupted_one(
    mixed: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maps: bool
) -> None:
    def spoil(number: int, scores: Scores) -> None:
        depends_on_the_batch(scores)
        scores.score[(scores.score * 1e4).astype(int) % 97 == 5] = np.nan

    # It is far from sound: golden images ride along, but are not compared.
    monkeypatch.setattr("qfae_runtime.canary.row_failures", lambda *arguments: [])
    spoil_runs(monkeypatch, spoil)
    whole = tmp_path / "whole"
    run(mixed, engine_path, whole, maps=maps, batch_size=8)
    rows = list(read_rows(whole / "scores.jsonl"))
    assert len(rows) == 87 + 3 * 70
    assert {"nan" in (row.error or "") for row in rows} == {True, False}
    for stops in ([3], [40, 41], [75], [150, 280], [len(rows) - 3])[maps :: 1 + maps]:
        out = tmp_path / f"out-{stops[0]}"
        for stop in stops:
            with pytest.raises(RunInterruptedError):
                execute(Options((mixed,), engine_path, out, maps=maps, batch_size=8, resume=True), interrupted_at(stop))
        run(mixed, engine_path, out, maps=maps, batch_size=8, resume=True)
        for name in ("scores.jsonl", "scores.csv"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), (stops, name)
        pictures = {path.relative_to(out): path.read_bytes() for path in (out / "heatmaps").rglob("*.png")}
        drawn = {path.relative_to(whole): path.read_bytes() for path in (whole / "heatmaps").rglob("*.png")}
        assert pictures == drawn


def interrupted_at(rows: int) -> Callable[[Counts], None]:
    def stop(counts: Counts) -> None:
        if counts.rows >= rows:
            raise KeyboardInterrupt

    return stop


def test_a_restart_begins_with_a_batch(mixed: Path, engine_path: Path, tmp_path: Path) -> None:
    """From every row, the border before it is the same; no more than a batch is scored again."""
    run(mixed, engine_path, tmp_path / "out", maps=False, batch_size=8)
    rows = list(read_rows(tmp_path / "out" / "scores.jsonl"))
    borders = [restart_of(rows[:count], 8, canaries=True) for count in range(len(rows) + 1)]
    sources = list(dict.fromkeys(row.source for row in rows))
    for count, border in enumerate(borders):
        assert border == next(one for one in borders if one.start.rows == border.start.rows)
        assert count - border.start.rows <= 4 * 8
        before = [row for row in rows[: border.start.rows] if row.source not in sources[: border.file]]
        assert border.skip == len(before)
        assert {row.source for row in before} <= {sources[border.file]}
    assert borders[-1].start.canaries == 1
    assert 200 <= borders[-1].start.trusted < len(rows)
