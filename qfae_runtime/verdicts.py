"""Verdicts of the self-test, remembered in a cache folder: for which bytes, where, and how fast the engine was.

A verdict counts for the environment it was found in, to the letter: the engine's real bytes, the golden images, the
bounds, the backend, threads and batch size, card and system, and whatever else decides which kernels compute
(`kernels.py`). A changed engine, or a new version, is always tested again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from qfae_runtime import kernels
from qfae_runtime.contract import Contract
from qfae_runtime.engines.opened import OpenedEngine

PASSED, FAILED = "passed", "failed"
_NVIDIA = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Verdict:
    """What was found. `status` is "passed", "passed before" (remembered), "failed" or "skipped" (no golden file).

    `images_per_second` is the engine's rate at `batch_size`, its first run not counted; None where nothing was timed.
    """

    status: str
    summary: str
    images: int
    seconds: float
    remembered: bool
    batch_size: int = 0
    images_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for run.json."""
        return asdict(self)


class Runner(NamedTuple):
    """What runs an engine, as far as a verdict depends on it; `threads` None: as many as there are."""

    backend: str
    version: str
    device: str
    threads: int | None

    @classmethod
    def of(cls, opened: OpenedEngine) -> Self:
        """Return what runs an engine that is open."""
        return cls(opened.engine.backend, opened.engine.version, opened.engine.device, opened.threads)


def environment_of(
    engine_sha256: str, golden_sha256: str, contract: Contract, runner: Runner, batch_size: int
) -> dict[str, Any]:
    """Return everything that a verdict depends on, as plain JSON values."""
    on_cpu = runner.device == "cpu"
    return {
        "engine_sha256": engine_sha256,
        "golden_sha256": golden_sha256,
        "contract": {"name": contract.name, "bounds": dict(contract.bounds)},
        "backend": runner.backend,
        "version": runner.version,
        "device": runner.device,
        # Sums are split among threads, and their last digits depend on it; on a GPU no thread computes anything.
        # None is a number of its own: how many threads it is, each backend decides.
        "threads": runner.threads if on_cpu else None,
        "cores": _cores() if on_cpu else None,
        "batch_size": batch_size,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_kinds": kernels.cpu(),
        "variables": kernels.variables(runner.backend, runner.device),
        "libraries": kernels.libraries(runner.device),
        "cards": None if on_cpu else _cards(),
    }


def cache_folder() -> Path | None:
    """Return where verdicts are remembered: $QFAE_CACHE, else $XDG_CACHE_HOME/qfae, else ~/.cache/qfae.

    None for a user without a home folder: what others may write to, /tmp say, must not tell what has passed.
    """
    chosen = os.environ.get("QFAE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path("~").expanduser() / ".cache") / "qfae"
    except RuntimeError:  # as in a container, under a number that no user has
        return None


def recall(environment: dict[str, Any], cache: Path | None = None) -> Verdict | None:
    """Return the verdict found in this very environment, "passed" or "failed"; None if there is none, or no legible."""
    memory = _memory(environment, cache)
    if memory is None:
        return None
    try:
        stored = json.loads(memory.read_bytes())
        verdict = stored["verdict"]
        if stored["environment"] != environment or verdict["status"] not in (PASSED, FAILED):
            return None
        rate = verdict["images_per_second"]
        return Verdict(
            status=verdict["status"],
            summary=str(verdict["summary"]),
            images=int(verdict["images"]),
            seconds=0.0,
            remembered=True,
            batch_size=int(verdict["batch_size"]),
            images_per_second=None if rate is None else float(rate),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(environment: dict[str, Any], verdict: Verdict, cache: Path | None = None) -> bool:
    """Keep a verdict; say whether that could be done."""
    memory = _memory(environment, cache)
    if memory is None:
        return False
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_name(f"{memory.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"environment": environment, "verdict": asdict(verdict)}), "utf-8")
        temporary.replace(memory)
    except OSError:
        return False
    return True


def _memory(environment: dict[str, Any], cache: Path | None) -> Path | None:
    folder = cache or cache_folder()
    if folder is None:
        return None
    key = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()
    return folder / "selftest" / f"{key}.json"


def hardware() -> dict[str, Any]:
    """Return what this machine computes with, for records: processor, cores that may be used, memory, NVIDIA cards."""
    return {"processor": _cpu_name(), "cores": _cores(), "memory_bytes": memory_bytes(), "cards": _cards()}


def memory_bytes() -> int | None:
    """Return how much memory this machine has; None where the system does not tell."""
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cards() -> list[str]:
    """Return the NVIDIA cards' names and their driver, as the driver tells without any library."""
    found = []
    for path in (*sorted(_NVIDIA.glob("gpus/*/information")), _NVIDIA / "version"):
        try:
            line = path.read_text(encoding="utf-8", errors="replace").splitlines()[0]  # "Model: \t\t NVIDIA H200"
            _, label, rest = line.partition(":")
            found.append(" ".join((rest if label else line).split()))
        except (OSError, IndexError):
            continue
    return found
