"""The processes of the candidates, seen from the one that measures: started fresh, kept while memory allows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.speed.candidates import Candidate
from qfae_runtime.children import importing_alike
from qfae_runtime.errors import QfaeError
from qfae_runtime.verdicts import memory_bytes

_ROOM = 0.15
"""The share of the machine's memory that stays free; beyond it, the process that waited longest is ended."""


class WorkerError(QfaeError):
    """A candidate failed, or its process ended; the message is its own."""


class Worker:
    """One process of `worker.py`. What it prints goes to `log`; with `own_group`, `kill` ends all that it started."""

    def __init__(self, folder: Path, log: Path, threads: int | None, *, own_group: bool = False) -> None:
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        variables = importing_alike()
        if threads is not None:
            variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.speed.worker", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=variables,
                start_new_session=own_group,
            )
        self._own_group = own_group

    def ask(self, do: str, say: Callable[[str], None] = lambda step: None, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer; steps on the way are said.

        Raises:
            WorkerError: it failed, or the process ended.

        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._end()) from None
        for line in self._process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "step" in answer:
                say(answer["step"])
                continue
            if "error" in answer:
                raise WorkerError(answer["error"])
            return answer
        raise WorkerError(self._end())

    def _end(self) -> str:
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}; see {self.log.name}"

    def kill(self) -> None:
        """End the process at once, whatever it does; may be called from another thread."""
        if not self._own_group:
            self._process.kill()
        elif self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it is dead already, and what it was last asked was never read
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Opening:
    """How a fresh process came to its first score: seconds from its start, and of loading."""

    cold_start: float
    load: float
    version: str
    disk: int
    flop: int | None


@dataclass
class Workers:
    """One open process a candidate, by name; `openings` holds every fresh start, and memory is in bytes.

    host_peaks    the largest that a candidate's process had
    device_held   the most that PyTorch's allocator had of the device's memory; of others the most that a candidate had
                  taken of it when a visit was over: what was in use then less what was before, summed over its visits,
                  for others keep theirs meanwhile; None: not known
    """

    folder: Path
    logs: Path
    device: str
    threads: int | None
    batch: int
    most: int
    openings: dict[str, list[Opening]] = field(default_factory=dict)
    host_peaks: dict[str, int] = field(default_factory=dict)
    device_held: dict[str, int | None] = field(default_factory=dict)
    _open: dict[str, Worker] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)
    _used: int | None = None
    _settled: set[tuple[str, int]] = field(default_factory=set)

    def of(self, candidate: Candidate) -> Worker:
        """Return the candidate's process, started and opened if it is not there.

        Raises:
            WorkerError: it cannot be opened.

        """
        worker = self._open.pop(candidate.name, None)
        if worker is None:
            self._make_room(candidate.name)
        self._used = device_used(self.device)
        if worker is None:
            self._taken[candidate.name] = 0
            worker = self._start(candidate)
        self._open[candidate.name] = worker  # the last of the dict is the one used last
        return worker

    def settled(self, candidate: Candidate, batch: int) -> bool:
        """Say whether the open process has run this batch size, and note that it has."""
        known = (candidate.name, batch) in self._settled
        self._settled.add((candidate.name, batch))
        return known

    def _start(self, candidate: Candidate) -> Worker:
        worker = Worker(self.folder, self.logs / f"{candidate.name}.log", self.threads)
        try:
            answer = worker.ask(
                "open",
                candidate=candidate.name,
                device=self.device,
                threads=self.threads,
                batch=self.batch,
                most=self.most,
            )
        except WorkerError:
            worker.close()
            raise
        self.openings.setdefault(candidate.name, []).append(
            Opening(
                answer["at"] - worker.started,
                answer["load"],
                answer["version"],
                answer["disk"],
                answer["flop"],
            )
        )
        return worker

    def _make_room(self, name: str) -> None:
        # Of one that was never open, it may need as much as the largest.
        needed = self.host_peaks.get(name, max(self.host_peaks.values(), default=0))
        least = needed + _ROOM * (memory_bytes() or 0)
        while self._open and memory_available() < least:
            self.end(next(iter(self._open)))

    def note_memory(self, candidate: Candidate) -> None:
        """Note what a candidate has taken, now that its visit is over."""
        name = candidate.name
        peaks = self._open[name].ask("memory")
        self.host_peaks[name] = max(peaks["host"], self.host_peaks.get(name, 0))
        if peaks["device"] is not None:
            self.device_held[name] = max(peaks["device"], self.device_held.get(name) or 0)
            return
        before, now = self._used, device_used(self.device)
        if before is None or now is None:
            self.device_held.setdefault(name, None)
            return
        self._taken[name] += now - before
        self.device_held[name] = max(self._taken[name], self.device_held.get(name) or 0)

    def end(self, name: str) -> None:
        """End a candidate's process, if there is one."""
        worker = self._open.pop(name, None)
        self._settled = {one for one in self._settled if one[0] != name}
        if worker is not None:
            worker.close()

    def end_others(self, name: str) -> None:
        """End every process but one candidate's."""
        for other in [one for one in self._open if one != name]:
            self.end(other)

    def close(self) -> None:
        """End all of them."""
        for name in list(self._open):
            self.end(name)


def memory_available() -> int:
    """Return the bytes that processes can still take, as Linux estimates it; all there are on another system."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return memory_bytes() or sys.maxsize
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def device_used(device: str) -> int | None:
    """Return the bytes in use on a CUDA device, by whomever; None where nvidia-smi cannot say, and for a processor.

    It is asked of the system, so that nobody has to load a library for it.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return None
    # nvidia-smi numbers all cards of the machine, CUDA those that this variable lets it see.
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    ordinal = int(number or 0)
    card = visible[ordinal] if ordinal < len(visible) else str(ordinal)
    command = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return int(done.stdout) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):  # ValueError: "[N/A]"
        return None
