"""What was measured of an engine, and the sentences and tables about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from qfae_export.errors import ExportError
from qfae_export.images import ParityImages
from qfae_runtime.agreement import TYPICAL, Agreement, Reference
from qfae_runtime.certificate import PYTORCH, CertificateEntry, Link
from qfae_runtime.contract import (
    AUROC_CHANGE,
    CONTRACTS,
    FLIPS_SHARE,
    Contract,
    beyond_pytorch,
    demanded,
    min_images,
    min_pairs,
    pairs,
)
from qfae_runtime.coverage import bounds_at
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.layout import GOOD, UNGOOD
from qfae_runtime.quantities import OF_ALL_IMAGES, QUANTITIES

ROUNDED = "graph FP16"
"""The graph in PyTorch, rounded as FP16 rounds (rounded.py): a branch of the chain."""

_ALWAYS_SHOWN = ("score_abs", "map_abs")
"""Quantities that tables show beside the bounded ones, in the scores' own unit."""

_CURES = {
    "fp32": "PyTorch FP32 keeps these bounds where it was compared with FP64, and this engine does not: try other "
    "versions of torch, onnxscript or onnxruntime, and report these lines",
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
    """One batch size, and how many different images were run so."""

    batch: int
    run_at_this_size: int
    agreement: Agreement


@dataclass(frozen=True)
class ParityReport:
    """What was measured of an engine; true when every bound of the contract held, on all images and at every size.

    rows       one for each batch size, ascending
    whole      all images together, each at the largest size it came in; None where outputs could not be compared
    outputs    the engine's outputs on all images, likewise
    faults     what else is wrong with it, in sentences
    reference  what it was measured against, in words
    pytorch    PyTorch FP32, measured as the engine is
    """

    rows: tuple[Measured, ...]
    images: ParityImages
    contract: Contract
    whole: Agreement | None = None
    outputs: Scores | None = None
    links: tuple[Link, ...] = ()
    faults: tuple[str, ...] = ()
    reference: str = PYTORCH
    pytorch: Agreement | None = None

    def __bool__(self) -> bool:
        return not self.failures()

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes measured."""
        return tuple(row.batch for row in self.rows)

    @property
    def worst(self) -> Agreement:
        """The worst of every quantity over all batch sizes: the least bounds that would have passed."""
        agreements = [agreement for _, agreement, _ in self._columns()]
        faulty = next((one for one in agreements if one.fault is not None), None)
        return faulty or _worst_of(agreements)

    def failures(self) -> list[str]:
        """Say which bound was broken at which batch size, image and pixel, and by how much; and what rounding broke."""
        rounding = [one for one in self.links if one.target == ROUNDED and not one.passed]
        return [*(_broken(one, self.pytorch) for one in rounding), *self.faults] + [
            f"{heading}: {sentence}"
            for heading, agreement, contract in self._columns()
            for sentence in contract.failures(agreement, self.images.names)
        ]

    def untold(self) -> list[str]:
        """Say which bounds of the precision these images cannot show, and which PyTorch FP32 breaks on them itself."""
        name = self.contract.name
        beyond = _beyond(demanded(name, self.images.labels[: self.images.real]), self.pytorch)
        bounds, said = {*self.contract.bounds, *beyond}, []
        if name in FLIPS_SHARE and "flips_share" not in bounds:
            least = min_images(name)
            said.append(
                f"{name.upper()}'s flipped decisions are not bounded: these are {self.images.real} images, expected "
                f"{least} or more; pass --parity-images DIR and --parity-count {least} or more"
            )
        if name in AUROC_CHANGE and "auroc_change" not in bounds:
            least, enough = min_pairs(name), 2 * math.ceil(math.sqrt(min_pairs(name)))
            said.append(
                f"{name.upper()}'s change of AUROC is not bounded: these images make {pairs(self.images.labels):,} "
                f"pairs of a normal and an anomalous one, expected {least:,} or more; pass --parity-images DIR with "
                f"folders {GOOD} and {UNGOOD}, and --parity-count {enough} or more, half of them of each kind"
            )
        if beyond:
            titles = ", ".join(QUANTITIES[one].title for one in beyond)
            said.append(f"PyTorch FP32 itself breaks these bounds on these images, so they are left out: {titles}")
        return said

    def guilty(self) -> str | None:
        """Name the first link of the chain that broke its contract; None if none did."""
        return next((f"{link.source} -> {link.target}" for link in self.links if not link.passed), None)

    def table(self) -> Table:
        """Return what was measured by batch size, PyTorch FP32's own beside it, and the bounds, for a terminal."""
        stress = len(self.images.stress)
        counted = f"{self.images.real} images" + (f" and {stress} stress images" if stress else "")
        title = f"against {self.reference} on {counted}, contract {self.contract.name}"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        table.add_column("measured")
        columns = list(self._shown())
        own = [] if self.pytorch is None else ["PyTorch FP32"]
        for heading in (*own, *(heading for heading, _, _ in columns), "bound"):
            table.add_column(heading, justify="right")
        for name, quantity in QUANTITIES.items():
            bound = self.contract.bounds.get(name)
            if bound is None and name not in _ALWAYS_SHOWN:
                continue
            cells = [_cell(name, agreement, contract) for _, agreement, contract in columns]
            if self.pytorch is not None:
                cells.insert(0, _number(name, self.pytorch.values.get(name)))
            sign = "≥" if quantity.larger_is_better else "≤"
            table.add_row(quantity.title, *cells, "" if bound is None else f"{sign} {bound:g}")
        return table

    def chain(self) -> Table:
        """Return one row per link: where between PyTorch and the engine the error arises."""
        table = Table(
            box=box.SIMPLE_HEAD,
            title="step by step: largest errors, rank correlation, first percentile of map cosines",
            title_justify="left",
        )
        table.add_column("step")
        names = {
            "images": None,
            "score": "score_abs",
            "/ PyTorch's": "score_worst",
            "as distance": "score_distance_max",
            "ranks": "spearman",
            "map": "map_abs",
            "cosine": "map_cosine_p1",
        }
        for heading in names:
            table.add_column(heading, justify="right")
        for link in self.links:
            cells = [
                str(link.images) if name is None else _number(name, link.measured[name]) for name in names.values()
            ]
            step = f"{link.source} → {link.target}"
            table.add_row(step if link.passed else f"[red]{step}[/red]", *cells)
        return table

    def _shown(self) -> Iterator[tuple[str, Agreement, Contract]]:
        """Yield the columns of the table: of the sizes above 1, the worst of all of them."""
        *columns, last = self._columns()
        batches = [(row.batch, row.agreement) for row in self.rows if row.batch > 1]
        if len(batches) < 2:
            yield from (*columns, last)
            return
        yield from columns[: len(columns) - len(batches) + 1]
        agreements = [agreement for _, agreement in batches]
        faulty = next((one for one in agreements if one.fault is not None), None)
        heading = f"batch {batches[0][0]} to {batches[-1][0]}, worst"
        worst = faulty or _worst_of(agreements, every=True)
        yield heading, worst, bounds_at(self.contract, worst)

    def _columns(self) -> Iterator[tuple[str, Agreement, Contract]]:
        """Yield what was measured under each heading, and what it is held against: few images cannot show all."""
        if self.whole is not None:
            yield "all images", self.whole, self.contract
        for row in self.rows:
            yield f"batch {row.batch}", row.agreement, bounds_at(self.contract, row.agreement)


def link(
    source: str,
    target: str,
    reference: Reference,
    got: Scores,
    precision: str,
    labels: Sequence[bool | None],
    of: int,
    pytorch: Agreement | None = None,
) -> Link:
    """Measure one step of the chain; `precision` names the contract it is held against.

    `reference` holds the step's own beginning, on some of the `of` images, with the yardstick of the whole measurement:
    links add up to what the engine is held against. Bounds that `pytorch`, PyTorch FP32 in that measurement, breaks
    itself are left out, as they are for the engine.
    """
    agreement = reference.compare(got, labels)
    contract = CONTRACTS[precision].without(_beyond(CONTRACTS[precision], pytorch))
    if len(reference) < of:
        contract = contract.without(OF_ALL_IMAGES)
    nothing = dict.fromkeys(QUANTITIES)
    values = agreement.values or nothing
    return Link(source, target, len(reference), precision, values, not contract.failures(agreement))


def accepted(report: ParityReport, file: str, backend: str) -> ParityReport:
    """Return the report if every bound held.

    Raises:
        ParityError: which bounds did not, and at which step.

    """
    if report:
        return report
    lines = [f"{file}: {backend} does not compute what {report.reference} computes, so nothing was written:"]
    lines += [f"  {failure}" for failure in report.failures()]
    if guilty := report.guilty():
        lines.append(f"the first step that is beyond its bounds: {guilty}")
    lines.append(_CURES["plan" if backend.startswith("tensorrt") else report.contract.name])
    raise ParityError("\n".join(lines), report)


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
        images=report.images.real,
        stress_images=len(report.images.stress),
        passed=bool(report),
        links=report.links,
        pytorch=report.pytorch.values if report.pytorch is not None else None,
    )


def _beyond(contract: Contract, pytorch: Agreement | None) -> list[str]:
    """Return the bounds that PyTorch FP32 breaks itself; none where it was not measured."""
    return [] if pytorch is None else beyond_pytorch(contract, pytorch.values)


def _broken(link: Link, pytorch: Agreement | None) -> str:
    contract = CONTRACTS[link.contract].without(OF_ALL_IMAGES)  # it is of a few images
    contract = contract.without(_beyond(contract, pytorch))
    if all(value is None for value in link.measured.values()):
        return f"{link.target}: rounded as FP16 rounds, the graph gives values that are not finite"
    bounds = (name for name in contract.bounds if not contract.allows(name, link.measured[name]))
    said = (f"{QUANTITIES[name].title} {_number(name, link.measured[name])}" for name in bounds)
    return f"{link.target}: rounded as FP16 rounds, the graph breaks the contract: {', '.join(said)}"


def _worst_of(agreements: list[Agreement], *, every: bool = False) -> Agreement:
    """Return the first, which is of all images unless `every`, with the worst of what few images show as well."""
    values: dict[str, float | None] = {}
    for name, quantity in QUANTITIES.items():
        few = every or name not in OF_ALL_IMAGES or name in TYPICAL
        measured = [one.values[name] for one in (agreements if few else agreements[:1])]
        known = [value for value in measured if value is not None]
        pick = min if quantity.larger_is_better else max
        values[name] = pick(known) if known else None
    return replace(agreements[0], values=values)


def _cell(name: str, agreement: Agreement, contract: Contract) -> str:
    if agreement.fault is not None:
        return "[red]none[/red]"
    value = agreement.values[name]
    if name not in contract.bounds and name not in _ALWAYS_SHOWN:
        return "–"
    text = _number(name, value)
    return text if contract.allows(name, value) else f"[red]{text}[/red]"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if QUANTITIES[name].larger_is_better:
        return f"{value:.6f}"
    if QUANTITIES[name].title.endswith("PyTorch's own"):
        return f"{value:.2f}" if value < 100 else f"{value:.2g}"
    return f"{value:g}" if value == int(value) else f"{value:.1e}"
