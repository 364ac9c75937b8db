"""Score a labelled split in PyTorch and measure how well the scores separate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from qfae_runtime.writers.metrics import PixelRoc
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.data import Split


@dataclass(frozen=True)
class Metrics:
    """Areas under the ROC curve, from 0 to 1; None where one of the two classes is missing."""

    image_auroc: float | None
    pixel_auroc: float | None
    scores: Tensor
    """float32 (N,), in the order of the split."""


def evaluate(scorer: AnomalyScorer, split: Split, batch_size: int) -> Metrics:
    """Score every image of the split; the last batch may be smaller, none is dropped."""
    device = next(scorer.parameters()).device
    was_training = scorer.training
    scorer.eval()
    pixels = PixelRoc()
    scores = []
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        result = scorer(split.rgb(part).to(device))
        scores.append(result.score.float().cpu())
        for anomaly_map, mask in zip(result.anomaly_map.float().cpu(), split.masks[part], strict=True):
            pixels.add(anomaly_map.numpy(), mask.numpy())
    scorer.train(was_training)
    return Metrics(image_auroc(torch.cat(scores), split.anomalous), pixels.result()[0], torch.cat(scores))


def image_auroc(scores: Tensor, anomalous: Tensor) -> float | None:
    """Return the AUROC of scores (N,) for labels (N,), or None if only one class is there."""
    if anomalous.all() or not anomalous.any():
        return None
    return float(roc_auc_score(anomalous.numpy(), scores.numpy()))
