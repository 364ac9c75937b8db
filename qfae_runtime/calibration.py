"""ENGINE.calibration.json: the threshold of an engine, found on normal images, and the scores it comes from.

It lies beside the engine and is bound to its bytes: scores of another engine mean something else. It holds the scores
of all normal images, in ascending order, so that every new score gets its p-value.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qfae_runtime import conformal
from qfae_runtime.checked import Fields, parse_json
from qfae_runtime.contract import scores_agree
from qfae_runtime.engines import OpenedEngine
from qfae_runtime.errors import CalibrationError, ManifestError

SUFFIX = ".calibration.json"
SCHEMA_VERSION = 1
_MAX_BYTES = 256 * 2**20
_MOST_IMAGES = 10_000_000
_CURE = "calibrate again with qfae-run calibrate"


@dataclass(frozen=True)
class Calibration:
    """A decision threshold for one engine and a promised rate of false positives.

    `scores` are those of the normal images, ascending, which came from so many `files`; `reading` says how they were
    read (options of the readers).
    """

    engine: str
    engine_sha256: str
    preprocess_sha256: str
    backend: str
    device: str
    reading: dict[str, Any]
    fpr: float
    threshold: float
    scores: tuple[float, ...]
    files: int
    unreadable: int
    created: str

    @property
    def images(self) -> int:
        """How many normal images stand behind it."""
        return len(self.scores)

    @property
    def how(self) -> str:
        """Where the threshold comes from, in words."""
        of = "" if self.files == self.images else f" in {self.files} files"
        return f"split-conformal for a false positive rate of {self.fpr:g}, from {self.images} normal images{of}"

    def warnings(self) -> list[str]:
        """Say what a user should know before trusting it."""
        told = []
        low, high = conformal.rate_interval(self.images, self.fpr)
        if high > 2 * self.fpr:
            told.append(
                f"{self.images} images are few for a rate of {self.fpr:g}: the threshold's own rate lies between "
                f"{low:.2g} and {high:.2g} (95 %); more normal images narrow that"
            )
        if self.files < 0.5 * self.images:
            told.append(
                f"the {self.images} images come from {self.files} files: slices of a volume resemble one another, "
                "and are worth less than as many patients"
            )
        if len(set(self.scores)) < 0.9 * self.images:
            told.append(
                f"only {len(set(self.scores))} of {self.images} scores differ: copies of an image are no further "
                "evidence; remove them"
            )
        return told

    def to_dict(self) -> dict[str, Any]:
        """Return the whole file as plain JSON values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "scores": list(self.scores)}

    def summary(self) -> dict[str, Any]:
        """Return what run.json says of it: everything but the scores."""
        return {key: value for key, value in self.to_dict().items() if key != "scores"} | {"images": self.images}

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of all that it says."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the file, atomically.

        Raises:
            OSError: it cannot be written.

        """
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, allow_nan=False)
                file.write("\n")
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


class Decider:
    """What a calibration says of single scores."""

    def __init__(self, calibration: Calibration) -> None:
        self.threshold = calibration.threshold
        self._scores = np.array(calibration.scores)

    def p_value(self, score: float) -> float:
        """Return the share of normal images that score at least as high, the image itself counted as one of them."""
        return conformal.p_value(self._scores, score)


def path_beside(engine: Path) -> Path:
    """Return where an engine's calibration lies unless told otherwise."""
    return engine.with_name(engine.name + SUFFIX)


def load(path: Path, opened: OpenedEngine, reading: dict[str, Any] | None) -> Calibration:
    """Read a calibration and hold it against the engine, and the options of reading, it is to be used with.

    `reading` None: whatever they were.

    Raises:
        CalibrationError: it is missing, damaged, contradicts itself, or belongs to another engine.

    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CalibrationError(f"{path}: larger than {_MAX_BYTES} bytes, this is no calibration; {_CURE}")
        stored = _read(Fields(parse_json(path.read_bytes(), path.name, _CURE), path.name, cure=_CURE))
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error}); {_CURE}") from None
    except ManifestError as error:
        raise CalibrationError(str(error)) from None
    engine_sha256, manifest = opened.sha256, opened.manifest
    if stored.engine_sha256 != engine_sha256:
        raise CalibrationError(
            f"{path}: made with another engine (SHA-256 {stored.engine_sha256[:16]}..., this one is "
            f"{engine_sha256[:16]}...): its threshold means nothing here; {_CURE}, or remove it"
        )
    if stored.preprocess_sha256 != manifest.preprocess.sha256():
        raise CalibrationError(f"{path}: made with images that were prepared in another way; {_CURE}, or remove it")
    precision = manifest.files[opened.path.name].precision or "fp32"
    if not scores_agree(precision, stored.backend, opened.engine.backend):
        raise CalibrationError(
            f"{path}: made with {stored.backend}, whose scores are not those of {opened.engine.backend}; "
            f"pass --backend {stored.backend}, or {_CURE}"
        )
    if reading is not None and stored.reading != reading:
        raise CalibrationError(
            f"{path}: made with images that were read in another way: {_words(stored.reading)}, here "
            f"{_words(reading)}; pass the same options, or {_CURE}"
        )
    return stored


def _words(reading: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in reading.items())


def _read(fields: Fields) -> Calibration:
    fields.whole("schema_version", SCHEMA_VERSION, SCHEMA_VERSION)
    scores = fields.array("scores")
    if not all(type(score) is float or type(score) is int for score in scores) or sorted(scores) != scores:
        raise fields.fault("scores", "numbers in ascending order")
    calibration = Calibration(
        engine=fields.text("engine"),
        engine_sha256=fields.digest("engine_sha256"),
        preprocess_sha256=fields.digest("preprocess_sha256"),
        backend=fields.text("backend"),
        device=fields.text("device"),
        reading=fields.mapping("reading"),
        fpr=fields.number("fpr"),
        threshold=fields.number("threshold"),
        scores=tuple(float(score) for score in scores),
        files=fields.whole("files", 1, _MOST_IMAGES),
        unreadable=fields.whole("unreadable", 0, _MOST_IMAGES),
        created=fields.text("created"),
    )
    fields.finish()
    if not 0 < calibration.fpr < 1:
        raise fields.fault("fpr", "a rate between 0 and 1")
    if len(scores) < conformal.least_images(calibration.fpr):
        raise fields.fault("scores", f"{conformal.least_images(calibration.fpr)} scores or more")
    if conformal.threshold_of(np.array(scores, dtype=np.float64), calibration.fpr) != calibration.threshold:
        raise fields.fault("threshold", "the one that its scores give")
    return calibration
