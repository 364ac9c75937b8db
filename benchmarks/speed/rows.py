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
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.speed.candidates import BASELINE, KNOWN, Candidate
from benchmarks.speed.rounds import Measured, Plan
from benchmarks.speed.statistics import Interval, latency, speed_up, throughput
from benchmarks.speed.subject import Subject
from benchmarks.speed.workers import Workers
from qfae_runtime import __version__
from qfae_runtime.agreement import OF_ALL_IMAGES, Agreement
from qfae_runtime.contract import MIN_IMAGES, demanded
from qfae_runtime.verdicts import hardware
from qfae_runtime.writers.whole import whole_file

Row = dict[str, Any]

ERRORS = ("score_abs", "score_iqr", "spearman", "auroc_change", "map_cosine_p1")
"""The quantities of agreement.QUANTITIES that rows keep."""

_VERSIONS = ("torch", "timm", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")


def conditions(subject: Subject, plan: Plan, device: str, threads: int | None, images: int, commit: str | None) -> Row:
    """Return what every other row was measured under.

    `images` is how many the score errors are over, `commit` what revision.commit says of the code.
    """
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "kind": "conditions",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "qfae": __version__,
        "commit": commit,
        "model": subject.asked.title,
        "gflop_per_image": subject.flop / 1e9,
        "images_of_errors": images,
        "device": device,
        "threads": threads,
        "hardware": hardware(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
        "batches": list(plan.batches),
        "rounds": plan.rounds,
        "seconds_per_visit": plan.seconds,
        "calls_per_visit": plan.calls,
    }


def engine_rows(
    candidates: Sequence[Candidate],
    plan: Plan,
    measured: Measured,
    workers: Workers,
    subject: Subject,
    agreements: dict[str, Agreement],
    labels: Sequence[bool | None],
    built: dict[str, float],
    limits: dict[str, Row],
) -> list[Row]:
    """Return a row for every engine at every batch size that was measured; `limits` is what `best_gemm` says.

    `agreements` are over the images that have these labels (True: anomalous, None: unknown).
    """
    found = []
    for candidate in candidates:
        for batch in plan.batches:
            visits = measured.of(candidate.name, batch)
            if not visits:
                continue
            rate = throughput(visits)
            opening = workers.openings[candidate.name][0]
            flops = rate.mean * subject.flop
            limit = limits.get(candidate.precision)
            ratio = speed_up(visits, measured.of(BASELINE, batch))
            found.append(
                {
                    "kind": "engine",
                    "candidate": candidate.name,
                    "title": candidate.title,
                    "precision": candidate.precision,
                    "batch": batch,
                    "calls": sum(len(visit.seconds) for visit in visits),
                    "rounds": len(visits),
                    "latency_ms": latency(visits),
                    "images_per_second": asdict(rate),
                    "times_plain": asdict(ratio) if ratio is not None else None,
                    "gflops": flops / 1e9,
                    "share_of_gemm": flops / 1e9 / limit["gflops"] if limit is not None else None,
                    "gemm_of": limit["title"] if limit is not None else None,
                    "first_call_s": measured.first_calls.get((candidate.name, batch)),
                    "cold_start_s": opening.cold_start,
                    "load_s": opening.load,
                    "build_s": built.get(candidate.name),
                    "host_peak_bytes": workers.host_peaks[candidate.name],
                    "device_bytes": workers.device_held[candidate.name],
                    "disk_bytes": opening.disk,
                    "version": opening.version,
                    "error": _errors(agreements.get(candidate.name)),
                    "contract": _contract(candidate, agreements.get(candidate.name), labels),
                }
            )
    return found


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
    """Return rows of the engines and libraries that failed while they were measured."""
    return [missing_row(KNOWN[name], reason) for name, reason in measured.failed.items()]


def left_out_rows(measured: Measured) -> list[Row]:
    """Return rows of the batch sizes that an engine or a library was not measured at."""
    return [{**missing_row(KNOWN[name], reason), "batch": batch} for (name, batch), reason in measured.left_out.items()]


def _errors(agreement: Agreement | None) -> dict[str, Any] | None:
    if agreement is None:
        return None
    if agreement.fault is not None:
        return {"fault": agreement.fault}
    return {name: agreement.values[name] for name in ERRORS}


def _contract(candidate: Candidate, agreement: Agreement | None, labels: Sequence[bool | None]) -> Row | None:
    """Say whether the scores keep the contract of a candidate's precision, and which bounds they break."""
    if agreement is None:
        return None
    owed = demanded(candidate.precision, labels)
    if agreement.images < MIN_IMAGES:
        owed = owed.without(OF_ALL_IMAGES)
    broken = [name for name in owed.bounds if not owed.allows(name, agreement.values.get(name))]
    return {"name": owed.name, "kept": not broken, "broken": broken}


def save(rows: Sequence[Row], path: Path) -> None:
    """Write rows, one a line, whole or not at all."""
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """Read the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
