"""qfae-run on files beside its engine alone: what reading, preparing and writing cost, in the same rounds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2

from benchmarks.speed.candidates import Candidate
from benchmarks.speed.rows import Row
from benchmarks.speed.statistics import Interval
from benchmarks.speed.subject import Subject, images_of
from benchmarks.speed.workers import WorkerError, Workers
from qfae_runtime.children import importing_alike

SIDE = 240
"""Pixels of the files' sides, those of BraTS's slices."""

_RUN = "import sys; from qfae_runtime.cli import main; main(sys.argv[1:])"


def write_pictures(folder: Path, count: int, model: Path) -> None:
    """Write PNG files of the model's images, enlarged; each is another file, for no two may be cached alike."""
    images, _, _ = images_of(model)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        picture = cv2.resize(images[number % len(images)], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        picture[0, :3, 0] = number % 256, number // 256, 0
        cv2.imwrite(str(folder / f"{number:05}.png"), picture[..., ::-1])


def end_to_end(
    candidate: Candidate,
    workers: Workers,
    work: Path,
    files: int,
    batch: int,
    rounds: int,
    maps: bool,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """Run an engine of one of the model's files alone, and qfae-run with it, in turn; yield the row after every round.

    Each row is of all rounds so far.

    Raises:
        WorkerError: either failed.

    """
    pictures = work / "pictures"
    shares, rates, stages = [], [], []
    calls = -(-files // batch)
    moved = workers.of(candidate).ask("transfer", batch=batch, maps=maps)["seconds"]
    for number in range(rounds):
        say(f"qfae-run with {candidate.name}, round {number + 1} of {rounds}{', with heat maps' if maps else ''}")
        worker = workers.of(candidate)
        workers.end_others(candidate.name)  # qfae-run needs the memory, for an engine of its own
        alone = worker.ask("time", batch=batch, seconds=0.0, calls=calls, settle=True, maps=maps)["seconds"]
        engine_rate = batch * len(alone) / sum(alone)
        record, seconds = _run(candidate, workers, pictures, work / "results", batch, maps)
        scoring = record["seconds"]["scoring"]
        rates.append(files / scoring)
        shares.append(files / scoring / engine_rate)
        stages.append({**record["seconds"], "process": seconds})
        yield {
            "kind": "end_to_end",
            "candidate": candidate.name,
            "title": candidate.title,
            "precision": candidate.precision,
            "batch": batch,
            "files": files,
            "maps": maps,
            "rounds": number + 1,
            "images_per_second": asdict(Interval.over(rates)),
            "share_of_engine": asdict(Interval.over(shares)),
            "seconds": {name: sum(one.get(name, 0.0) for one in stages) / len(stages) for name in stages[0]},
            "transfer_s": moved * calls if moved is not None else None,
        }


def _run(
    candidate: Candidate, workers: Workers, pictures: Path, results: Path, batch: int, maps: bool
) -> tuple[dict[str, Any], float]:
    """Run qfae-run in a process of its own; return run.json and the seconds of the process."""
    engine = workers.folder / Subject.load(workers.folder).files[candidate.model]
    command = [sys.executable, "-P", "-c", _RUN, str(pictures), "--engine", str(engine)]
    command += ["--out", str(results), "--overwrite", "--quiet", "--allow-uncertified", "--batch-size", str(batch)]
    command += ["--backend", candidate.backend, "--device", workers.device]
    command += [] if maps else ["--no-maps"]
    command += ["--threads", str(workers.threads)] if workers.threads is not None else []
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=importing_alike(), check=False)
    if done.returncode:
        raise WorkerError(f"qfae-run: {' '.join(done.stderr.split())[-500:]}")
    record: dict[str, Any] = json.loads((results / "run.json").read_text(encoding="utf-8"))
    return record, time.perf_counter() - start
