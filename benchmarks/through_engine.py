"""Evaluate a certified engine on a labelled folder: scores and maps measured, no pictures drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qfae_runtime.engines import open_engine
from qfae_runtime.errors import QfaeError
from qfae_runtime.layout import UNGOOD, label_of, scan
from qfae_runtime.metrics import Bootstrap, Metrics, PixelMetrics, measure
from qfae_runtime.pipeline import Job, Pipeline
from qfae_runtime.scorer import Scorer
from qfae_runtime.selftest import self_test


def engine_scores(engine: Path, folder: Path) -> Metrics:
    """Score every image of a BMAD split through the engine, in the order of their paths.

    Raises:
        QfaeError: the engine is refused, or an image cannot be read.

    """
    found = scan([folder])
    jobs = [Job(path, found.source_of(path), label_of(path, found.root)) for path in found.images]
    pixels, scores = PixelMetrics(), []
    with open_engine(engine) as opened:
        self_test(opened)
        pipeline = Pipeline(Scorer.of(opened), truth=True)
        for outcome in pipeline.run(jobs):
            if outcome.scored is None or outcome.scored.anomaly_map is None:
                raise QfaeError(
                    f"{outcome.row.source}: {outcome.row.error}; every image counts here, mend or remove it"
                )
            scores.append(outcome.scored.score)
            pixels.add(outcome.scored.anomaly_map, outcome.picture.truth)
    anomalous = np.array([job.label == UNGOOD for job in jobs], dtype=np.bool_)
    return measure(np.array(scores), anomalous, pixels, bootstrap=Bootstrap())
