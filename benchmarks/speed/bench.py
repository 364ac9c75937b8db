"""The whole measurement, top-down: files -> builds -> scores -> rounds -> files through qfae-run -> rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.speed.building import Builds
from benchmarks.speed.candidates import CPU, GEMMS, Candidate, lacking
from benchmarks.speed.end_to_end import end_to_end, write_pictures
from benchmarks.speed.opening import PLANS
from benchmarks.speed.rounds import Measured, Plan, measure
from benchmarks.speed.rows import (
    Judged,
    Row,
    Start,
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
from qfae_runtime.engines.base import Scores

Say = Callable[[str], None]
Keep = Callable[[list[Row]], None]

_COUNTED = ("eager", "captured", "compile")  # PyTorch counts the memory of these itself
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


def bench(options: Options, say: Say = lambda step: None, keep: Keep = lambda rows: None) -> list[Row]:
    """Measure all candidates and return the rows; `keep` receives all that there are so far, as they come.

    That is after every batch size of every round, and after every round of files.

    Raises:
        QfaeError: the model itself cannot be had; a candidate that fails becomes a row.

    """
    start, missing = Start.now(), list[Row]()
    present = _able(options.candidates, lambda one: lacking(one, options.device), missing)
    subject = _prepared(options, present, say)
    present = _able(present, lambda one: _no_file(one, subject), missing)
    gemms = [one for one in GEMMS if options.device in one.devices and lacking(one, options.device) is None]
    needed = {one.precision for one in present}
    needed |= {"fp32"} if "int8" in needed else set()  # a part of such a file's arithmetic
    gemms = [one for one in gemms if subject.products and one.precision in needed]
    names = [one.name for one in options.candidates]
    first = conditions(start, subject, options.plan, options.device, options.threads, names, options.files)
    logs, most = options.out / "logs", max(options.plan.batches)
    workers = Workers(options.model, logs, options.device, options.threads, options.gemm_batch, most)
    try:
        longest = options.plan.longest_build
        with closing(Builds(options.model, logs, options.device, options.threads, most, longest)) as builds:
            builds.start(present, say)
            judged = _judged(options, present, subject, builds, workers, missing, say)
        present = [one for one in present if one.name in judged]
        of_files: list[Row] = []

        def rows(measured: Measured) -> list[Row]:
            first["rounds_done"] = measured.rounds
            gemm = gemm_rows(gemms, measured, workers)
            engines = engine_rows(first, present, measured, workers, subject, judged, gemm)
            return [first, *engines, *gemm, *failed_rows(measured), *left_out_rows(measured), *missing, *of_files]

        measured = measure(options.plan, [*present, *gemms], workers, say, lambda measured: keep(rows(measured)))
        runnable = [one for one in present if one.model in subject.files]
        for found in _end_to_end(options, runnable, measured, workers, judged, missing, say):
            of_files[:] = found
            keep(rows(measured))
        first["complete"] = True
        return rows(measured)
    finally:
        workers.close()


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
        most, device = max(options.plan.batches), options.device
        worker.ask("prepare", say, asked=asked, flavours=flavours, max_batch=most, device=device)
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


def _judged(
    options: Options,
    candidates: Sequence[Candidate],
    subject: Subject,
    builds: Builds,
    workers: Workers,
    missing: list[Row],
    say: Say,
) -> dict[str, Judged]:
    """Open every candidate once and hold its outputs on the images against PyTorch, the reference."""
    _, labels, reference = images_of(options.model)
    real = [label for number, label in enumerate(labels) if number not in reference.stress]
    found = {}
    for candidate in sorted(candidates, key=lambda one: builds.running(one) or one.backend not in _COUNTED):
        if candidate.backend not in _COUNTED:
            builds.wait()  # what the card has in use would be counted as this candidate's
        out = options.out / "logs" / f"{candidate.name}.npz"
        try:
            built = builds.seconds(candidate)
            say(f"scoring with {candidate.name}")
            workers.of(candidate).ask("score", out=str(out))
            workers.note_memory(candidate)
        except WorkerError as error:
            missing.append(missing_row(candidate, str(error)))
            workers.end(candidate.name)
            continue
        with np.load(out, allow_pickle=False) as stored:
            got = Scores(*(stored[name] for name in Scores._fields))
        out.unlink()
        if candidate.backend == "compile" and builds.running():  # its compiler can work beside the others, too
            _compile_sizes(candidate, options.plan.batches, workers)
        agreement = reference.compare(got, labels)
        contract = contract_kept(candidate, agreement, real)
        found[candidate.name] = Judged(errors_of(agreement), contract, built)
    return found


def _compile_sizes(candidate: Candidate, batches: Sequence[int], workers: Workers) -> None:
    """Run every batch size once; one that fails will fail in its round again, and be told there."""
    try:
        for batch in batches:
            workers.of(candidate).ask("time", batch=batch, seconds=0, calls=1, settle=False)
        workers.note_memory(candidate)
    except WorkerError:
        workers.end(candidate.name)


def _end_to_end(
    options: Options,
    candidates: Sequence[Candidate],
    measured: Measured,
    workers: Workers,
    judged: dict[str, Judged],
    missing: list[Row],
    say: Say,
) -> Iterator[list[Row]]:
    """Run qfae-run with the fastest of its engines that keeps its contract, without heat maps and with them.

    Where none does, it is the fastest of all. Yields the rows so far after every round; each replaces those before.
    """
    able = [one for one in candidates if judged[one.name].contract["kept"]] or list(candidates)
    sizes = [batch for batch in options.plan.batches if any(measured.of(one.name, batch) for one in able)]
    if not options.files or not sizes:
        return
    batch = max(size for size in sizes if size <= max(16, min(sizes)))
    able = [one for one in able if measured.of(one.name, batch)]
    fastest = max(able, key=lambda one: throughput(measured.of(one.name, batch)).mean)
    known, done = judged[fastest.name], list[Row]()
    try:
        write_pictures(options.out / "pictures", options.files, options.model)
        for maps in (False, True):
            rows = list(done)
            for row in end_to_end(fastest, workers, options.out, options.files, batch, _FILE_ROUNDS, maps, say):
                rows = [*done, {**row, "error": known.error, "contract": known.contract}]
                yield rows
            done = rows
    except (WorkerError, OSError) as error:
        missing.append({**missing_row(fastest, str(error)), "candidate": f"qfae-run with {fastest.name}"})
