"""metrics.json: how well the scores separate, where labels are known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qfae_runtime.layout import UNGOOD
from qfae_runtime.metrics import Bootstrap, PixelMetrics, measure
from qfae_runtime.writers.records import OK, Row


@dataclass
class UnusableMasks:
    """Masks that are there and say nothing: how many, and `first`, the path of the first with its reason."""

    number: int = 0
    first: str = ""

    def count(self, fault: str | None) -> None:
        """Count one mask's fault; None is none."""
        if fault is not None:
            self.first = self.first or fault
            self.number += 1

    def notes(self) -> list[str]:
        """Say it in one sentence, if there is something to say."""
        masks = "1 mask" if self.number == 1 else f"{self.number} masks"
        return [f"{masks} could not be used, the first is {self.first}"] if self.number else []


def compute_metrics(
    rows: Iterable[Row],
    pixels: PixelMetrics | None,
    pixel_note: str | None,
    unusable: UnusableMasks | None = None,
) -> dict[str, Any] | None:
    """Compute what metrics.json holds; None where no row has a label. Ungood is the positive class.

    `pixels` is None where pixel truth was not gathered, and `pixel_note` then says why.
    """
    unusable = unusable or UnusableMasks()
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
        notes=[*([pixel_note] if pixel_note else []), *unusable.notes()],
    )
    values = metrics.to_dict()
    values["counts"]["labelled_but_not_scored"] = unscored
    values["counts"]["masks_unusable"] = unusable.number
    return values
