"""Does this engine still compute, on this machine, what PyTorch computed? Golden images say so.

Runs on first use of an engine on a machine, backend and version. A passed verdict is remembered in a cache folder
under a key made of the engine's real bytes and the environment: a changed engine is always tested again.

The bounds are the contract's, or tighter: an engine that was certified with errors far below the contract must stay
near them, for another processor's rounding moves a score by as much as the certificate states, not by ten times that.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.contract import Contract, compare
from qfae_runtime.engines import OpenedEngine
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.errors import SelfTestError
from qfae_runtime.golden import Golden, golden_bytes, load_golden

_SHOWN_FAILURES = 6
_MARGIN, _LEAST_ABS, _LEAST_REL = 10.0, 5e-6, 5e-5


@dataclass(frozen=True)
class Verdict:
    """What was found. `status` is "passed", "passed before" (remembered) or "skipped" (no golden file)."""

    status: str
    summary: str
    images: int
    seconds: float
    remembered: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for run.json."""
        return asdict(self)


def self_test(opened: OpenedEngine, *, force: bool = False, cache: Path | None = None) -> Verdict:
    """Score the golden images and hold the outputs against the contract, unless that was done here before.

    `cache` is the folder for remembered verdicts (None: see cache_folder); failing to write it is no fault.

    Raises:
        SelfTestError: an output breaks its bound; the message holds the numbers.
        ManifestError: the golden file is missing, damaged, or not the one the manifest names.

    """
    contract = contract_for(opened.certificate)
    content = golden_bytes(opened)
    if content is None:
        return Verdict("skipped", "the manifest names no golden file", 0, 0.0, False)
    environment = _environment(opened, hashlib.sha256(content).hexdigest(), contract)
    memory = (cache or cache_folder()) / "selftest" / f"{_key_of(environment)}.json"
    if not force and (before := _recall(memory, environment)) is not None:
        return before
    golden = load_golden(content, opened.manifest.golden or "", opened.manifest.image_size)
    start = time.perf_counter()
    comparison = compare(golden.scores, _run_golden(opened.engine, golden), contract)
    if not comparison:
        shown = comparison.failures()[:_SHOWN_FAILURES]
        raise SelfTestError(
            f"{opened.path}: self-test failed on {environment['backend']} {environment['version']}, "
            f"{environment['device']}: {len(golden.images)} golden images do not give PyTorch's outputs:\n  "
            + "\n  ".join(shown)
            + "\ndo not use its scores; export the engine again, or use the backend version it was certified on"
        )
    seconds = round(time.perf_counter() - start, 3)
    verdict = Verdict("passed", comparison.summary(), len(golden.images), seconds, False)
    return replace(verdict, remembered=_remember(memory, environment, verdict))


def contract_for(certificate: CertificateEntry | None) -> Contract:
    """Return the bounds of the self-test: the contract, tightened to _MARGIN times the certified errors."""
    contract = Contract()
    if certificate is None:
        return contract
    measured = [certificate.outputs[name] for name in ("score", "anomaly_map")]
    largest_abs = max(one.max_abs for one in measured)
    largest_rel = max(one.max_rel or 0.0 for one in measured)
    return replace(
        contract,
        abs=min(contract.abs, max(_MARGIN * largest_abs, _LEAST_ABS)),
        rel=min(contract.rel, max(_MARGIN * largest_rel, _LEAST_REL)),
    )


def cache_folder() -> Path:
    """Return where verdicts are remembered: $QFAE_CACHE, else $XDG_CACHE_HOME/qfae, else ~/.cache/qfae."""
    chosen = os.environ.get("QFAE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~").expanduser() / ".cache") / "qfae"


def _run_golden(engine: Engine, golden: Golden) -> Scores:
    # The first image alone, the others in batches as large as allowed: both shapes are tested.
    count = len(golden.images)
    cuts = [0, 1, *range(1 + engine.max_batch, count, engine.max_batch), count]
    parts = [engine.run(golden.images[a:b]) for a, b in pairwise(cuts) if b > a]
    return Scores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _environment(opened: OpenedEngine, golden_sha256: str, contract: Contract) -> dict[str, Any]:
    return {
        "engine_sha256": opened.sha256,
        "golden_sha256": golden_sha256,
        "contract": asdict(contract),
        "backend": opened.engine.backend,
        "version": opened.engine.version,
        "device": opened.engine.device,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _key_of(environment: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()


def _recall(memory: Path, environment: dict[str, Any]) -> Verdict | None:
    try:
        stored = json.loads(memory.read_bytes())
        if stored["environment"] != environment or stored["verdict"]["status"] != "passed":
            return None
        verdict = stored["verdict"]
        return Verdict("passed before", str(verdict["summary"]), int(verdict["images"]), 0.0, True)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing remembered, or nothing legible: test again


def _remember(memory: Path, environment: dict[str, Any], verdict: Verdict) -> bool:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_name(f"{memory.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"environment": environment, "verdict": asdict(verdict)}), "utf-8")
        temporary.replace(memory)
    except OSError:
        return False
    return True
