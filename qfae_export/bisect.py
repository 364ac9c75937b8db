"""--bisect: where FP16 breaks its contract, find the least that must stay FP32, rebuild, measure, say what it cost.

    survey      where errors arise and how far they reach, in PyTorch: orders the trials, decides nothing
    trials      policies, run on the images until they fail: rounded in PyTorch, then as an engine
    the answer  traced and written like every engine, measured on all images at every batch size

A trial needs both: ONNX Runtime on a CPU rounds less than FP16 does, and elsewhere than PyTorch. Its engine is a real
one; only its file is retyped instead of traced, which takes 0.1 s in place of 10 s for a small model. Should the answer
fail in full, at another batch size say, whole blocks stay FP32, or whole stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from qfae_export.graph import InferenceGraph
from qfae_export.parity_report import ParityError, ParityReport
from qfae_export.precision import FP16, Precision, covers
from qfae_export.search import Refined, merged, refine, stages
from qfae_export.survey import Survey, survey
from qfae_export.trials import Bench, Open, OutOfTrials, Say, Trial, worst_numbers
from qfae_runtime.agreement import Agreement, Reference

MOST_TRIALS = 150
"""Then the least policy that passed is taken, minimal or not: at full size a trial takes minutes on a CPU."""

_SURVEYED = 2  # images; the worst tell where to look


@dataclass(frozen=True)
class Cost:
    """What keeping FP32 takes.

    units     operations kept in FP32, of the `of_units` that FP16 rounds
    bytes     by which the engine's files grew, from `of_bytes`
    products  share of the matrix products' floating-point operations, attention included, that are FP32 now
    """

    units: int
    of_units: int
    bytes: int
    of_bytes: int
    products: float


@dataclass(frozen=True)
class Bisected:
    """The policy found. `minimal`: without any one of its places in FP32, the contract is broken.

    before   the worst of every quantity over all batch sizes, in FP16
    report   the measurement of the engine with this policy
    rounded  what the rounding alone does in PyTorch, in FP16 and with this policy; None of half a graph
    files    what was written, the engine first
    """

    precision: Precision
    minimal: bool
    trials: tuple[Trial, ...]
    before: Agreement
    report: ParityReport
    rounded: tuple[Agreement, Agreement] | None
    cost: Cost
    files: tuple[Path, ...]

    @property
    def after(self) -> Agreement:
        """The worst of every quantity over all batch sizes, with this policy."""
        return self.report.worst

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest."""
        cost = self.cost
        return {
            "kept_fp32": list(self.precision.kept),
            "minimal": self.minimal,
            "trials": len(self.trials),
            "engine": _before_and_after(self.before, self.after),
            "rounded": None if self.rounded is None else _before_and_after(*self.rounded),
            "cost": {
                "operations_fp32": cost.units,
                "operations": cost.of_units,
                "bytes_added": cost.bytes,
                "bytes_fp16": cost.of_bytes,
                "matrix_products_fp32_share": cost.products,
            },
        }

    def table(self) -> Table:
        """Return what stays FP32, what that costs and what it cures, for a terminal."""
        kept, cost = self.precision.kept, self.cost
        places = "1 place" if len(kept) == 1 else f"{len(kept)} places"
        title = f"bisected in {len(self.trials)} trials: FP32 stays in {places}"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
        for stage in stages(kept):
            below = [place.removeprefix(f"{stage}.") for place in kept if covers(stage, place)]
            table.add_row(stage, "all of it" if below == [stage] else ", ".join(below))
        if not self.minimal:
            table.add_row("", "perhaps more than must be: the search ended early")
        table.add_row("operations kept in FP32", f"{cost.units} of {cost.of_units}")
        table.add_row("matrix products in FP32", f"{cost.products:.1%}")
        table.add_row("file", f"{cost.bytes / max(cost.of_bytes, 1):+.1%} ({cost.bytes / 1e6:+.2f} MB)")
        for what, pair in (("engine", (self.before, self.after)), ("rounding alone", self.rounded)):
            for when, agreement in zip(("before", "after"), pair or (), strict=False):
                table.add_row(f"{what}, {when}", worst_numbers(agreement, self.report.contract))
        return table


def bisect(
    graph: InferenceGraph,
    failed: ParityReport,
    reference: Reference,
    open_engine: Open,
    path: Path,
    say: Say = lambda step: None,
    most_trials: int = MOST_TRIALS,
) -> Bisected:
    """Find the least that must stay FP32 for an engine to keep its contract, and write that engine to `path`.

    `graph` is FP32; `failed` is the measurement of its FP16 engine, which is at `path`, against `reference`.
    `open_engine` opens an ONNX file as the engine to be measured: ONNX Runtime's, or a plan built from it.

    Raises:
        ParityError: with everything in FP32 the contract is broken too.
        ExportError: torch cannot express the graph in ONNX.
        EngineError: the backend cannot run the answer.

    """
    units, before, size = graph.halved(FP16), failed.worst, _bytes(path)
    if failed:
        return Bisected(FP16, True, (), before, failed, None, Cost(0, len(units), 0, size, 0.0), (path,))
    say("tracing the graph for trials")
    bench = Bench(graph, failed, reference, open_engine, path.parent, say, most_trials)
    everything = stages(units)
    whole = bench.measure(everything)
    if not whole:
        raise ParityError(_innocent(path, whole), whole)
    worst = bench.telling[:_SURVEYED]
    seen = survey(graph, failed.images.pixels[worst], reference.scores.reconstruction[worst])
    found, minimal = _search(bench, seen)
    for kept in (found.kept, *found.coarser, everything):
        files, report, after = bench.build(kept, path)
        if report:
            break
        minimal = False
    else:
        raise ParityError(_innocent(path, report), report)
    rounded = None if bench.before is None or after is None else (bench.before, after)
    cost = _cost(seen, kept, _bytes(path) - size, size)
    policy = Precision("fp16", kept)
    return Bisected(policy, minimal, tuple(bench.trials), before, report, rounded, cost, tuple(files))


def _search(bench: Bench, seen: Survey) -> tuple[Refined, bool]:
    """Return the answer, and whether it is minimal."""
    try:
        return refine(bench.units, seen.effect, bench.passes), True
    except OutOfTrials:
        return Refined(merged(bench.least_passing(), bench.units), ()), False


def _cost(seen: Survey, kept: tuple[str, ...], added: int, size: int) -> Cost:
    units = [unit for unit in seen.products if any(covers(place, unit) for place in kept)]
    products = sum(seen.products[unit] for unit in units) / sum(seen.products.values())
    return Cost(len(units), len(seen.products), added, size, products)


def _before_and_after(before: Agreement, after: Agreement) -> dict[str, Any]:
    pair = (("before", before), ("after", after))
    return {when: {"fault": one.fault, "measured": one.values} for when, one in pair}


def _bytes(path: Path) -> int:
    weights = path.with_name(path.name + ".data")
    return path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def _innocent(path: Path, report: ParityReport) -> str:
    return (
        f"{path.name}: FP16 is not at fault: with every stage in FP32 the contract is broken all the same "
        f"({report.failures()[0]}); leave out --fp16 and --bisect, and see which step breaks it"
    )
