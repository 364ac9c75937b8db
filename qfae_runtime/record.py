"""run.json: what a run was made of, what it must be to be resumed, and where its time went."""

from __future__ import annotations

import hashlib
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qfae_runtime
from qfae_runtime.calibration import Calibration
from qfae_runtime.engines import OpenedEngine
from qfae_runtime.hashing import sha256_of
from qfae_runtime.layout import Scan
from qfae_runtime.options import Options
from qfae_runtime.pseudonyms import Pseudonyms
from qfae_runtime.verdicts import Verdict, hardware
from qfae_runtime.workers import Seconds
from qfae_runtime.writers.heatmap import ColourScale

_READERS = (
    "numpy",
    "pillow",
    "opencv-python-headless",
    "pydicom",
    "nibabel",
    "pyjpegls",
    "pylibjpeg-openjpeg",
    "python-gdcm",
)


@dataclass(frozen=True)
class Subject:
    """What a record speaks of; `sources` are the names that rows have."""

    options: Options
    opened: OpenedEngine
    verdict: Verdict
    found: Scan
    sources: list[str]
    batch_size: int
    scale: ColourScale
    calibration: Calibration | None
    names: Pseudonyms | None


class Clock:
    """Seconds by step since it was made; a step that comes again adds to what it took before."""

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, step: str) -> None:
        """Count the time since the last call for `step`."""
        now = time.perf_counter()
        self.laps[step] = self.laps.get(step, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.start

    def seconds(self, spent: Seconds) -> dict[str, float]:
        """Return the seconds of each step, their total, and what was spent within scoring (over several threads)."""
        within = {f"scoring_{name}": value for name, value in spent.to_dict().items()}
        return {name: round(value, 6) for name, value in {**self.laps, **within, "total": self.total}.items()}


def fingerprint_of(run: Subject) -> dict[str, Any]:
    """Return everything that decides what the rows hold: a run is resumed only if all of it is unchanged."""
    options, opened = run.options, run.opened
    return {
        "engine_sha256": opened.sha256,
        "preprocess_sha256": opened.manifest.preprocess.sha256(),
        "backend": opened.engine.backend,
        "backend_version": opened.engine.version,
        "device": opened.engine.device,
        "threads": options.threads,
        "qfae": qfae_runtime.__version__,
        "readers": reader_versions(),
        "batch_size": run.batch_size,
        "maps": options.maps,
        "save_maps": options.save_maps,
        **options.reading.to_dict(),
        "threshold": run.calibration.threshold if run.calibration is not None else None,
        "calibration_sha256": run.calibration.sha256() if run.calibration is not None else None,
        "labels_sha256": sha256_of(options.labels) if options.labels else None,
        "root": str(run.found.root) if run.names is None else run.names.of(str(run.found.root)),
        "pseudonym_key_sha256": run.names.key_sha256() if run.names is not None else None,
        "inputs": len(run.sources),
        "inputs_sha256": _digest_of_list(run.sources),
        "inputs_state_sha256": _digest_of_list([_state_of(path) for path in run.found.images]),
        "inputs_content_sha256": _digest_of_contents(run.found.images) if options.hash_inputs else None,
    }


def record_of(run: Subject, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says from the beginning."""
    opened, found = run.opened, run.found
    return {
        "qfae": qfae_runtime.__version__,
        "started": now(),
        "engine": opened.path.name,
        "model": opened.manifest.name,
        "certified": opened.certificate is not None,
        "allow_uncertified": run.options.allow_uncertified,
        "self_test": run.verdict.to_dict(),
        "backend_choice": opened.choice.to_dict() if opened.choice is not None else None,
        "fingerprint": fingerprint,
        "calibration": run.calibration.summary() if run.calibration is not None else None,
        "threads": run.options.threads,
        "colour_scale": {"low": run.scale.low, "high": run.scale.high, "origin": run.scale.origin},
        "inputs": {
            "root": fingerprint["root"],
            "ignored": found.ignored,
            "mask_files": found.mask_files,
        },
        "versions": {
            "python": platform.python_version(),
            **reader_versions(),
            opened.engine.backend: opened.engine.version,
        },
        "platform": platform.platform(),
        "hardware": hardware(),
    }


def reader_versions() -> dict[str, str]:
    """Return the versions of what turns files into pixels; another may read a file otherwise."""
    found = {}
    for package in _READERS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _digest_of_list(sources: list[str]) -> str:
    text = "\0".join(sources).encode("utf-8", errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()


def _digest_of_contents(paths: list[Path]) -> str:
    """Return a SHA-256 (hex) over the files' own, in order; a file that cannot be read counts as such."""

    def digest(path: Path) -> str:
        try:
            return sha256_of(path) if path.is_file() else "none"
        except OSError:
            return "none"

    with ThreadPoolExecutor() as pool:
        return _digest_of_list(list(pool.map(digest, paths)))


def _state_of(path: Path) -> str:
    # Size and time of change instead of the content: a run must not read its inputs twice to find them unchanged.
    try:
        status = path.stat()
    except OSError:
        return "none"
    return f"{status.st_size} {status.st_mtime_ns}"


def now() -> str:
    """Return the time, UTC, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
