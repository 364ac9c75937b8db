"""metrics.json: how well the scores separate, where labels are known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from qfae_runtime.layout import UNGOOD
from qfae_runtime.metrics import Bootstrap, PixelMetrics, measure
from qfae_runtime.writers.records import OK, Row


def compute_metrics(rows: Iterable[Row], pixels: PixelMetrics | None, pixel_note: str | None) -> dict[str, Any] | None:
    """Compute what metrics.json holds; None where no row has a label. Ungood is the positive class.

    `pixels` is None where pixel truth was not gathered, and `pixel_note` then says why.
    """
    scores: list[float] = []
    positives: list[bool] = []
    unscored = 0
    for row in rows:
        if row.label is None:
            continue
        if row.status != OK or row.score is None:
            unscored += 1
            continue
        scores.append(row.score)
        positives.append(row.label == UNGOOD)
    if not scores and not unscored:
        return None
    metrics = measure(
        np.array(scores),
        np.array(positives, dtype=np.bool_),
        pixels,
        bootstrap=Bootstrap(),
        notes=[pixel_note] if pixel_note else [],
    )
    values = metrics.to_dict()
    values["counts"]["labelled_but_not_scored"] = unscored
    return values
