"""The trivial detector the demo must beat: the brightest spot of the blurred image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from qfae_runtime.layout import UNGOOD, label_of, scan
from qfae_runtime.readers.image import read_image

BLUR_PIXELS = 4.0


def baseline_auroc(folder: Path) -> float:
    """Return the image AUROC of blurred maximum intensity, whichever sign serves it better (0.5 to 1)."""
    found = scan([folder])
    labels = [label_of(path, found.root) == UNGOOD for path in found.images]
    scores = [_score(path) for path in found.images]
    auroc = float(roc_auc_score(labels, scores))
    return max(auroc, 1 - auroc)


def _score(path: Path) -> float:
    grey = read_image(path).pixels[..., 0].astype(np.float32)
    return float(ndimage.gaussian_filter(grey, BLUR_PIXELS).max())
