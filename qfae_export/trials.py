"""Engines of one graph in many FP16 policies, each measured against PyTorch: the verdicts of a bisection.

A policy passes where two do: a whole graph, rounded as FP16 rounds (rounded.py), and the engine to be handed over.

A trial runs the images in portions, the most telling first, and ends with the first portion that breaks a bound. Images
that were not run count as right, so that what fails on some of them fails the contract; what passes ran all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qfae_export.graph import InferenceGraph
from qfae_export.onnx_file import write_onnx
from qfae_export.parity import measure, run_in_batches
from qfae_export.parity_report import ParityReport
from qfae_export.precision import FP16, Precision, covers
from qfae_export.retype import Retyper
from qfae_export.rounded import RoundedEngine
from qfae_runtime.agreement import Agreement, Reference, incomparable
from qfae_runtime.contract import Contract
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.errors import EngineError
from qfae_runtime.quantities import OF_ALL_IMAGES, QUANTITIES

_FIRST_IMAGES = 8  # of a trial; each portion after that is as large as all before it
_TELLING = 2  # images that failed a trial late are run early from then on
_SHOWN_PLACES = 4

Say = Callable[[str], None]
Open = Callable[[Path], Engine]


class OutOfTrials(Exception):  # noqa: N818 - the search ends with it, in good order
    """The search has had as many trials as it may."""


@dataclass(frozen=True)
class Trial:
    """One policy: the places kept FP32, and how its engine agreed with PyTorch; `images` were run until it failed."""

    kept: tuple[str, ...]
    passed: bool
    images: int
    agreement: Agreement

    def line(self, contract: Contract) -> str:
        """Say policy, verdict and the numbers that matter, in one short line."""
        more = len(self.kept) - _SHOWN_PLACES
        kept = ", ".join(self.kept[:_SHOWN_PLACES]) + (f" and {more} more" if more > 0 else "")
        verdict = "passes" if self.passed else "fails"
        return f"FP32 in {kept}: {verdict} on {self.images} images: {worst_numbers(self.agreement, contract)}"


def worst_numbers(agreement: Agreement, contract: Contract, count: int = 2) -> str:
    """Return the measured numbers that are farthest beyond their bounds, or nearest to them."""
    if agreement.fault is not None:
        return agreement.fault

    def strain(name: str) -> float:
        value, bound = agreement.values.get(name), contract.bounds[name]
        if value is None:
            return float("inf")
        used, allowed = (1 - value, 1 - bound) if QUANTITIES[name].larger_is_better else (value, bound)
        if allowed > 0:
            return used / allowed
        return float("inf") if used > 0 else 0.0

    worst = sorted(contract.bounds, key=strain, reverse=True)[:count]
    return "; ".join(_beside_bound(name, agreement.values.get(name), contract.bounds[name]) for name in worst)


class Built(NamedTuple):
    """An engine that was written: its files, its measurement, and that of its policy's rounding (None: of a half)."""

    files: list[Path]
    report: ParityReport
    rounded: Agreement | None


class Bench:
    """Tries policies on one graph, which is FP32; `failed` measured its FP16 engine.

    units    the places of the operations that FP16 rounds; the others are FP32 by rule, and no trial needs to say so
    before   how FP16's rounding alone agrees with PyTorch; None of half a graph
    telling  numbers of all images, those first on which policies fail
    trials   all that was tried, in order
    """

    def __init__(
        self,
        graph: InferenceGraph,
        failed: ParityReport,
        reference: Reference,
        open_engine: Open,
        folder: Path,
        say: Say,
        most_trials: int,
    ) -> None:
        assert failed.outputs is not None
        self.units = graph.halved(FP16)
        self.trials: list[Trial] = []
        self._graph, self._images, self._contract = graph, failed.images, failed.contract
        self._reference, self._open, self._pytorch = reference, open_engine, failed.pytorch
        self._folder, self._say, self._left = folder, say, most_trials
        self._retyper = Retyper(graph)
        self._verdicts: dict[frozenset[str], bool] = {frozenset(): False}
        self.before: Agreement | None = None
        outputs = failed.outputs
        if self._whole:
            outputs = self._rounded(()).run(self._images.pixels)
            self.before = reference.compare(outputs, self._images.labels)
        self.telling = by_error(reference.scores, outputs)

    def passes(self, kept: Sequence[str]) -> bool:
        """Say whether the contract holds at the largest batch with these places in FP32.

        Raises:
            OutOfTrials: it would take one trial more than there may be.

        """
        policy = self._policy(kept)
        if policy not in self._verdicts:
            if self._left == 0:
                raise OutOfTrials
            self._left -= 1
            rounded = self._tried(tuple(kept), self._rounded(kept)) if self._whole else None
            self._note(self._tried_engine(tuple(kept)) if rounded is None or rounded.passed else rounded)
        return self._verdicts[policy]

    def measure(self, kept: Sequence[str]) -> ParityReport:
        """Measure a policy's trial engine on all images at every batch size.

        Raises:
            EngineError: the backend failed.

        """
        with self._trial_file(kept) as path:
            return self._in_full(kept, [path]).report

    def build(self, kept: Sequence[str], path: Path) -> Built:
        """Write a policy's engine as every engine is written and measure it in full.

        Raises:
            ExportError: torch cannot express the graph in ONNX.
            EngineError: the backend failed.

        """
        self._say(f"writing {path.name} with FP32 in {len(kept)} {'place' if len(kept) == 1 else 'places'}")
        files = write_onnx(self._graph.at(Precision("fp16", tuple(kept))), path)
        return self._in_full(kept, files)

    def least_passing(self) -> tuple[str, ...]:
        """Return the policy that passed with the fewest operations in FP32."""
        return min((trial.kept for trial in self.trials if trial.passed), key=lambda kept: len(self._policy(kept)))

    @property
    def _whole(self) -> bool:
        return self._graph.part == "full"

    def _rounded(self, kept: Sequence[str]) -> RoundedEngine:
        return RoundedEngine(self._graph, Precision("fp16", tuple(kept)), len(self._images))

    def _tried_engine(self, kept: tuple[str, ...]) -> Trial:
        with self._trial_file(kept) as path:
            try:
                with self._open(path) as engine:
                    return self._tried(kept, engine)
            except EngineError as error:  # a backend may have no kernel for a mixture of types
                return Trial(kept, False, 0, Agreement(0, self._reference.scale, {}, {}, str(error)))

    def _tried(self, kept: tuple[str, ...], engine: Engine) -> Trial:
        whole = self._reference.scores.of(list(range(len(self._images))))  # a copy
        run, portion = 0, _FIRST_IMAGES
        while True:
            numbers = self.telling[run : run + portion]
            outputs = run_in_batches(engine, self._images.pixels[numbers], engine.max_batch)
            run += len(numbers)
            if fault := incomparable(self._reference.scores.of(numbers), outputs):
                self._run_first(numbers[:_TELLING])
                return Trial(kept, False, run, Agreement(run, self._reference.scale, {}, {}, fault))
            whole.score[numbers], whole.anomaly_map[numbers], whole.reconstruction[numbers] = outputs
            agreement = self._reference.compare(whole, self._images.labels)
            if not self._contract_of(run).holds(agreement.values):
                self._run_first(by_error(self._reference.scores, whole)[:_TELLING])
                return Trial(kept, False, run, agreement)
            if run == len(self._images):
                return Trial(kept, True, run, agreement)
            portion = run

    def _contract_of(self, images: int) -> Contract:
        # Images that count as right may make quantities of all images worse.
        return self._contract if images == len(self._images) else self._contract.without(OF_ALL_IMAGES)

    def _run_first(self, numbers: list[int]) -> None:
        self.telling = list(dict.fromkeys([*numbers, *self.telling]))

    def _in_full(self, kept: Sequence[str], files: list[Path]) -> Built:
        rounded = report = None
        if self._whole:
            report = measure(self._rounded(kept), self._images, self._reference, self._contract, self._pytorch)
            rounded = report.worst
        if report is None or report:
            with self._open(files[0]) as engine:
                report = measure(engine, self._images, self._reference, self._contract, self._pytorch)
        self._note(Trial(tuple(kept), bool(report), len(self._images), report.worst))
        return Built(files, report, rounded)

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._verdicts[self._policy(trial.kept)] = trial.passed
        self._say(f"trial {len(self.trials)}: {trial.line(self._contract_of(trial.images))}")

    @contextmanager
    def _trial_file(self, kept: Sequence[str]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".trial-") as folder:
            yield self._retyper.write(Precision("fp16", tuple(kept)), Path(folder) / "trial.onnx")[0]

    def _policy(self, kept: Sequence[str]) -> frozenset[str]:
        return frozenset(unit for unit in self.units if any(covers(place, unit) for place in kept))


def by_error(reference: Scores, outputs: Scores) -> list[int]:
    """Return the numbers of all images: by turns the next worst by score, by map and by the map's direction.

    What is not finite is worst.
    """
    count = len(reference.score)
    want, have = (np.asarray(one.anomaly_map, np.float64).reshape(count, -1) for one in (reference, outputs))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        product = np.linalg.norm(want, axis=1) * np.linalg.norm(have, axis=1)
        kinds = [
            np.abs(outputs.score.astype(np.float64) - reference.score),
            np.percentile(np.abs(have - want), 99.9, axis=1),
            1 - (want * have).sum(axis=1) / product,
        ]
    orders = [np.argsort(-np.nan_to_num(kind, nan=np.inf), kind="stable") for kind in kinds]
    return list(dict.fromkeys(int(number) for turn in zip(*orders, strict=True) for number in turn))


def _beside_bound(name: str, value: float | None, bound: float) -> str:
    title, larger_is_better = QUANTITIES[name]
    if value is None:
        return f"{title} undefined"
    return f"{title} {value:.5f} (≥ {bound:g})" if larger_is_better else f"{title} {value:.3g} (≤ {bound:g})"
