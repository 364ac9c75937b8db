"""Score a labelled split in PyTorch and measure how well scores and anomaly maps separate."""

from __future__ import annotations

import torch

from qfae_runtime.metrics import Bootstrap, Metrics, PixelMetrics, measure
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.data import Split

__all__ = ["Metrics", "evaluate"]


def evaluate(scorer: AnomalyScorer, split: Split, batch_size: int, *, bootstrap: Bootstrap | None = None) -> Metrics:
    """Score every image of the split, the incomplete last batch too; `scores` float32 (N,) keep the split's order.

    Anomalous images without a mask count for the image metrics alone. Intervals come with a `bootstrap`; without one,
    as in training, neither its time nor its memory is spent.
    """
    device = next(scorer.parameters()).device
    was_training = scorer.training
    scorer.eval()
    pixels = PixelMetrics(keep_images=bootstrap is not None)
    scores = []
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        result = scorer(split.rgb(part).to(device))
        scores.append(result.score.float().cpu())
        maps = result.anomaly_map.float().cpu()
        for anomaly_map, mask, known in zip(maps, split.masks[part], split.has_truth[part], strict=True):
            pixels.add(anomaly_map.numpy(), mask.numpy() if known else None)
    scorer.train(was_training)
    return measure(torch.cat(scores).numpy(), split.anomalous.numpy(), pixels, bootstrap=bootstrap)
