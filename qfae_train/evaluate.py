"""Score a labelled split in PyTorch and measure how well scores and anomaly maps separate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qfae_runtime.metrics import Bootstrap, Metrics, PixelMetrics, measure
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.bmad import held_against
from qfae_train.checkpoint import build_scorer, load
from qfae_train.config import Config
from qfae_train.data import Split, load_split
from qfae_train.float32 import whole_float32
from qfae_train.internals import IMAGES, Internals, internals
from qfae_train.official import open_checkpoint
from qfae_train.weight_files import FROM_HUB, WeightFiles

__all__ = ["Metrics", "evaluate", "evaluate_checkpoint", "internals_of"]


@whole_float32()
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
    verbose: bool = False,
) -> Metrics:
    """Score a split of the data set at `data` with a checkpoint, in float32, and measure it with its intervals.

    `config` describes the authors' checkpoint; `batch_size` None is the training's; `say` takes the counts
    and, if `verbose`, the figures of `internals` on up to IMAGES images from all over the split.

    Raises:
        UsageError, CheckpointError, WeightsError: see `official.open_checkpoint` and `checkpoint.build_scorer`.
        DataError, InputError: see `data.load_split`.

    """
    checkpoint = open_checkpoint(path, config, files)
    images = load_split(data, split, checkpoint.config.preprocess_spec())
    say(held_against(checkpoint.config.data.benchmark, split, len(images)))
    scorer = build_scorer(checkpoint, files).to(_chosen(device))
    if verbose:
        at = torch.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().long()
        for line in internals(scorer, images.rgb(at)).lines():
            say(line)
    return evaluate(scorer, images, batch_size or checkpoint.config.train.batch_size, bootstrap=Bootstrap())


def internals_of(path: Path, device: str = "auto") -> Internals:
    """Return the figures of a checkpoint that training wrote, on the validation images in it.

    Raises:
        CheckpointError, WeightsError: see `checkpoint.load` and `checkpoint.build_scorer`.

    """
    checkpoint = load(path)
    return internals(build_scorer(checkpoint).to(_chosen(device)), checkpoint.parity_images[:IMAGES])


def _chosen(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
