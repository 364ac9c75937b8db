"""Runs that are killed (SIGKILL) again and again, at moments of every kind, and resumed: no row lost, none twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from .conftest import write_png
from .dicom_files import write_dicom
from .test_run import run, table
from .tiny import export_tiny

KILLS = 22
FILES = 240


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for number in range(FILES):
        path = tmp_path / "archive" / f"{number // 50}" / f"{number:03}.png"
        write_png(path, rng.integers(0, 256, (24, 24), dtype=np.uint8))
        if number % 37 == 5:
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "archive"


def bytes_in(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def kill_somewhere(command: list[str], out: Path, chance: random.Random, number: int) -> bool:
    """Start a run and kill it: while it starts, after some more rows, or while it ends. True if it was still alive."""
    rows = out / "scores.jsonl"
    before = bytes_in(rows)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        if number % 4 == 0:
            time.sleep(chance.uniform(0, 0.9))  # while it imports, or opens the engine
        else:
            wanted = before + chance.randint(1, 2500)
            while process.poll() is None and bytes_in(rows) < wanted:
                time.sleep(chance.uniform(0.0002, 0.003))
        process.kill()
        _, told = process.communicate()
    assert process.returncode in (-9, 3), told.decode()  # 3: it had ended, and some files are damaged
    return process.returncode == -9


def resume_and_compare(command: list[str], out: Path, whole: Path) -> None:
    finished = subprocess.run(command, capture_output=True, check=False)
    assert finished.returncode == 3, finished.stderr  # some files are damaged
    for name in ("scores.jsonl", "scores.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    pictures = {path.relative_to(out): path.read_bytes() for path in (out / "heatmaps").rglob("*.png")}
    assert pictures == {path.relative_to(whole): path.read_bytes() for path in (whole / "heatmaps").rglob("*.png")}
    assert len(pictures) == sum(row["status"] == "ok" for row in table(out))
    assert json.loads((out / "run.json").read_text())["status"] == "done"


def test_killed_and_resumed_gives_the_rows_of_one_run(archive: Path, engine_path: Path, tmp_path: Path) -> None:
    """How far a run comes before it is killed is up to the machine: one that came to its end makes room for another."""
    run(archive, engine_path, tmp_path / "whole", batch_size=8)
    chance, number, killed, between_rows = random.Random(20), 0, 0, 0
    for folder in range(KILLS):
        out = tmp_path / f"out-{folder}"
        arguments = [str(archive), "--engine", str(engine_path), "--out", str(out), "--batch-size", "8", "--quiet"]
        command = [sys.executable, "-m", "qfae_runtime.cli", *arguments, "--resume"]
        before = 0
        while killed < KILLS and kill_somewhere(command, out, chance, number):
            killed, number = killed + 1, number + 1
            rows = (out / "scores.jsonl").read_bytes().splitlines() if (out / "scores.jsonl").exists() else []
            done = [json.loads(line)["source"] for line in rows[:-1]]
            assert len(set(done)) == len(done)
            between_rows += before < len(done) < FILES - 1  # this run had written some, and had some to write
            before = len(done)
        number += 1
        resume_and_compare(command, out, tmp_path / "whole")
        if killed == KILLS:
            break
    assert killed == KILLS
    assert between_rows >= KILLS // 3


# Half of the file written, under its temporary name; before it, all of the file before.
ENDS = ["scores.csv begun", "metrics.json begun", "report.html begun", "run.json begun", "run.json"]
KILLER = """
import os, signal, sys
from pathlib import Path
name, _, begun = sys.argv.pop(1).partition(" ")
genuine = Path.replace
def replace(self, target):
    # run.json is written at the beginning too, when there is no report.
    ours = Path(target).name == name and (name != "run.json" or Path(target).with_name("report.html").exists())
    if ours and begun:
        with self.open("r+b") as file:
            file.truncate(self.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    genuine(self, target)
    if ours:
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace = replace
from qfae_runtime.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Labelled pictures with masks and films, the last file one of them; an engine; an undisturbed run."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(6)
    for number in range(9):
        for label in ("good", "Ungood"):
            image = rng.integers(0, 256, (20, 22), dtype=np.uint8)
            write_png(root / "data" / label / "img" / f"{number}.png", image)
        write_png(root / "data" / "Ungood" / "label" / f"{number}.png", (image > 200).astype(np.uint8))
    for label in ("Ungood", "good"):
        write_dicom(root / "data" / label / "img" / "z.film", rng.integers(0, 256, (5, 20, 22), dtype=np.uint8))
    engine_path = export_tiny(root / "engine")
    run(root / "data", engine_path, root / "whole", batch_size=4)
    return root / "data", engine_path, root / "whole"


def all_but_times(out: Path) -> dict[str, bytes]:
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name not in ("run.json", "report.html")}


@pytest.mark.parametrize("moment", ENDS)
def test_killed_while_the_results_are_put_together(
    finished: tuple[Path, Path, Path], tmp_path: Path, moment: str
) -> None:
    """All rows are there; of table, metrics, report and record some are, or half of one."""
    data, engine_path, whole = finished
    out = tmp_path / "out"
    command = [str(data), "--engine", str(engine_path), "--out", str(out), "--batch-size", "4", "--quiet"]
    done = subprocess.run([sys.executable, "-c", KILLER, moment, *command], check=False)
    assert done.returncode == -9
    rows = (out / "scores.jsonl").read_bytes()
    assert rows == (whole / "scores.jsonl").read_bytes()
    name, _, begun = moment.partition(" ")
    assert (out / f".{name}.part").exists() == bool(begun)
    summary = run(data, engine_path, out, batch_size=4, resume=True)
    # The last file's frames are scored again, unless run.json says that they are all of them.
    assert (summary.counts.resumed, summary.nothing_left) == ((20, True) if moment == "run.json" else (19, False))
    assert all_but_times(out) == all_but_times(whole)
    assert not list(out.rglob("*.part"))
    parts = json.loads((out / "run.json").read_text())["parts"]
    kept = [("done", 28)] if moment == "run.json" else [("killed", 23), ("done", 5)]
    assert [(part["status"], part["rows"]) for part in parts] == kept
    for path in (out, whole):
        assert json.loads((path / "run.json").read_text())["counts"]["rows"] == 28
    assert (out / "report.html").read_text().count("<img") == (whole / "report.html").read_text().count("<img")
