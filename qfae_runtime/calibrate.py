"""qfae-run calibrate: score normal images, find the threshold, write it beside the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from qfae_runtime import conformal
from qfae_runtime.calibration import Calibration, path_beside
from qfae_runtime.engines import OpenedEngine
from qfae_runtime.errors import CalibrationError, OutputError, cure_of_writing
from qfae_runtime.layout import UNGOOD, Scan, label_of
from qfae_runtime.pipeline import Job, Pipeline
from qfae_runtime.run import Counts, Options, Progress, Say, check_batch_size, find_inputs, open_asked, other_batch_size
from qfae_runtime.scorer import Scorer
from qfae_runtime.selftest import self_test
from qfae_runtime.verdicts import Verdict
from qfae_runtime.writers.records import OK


@dataclass(frozen=True)
class Calibrated:
    """A calibration, where it was written, and the reasons of the files that could not be scored, one each."""

    calibration: Calibration
    path: Path
    verdict: Verdict
    unreadable: tuple[str, ...]


def calibrate(
    options: Options, fpr: float, progress: Progress = lambda _: None, say: Say = lambda _: None
) -> Calibrated:
    """Find the threshold that at most a share `fpr` of normal images exceed, and write it.

    Of `options` count the images (all normal), the engine and how it is run, `calibration` (where it is written; None:
    beside the engine) and `overwrite`.

    `say` is told in one line of a batch size that is not the one asked for.

    Raises:
        CanaryError: the engine went wrong while it scored.
        CalibrationError: the images are too few for that rate, or not all of them are normal.
        OutputError: a calibration is there already, or cannot be written.
        QfaeError: an input or the engine cannot be used, see find_inputs, open_engine and self_test.

    """
    path = options.calibration or path_beside(options.engine)
    if path.exists() and not options.overwrite:
        raise OutputError(f"{path}: exists already; pass --overwrite to replace it, or --calibration with another name")
    found = find_inputs(options.images, options.listed)
    _refuse_anomalous(found)
    with open_asked(options) as opened:
        check_batch_size(options, opened)
        verdict = self_test(opened, batch_size=options.batch_size, force=options.selftest)
        scorer = Scorer.of(opened, options.batch_size)
        if (line := other_batch_size(options, scorer)) is not None:
            say(line)
        scores, unreadable, files = _scores(scorer, options, found, progress)
        if len(scores) < conformal.least_images(fpr):
            raise _too_few(len(scores), len(unreadable), fpr)
        calibration = _calibration(opened, options, scores, files, len(unreadable), fpr)
    try:
        calibration.save(path)
    except OSError as error:
        cure = cure_of_writing(error, "another --calibration")
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {cure}") from None
    return Calibrated(calibration, path, verdict, tuple(unreadable))


def _scores(
    scorer: Scorer, options: Options, found: Scan, progress: Callable[[Counts], None]
) -> tuple[list[float], list[str], int]:
    """Return the scores of all normal images, a reason for each that could not be scored, and the files scored."""
    scores: list[float] = []
    unreadable: list[str] = []
    files: set[str] = set()
    pipeline = Pipeline(scorer, maps=False, reading=options.reading)
    counts = Counts(total=len(found.images))
    jobs = (Job(path, found.source_of(path)) for path in found.images)
    with closing(pipeline.run(jobs)) as outcomes:
        for row, picture, _ in outcomes:
            if row.status == OK and row.score is not None:
                scores.append(row.score)
                files.add(row.source)
            else:
                unreadable.append(row.error or "cannot be scored")
            counts.rows += 1
            counts.done += picture.last
            counts.errors = len(unreadable)
            progress(counts)
    return scores, unreadable, len(files)


def _calibration(
    opened: OpenedEngine, options: Options, scores: list[float], files: int, unreadable: int, fpr: float
) -> Calibration:
    ascending = np.sort(np.array(scores, dtype=np.float64))
    return Calibration(
        engine=opened.path.name,
        engine_sha256=opened.sha256,
        preprocess_sha256=opened.manifest.preprocess.sha256(),
        backend=opened.engine.backend,
        device=opened.engine.device,
        reading=options.reading.to_dict(),
        fpr=fpr,
        threshold=conformal.threshold_of(ascending, fpr),
        scores=tuple(ascending.tolist()),
        files=files,
        unreadable=unreadable,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _refuse_anomalous(found: Scan) -> None:
    anomalous = [path for path in found.images if label_of(path, found.root) == UNGOOD]
    if anomalous:
        raise CalibrationError(
            f"{len(anomalous)} of {len(found.images)} images lie in a folder {UNGOOD}; the threshold is found on "
            "normal images alone: name their folder"
        )


def _too_few(count: int, unreadable: int, fpr: float) -> CalibrationError:
    left_out = f" ({unreadable} could not be scored)" if unreadable else ""
    return CalibrationError(
        f"{count} images{left_out} give no threshold for a false positive rate of {fpr:g}: "
        f"{conformal.least_images(fpr)} are needed, ten times as many are better; add normal images or raise --fpr"
    )
