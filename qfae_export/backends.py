"""Further backends on an FP32 or INT8 engine: measured like the reference, each held against what it owes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from qfae_export.chain import Chain
from qfae_export.options import REFERENCE
from qfae_export.parity_report import ParityReport, certificate_of
from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.engines.backends import RUNNERS, load_onnx
from qfae_runtime.errors import EngineError


class OnBackend(NamedTuple):
    """What was measured of a backend; the entry certifies it if it passed, and is None if nothing can be compared.

    `report` is None where it could not run the engine, and `failed` says why.
    """

    backend: str
    report: ParityReport | None
    entry: CertificateEntry | None
    failed: str | None = None


def measure_others(
    path: Path, precision: str, chain: Chain, max_batch: int, backends: Iterable[str], say: Callable[[str], None]
) -> list[OnBackend]:
    """Measure an engine on the backends that run its precision; the reference must have kept its contract before.

    What one of them breaks is no fault of the export. Its entry stays in the manifest nevertheless, so that qfae-run
    can say why it does not take that backend.
    """
    runs = [one.name for one in RUNNERS if precision in one.precisions]
    measured = []
    for backend in backends:
        if backend == REFERENCE or backend not in runs:
            continue
        say(f"comparing {path.name} in {backend} with PyTorch")
        try:
            with load_onnx(path, chain.images.pixels.shape[1], max_batch, backend) as engine:
                report = chain.branch(engine, f"{path.name} in {backend}", precision)
                entry = certificate_of(path, engine, report) if report.worst.fault is None else None
        except EngineError as error:
            measured.append(OnBackend(backend, None, None, f"{backend} is not certified: {error}"))
            continue
        measured.append(OnBackend(backend, report, entry))
    return measured
