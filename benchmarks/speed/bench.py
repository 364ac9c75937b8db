"""The whole measurement, top-down: files -> builds -> scores -> rounds -> files through qfae-run -> rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.speed.candidates import CPU, GEMMS, Candidate, lacking
from benchmarks.speed.end_to_end import end_to_end, write_pictures
from benchmarks.speed.opening import PLANS, built_file
from benchmarks.speed.revision import commit
from benchmarks.speed.rounds import Measured, Plan, measure
from benchmarks.speed.rows import (
    Row,
    best_gemm,
    conditions,
    contract_kept,
    engine_rows,
    errors_of,
    failed_rows,
    gemm_rows,
    left_out_rows,
    missing_row,
)
from benchmarks.speed.statistics import throughput
from benchmarks.speed.subject import WRITTEN, Asked, Subject, images_of
from benchmarks.speed.workers import Worker, WorkerError, Workers
from qfae_runtime.agreement import Agreement, Scale, measure_agreement
from qfae_runtime.engines.base import Scores

Say = Callable[[str], None]

_FILE_ROUNDS = 3
_GEMM_BATCH = 8  # on a CPU: larger batches make products no faster, and take long


@dataclass(frozen=True)
class Options:
    """One run of qfae-bench.

    out          folder for rows, page, logs and the model's files
    candidates   what to measure
    files        how many files qfae-run scores; 0: none
    """

    asked: Asked
    out: Path
    candidates: tuple[Candidate, ...]
    plan: Plan = field(default_factory=Plan)
    device: str = CPU
    threads: int | None = None
    files: int = 64

    @property
    def model(self) -> Path:
        """The folder of the model's files."""
        return self.out / "model"

    @property
    def gemm_batch(self) -> int:
        """The batch size that matrix products are measured at."""
        sizes = self.plan.batches
        return max(sizes) if self.device != CPU else max((one for one in sizes if one <= _GEMM_BATCH), default=sizes[0])


def bench(options: Options, say: Say = lambda step: None) -> list[Row]:
    """Measure all candidates and return the rows.

    Raises:
        QfaeError: the model itself cannot be had; a candidate that fails becomes a row.

    """
    revision = commit()  # before processes read the code, one after the other
    missing: list[Row] = []
    present = _able(options.candidates, lambda one: lacking(one, options.device), missing)
    subject = _prepared(options, present, say)
    present = _able(present, lambda one: _no_file(one, subject), missing)
    gemms = [one for one in GEMMS if options.device in one.devices and lacking(one, options.device) is None]
    gemms = [one for one in gemms if subject.products and any(one.precision == other.precision for other in present)]
    built = _built(options, present, missing, say)
    present = [one for one in present if one.name in built]
    images, labels, reference = images_of(options.model)
    first = conditions(subject, options.plan, options.device, options.threads, len(images), revision)
    workers = Workers(
        options.model,
        options.out / "logs",
        options.device,
        options.threads,
        options.gemm_batch,
        max(options.plan.batches),
    )
    try:
        agreements = _scored(options, present, labels, reference, workers, missing, say)
        present = [one for one in present if one.name in agreements]
        measured = measure(options.plan, [*present, *gemms], workers, say)
        contracts = {one.name: contract_kept(one, agreements[one.name], labels) for one in present}
        runnable = [one for one in present if one.model in subject.files and one.name not in measured.failed]
        whole = _end_to_end(options, runnable, measured, workers, contracts, missing, say)
        for row in whole:
            row |= {"error": errors_of(agreements[row["candidate"]]), "contract": contracts[row["candidate"]]}
        missing += failed_rows(measured)
        seconds = {name: value for name, value in built.items() if value is not None}
        gemm = gemm_rows(gemms, measured, workers)
        best = best_gemm(gemm)
        rows = engine_rows(present, options.plan, measured, workers, subject, agreements, contracts, seconds, best)
    finally:
        workers.close()
    return [first, *rows, *gemm, *whole, *left_out_rows(measured), *missing]


def _able(
    candidates: Sequence[Candidate], why_not: Callable[[Candidate], str | None], missing: list[Row]
) -> list[Candidate]:
    """Return the candidates that nothing speaks against; the others get a row in `missing`, with the reason."""
    able = []
    for candidate in candidates:
        reason = why_not(candidate)
        if reason is None:
            able.append(candidate)
        else:
            missing.append(missing_row(candidate, reason))
    return able


def _prepared(options: Options, candidates: Sequence[Candidate], say: Say) -> Subject:
    """Have the model's files written by a process of its own, whose memory goes with it."""
    models = {PLANS.get(one.model, one.model) for one in candidates}
    flavours = sorted(models & WRITTEN.keys())
    with Worker(options.model, options.out / "logs" / "prepare.log", options.threads) as worker:
        asked = asdict(options.asked)
        worker.ask("prepare", say, asked=asked, flavours=flavours, max_batch=max(options.plan.batches))
    return Subject.load(options.model)


def _no_file(candidate: Candidate, subject: Subject) -> str | None:
    """Say why a candidate cannot run this model; None if it can."""
    asked, files = subject.asked, subject.files
    if candidate.model in ("plain", "graph"):
        has_weights = asked.ckpt is not None or asked.random_weights is not None
        return None if has_weights else "PyTorch needs the checkpoint: pass --ckpt"
    if candidate.model in files or PLANS.get(candidate.model) in files:
        return None
    return f"there is no {PLANS.get(candidate.model, candidate.model)} file of this engine"


def _built(options: Options, candidates: Sequence[Candidate], missing: list[Row], say: Say) -> dict[str, float | None]:
    """Build what has to be built, each in its own process; return the seconds, None where there is nothing to do."""
    found: dict[str, float | None] = {}
    for candidate in candidates:
        if built_file(candidate, options.model, options.device) is None:
            found[candidate.name] = None
            continue
        say(f"building {candidate.name}")
        most = max(options.plan.batches)
        try:
            with Worker(options.model, options.out / "logs" / f"{candidate.name}.log", options.threads) as worker:
                answer = worker.ask("build", candidate=candidate.name, device=options.device, max_batch=most)
            found[candidate.name] = answer["seconds"]
        except WorkerError as error:
            missing.append(missing_row(candidate, str(error)))
    return found


def _scored(
    options: Options,
    candidates: Sequence[Candidate],
    labels: Sequence[bool | None],
    reference: Scores,
    workers: Workers,
    missing: list[Row],
    say: Say,
) -> dict[str, Agreement]:
    """Open every candidate once and hold its outputs on the images against PyTorch FP32, the reference."""
    scale = Scale.of(reference, labels)
    found = {}
    for candidate in candidates:
        say(f"scoring with {candidate.name}")
        out = options.out / "logs" / f"{candidate.name}.npz"
        try:
            workers.of(candidate).ask("score", out=str(out))
            workers.note_memory(candidate)
        except WorkerError as error:
            missing.append(missing_row(candidate, str(error)))
            workers.end(candidate.name)
            continue
        with np.load(out, allow_pickle=False) as stored:
            got = Scores(*(stored[name] for name in Scores._fields))
        out.unlink()
        found[candidate.name] = measure_agreement(reference, got, labels, scale)
    return found


def _end_to_end(
    options: Options,
    candidates: Sequence[Candidate],
    measured: Measured,
    workers: Workers,
    contracts: dict[str, Row],
    missing: list[Row],
    say: Say,
) -> list[Row]:
    """Run qfae-run with the fastest of its engines that keeps its contract, without heat maps and with them.

    Where none does, it is the fastest of all.
    """
    able = [one for one in candidates if contracts[one.name]["kept"]] or list(candidates)
    sizes = [batch for batch in options.plan.batches if all(measured.of(one.name, batch) for one in able)]
    if not options.files or not able or not sizes:
        return []
    batch = max(size for size in sizes if size <= max(16, min(sizes)))
    fastest = max(able, key=lambda one: throughput(measured.of(one.name, batch)).mean)
    write_pictures(options.out / "pictures", options.files, options.model)
    rows = []
    for maps in (False, True):
        try:
            rows.append(end_to_end(fastest, workers, options.out, options.files, batch, _FILE_ROUNDS, maps, say))
        except WorkerError as error:
            missing.append(missing_row(fastest, str(error)))
            break
    return rows
