"""An engine that was opened, and why this backend runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qfae_runtime.engines.base import Engine
from qfae_runtime.manifest import CertificateEntry, Manifest

if TYPE_CHECKING:
    from qfae_runtime.verdicts import Verdict  # which imports this file


@dataclass(frozen=True)
class Candidate:
    """A backend that can run a file, as far as formats go, and why it was not taken: None of the one that was.

    `installed` says whether this machine has what it needs.
    `images_per_second` is its rate in its self-test, at the run's batch size; None where it was not timed.
    """

    backend: str
    device: str
    installed: bool
    not_taken: str | None
    images_per_second: float | None = None


@dataclass(frozen=True)
class Choice:
    """What `--backend auto` took, why, and every candidate in the order of engines.backends.BACKENDS.

    `verdict` is that of the self-test that the choice rests on, where it was run for this choice; None where a verdict
    was remembered, or none was asked for.
    """

    backend: str
    device: str
    why: str
    candidates: tuple[Candidate, ...]
    verdict: Verdict | None = field(default=None, compare=False)

    def sentence(self) -> str:
        """Return the choice in one line, with what was passed over of what is installed."""
        reasons: dict[str, list[str]] = {}
        for one in self.candidates:
            if one.installed and one.not_taken is not None:
                reasons.setdefault(one.not_taken, []).append(f"{one.backend} on {one.device}")
        others = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        return f"{self.backend} on {self.device}, {self.why}" + (f" ({others})" if others else "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for run.json."""
        candidates = [asdict(one) for one in self.candidates]
        return {"backend": self.backend, "device": self.device, "why": self.why, "candidates": candidates}


@dataclass(frozen=True)
class OpenedEngine:
    """An engine ready to run, what its manifest says, and its certificate for this backend and device.

    `sha256` is the hash of the bytes that were loaded (where graph and weights lie apart: of both hashes);
    `certificate` is None only if the caller allowed it. `choice` says how the backend was found; None where it was
    named. `threads` are those it was opened with, None: all cores.
    """

    engine: Engine
    manifest: Manifest
    path: Path
    sha256: str
    certificate: CertificateEntry | None
    choice: Choice | None = None
    threads: int | None = None

    @property
    def directory(self) -> Path:
        """The folder that holds the engine, its manifest and its golden file."""
        return self.path.parent

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
