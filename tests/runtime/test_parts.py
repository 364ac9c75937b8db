"""run.json of a run in several starts: each of them, their totals, and the options as they were given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime.errors import EngineError, RunInterruptedError
from qfae_runtime.parts import KILLED, Part, earlier_parts, told
from qfae_runtime.readers.base import ReadOptions
from qfae_runtime.run import Counts, Options, execute

from .test_cli import qfae_run
from .test_run import run, table


def record_of(out: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((out / "run.json").read_text())
    return stored


def interrupt(images: Path, engine_path: Path, out: Path, at: int, **options: Any) -> None:
    def stop(counts: Counts) -> None:
        if counts.rows == at:
            raise KeyboardInterrupt

    with pytest.raises(RunInterruptedError):
        execute(Options((images,), engine_path, out, **options), stop)


def test_a_run_in_one_start_has_one_part(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "out")
    record = record_of(tmp_path / "out")
    [part] = record["parts"]
    assert part == {
        "started": record["started"],
        "self_test": "passed",
        "status": "done",
        "ended": record["finished"],
        "seconds": record["seconds"],
        "rows": 12,
        "machine": None,
        "batches": {"8": 1, "4": 1, "1": 1},
        "canaries": 1,
        "untrusted_from_row": None,
    }


def test_starts_are_kept_and_add_up(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    times = iter(f"2026-11-0{day}T10:00:00+00:00" for day in range(1, 10))
    for place in ("record", "parts"):
        monkeypatch.setattr(f"qfae_runtime.{place}.now", lambda: next(times))
    interrupt(dataset, engine_path, out, 4)
    first = record_of(out)
    assert (first["status"], [part["rows"] for part in first["parts"]]) == ("interrupted", [4])
    assert first["parts"][0]["seconds"]["scoring"] > 0
    monkeypatch.setattr("qfae_runtime.record.hardware", lambda: {"processor": "another"})
    interrupt(dataset, engine_path, out, 9, resume=True)
    monkeypatch.undo()
    run(dataset, engine_path, out, resume=True)
    record = record_of(out)
    assert (record["status"], record["started"]) == ("done", "2026-11-01T10:00:00+00:00")
    assert record["finished"] > "2026-11-09"
    parts = record["parts"]
    assert [(part["status"], part["rows"]) for part in parts] == [("interrupted", 4), ("interrupted", 5), ("done", 3)]
    assert parts[0] == first["parts"][0]
    assert [part["started"][:10] for part in parts[:2]] == ["2026-11-01", "2026-11-03"]
    assert [part["self_test"] for part in parts] == ["passed", "passed before", "passed before"]
    assert parts[1]["machine"]["hardware"] == {"processor": "another"}
    assert (parts[0]["machine"], parts[2]["machine"]) == (None, None)
    assert record["hardware"] == first["hardware"]
    assert list(record["seconds"])[-1] == "total"
    for step, seconds in record["seconds"].items():
        assert seconds == pytest.approx(sum(part["seconds"].get(step, 0.0) for part in parts), abs=1e-5)
    assert record["counts"]["rows"] == sum(part["rows"] for part in parts) == 12


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_killed_start_is_told_as_far_as_it_is_known(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from qfae_runtime.run import Options, execute\n"
        "def stop(counts):\n"
        "    if counts.rows == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "execute(Options((Path(sys.argv[1]),), Path(sys.argv[2]), Path(sys.argv[3]), maps=False), stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, dataset, engine_path, out], check=False)
    assert done.returncode == -signal.SIGKILL
    assert record_of(out)["parts"][0]["status"] == "running"
    os.utime(out / "scores.jsonl", (0, datetime.fromisoformat(record_of(out)["started"]).timestamp() + 100))
    run(dataset, engine_path, out, maps=False, resume=True)
    first, last = record_of(out)["parts"]
    assert (first["status"], first["rows"], first["seconds"]) == ("killed", 7, {"total": 100.0})
    ended, started = (datetime.fromisoformat(first[when]) for when in ("ended", "started"))
    assert (ended - started).total_seconds() == 100
    assert (last["status"], last["rows"]) == ("done", 5)
    seconds = record_of(out)["seconds"]
    assert seconds["total"] == pytest.approx(100 + last["seconds"]["total"], abs=1e-5)
    assert seconds["scoring"] == last["seconds"]["scoring"]


def test_a_start_that_failed_says_so(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def broken(*_: object) -> None:
        raise EngineError("the card has fallen off the bus")

    monkeypatch.setattr("qfae_runtime.pipeline.scored_row", broken)
    with pytest.raises(EngineError):
        run(dataset, engine_path, out, maps=False)
    monkeypatch.undo()
    assert record_of(out)["status"] == "failed"
    run(dataset, engine_path, out, maps=False, resume=True)
    assert [(part["status"], part["rows"]) for part in record_of(out)["parts"]] == [("failed", 0), ("done", 12)]


def test_an_interruption_while_results_are_put_together(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qfae_runtime.run.write_report", stop)
        shown = qfae_run(dataset, "--engine", engine_path, "--out", out, "--no-maps", "--quiet")
    assert shown.exit_code == 130
    assert shown.stderr == (
        f"qfae-run: stopped: 12 of 12 files have whole rows in {out}/scores.jsonl; go on with the same command and "
        "--resume\n"
    )
    [part] = record_of(out)["parts"]
    assert (record_of(out)["status"], part["status"], part["rows"]) == ("interrupted", "interrupted", 12)
    assert part["seconds"]["results"] > 0
    run(dataset, engine_path, out, maps=False, resume=True)
    assert [part["rows"] for part in record_of(out)["parts"]] == [12, 0]


def test_rows_that_were_taken_back_count_for_nobody() -> None:
    """The frames of a file that was not finished are scored again by the next start."""
    start = "2026-11-01T10:00:00+00:00"
    stored = told([Part(start, "passed", "interrupted", start, {"total": 2.0}, 7), Part(start, "passed")])
    kept = earlier_parts(stored, 5, datetime.fromisoformat(start).timestamp() + 3)
    assert [(part.rows, part.status, part.seconds) for part in kept] == [
        (5, "interrupted", {"total": 2.0}),
        (0, KILLED, {"total": 3.0}),
    ]
    assert told(kept)["seconds"] == {"total": 5.0}
    damaged: list[dict[str, Any]] = [{}, {"parts": None}, {"parts": [{}]}, {"parts": [1]}]
    damaged.append({"parts": [{"started": 1, "self_test": "passed"}]})
    for stored in damaged:
        assert earlier_parts(stored, 5, 0.0) == ()


def test_a_run_can_be_repeated_from_its_record_alone(
    dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = tmp_path / "labels.csv"
    labels.write_text("source,label\ngood/img/0.png,anomalous\nUngood/img/0.png,normal\n")
    listed = tmp_path / "list.txt"
    listed.write_text("data/test/good/img/1.png\ndata/test/gone.png\n")
    given = [*("--engine", engine_path.relative_to(tmp_path), "--batch-size", 5, "--threads", 1, "--no-maps")]
    given += ["--labels", "labels.csv", "--window", "40,400", "--axis", "coronal", "--slices", "2:", "--hash-inputs"]
    shown = qfae_run("data/test", "@list.txt", "--out", "out", *given)
    assert shown.exit_code == 3
    options = record_of(tmp_path / "out")["options"]
    assert (options["images"], options["listed"]) == (["data/test"], ["data/test/good/img/1.png", "data/test/gone.png"])
    assert (options["backend"], options["device"]) == ("auto", "auto")  # as it was given, not what was chosen
    assert options["working_folder"] == str(tmp_path)

    for name in ("engine", "out", "labels", "calibration", "deidentify"):
        options[name] = Path(options["working_folder"], options[name]) if options[name] is not None else None
    for name in ("images", "listed"):
        options[name] = tuple(Path(options["working_folder"], path) for path in options[name])
    reading = ReadOptions(tuple(options.pop("window")), options.pop("axis"), tuple(options.pop("slices")))
    del options["working_folder"]
    monkeypatch.chdir("/")
    execute(Options(**{**options, "out": tmp_path / "again"}, reading=reading))
    assert (tmp_path / "again" / "scores.jsonl").read_bytes() == (tmp_path / "out" / "scores.jsonl").read_bytes()
    both = [record_of(tmp_path / name)["fingerprint"] for name in ("out", "again")]
    assert both[0] == both[1]


def test_options_of_the_first_start_are_kept(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(dataset, engine_path, out, 4, maps=False)
    run(dataset, engine_path, out, maps=False, resume=True, selftest=True)
    assert (record_of(out)["options"]["resume"], record_of(out)["options"]["selftest"]) == (False, False)
    assert len(table(out)) == 12


def test_many_paths_are_a_number() -> None:
    paths = tuple(Path(f"{number}.png") for number in range(101))
    told_of = Options(paths, Path("e.onnx"), listed=paths[:100]).to_dict()
    assert told_of["images"] == {"number": 101}
    assert told_of["listed"] == [str(path) for path in paths[:100]]
    assert json.loads(json.dumps(told_of)) == told_of
