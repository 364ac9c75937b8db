"""Score a labelled split in PyTorch and measure how well scores and anomaly maps separate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from qfae_runtime.contract import MIN_IMAGES
from qfae_runtime.coverage import spread
from qfae_runtime.metrics import Bootstrap, Metrics, PixelMetrics, measure
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.bmad import held_against
from qfae_train.checkpoint import Checkpoint, build_scorer, load
from qfae_train.conditioning import Conditioning
from qfae_train.conditioning import measure as measure_conditioning
from qfae_train.config import Config
from qfae_train.data import Split, load_split
from qfae_train.float32 import whole_float32
from qfae_train.internals import IMAGES, Internals, internals
from qfae_train.official import open_checkpoint
from qfae_train.weight_files import FROM_HUB, WeightFiles

__all__ = ["Judged", "Metrics", "evaluate", "evaluate_checkpoint", "internals_of", "judge_checkpoint"]


class Judged(NamedTuple):
    """What a checkpoint is worth: how well its scores separate, and how far rounding moves them."""

    metrics: Metrics
    conditioning: Conditioning


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
    opened = _open(path, data, split, config, files, device, say, verbose)
    return _evaluate(opened, batch_size)


def judge_checkpoint(
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
) -> Judged:
    """Do what `evaluate_checkpoint` does, and measure how far rounding moves the scores; the same arguments and errors.

    That is measured on the images that the checkpoint brings for an export, or on MIN_IMAGES of the split's where it
    brings none.
    """
    opened = _open(path, data, split, config, files, device, say, verbose)
    metrics = _evaluate(opened, batch_size)
    images, earlier = opened.checkpoint.parity_images, opened.checkpoint.conditioning
    if len(images):
        threshold = earlier.threshold if earlier is not None else None  # the trainer knew which images are normal
        return Judged(metrics, measure_conditioning(opened.scorer, images, threshold=threshold))
    numbers = spread(len(opened.images), MIN_IMAGES)
    labels = [bool(opened.images.anomalous[number]) for number in numbers]
    return Judged(metrics, measure_conditioning(opened.scorer, opened.images.rgb(torch.tensor(numbers)), labels))


class _Opened(NamedTuple):
    checkpoint: Checkpoint
    scorer: AnomalyScorer
    images: Split


def _open(
    path: Path,
    data: Path,
    split: str,
    config: Config | None,
    files: WeightFiles,
    device: str,
    say: Callable[[str], None],
    verbose: bool,
) -> _Opened:
    checkpoint = open_checkpoint(path, config, files)
    images = load_split(data, split, checkpoint.config.preprocess_spec())
    say(held_against(checkpoint.config.data.benchmark, split, len(images)))
    scorer = build_scorer(checkpoint, files).to(_chosen(device))
    if verbose:
        at = torch.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().long()
        for line in internals(scorer, images.rgb(at)).lines():
            say(line)
    return _Opened(checkpoint, scorer, images)


def _evaluate(opened: _Opened, batch_size: int | None) -> Metrics:
    size = batch_size or opened.checkpoint.config.train.batch_size
    return evaluate(opened.scorer, opened.images, size, bootstrap=Bootstrap())


def internals_of(path: Path, device: str = "auto") -> Internals:
    """Return the figures of a checkpoint that training wrote, on the validation images in it.

    Raises:
        CheckpointError, WeightsError: see `checkpoint.load` and `checkpoint.build_scorer`.

    """
    checkpoint = load(path)
    return internals(build_scorer(checkpoint).to(_chosen(device)), checkpoint.parity_images[:IMAGES])


def _chosen(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
