"""One score and one label per image: AUROC and average precision."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Bool
from qfae_runtime.metrics.bootstrap import Bootstrap, can_be_drawn, classes_of, interval_of, resample
from qfae_runtime.metrics.curves import Weights, auroc, average_precision
from qfae_runtime.metrics.figures import Figures

_NAMES = "image_auroc and image_ap"
_BLOCK = 1 << 20  # counts at a time; each becomes a few float64


def image_figures(scores: npt.NDArray[np.floating], anomalous: Bool, bootstrap: Bootstrap | None = None) -> Figures:
    """Return image_auroc and image_ap of scores, finite (N,), for labels bool (N,), by scikit-learn.

    95 % intervals come with a bootstrap.
    """
    figures = Figures()
    if reason := _undefined(anomalous):
        figures.notes.append(f"{_NAMES} are undefined: {reason}")
        return figures
    # Imported here: scikit-learn takes a second to import, and most runs have no labels.
    from sklearn.metrics import average_precision_score, roc_auc_score

    figures.values["image_auroc"] = float(roc_auc_score(anomalous, scores))
    figures.values["image_ap"] = float(average_precision_score(anomalous, scores))
    if bootstrap is not None:
        _add_intervals(figures, scores, anomalous, bootstrap)
    return figures


def _undefined(anomalous: Bool) -> str | None:
    if not len(anomalous):
        return "no labelled image was scored"
    if anomalous.all() or not anomalous.any():
        label = "anomalous" if anomalous.all() else "normal"
        return f"all {len(anomalous)} scored images are {label}, and it takes both normal and anomalous ones"
    return None


def _add_intervals(figures: Figures, scores: npt.NDArray[np.floating], anomalous: Bool, bootstrap: Bootstrap) -> None:
    order = np.argsort(scores)  # sorted, so that the draws do not depend on the order of the images
    labels = anomalous[order]
    classes = classes_of(labels, np.arange(len(labels)))
    if not can_be_drawn(classes):
        figures.notes.append(f"95 % intervals of {_NAMES} need at least 2 images of each class")
        return
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of each distinct score: one bin
    found: list[tuple[Weights, Weights]] = []
    for counts in resample(classes, bootstrap, _BLOCK):
        normal, positive = (
            np.add.reduceat(counts * part, starts, axis=1, dtype=np.float64) for part in (~labels, labels)
        )
        found.append((auroc(normal, positive), average_precision(normal, positive)))
    for name, values in zip(("image_auroc", "image_ap"), zip(*found, strict=True), strict=True):
        figures.intervals[name] = interval_of(np.concatenate(values))
