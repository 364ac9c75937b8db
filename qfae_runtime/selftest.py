"""Does this engine still compute, on this machine, what PyTorch computed? Golden images say so.

Runs on first use of an engine on a machine, backend and version. A passed verdict is remembered in a cache folder
under a key made of the engine's real bytes and the environment: a changed engine is always tested again.

The bounds are the contract's, or tighter: an engine that was certified with errors far below the contract must stay
near them, for another processor's rounding moves a score by as much as the certificate states, not by ten times that.
Rank correlation and AUROC are left out: on 16 images, one swapped pair of equal scores would move them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qfae_runtime.agreement import OF_ALL_IMAGES, QUANTITIES, Scale, measure_agreement
from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.contract import CONTRACTS, Contract
from qfae_runtime.engines import OpenedEngine
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.errors import SelfTestError
from qfae_runtime.golden import Golden, golden_bytes, load_golden
from qfae_runtime.preprocess import probe

_SHOWN_FAILURES = 6
_MARGIN = 10.0

# Errors that another processor's rounding may give an engine whose certified error is 0.
_LEAST = {
    "score_abs": 5e-6,
    "map_abs": 5e-6,
    "map_cosine_min": 1e-6,
    "reconstruction_levels": 1.0,
    "reconstruction_p999": 1.0,
}
_OTHER_LEAST = 5e-5
NOT_ON_FEW_IMAGES = (*OF_ALL_IMAGES, "map_cosine_p1")


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
    contract = contract_for(opened.certificate, opened.manifest.files[opened.path.name].precision or "fp32")
    if opened.manifest.probe not in (None, probe(opened.manifest.preprocess)):
        raise SelfTestError(
            f"{opened.path}: self-test failed: this machine prepares images otherwise than the one that exported the "
            "engine; do not use its scores: install the numpy and qfae that the manifest names, or export again here"
        )
    content = golden_bytes(opened)
    if content is None:
        return Verdict("skipped", "the manifest names no golden file", 0, 0.0, False)
    environment = _environment(opened, hashlib.sha256(content).hexdigest(), contract)
    memory = (cache or cache_folder()) / "selftest" / f"{_key_of(environment)}.json"
    if not force and (before := _recall(memory, environment)) is not None:
        return before
    golden = load_golden(content, opened.manifest.golden or "", opened.manifest.image_size)
    start = time.perf_counter()
    scale = opened.certificate.scale if opened.certificate is not None else None
    if scale is not None and not _plausible(scale, golden.scores):
        raise SelfTestError(
            f"{opened.path}: self-test failed: the certificate's scale (interquartile range {scale.score_iqr:g}, maps "
            f"{scale.map_p999:g}) is beyond what its golden images span; export the engine again"
        )
    agreement = measure_agreement(golden.scores, _run_golden(opened.engine, golden), scale=scale)
    if shown := contract.failures(agreement)[:_SHOWN_FAILURES]:
        raise SelfTestError(
            f"{opened.path}: self-test failed on {environment['backend']} {environment['version']}, "
            f"{environment['device']}: {len(golden.images)} golden images do not give PyTorch's outputs:\n  "
            + "\n  ".join(shown)
            + "\ndo not use its scores; export the engine again, or use the backend version it was certified on"
        )
    seconds = round(time.perf_counter() - start, 3)
    verdict = Verdict("passed", agreement.summary(), len(golden.images), seconds, False)
    return replace(verdict, remembered=_remember(memory, environment, verdict))


def contract_for(certificate: CertificateEntry | None, precision: str = "fp32") -> Contract:
    """Return the bounds of the self-test: the contract's, tightened to _MARGIN times the certified errors.

    Never tighter than what was certified itself: the golden images are among those, and the worst of them may be one.
    """
    contract = certificate.contract if certificate is not None else CONTRACTS[precision]
    contract = contract.without(NOT_ON_FEW_IMAGES)
    if certificate is None:
        return contract
    bounds = dict(contract.bounds)
    for name, quantity in QUANTITIES.items():
        measured = certificate.measured[name]
        if measured is None or name in NOT_ON_FEW_IMAGES:
            continue
        least = _LEAST.get(name, _OTHER_LEAST)
        if quantity.larger_is_better:
            bounds[name] = max(1 - max(_MARGIN * (1 - measured), least), min(bounds.get(name, -1.0), measured))
        else:
            bounds[name] = min(max(_MARGIN * measured, least), max(bounds.get(name, math.inf), measured))
    return replace(contract, bounds=bounds)


def _plausible(scale: Scale, golden: Scores) -> bool:
    """Say whether a scale can be that of images of which the golden ones are the lowest to the highest scores.

    Were it larger, errors would look small beside it.
    """
    span = float(golden.score.max() - golden.score.min())
    return scale.score_iqr <= span * (1 + 1e-6) and scale.map_p999 <= 2 * float(golden.anomaly_map.max())


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
    return Scores.joined(engine.run(golden.images[a:b]) for a, b in pairwise(cuts) if b > a)


def _environment(opened: OpenedEngine, golden_sha256: str, contract: Contract) -> dict[str, Any]:
    return {
        "engine_sha256": opened.sha256,
        "golden_sha256": golden_sha256,
        "contract": {"name": contract.name, "bounds": dict(contract.bounds)},
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
