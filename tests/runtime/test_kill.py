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
from .test_run import run, table

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
        alive = process.poll() is None
        process.kill()
        _, told = process.communicate()
    if not alive:
        assert process.returncode in (0, 3), told.decode()
    return alive


def test_killed_and_resumed_gives_the_rows_of_one_run(archive: Path, engine_path: Path, tmp_path: Path) -> None:
    run(archive, engine_path, tmp_path / "whole", batch_size=8)
    out, chance = tmp_path / "out", random.Random(20)
    arguments = [str(archive), "--engine", str(engine_path), "--out", str(out), "--batch-size", "8", "--quiet"]
    command = [sys.executable, "-m", "qfae_runtime.cli", *arguments, "--resume"]
    killed = sum(kill_somewhere(command, out, chance, number) for number in range(KILLS))
    assert killed >= 20
    done = [json.loads(line)["source"] for line in (out / "scores.jsonl").read_bytes().splitlines()[:-1]]
    assert len(set(done)) == len(done) > 0
    assert len(done) < FILES  # else nothing was interrupted
    finished = subprocess.run(command, capture_output=True, check=False)
    assert finished.returncode == 3, finished.stderr  # some files are damaged
    for name in ("scores.jsonl", "scores.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    pictures = {path.relative_to(out): path.read_bytes() for path in (out / "heatmaps").rglob("*.png")}
    assert pictures == {
        path.relative_to(tmp_path / "whole"): path.read_bytes()
        for path in (tmp_path / "whole" / "heatmaps").rglob("*.png")
    }
    assert len(pictures) == sum(row["status"] == "ok" for row in table(out))
    assert json.loads((out / "run.json").read_text())["status"] == "done"


def test_killed_while_the_results_are_put_together(archive: Path, engine_path: Path, tmp_path: Path) -> None:
    """All rows are there; table, report and record are not, or only in part."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(archive, engine_path, whole, maps=False)
    script = (
        "import os, signal, sys\n"
        "import qfae_runtime.run as run\n"
        "setattr(run, sys.argv.pop(1), lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))\n"
        "from qfae_runtime.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [str(archive), "--engine", str(engine_path), "--out", str(out), "--quiet", "--resume", "--no-maps"]
    for step in ("write_csv", "write_report"):
        done = subprocess.run([sys.executable, "-c", script, step, *command], check=False)
        assert done.returncode == -9
    assert run(archive, engine_path, out, maps=False, resume=True).counts.done == FILES
    for name in ("scores.jsonl", "scores.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
