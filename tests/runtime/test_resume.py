"""Runs that go on where another stopped: what is kept, what is refused, and what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qfae_runtime.engines import open_engine
from qfae_runtime.errors import OutputError, RunInterruptedError
from qfae_runtime.pipeline import Job, Pipeline
from qfae_runtime.progress import Reporter
from qfae_runtime.run import Counts, Options, execute, find_inputs
from qfae_runtime.scorer import Scorer

from .conftest import write_png
from .test_cli import qfae_run
from .test_run import damage, run, table
from .tiny import SIZE

MANY = 1600
"""Files enough for a run that is still going when it is interrupted."""


@pytest.mark.parametrize("torn", [b"", b'{"source": "good/img', b"{}"])
@pytest.mark.parametrize("kept", [0, 1, 7, 12])
def test_resume_goes_on_after_a_torn_line(
    dataset: Path, engine_path: Path, tmp_path: Path, kept: int, torn: bytes
) -> None:
    damage(dataset)
    out = tmp_path / "out"
    run(dataset, engine_path, tmp_path / "whole", maps=False)
    shutil.copytree(tmp_path / "whole", out)
    lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(lines[:kept]) + torn)
    (out / "scores.csv").unlink()
    summary = run(dataset, engine_path, out, maps=False, resume=True)
    assert (summary.counts.resumed, summary.counts.done, summary.counts.errors) == (kept, 15, 3)
    for name in ("scores.csv", "scores.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resume_of_nothing_starts(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    assert run(dataset, engine_path, tmp_path / "out", resume=True).counts.done == 12


def contents(out: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(out).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in out.rglob("*")
        if path.is_file()
    }


def test_resume_of_a_finished_run_changes_nothing(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    damage(dataset)
    out = tmp_path / "out"
    metrics = run(dataset, engine_path, out).metrics
    before = contents(out)
    summary = run(dataset, engine_path, out, resume=True)
    assert (summary.counts.resumed, summary.counts.done, summary.counts.errors) == (15, 15, 3)
    assert summary.nothing_left
    assert summary.metrics == metrics
    shown = qfae_run(dataset, "--engine", engine_path, "--out", out, "--resume")
    assert shown.exit_code == 3  # the damaged files have not become better
    assert "nothing was left to do: all 15 images had been scored before" in shown.stdout
    assert contents(out) == before
    (out / "metrics.json").write_text("[]")
    with pytest.raises(OutputError, match=r"metrics\.json: cannot be read or is damaged; start afresh"):
        run(dataset, engine_path, out, resume=True)


@pytest.mark.parametrize("stop_at", [1, 4, 9, 15])
def test_interrupted_and_resumed_gives_the_metrics_of_one_run(
    dataset: Path, engine_path: Path, tmp_path: Path, stop_at: int
) -> None:
    damage(dataset)
    out = tmp_path / "out"
    run(dataset, engine_path, tmp_path / "whole", batch_size=4, save_maps=True)

    def stop(counts: Counts) -> None:
        if counts.done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(RunInterruptedError):
        execute(Options((dataset,), engine_path, out, batch_size=4, save_maps=True), stop)
    first_part = (out / "scores.jsonl").read_bytes()
    assert first_part.count(b"\n") == stop_at
    drawn = out / "heatmaps" / "Ungood" / "img" / "0.png"
    drawn_at = drawn.stat().st_mtime_ns
    seen: list[int] = []
    execute(
        Options((dataset,), engine_path, out, batch_size=4, save_maps=True, resume=True),
        lambda counts: seen.append(counts.done),
    )
    assert seen == [stop_at] * stop_at + list(range(stop_at + 1, 16))
    assert drawn.stat().st_mtime_ns == drawn_at
    assert (out / "scores.jsonl").read_bytes().startswith(first_part)
    whole = contents(tmp_path / "whole")
    assert contents(out).keys() == whole.keys()
    for name in whole:
        if name not in ("run.json", "report.html"):
            assert (out / name).read_bytes() == whole[name][0], name
    assert json.loads((out / "metrics.json").read_text())["counts"]["images_with_pixel_truth"] == 12


def test_resume_without_labels_writes_nothing_twice(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(dataset / "good" / "img", images)
    run(images, engine_path, out)
    lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(lines[:4]))
    seen: list[int] = []
    execute(Options((images,), engine_path, out, resume=True), lambda counts: seen.append(counts.done))
    assert seen == [5, 6]


def test_progress_tells_of_maps_made_again() -> None:
    stream = io.StringIO()
    with Reporter(stream, quiet=False) as reporter:
        reporter.update(Counts(total=9, resumed=4, done=4))
        reporter._next_line = 0.0
        reporter.update(Counts(total=9, resumed=4, done=4))
    assert stream.getvalue() == "4/9 files, their maps are being made again for the pixel metrics\n"


def test_resume_refuses_another_run_and_says_what_changed(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    with pytest.raises(OutputError) as caught:
        run(dataset, engine_path, out, resume=True, maps=False, batch_size=3)
    assert "maps: was True, now False" in str(caught.value)
    assert "batch_size: was 16, now 2" in str(caught.value)
    (dataset / "good" / "img" / "0.png").unlink()
    with pytest.raises(OutputError, match=r"  inputs: 1 missing: 'good/img/0.png'\n"):
        run(dataset, engine_path, out, resume=True)
    (out / "run.json").unlink()
    with pytest.raises(OutputError, match=r"run\.json: missing or damaged, so the run cannot be resumed"):
        run(dataset, engine_path, out, resume=True)


def test_resume_refuses_another_folder_with_the_same_names(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run(dataset, engine_path, out)
    before = (out / "scores.jsonl").read_bytes()
    shutil.copytree(dataset, other)
    with pytest.raises(OutputError) as caught:
        run(other, engine_path, out, resume=True)
    assert f"  root: was {str(dataset)!r}, now {str(other)!r}\n" in str(caught.value)
    assert str(caught.value).endswith(
        "repeat the options of the first run on the same files in the same place, or start afresh with --overwrite"
    )
    assert (out / "scores.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_resume_refuses_inputs_that_have_changed(
    dataset: Path, engine_path: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, image = tmp_path / "out", dataset / "good" / "img" / "0.png"
    run(dataset, engine_path, out)
    status = image.stat()
    if change == "size":
        image.write_bytes(image.read_bytes() + b"more")
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:  # between the search for images and the look at them
        found = find_inputs((dataset,), out=out)
        monkeypatch.setattr("qfae_runtime.run.find_inputs", lambda images, listed, out: found)
        image.unlink()
    with pytest.raises(OutputError, match=r":\n  inputs: 1 with another size or time of change: 'good/img/0.png'\n"):
        run(dataset, engine_path, out, resume=True)


def test_damaged_rows_are_not_resumed(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out)
    lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join([lines[0], b"nonsense\n", *lines[2:]]))
    with pytest.raises(OutputError, match=r"line 2 is no row of qfae-run"):
        run(dataset, engine_path, out, resume=True)
    (out / "scores.jsonl").write_bytes(b"".join([lines[1], lines[0]]))
    with pytest.raises(OutputError, match="row 1 is of another file"):
        run(dataset, engine_path, out, resume=True)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_leaves_whole_rows_and_can_be_resumed(engine_path: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "many", tmp_path / "out"
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(images / "0.png")
    for number in range(1, MANY):
        (images / f"{number}.png").hardlink_to(images / "0.png")
    command = [sys.executable, "-m", "qfae_runtime.cli", str(images), "--engine", str(engine_path), "--batch-size", "4"]
    # A suite that a script runs in the background has Ctrl-C ignored, and so has whatever it starts.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    arguments = [*command, "--out", str(out)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    rows = out / "scores.jsonl"
    deadline = time.monotonic() + 240
    while not (rows.exists() and rows.stat().st_size > 2000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert f"of {MANY} files have whole rows" in errors
    assert "go on with the same command and --resume" in errors
    assert "Traceback" not in errors
    written = rows.read_bytes()
    assert written.endswith(b"}\n")
    done = [json.loads(line) for line in written.splitlines()]
    assert 0 < len(done) < MANY
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    summary = run(images, engine_path, out, batch_size=4, resume=True)
    assert (summary.counts.resumed, summary.counts.done) == (len(done), MANY)
    assert len({row["source"] for row in table(out)}) == MANY


def test_two_runs_do_not_write_into_one_folder(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[int] = []

    def again(counts: Counts) -> None:
        if counts.done == 3:
            for option in ("--resume", "--overwrite"):
                shown = qfae_run(dataset, "--engine", engine_path, "--out", out, option)
                assert shown.stderr == (
                    f"qfae-run: {out}: another qfae-run is writing there; wait for it, or choose another --out\n"
                )
                seen.append(shown.exit_code)

    execute(Options((dataset,), engine_path, out), again)
    assert seen == [1, 1]
    assert len(table(out)) == 12
    assert run(dataset, engine_path, out, overwrite=True).counts.done == 12  # it is free again


def test_a_resumed_run_stays_on_the_backend_it_began_on(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out, maps=False)
    (out / "report.html").unlink()
    asked: list[str | None] = []

    def opening(*arguments: Any, **options: Any) -> Any:
        asked.append(options["backend"])
        return open_engine(*arguments, **options)

    monkeypatch.setattr("qfae_runtime.run.open_engine", opening)
    run(dataset, engine_path, out, maps=False, resume=True)
    run(dataset, engine_path, tmp_path / "new", maps=False, resume=True)
    assert asked == ["onnxruntime", "auto"]


def test_other_threads_or_readers_are_another_run(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out, maps=False)
    with pytest.raises(OutputError, match=r"  threads: was None, now 1\n"):
        run(dataset, engine_path, out, maps=False, resume=True, threads=1)
    monkeypatch.setattr("qfae_runtime.record.reader_versions", lambda: {"pillow": "0.1"})
    with pytest.raises(OutputError, match=r"  readers: was "):
        run(dataset, engine_path, out, maps=False, resume=True)


def test_progress_of_a_first_file_with_many_pictures() -> None:
    shown = io.StringIO()
    reporter = Reporter(shown, quiet=False)
    reporter._next_line, reporter._start = 0.0, 0.0
    reporter.update(Counts(total=2, rows=40))
    assert shown.getvalue() == "0/2 files, 40 pictures of the first one, 0 errors\n"


def test_one_good_file_before_many_bad_ones_keeps_no_row_back(engine_path: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "0.png", np.zeros((8, 8), np.uint8))
    for number in range(100):
        (tmp_path / "in" / f"bad{number:03}.png").touch()
    rows_at: list[int] = []
    execute(
        Options((tmp_path / "in",), engine_path, tmp_path / "out", batch_size=4, maps=False),
        lambda counts: rows_at.append(counts.rows),
    )
    pipeline = Pipeline(Scorer(*_opened(engine_path), 4), maps=False)
    jobs = [Job(path, path.name) for path in sorted((tmp_path / "in").iterdir())]
    taken: list[str] = []

    def watched() -> Iterator[Job]:
        for job in jobs:
            taken.append(job.source)
            yield job

    with closing(pipeline.run(watched())) as outcomes:
        next(outcomes)
    assert len(taken) < 60
    assert rows_at[-1] == 101


def _opened(engine_path: Path) -> tuple[Any, Any]:
    opened = open_engine(engine_path, backend="onnxruntime")
    return opened.engine, opened.manifest
