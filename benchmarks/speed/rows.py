"""Rows: what is kept of a measurement, one JSON object a line. Tables and pages are made of these alone.

kind          what it says
conditions    once: the machine, versions, the model, how much was measured
engine        one candidate at one batch size
gemm          one library's rate at the model's own matrix products
end_to_end    qfae-run on files, beside its engine alone
missing       a candidate that was not measured, and why
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed.candidates import BASELINE, CPU, KNOWN, Candidate
from benchmarks.speed.revision import commit
from benchmarks.speed.rounds import Measured, Plan
from benchmarks.speed.statistics import Interval, latency, speed_up, throughput
from benchmarks.speed.subject import Subject
from benchmarks.speed.workers import Workers
from qfae_runtime import __version__
from qfae_runtime.agreement import Agreement
from qfae_runtime.contract import AUROC_CHANGE, MIN_IMAGES, demanded
from qfae_runtime.quantities import OF_ALL_IMAGES
from qfae_runtime.verdicts import hardware
from qfae_runtime.writers.whole import whole_file

Row = dict[str, Any]

ERRORS = (
    *("score_abs", "score_iqr", "score_typical", "score_worst", "score_distance"),
    *("spearman", "auroc_change", "map_cosine_p1"),
)
"""The quantities of agreement.QUANTITIES that rows keep."""

_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
_VERSIONS = ("torch", "timm", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")


@dataclass(frozen=True)
class Start:
    """What is known before anything is measured: revision.commit of the code, and how busy the machine was."""

    commit: str | None
    load: float | None

    @classmethod
    def now(cls) -> Start:
        """Look before processes read the code and keep the machine busy."""
        return cls(commit(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None)


@dataclass(frozen=True)
class Judged:
    """What is known of a candidate before it is timed: errors, contract (`contract_kept`), seconds it was built in."""

    error: Row
    contract: Row
    build_s: float | None


def conditions(
    start: Start, subject: Subject, plan: Plan, device: str, threads: int | None, candidates: Sequence[str], files: int
) -> Row:
    """Return what every other row was measured under; what is not known yet is filled in as it comes."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = hardware()
    return {
        "kind": "conditions",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "qfae": __version__,
        "commit": start.commit,
        "model": subject.asked.title,
        "gflop_per_image": subject.flop / 1e9,
        "images_of_errors": subject.images,
        "reference": subject.reference,
        "int8": subject.int8,
        "device": device,
        "threads": threads or machine["cores"],
        "hardware": machine,
        "instructions": instructions(),
        "load_before": start.load,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
        "candidates": [*candidates],
        "batches": list(plan.batches),
        "rounds": plan.rounds,
        "seconds_per_visit": plan.seconds,
        "calls_per_visit": plan.calls,
        "longest": plan.longest,
        "longest_build": plan.longest_build,
        "files": files,
        "rounds_done": 0,
        "complete": False,
    }


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return which of the instructions that products gain from this processor has, as Linux names them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [name for name in _INSTRUCTIONS if name in flags]


def engine_rows(
    first: Row,
    candidates: Sequence[Candidate],
    measured: Measured,
    workers: Workers,
    subject: Subject,
    judged: dict[str, Judged],
    gemm: Sequence[Row],
) -> list[Row]:
    """Return a row for every engine at every batch size that was measured; `first` is the row of conditions."""
    found = []
    for candidate in candidates:
        limit = limit_of(candidate, gemm, subject.int8)
        for batch in first["batches"]:
            visits = measured.of(candidate.name, batch)
            if not visits:
                continue
            rate = throughput(visits)
            opening, known = workers.openings[candidate.name][0], judged[candidate.name]
            gflops = rate.mean * subject.flop / 1e9
            ratio = speed_up(visits, measured.of(BASELINE, batch))
            found.append(
                {
                    "kind": "engine",
                    "candidate": candidate.name,
                    "title": candidate.title,
                    "precision": candidate.precision,
                    **_shared(first),
                    "batch": batch,
                    "calls": sum(len(visit.seconds) for visit in visits),
                    "rounds": len(visits),
                    "latency_ms": latency(visits),
                    "images_per_second": asdict(rate),
                    "times_plain": asdict(ratio) if ratio is not None else None,
                    "gflops": gflops,
                    "share_of_gemm": gflops / limit.gflops if limit is not None else None,
                    "gemm_of": limit.title if limit is not None else None,
                    "gemm_batch": limit.batch if limit is not None else None,
                    "first_call_s": measured.first_calls.get((candidate.name, batch)),
                    "cold_start_s": opening.cold_start,
                    "load_s": opening.load,
                    "build_s": known.build_s,
                    "host_peak_bytes": workers.host_peaks[candidate.name],
                    "device_bytes": workers.device_held[candidate.name],
                    "disk_bytes": opening.disk,
                    "version": opening.version,
                    "error": known.error,
                    "contract": known.contract,
                }
            )
    return found


def _shared(first: Row) -> Row:
    """Return what of the conditions every row repeats, so that one row says what was measured on what."""
    machine = first["hardware"]
    on = machine["processor"] if first["device"] == CPU else ", ".join(machine["cards"][:1])
    return {name: first[name] for name in ("model", "device", "threads")} | {"hardware": on}


class Limit(NamedTuple):
    """The rate that products alone reach, whose it is, and at which batch size."""

    gflops: float
    title: str
    batch: int


def limit_of(candidate: Candidate, gemm: Sequence[Row], int8: Row | None) -> Limit | None:
    """Return how fast the fastest library computes a candidate's products; None where none was measured.

    Of an INT8 file a part of the arithmetic is FP32: the limit is that of both parts, one after the other.
    """
    best = best_gemm(gemm)
    mine = best.get(candidate.precision)
    if mine is None:
        return None
    if candidate.precision != "int8":
        return Limit(mine["gflops"], mine["title"], mine["batch"])
    rest = best.get("fp32")
    if rest is None or int8 is None:
        return None
    share = int8["share_of_flop"]
    gflops = 1 / (share / mine["gflops"] + (1 - share) / rest["gflops"])
    return Limit(gflops, f"{share:.0%} {mine['title']} INT8, else {rest['title']} FP32", mine["batch"])


def gemm_rows(candidates: Sequence[Candidate], measured: Measured, workers: Workers) -> list[Row]:
    """Return a row for every library whose matrix products were measured."""
    found = []
    for candidate in candidates:
        visits = [one for one in measured.visits if one.candidate == candidate.name]
        if not visits:
            continue
        flop = workers.openings[candidate.name][0].flop or 0
        rates = Interval.over([flop * len(visit.seconds) / sum(visit.seconds) / 1e9 for visit in visits])
        found.append(
            {
                "kind": "gemm",
                "candidate": candidate.name,
                "title": candidate.title,
                "precision": candidate.precision,
                "batch": visits[0].batch,
                "gflops": rates.mean,
                "gflops_interval": asdict(rates),
            }
        )
    return found


def best_gemm(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the fastest library's row by precision."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == "gemm" and row["gflops"] > found.get(row["precision"], {"gflops": 0})["gflops"]:
            found[row["precision"]] = row
    return found


def missing_row(candidate: Candidate, reason: str) -> Row:
    """Return the row of a candidate that was not measured."""
    return {
        "kind": "missing",
        "candidate": candidate.name,
        "title": candidate.title,
        "precision": candidate.precision,
        "reason": reason,
    }


def failed_rows(measured: Measured) -> list[Row]:
    """Return rows of the batch sizes that an engine or a library failed at while it was measured."""
    return [{**missing_row(KNOWN[name], reason), "batch": batch} for (name, batch), reason in measured.failed.items()]


def left_out_rows(measured: Measured) -> list[Row]:
    """Return rows of the batch sizes that an engine or a library was not measured at."""
    return [{**missing_row(KNOWN[name], reason), "batch": batch} for (name, batch), reason in measured.left_out.items()]


def errors_of(agreement: Agreement) -> Row:
    """Return the errors that rows keep; why there are none, where outputs could not be compared."""
    if agreement.fault is not None:
        return {"fault": agreement.fault}
    return {name: agreement.values[name] for name in ERRORS}


def contract_kept(candidate: Candidate, agreement: Agreement, labels: Sequence[bool | None]) -> Row:
    """Say whether the scores keep the contract of a candidate's precision, and which bounds they break.

    `labels` are those of the real images (True: anomalous, None: unknown). What a precision owes and these cannot tell
    is `not_bounded`.
    """
    owed = demanded(candidate.precision, labels)
    if agreement.images < MIN_IMAGES:
        owed = owed.without(OF_ALL_IMAGES)
    broken = [name for name in owed.bounds if not owed.allows(name, agreement.values.get(name))]
    unbounded = ["auroc_change"] if owed.name in AUROC_CHANGE and "auroc_change" not in owed.bounds else []
    return {"name": owed.name, "kept": not broken, "broken": broken, "not_bounded": unbounded}


def save(rows: Sequence[Row], path: Path) -> None:
    """Write rows, one a line, whole or not at all."""
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """Read the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
