"""The certificate in a manifest: what was measured for one engine file on one backend and device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from qfae_runtime.checked import Fields
from qfae_runtime.contract import Comparison
from qfae_runtime.engines.base import OUTPUT_NAMES, Engine
from qfae_runtime.hashing import sha256_of


@dataclass(frozen=True)
class OutputParity:
    """Measured errors of one output and their bounds; the reconstruction has no relative bound."""

    max_abs: float
    bound_abs: float
    max_rel: float | None = None
    bound_rel: float | None = None

    def holds(self) -> bool:
        """Say whether the measured errors lie within the bounds."""
        relative = self.max_rel is None or self.bound_rel is None or self.max_rel <= self.bound_rel
        return self.max_abs <= self.bound_abs and relative


@dataclass(frozen=True)
class CertificateEntry:
    """What was measured for one engine file on one backend and device; their hash binds it to its bytes."""

    engine: str
    engine_sha256: str
    backend: str
    backend_version: str
    device: str
    batches: tuple[int, ...]
    images: int
    images_from: str
    outputs: dict[str, OutputParity]
    passed: bool
    created: str

    @classmethod
    def issue(
        cls,
        engine_path: Path,
        engine: Engine,
        comparison: Comparison,
        *,
        batches: Iterable[int],
        images: int,
        images_from: str,
    ) -> Self:
        """Record a comparison on `images` images taken from `images_from` (said in words)."""
        return cls(
            engine=engine_path.name,
            engine_sha256=sha256_of(engine_path),
            backend=engine.backend,
            backend_version=engine.version,
            device=engine.device,
            batches=tuple(batches),
            images=images,
            images_from=images_from,
            outputs={
                name: OutputParity(one.max_abs, one.bound_abs, one.max_rel, one.bound_rel)
                for name, one in comparison.outputs.items()
            },
            passed=bool(comparison),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def read_certificate(fields: Fields, where: str) -> tuple[CertificateEntry, ...]:
    """Take 'certificate' (a list or null) from a manifest; errors as in Manifest.from_dict."""
    if fields.is_null("certificate"):
        return ()
    entries = fields.array("certificate")
    return tuple(_read_entry(Fields(entry, where, f"certificate.{n}")) for n, entry in enumerate(entries))


def _read_entry(fields: Fields) -> CertificateEntry:
    batches = fields.array("batches")
    if not batches or any(type(size) is not int or size < 1 for size in batches):
        raise fields.fault("batches", "a list of batch sizes")
    outputs = fields.inner("outputs")
    entry = CertificateEntry(
        engine=fields.text("engine"),
        engine_sha256=fields.digest("engine_sha256"),
        backend=fields.text("backend"),
        backend_version=fields.text("backend_version"),
        device=fields.text("device"),
        batches=tuple(batches),
        images=fields.whole("images", 1, 2**50),
        images_from=fields.text("images_from"),
        outputs={name: _read_parity(outputs.inner(name)) for name in OUTPUT_NAMES},
        passed=fields.flag("passed"),
        created=fields.text("created"),
    )
    outputs.finish()
    fields.finish()
    if entry.passed and not all(parity.holds() for parity in entry.outputs.values()):
        raise fields.fault("passed", "false, since a measured error exceeds its bound")
    return entry


def _read_parity(fields: Fields) -> OutputParity:
    parity = OutputParity(
        max_abs=fields.number("max_abs"),
        bound_abs=fields.number("bound_abs"),
        max_rel=fields.optional_number("max_rel"),
        bound_rel=fields.optional_number("bound_rel"),
    )
    fields.finish()
    return parity
