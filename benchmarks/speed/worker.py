"""The process that runs one candidate: commands come in on stdin, one JSON object a line, answers go out on stdout.

    {"do": "prepare", "asked": {...}, "flavours": [...], "max_batch": 64, "device": "cpu"}   write the model's files
    {"do": "build", "candidate": "...", "device": "...", "max_batch": 64}   build what it runs
    {"do": "open", "candidate": "...", "device": "...", "threads": 2, "batch": 8, "most": 64}
    {"do": "time", "batch": 8, "seconds": 2.0, "calls": 3, "settle": true}  -> {"seconds": [...], "first": 9.0}
    {"do": "score", "out": "file.npz"}                                      the images' outputs, as a file
    {"do": "memory"}                                                        -> {"host": ..., "device": ...}, in bytes
    {"do": "transfer", "batch": 8, "maps": true}                            -> seconds to a GPU and back, or null

An answer has "error" where something failed. Whatever libraries print goes to stderr, and where the process is when a
signal ends it, such as a segmentation fault of a library.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.speed.candidates import KNOWN
from benchmarks.speed.opening import Ready, build, ready
from benchmarks.speed.subject import Asked, images_of, prepare
from benchmarks.speed.transfer import transfer_seconds
from qfae_runtime.engines.base import Scores

_SCORED_AT_ONCE = 8
_SHOWN = 200  # characters of an error; all of it is in the log


class Work:
    """What one process does for one folder.

    `firsts` are the seconds of the very first call of every batch size, whoever made it: there compilers work.
    """

    def __init__(self, folder: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        self.folder, self.tell = folder, tell
        self.opened: Ready | None = None
        self.firsts: dict[int, float] = {}

    def prepare(self, asked: dict[str, Any], flavours: list[str], max_batch: int, device: str) -> dict[str, Any]:
        """Write the model's files, saying each step."""
        prepare(Asked(**asked), self.folder, flavours, max_batch, lambda step: self.tell({"step": step}), device)
        return {}

    def build(self, candidate: str, device: str, max_batch: int) -> dict[str, Any]:
        """Build what a candidate runs."""
        return {"seconds": build(KNOWN[candidate], self.folder, device, max_batch)}

    def open(self, candidate: str, device: str, threads: int | None, batch: int, most: int) -> dict[str, Any]:
        """Open a candidate and score one image; `at` is the system's monotonic clock after that."""
        start = time.perf_counter()
        self.opened = ready(KNOWN[candidate], self.folder, device, threads, batch, most)
        loaded = time.perf_counter() - start
        self._seconds(1)
        version = self.opened.engine.version if self.opened.engine is not None else ""
        return {
            "load": loaded,
            "at": time.monotonic(),
            "version": version,
            "disk": self.opened.disk,
            "flop": self.opened.flop,
        }

    def time(self, batch: int, seconds: float, calls: int, settle: bool, maps: bool = True) -> dict[str, Any]:
        """Time batches of a size until `seconds` have passed and `calls` were made; `settle` begins with one more."""
        if settle:
            self._seconds(batch, maps)
        found: list[float] = []
        while len(found) < calls or sum(found) < seconds:
            found.append(self._seconds(batch, maps))
        return {"seconds": found, "first": self.firsts[batch]}

    def _seconds(self, batch: int, maps: bool = True) -> float:
        assert self.opened is not None
        seconds = self.opened.seconds(batch, maps)
        self.firsts.setdefault(batch, seconds)
        return seconds

    def score(self, out: str) -> dict[str, Any]:
        """Score the model's images and leave the outputs in a file."""
        assert self.opened is not None
        assert self.opened.engine is not None
        engine = self.opened.engine
        images, _, _ = images_of(self.folder)
        size = min(_SCORED_AT_ONCE, engine.max_batch)
        parts = []
        for at in range(0, len(images), size):
            start = time.perf_counter()
            # Batches of one size: for another one, compilers would work again.
            parts.append(engine.run(images[np.arange(at, at + size) % len(images)]))
            self.firsts.setdefault(size, time.perf_counter() - start)
        scores = Scores.joined(parts)
        np.savez(out, **{name: array[: len(images)] for name, array in scores._asdict().items()})
        return {}

    def transfer(self, batch: int, maps: bool) -> dict[str, Any]:
        """Return the seconds that a batch is on its way to a GPU and back."""
        assert self.opened is not None
        assert self.opened.engine is not None
        return {"seconds": transfer_seconds(self.opened.engine, batch, maps)}

    def memory(self) -> dict[str, Any]:
        """Return the largest memory that this process had; of the device's, None where the engine does not know."""
        engine = self.opened.engine if self.opened is not None else None
        device = getattr(engine, "device_peak", None)
        return {"host": peak_bytes(), "device": device() if device is not None else None}


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return the largest resident memory of this process; another system's count may begin with its parent's."""
    with suppress(OSError, StopIteration, ValueError):
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(folder: Path, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until there are none."""

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    work = Work(folder, tell)
    for line in commands:
        command: dict[str, Any] = json.loads(line)
        try:
            tell(getattr(work, command.pop("do"))(**command))
        except Exception as error:  # any library may raise anything; the others are measured all the same
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            first = (str(error).strip().splitlines() or [""])[0][:_SHOWN]
            tell({"error": f"{type(error).__name__}: {first}"})


def main() -> None:
    """Serve on stdin and stdout; what libraries print on stdout joins stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()
    serve(Path(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
