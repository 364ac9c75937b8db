"""Measuring the ONNX engines of an export: each against PyTorch, on the reference backend and on those asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qfae_export.backends import measure_others
from qfae_export.bisect import Bisected, bisect
from qfae_export.chain import Chain
from qfae_export.graph import InferenceGraph
from qfae_export.options import Options
from qfae_export.parity_report import ParityReport, accepted, certificate_of
from qfae_export.precision import Precision
from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.engines.base import Engine

Engines = dict[str, tuple[list[Path], Precision]]
"""Files and policy by engine."""

Rewrite = Callable[[Path], tuple[list[Path], Precision]]
"""Writes an engine anew, to the same path; returns its files and policy."""


@dataclass
class Measurements:
    """What was measured of the ONNX engines; `others` by engine file and backend, broken contracts among them."""

    reports: dict[str, ParityReport] = field(default_factory=dict)
    certificates: list[CertificateEntry] = field(default_factory=list)
    others: dict[tuple[str, str], ParityReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bisected: Bisected | None = None


def measure_engines(
    engines: Engines,
    chain: Chain,
    options: Options,
    max_batch: int,
    open_onnx: Callable[[Path], Engine],
    fresh_graph: Callable[[], InferenceGraph],
    less_in_int8: Rewrite | None,
    say: Callable[[str], None],
) -> Measurements:
    """Measure each engine; where FP16 (with --bisect) or INT8 breaks its contract, write it anew, and change `engines`.

    `fresh_graph` makes the FP32 graph once more, for FP16 has rounded the other's weights. `less_in_int8` writes INT8
    with more in FP32; None where the user said what stays.

    Raises:
        ParityError: an engine does not compute what PyTorch computes.

    """
    measured = Measurements()
    for engine, (files, precision) in engines.items():
        say(f"comparing {engine} in ONNX Runtime with PyTorch")
        step = f"ONNX {precision.name.upper()}"
        with open_onnx(files[0]) as opened:
            # INT8 is a way of its own to go on from FP32: FP16 does not come from there.
            aside = precision.name == "int8"
            report = chain.branch(opened, step, "int8") if aside else chain.measure(opened, precision.name)
        if aside and not report and less_in_int8 is not None:
            measured.notes.append(
                f"{engine}: encoder and decoder stay FP32; the decoder alone was not enough: {_first(report)}"
            )
            files, precision = engines[engine] = less_in_int8(files[0])
            with open_onnx(files[0]) as opened:
                report = chain.branch(opened, step, "int8")
        if options.bisect and precision.name == "fp16" and not report:
            graph = fresh_graph()
            bisected = bisect(graph, report, chain.reference, open_onnx, files[0], say)
            measured.bisected, report = bisected, bisected.report
            engines[engine] = (list(bisected.files), bisected.precision)
            chain.round(graph, bisected.precision)
            del graph
        if aside:
            report = accepted(report, engine, opened.backend)
        else:
            report = chain.accept(report, engine, step, opened.backend)
        measured.reports[engine] = report
        measured.certificates.append(certificate_of(files[0], opened, report))
        if precision.name != "fp16":
            others = measure_others(files[0], precision.name, chain, max_batch, options.backends, say)
            measured.others |= {(engine, one.backend): one.report for one in others if one.report is not None}
            measured.notes += [one.failed for one in others if one.failed is not None]
            measured.certificates += [one.entry for one in others if one.entry is not None]
    return measured


def _first(report: ParityReport) -> str:
    failures = report.failures()
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return failures[0].partition(", worst at")[0] + more
