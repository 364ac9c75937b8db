"""Does the engine compute what PyTorch computes? Every image, at several batch sizes, and every step in between.

The reference is the training modules themselves (`AnomalyScorer`, float32), not the rewritten graph: a fault of the
rewriting is caught like one of the export. The chain of links from there to the engine shows which step is guilty.

Letters: N images, B images in a batch, S pixels per side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table

from qfae_export.errors import ExportError
from qfae_export.images import ParityImages, spread
from qfae_runtime.agreement import OF_ALL_IMAGES, QUANTITIES, Agreement, Scale, measure_agreement
from qfae_runtime.arrays import UInt8
from qfae_runtime.certificate import PYTORCH, CertificateEntry, Link
from qfae_runtime.contract import CONTRACTS, MIN_PAIRS, Contract, pairs
from qfae_runtime.engines.base import UNWRITTEN, Engine, Poisonable, Scores
from qfae_runtime.errors import EngineError
from qfae_runtime.golden import MAX_IMAGES, Golden
from qfae_runtime.layout import GOOD, UNGOOD
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.float32 import whole_float32

_REFERENCE_BATCH = 8

# At the smaller batches, a few of the images tell whether the batch size matters; at the largest batch all are
# measured. All images at every size would take three times as long and say nothing more.
_SINGLES = 2

_LITTLE = 0.01  # of a score

ROUNDED = "graph FP16"
"""The graph in PyTorch, rounded as FP16 rounds (rounded.py): a branch of the chain."""

_CURES = {
    "fp32": "the checkpoint is not at fault, its export is: try other versions of torch, onnxscript or onnxruntime, "
    "and report these lines",
    "fp16": "FP16 rounds more than this model bears; pass --bisect to find what must stay FP32, or leave out --fp16",
    "int8": "INT8 rounds more than this model bears, or its scales come from images of another kind: pass "
    "--calibration-images DIR with normal images of yours, or keep more in FP32 with --int8-keep, or leave out --int8",
    "plan": "the ONNX file it was built from keeps its contract: try another TensorRT, and report these lines",
}


class ParityError(ExportError):
    """An engine was made, but it does not compute what PyTorch computes; `report` holds the measurement."""

    def __init__(self, message: str, report: ParityReport) -> None:
        self.report = report
        super().__init__(message)


class Measured(NamedTuple):
    """One batch size, and how many of the images were run so: percentiles are over those."""

    batch: int
    run_at_this_size: int
    agreement: Agreement


@dataclass(frozen=True)
class ParityReport:
    """What was measured of an engine; true when every bound of the contract held at every batch size."""

    rows: tuple[Measured, ...]
    images: ParityImages
    contract: Contract
    links: tuple[Link, ...] = ()
    outputs: Scores | None = None
    """The engine's outputs at the largest batch."""
    reference: str = PYTORCH
    """What it was measured against."""

    def __bool__(self) -> bool:
        return not self.failures()

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes measured."""
        return tuple(row.batch for row in self.rows)

    @property
    def worst(self) -> Agreement:
        """The worst of every quantity over all batch sizes: the least bounds that would have passed."""
        faulty = next((row.agreement for row in reversed(self.rows) if row.agreement.fault is not None), None)
        return faulty or _worst_of([row.agreement for row in self.rows])

    def failures(self) -> list[str]:
        """Say which bound was broken at which batch size, image and pixel, and by how much; and what rounding broke."""
        rounding = [one for one in self.links if one.target == ROUNDED and not one.passed]
        return [_broken(one) for one in rounding] + [
            f"batch {row.batch}: {sentence}"
            for row in self.rows
            for sentence in self._contract_of(row).failures(row.agreement, self.images.names)
        ]

    def untold(self) -> str | None:
        """Say what INT8 owes but these images cannot tell; None where they tell all."""
        if self.contract.name != "int8" or "auroc_change" in self.contract.bounds:
            return None
        enough = 2 * math.ceil(math.sqrt(MIN_PAIRS))
        return (
            f"INT8's change of AUROC is not bounded: these images make {pairs(self.images.labels):,} pairs of a normal "
            f"and an anomalous one, expected {math.ceil(MIN_PAIRS):,} or more; pass --parity-images DIR with folders "
            f"{GOOD} and {UNGOOD}, and --parity-count {enough} or more, half of them of each kind"
        )

    def _contract_of(self, row: Measured) -> Contract:
        if row.batch == max(self.batches):
            return self.contract
        return self.contract.without(OF_ALL_IMAGES)

    def guilty(self) -> str | None:
        """Name the first link of the chain that broke its contract; None if none did."""
        return next((f"{link.source} -> {link.target}" for link in self.links if not link.passed), None)

    def table(self) -> Table:
        """Return every bounded quantity by batch size beside its bound, for a terminal."""
        title = f"against {self.reference} on {len(self.images)} images, contract {self.contract.name}"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        table.add_column("measured")
        for row in self.rows:
            table.add_column(f"batch {row.batch}", justify="right")
        table.add_column("bound", justify="right")
        for name, quantity in QUANTITIES.items():
            if name not in self.contract.bounds:
                continue
            sign = "≥" if quantity.larger_is_better else "≤"
            cells = [_cell(name, row.agreement, self._contract_of(row)) for row in self.rows]
            table.add_row(quantity.title, *cells, f"{sign} {self.contract.bounds[name]:g}")
        return table

    def chain(self) -> Table:
        """Return one row per link: where between PyTorch and the engine the error arises."""
        table = Table(
            box=box.SIMPLE_HEAD,
            title="step by step: largest errors, rank correlation, first percentile of map cosines",
            title_justify="left",
        )
        table.add_column("step")
        for heading in ("images", "score", "/ IQR", "ranks", "map", "cosine"):
            table.add_column(heading, justify="right")
        for link in self.links:
            names = ("score_abs", "score_iqr", "spearman", "map_abs", "map_cosine_p1")
            cells = [_number(name, link.measured[name]) for name in names]
            step = f"{link.source} → {link.target}"
            table.add_row(step if link.passed else f"[red]{step}[/red]", str(link.images), *cells)
        return table


def _broken(link: Link) -> str:
    contract = CONTRACTS[link.contract]
    if all(value is None for value in link.measured.values()):
        return f"{link.target}: rounded as FP16 rounds, the graph gives values that are not finite"
    bounds = (name for name in contract.bounds if not contract.allows(name, link.measured[name]))
    said = (f"{QUANTITIES[name].title} {_number(name, link.measured[name])}" for name in bounds)
    return f"{link.target}: rounded as FP16 rounds, the graph breaks the contract: {', '.join(said)}"


def link(
    source: str,
    target: str,
    reference: Scores,
    got: Scores,
    precision: str,
    scale: Scale,
    labels: Sequence[bool | None],
) -> Link:
    """Measure one step of the chain; `precision` names the contract it is held against.

    `scale` is that of the whole measurement, so that links add up to what the engine is held against.
    """
    agreement, contract = measure_agreement(reference, got, labels, scale), CONTRACTS[precision]
    if len(reference.score) < len(labels):
        # Ranks of few images mean little.
        contract = contract.without(("spearman",))
    nothing = dict.fromkeys(QUANTITIES)
    values = agreement.values or nothing
    return Link(source, target, len(reference.score), precision, values, not contract.failures(agreement))


@whole_float32()
def pytorch_scores(
    scorer: Callable[[torch.Tensor], Sequence[torch.Tensor]], images: UInt8, device: str = "cpu"
) -> Scores:
    """Return PyTorch's float32 outputs on uint8 (N, S, S, 3), of the training modules or of the inference graph.

    `device` is where the module is.
    """
    with torch.no_grad():
        parts = [
            scorer(torch.from_numpy(images[start : start + _REFERENCE_BATCH]).to(device))
            for start in range(0, len(images), _REFERENCE_BATCH)
        ]
    return Scores(*(torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True)))


def reference_scores(scorer: AnomalyScorer, images: UInt8, device: str = "cpu") -> Scores:
    """Return the training modules' outputs on uint8 (N, S, S, 3): what every engine is held against.

    `device` is where they compute; the modules come back to the processor.

    Raises:
        ExportError: the outputs are not finite, so the checkpoint itself is at fault.

    """
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in scorer.state_dict().values()):
        raise ExportError("the reference must be float32; call scorer.float() before measuring")
    try:
        scores = pytorch_scores(scorer.to(device), images, device)
    finally:
        scorer.to("cpu")
    odd = int((~np.isfinite(scores.score)).sum() or (~np.isfinite(scores.anomaly_map)).sum())
    if odd:
        raise ExportError(
            f"the checkpoint gives {odd} values that are not finite on {len(images)} images, in PyTorch already; "
            "its training diverged: export an earlier checkpoint, or train again with a lower --lr"
        )
    return scores


def scale_of(images: ParityImages, reference: Scores, threshold: float | None = None) -> Scale:
    """Return what errors are held against, of the images as they came: coloured copies say nothing about scores."""
    return Scale.of(reference.of(slice(images.real)), images.labels[: images.real], threshold)


def measure(
    engine: Engine, images: ParityImages, reference: Scores, contract: Contract, scale: Scale | None = None
) -> ParityReport:
    """Run all images at the engine's largest batch, and some at every other size that its backend is called with.

    Where there are fewer images than the largest batch takes, it is filled with the same ones again.

    Raises:
        EngineError: the backend failed.

    """
    scale = scale or scale_of(images, reference)
    *smaller, largest = engine.batches
    count = len(images)
    # Every further round begins one image later: no place of the batch has the same image as another one round away.
    every = [(number + number // count) % count for number in range(max(count, largest))]
    whole = run_in_batches(engine, images.pixels[every], largest)
    _refuse_unwritten(engine, images.pixels[every[:largest]], whole.reconstruction)
    labels = [images.labels[number] for number in every]
    rows = [Measured(largest, count, measure_agreement(reference.of(every), whole, labels, scale))]
    for size in smaller:
        some = [number % count for number in spread(max(count, size), _SINGLES if size == 1 else size)]
        got = run_in_batches(engine, images.pixels[some], size)
        agreement = measure_agreement(reference.of(some), got, (), scale)
        rows.append(Measured(size, len(some), _placed(agreement, some)))
    complete = all(len(output) == len(every) for output in whole)  # else there is a fault, and nothing to go on with
    outputs = whole.of(list(range(count))) if complete else None
    return ParityReport(tuple(sorted(rows, key=lambda row: row.batch)), images, contract, outputs=outputs)


def run_in_batches(engine: Engine, images: UInt8, size: int) -> Scores:
    """Return the engine's outputs on uint8 (N, S, S, 3), `size` images at a time; the last batch may be smaller."""
    size = min(size, engine.max_batch)  # a plan's largest size may be more than it is given: it fills up
    return Scores.joined(engine.run(images[start : start + size]) for start in range(0, len(images), size))


def _refuse_unwritten(engine: Engine, images: UInt8, reconstruction: UInt8) -> None:
    """Refuse an engine that leaves pixels as they were: a uint8 buffer shows it only when filled with another byte.

    Scores and maps need no such run: what is not written of them is NaN.

    Raises:
        EngineError: some pixels are what the buffer was filled with, both times.

    """
    if not isinstance(engine, Poisonable):
        return
    engine.poison(0)
    try:
        again = engine.run(images).reconstruction
    finally:
        engine.poison()
    before = reconstruction[: len(again)]
    if before.shape != again.shape:
        return  # a fault of its own
    left = int(((again == 0) & (before == UNWRITTEN)).sum())
    if left:
        raise EngineError(
            f"output 'reconstruction': {left} of {again.size} values were not written in a batch of {len(images)}; "
            "do not use this plan: build it with another TensorRT, and report this line"
        )


def accepted(report: ParityReport, file: str, backend: str) -> ParityReport:
    """Return the report if every bound held.

    Raises:
        ParityError: which bounds did not, and which step is at fault.

    """
    if report:
        return report
    lines = [f"{file}: {backend} does not compute what {report.reference} computes, so nothing was written:"]
    lines += [f"  {failure}" for failure in report.failures()]
    guilty = report.guilty()
    lines.append(f"the step at fault: {guilty}" if guilty else "no step of the chain is at fault alone: errors add up")
    if hint := _alike(report):
        lines.append(hint)
    lines.append(_CURES["plan" if backend.startswith("tensorrt") else report.contract.name])
    raise ParityError("\n".join(lines), report)


def _alike(report: ParityReport) -> str | None:
    """Say so where the images' scores hardly differ: errors are held against how far the scores lie apart."""
    scale = report.worst.scale
    if scale is None or scale.score_iqr >= _LITTLE * abs(scale.threshold):
        return None
    return (
        f"these images' scores hardly differ (interquartile range {scale.score_iqr:.2g}, scores about "
        f"{scale.threshold:.2g}): pass --parity-images DIR with normal and anomalous ones"
    )


def certificate_of(path: Path, engine: Engine, report: ParityReport) -> CertificateEntry:
    """Return what a manifest keeps of a measurement."""
    return CertificateEntry.issue(
        path,
        engine,
        report.worst,
        report.contract,
        batches=report.batches,
        images_from=report.images.origin,
        reference=report.reference,
        images=len(report.images),
        passed=bool(report),
        links=report.links,
    )


def golden_of(images: ParityImages, reference: Scores) -> Golden:
    """Return up to 16 of the images, from the lowest to the highest score, and PyTorch's outputs on them."""
    by_score = np.argsort(reference.score, kind="stable")
    chosen = by_score[spread(len(images), MAX_IMAGES)]
    return Golden(images.pixels[chosen], reference.of(list(chosen)))


def _placed(agreement: Agreement, numbers: list[int]) -> Agreement:
    """Say of some images which of all they are, and leave out what says little about few."""
    worst = {name: replace(one, index=(numbers[one.index[0]], *one.index[1:])) for name, one in agreement.worst.items()}
    values = {name: None if name in OF_ALL_IMAGES else value for name, value in agreement.values.items()}
    return replace(agreement, worst=worst, values=values)


def _worst_of(agreements: list[Agreement]) -> Agreement:
    values: dict[str, float | None] = {}
    for name, quantity in QUANTITIES.items():
        measured = [one.values[name] for one in agreements[-1:] if name in OF_ALL_IMAGES] or [
            one.values[name] for one in agreements
        ]
        known = [value for value in measured if value is not None]
        pick = min if quantity.larger_is_better else max
        values[name] = pick(known) if len(known) == len(measured) else None
    return replace(agreements[-1], values=values)


def _cell(name: str, agreement: Agreement, contract: Contract) -> str:
    if agreement.fault is not None:
        return "[red]none[/red]"
    value = agreement.values[name]
    if name not in contract.bounds:
        return "–"
    text = _number(name, value)
    return text if contract.allows(name, value) else f"[red]{text}[/red]"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    if QUANTITIES[name].larger_is_better:
        return f"{value:.6f}"
    return f"{value:g}" if value == int(value) else f"{value:.1e}"
