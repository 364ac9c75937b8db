"""run.json: what a run was made of, what it must be to be resumed, and where its time went."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qfae_runtime
from qfae_runtime.calibration import Calibration
from qfae_runtime.engines import OpenedEngine
from qfae_runtime.hashing import sha256_of
from qfae_runtime.inputs import FINGERPRINT_KEYS, Inputs
from qfae_runtime.layout import Scan
from qfae_runtime.options import Options
from qfae_runtime.parts import DONE, TOTAL, Part, earlier_parts, now, told
from qfae_runtime.pseudonyms import Pseudonyms
from qfae_runtime.scorer import Scorer
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
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "python-gdcm",
)


@dataclass(frozen=True)
class Subject:
    """What a record speaks of; `given` are the options as they were given, `sources` the names that rows have."""

    options: Options
    given: Options
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
        self.started = now()
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
        return {name: round(value, 6) for name, value in {**self.laps, **within, TOTAL: self.total}.items()}


def fingerprint_of(run: Subject, inputs: Inputs) -> dict[str, Any]:
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
        **inputs.fingerprint(),
    }


def changes(before: dict[str, Any], fingerprint: dict[str, Any], inputs: Inputs, listed: Path) -> list[str]:
    """Say in a line each what of a fingerprint is not what it was; `listed` is the inputs.jsonl of the run before."""
    other = [key for key in dict.fromkeys((*before, *fingerprint)) if before.get(key) != fingerprint.get(key)]
    of_inputs = [
        key for key in other if key in FINGERPRINT_KEYS and None not in (before.get(key), fingerprint.get(key))
    ]
    lines = [
        # With names kept out, the folder of a run before, whose names perhaps were not, is not told either.
        "root: another folder than before"
        if key == "root" and fingerprint["pseudonym_key_sha256"] is not None
        else f"{key}: was {before.get(key)!r}, now {fingerprint.get(key)!r}"
        for key in other
        if key not in of_inputs
    ]
    if "pseudonym_key_sha256" in other:  # no file has the name that it had
        return lines
    if of_inputs:
        lines += inputs.changes(listed) or ["inputs: the same files in another order"]
    return lines


def record_of(run: Subject, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says from the beginning, but for what parts.told adds."""
    opened, found = run.opened, run.found
    return {
        "qfae": qfae_runtime.__version__,
        "engine": opened.path.name,
        "model": opened.manifest.name,
        "certified": opened.certificate is not None,
        "allow_uncertified": run.options.allow_uncertified,
        "self_test": run.verdict.to_dict(),
        "backend_choice": opened.choice.to_dict() if opened.choice is not None else None,
        "fingerprint": fingerprint,
        "options": run.given.to_dict(run.names.of if run.names is not None else str),
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
        **machine(),
    }


@dataclass(frozen=True)
class Ledger:
    """run.json while a run goes on: `base`, what does not change; the earlier starts, and this one, `part`.

    `rows` were there when it began.
    """

    base: dict[str, Any]
    earlier: tuple[Part, ...]
    part: Part
    rows: int

    def record(self) -> dict[str, Any]:
        """Return run.json at the beginning of this start."""
        return {**self.base, **told((*self.earlier, self.part))}

    def ended(
        self,
        status: str,
        counts: dict[str, int],
        seconds: dict[str, float],
        scorer: Scorer,
        untrusted_from_row: int | None = None,
    ) -> dict[str, Any]:
        """Return run.json at the end of this start; `counts` are those of run.json."""
        ended = now()
        part = replace(
            self.part,
            status=status,
            ended=ended,
            seconds=seconds,
            rows=counts["rows"] - self.rows,
            batches={str(size): scorer.batches_run[size] for size in sorted(scorer.batches_run, reverse=True)},
            canaries=scorer.canaries_read,
            untrusted_from_row=untrusted_from_row,
        )
        finished = {"finished": ended} if status == DONE else {}
        return {**self.base, **told((*self.earlier, part)), **finished, "counts": counts}


def ledger_of(
    run: Subject, fingerprint: dict[str, Any], stored: dict[str, Any], started: str, rows: int, last_seen: float
) -> Ledger:
    """Begin the ledger of a run, or go on with that of the run.json `stored`, if it is the same run's.

    `rows` are there already; `last_seen` is when something was written last, in seconds since 1970.
    """
    record = record_of(run, fingerprint)
    part = Part(started, run.verdict.status)
    earlier = earlier_parts(stored, rows, last_seen) if stored.get("fingerprint") == fingerprint else ()
    if earlier:
        here = machine()
        part = replace(part, machine=None if all(stored.get(key) == here[key] for key in here) else here)
        record |= {key: stored[key] for key in ("options", *here) if key in stored}
    return Ledger(record, earlier, part, rows)


def machine() -> dict[str, Any]:
    """Return the system and the hardware of this machine."""
    return {"platform": platform.platform(), "hardware": hardware()}


def reader_versions() -> dict[str, str]:
    """Return the versions of what turns files into pixels; another may read a file otherwise."""
    found = {}
    for package in _READERS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
