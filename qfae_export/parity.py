"""Does the engine compute what PyTorch computes? Every image, element by element, at several batch sizes.

The reference is the training modules themselves (`AnomalyScorer`, float32), not the rewritten graph: a fault of the
rewriting is caught like one of the export.

Letters: N images, B images in a batch, S pixels per side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table

from qfae_export.errors import ExportError
from qfae_export.images import ParityImages, spread
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import Comparison, Contract, OutputComparison, compare, worst_of
from qfae_runtime.engines.base import OUTPUT_NAMES, Engine, Scores
from qfae_runtime.golden import MAX_IMAGES, Golden
from qfae_train.autoencoder import AnomalyScorer

_REFERENCE_BATCH = 8
_ODD_BATCHES = (7, 5, 3)


class ParityError(ExportError):
    """An engine was made, but it does not compute what PyTorch computes; `report` holds the measurement."""

    def __init__(self, message: str, report: ParityReport) -> None:
        self.report = report
        super().__init__(message)


class Measured(NamedTuple):
    """All images through the engine at one batch size; the last batch may be smaller, none is left out."""

    batch: int
    comparison: Comparison


@dataclass(frozen=True)
class ParityReport:
    """What was measured; true when every bound held at every batch size. Image numbers index `images`."""

    rows: tuple[Measured, ...]
    images: ParityImages

    def __bool__(self) -> bool:
        return all(row.comparison for row in self.rows)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes measured."""
        return tuple(row.batch for row in self.rows)

    @property
    def worst(self) -> Comparison:
        """The worst of every output over all batch sizes: the least bounds that would have passed."""
        return worst_of(row.comparison for row in self.rows)

    def failures(self) -> list[str]:
        """Say which output broke which bound, at which batch size, image and pixel, and by how much."""
        return [
            f"batch {row.batch}: {sentence}{self._name_of(output)}"
            for row in self.rows
            for output in row.comparison.outputs.values()
            for sentence in output.failures()
        ]

    def _name_of(self, output: OutputComparison) -> str:
        indices = {worst.index[0] for worst in (output.absolute, output.relative) if worst is not None}
        return "".join(f" (image {index}: {self.images.names[index]})" for index in sorted(indices))

    def table(self) -> Table:
        """Return the largest errors by output and batch size beside their bounds, for a terminal."""
        table = Table(box=box.SIMPLE_HEAD, title=f"largest error on {len(self.images)} images", title_justify="left")
        table.add_column("output")
        for row in self.rows:
            table.add_column(f"batch {row.batch}", justify="right")
        table.add_column("bound", justify="right")
        for name in OUTPUT_NAMES:
            measured = [row.comparison.outputs[name] for row in self.rows]
            levels = measured[0].bound_rel is None
            label = f"{name}, grey levels" if levels else f"{name}, absolute"
            table.add_row(label, *(_cell(one, one.max_abs) for one in measured), f"{measured[0].bound_abs:g}")
            if not levels:
                table.add_row(
                    f"{name}, relative", *(_cell(one, one.max_rel) for one in measured), f"{measured[0].bound_rel:g}"
                )
        return table


def _cell(output: OutputComparison, error: float | None) -> str:
    if output.fault is not None:
        return "[red]none[/red]"
    text = f"{error:.1e}" if output.bound_rel is not None and error else f"{error:g}"
    return text if output else f"[red]{text}[/red]"


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes to measure: one image, an odd number, and the largest."""
    odd = next((size for size in _ODD_BATCHES if size < max_batch), 1)
    return tuple(sorted({1, odd, max_batch}))


def pytorch_scores(scorer: AnomalyScorer, images: UInt8) -> Scores:
    """Return PyTorch's float32 outputs on uint8 (N, S, S, 3): what every engine is held against.

    Raises:
        ExportError: the outputs are not finite, so the checkpoint itself is at fault.

    """
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in scorer.state_dict().values()):
        raise ExportError("the reference must be float32; call scorer.float() before measuring")
    parts = [
        scorer(torch.from_numpy(images[start : start + _REFERENCE_BATCH]))
        for start in range(0, len(images), _REFERENCE_BATCH)
    ]
    score, anomaly_map, reconstruction = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
    scores = Scores(score, anomaly_map, reconstruction)
    odd = int((~np.isfinite(scores.score)).sum() or (~np.isfinite(scores.anomaly_map)).sum())
    if odd:
        raise ExportError(
            f"the checkpoint gives {odd} values that are not finite on {len(images)} images, in PyTorch already; "
            "its training diverged: export an earlier checkpoint, or train again with a lower --lr"
        )
    return scores


def measure(engine: Engine, images: ParityImages, reference: Scores, contract: Contract | None = None) -> ParityReport:
    """Run every image through the engine at batch 1, an odd batch and its largest, and compare with the reference.

    Raises:
        EngineError: the backend failed.

    """
    rows = [
        Measured(size, compare(reference, _in_batches(engine, images.pixels, size), contract))
        for size in batch_sizes(engine.max_batch)
    ]
    return ParityReport(tuple(rows), images)


def _in_batches(engine: Engine, images: UInt8, size: int) -> Scores:
    parts = [engine.run(images[start : start + size]) for start in range(0, len(images), size)]
    return Scores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def golden_of(images: ParityImages, reference: Scores) -> Golden:
    """Return up to 16 of the images, from the lowest to the highest score, and PyTorch's outputs on them."""
    by_score = np.argsort(reference.score, kind="stable")
    chosen = by_score[spread(len(images), MAX_IMAGES)]
    return Golden(
        images.pixels[chosen],
        Scores(reference.score[chosen], reference.anomaly_map[chosen], reference.reconstruction[chosen]),
    )
