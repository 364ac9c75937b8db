"""What candidates need built first, in a process each: plans, and AOTInductor's packages.

On a GPU a package is compiled by the processor, and takes minutes: others are opened meanwhile. All else is built
alone, before anything is opened: plans, whose builder times kernels, and whatever runs on the cores that it would be
measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Timer

from benchmarks.speed.candidates import CPU, Candidate
from benchmarks.speed.opening import built_file
from benchmarks.speed.workers import Worker, WorkerError


@dataclass
class Builds:
    """All builds of one run; `longest` are the seconds after which one is given up, None: never."""

    folder: Path
    logs: Path
    device: str
    threads: int | None
    max_batch: int
    longest: float | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4))
    _found: dict[str, Future[float]] = field(default_factory=dict)
    _workers: list[Worker] = field(default_factory=list)
    _closed: bool = False
    _lock: Lock = field(default_factory=Lock)

    def start(self, candidates: Sequence[Candidate], say: Callable[[str], None]) -> None:
        """Build what must be built alone, and begin what can be built beside."""
        needing = [one for one in candidates if built_file(one, self.folder, self.device) is not None]
        beside = [one for one in needing if one.backend == "aot" and self.device != CPU]
        for candidate in needing:
            if candidate not in beside:
                say(f"building {candidate.name}")
                self._found[candidate.name] = Future()
                try:
                    self._found[candidate.name].set_result(self._build(candidate))
                except WorkerError as error:
                    self._found[candidate.name].set_exception(error)
        for candidate in beside:
            say(f"building {candidate.name}, beside what follows")
            self._found[candidate.name] = self._pool.submit(self._build, candidate)

    def running(self, candidate: Candidate | None = None) -> bool:
        """Say whether a candidate's build, or any, has not ended yet."""
        found = self._found.values() if candidate is None else filter(None, [self._found.get(candidate.name)])
        return any(not one.done() for one in found)

    def seconds(self, candidate: Candidate) -> float | None:
        """Return how long building a candidate took, once it is built; None where there is nothing to build.

        Raises:
            WorkerError: it could not be built, or not in time.

        """
        found = self._found.get(candidate.name)
        return found.result() if found is not None else None

    def _build(self, candidate: Candidate) -> float:
        with self._worker(candidate) as worker:
            given_up = Timer(self.longest or 0, worker.kill)
            if self.longest is not None:
                given_up.start()
            try:
                answer = worker.ask("build", candidate=candidate.name, device=self.device, max_batch=self.max_batch)
            except WorkerError:
                if self.longest is not None and not given_up.is_alive():
                    raise WorkerError(f"building it would take more than {self.longest:g} s") from None
                raise
            finally:
                given_up.cancel()
        seconds: float = answer["seconds"]
        return seconds

    def _worker(self, candidate: Candidate) -> Worker:
        with self._lock:
            if self._closed:
                raise WorkerError("the run has ended")
            worker = Worker(self.folder, self.logs / f"{candidate.name}.log", self.threads, own_group=True)
            self._workers.append(worker)
            return worker

    def wait(self) -> None:
        """Wait until nothing is being built any more, whatever came of it."""
        wait(self._found.values())

    def close(self) -> None:
        """End what is still being built, compilers and all."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        self._pool.shutdown()
