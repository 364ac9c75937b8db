"""Score a labelled split in PyTorch and measure how well the scores separate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from qfae_runtime.writers.metrics import PixelRoc
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.bmad import held_against
from qfae_train.checkpoint import build_scorer
from qfae_train.config import Config
from qfae_train.data import Split, load_split
from qfae_train.official import open_checkpoint
from qfae_train.weight_files import FROM_HUB, WeightFiles


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


def evaluate_checkpoint(
    path: Path,
    data: Path,
    *,
    split: str = "test",
    config: Config | None = None,
    files: WeightFiles = FROM_HUB,
    batch_size: int | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> Metrics:
    """Score a split of the data set at `data` with a checkpoint, in float32, and measure it with its intervals.

    `config` describes the authors' checkpoint; `batch_size` None is the training's; `say` hears the counts.

    Raises:
        UsageError, CheckpointError, WeightsError: see `official.open_checkpoint` and `checkpoint.build_scorer`.
        DataError, InputError: see `data.load_split`.

    """
    checkpoint = open_checkpoint(path, config, files)
    images = load_split(data, split, checkpoint.config.preprocess_spec())
    say(held_against(checkpoint.config.data.benchmark, split, len(images)))
    scorer = build_scorer(checkpoint, files)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return evaluate(scorer.to(chosen), images, batch_size or checkpoint.config.train.batch_size, intervals=True)
