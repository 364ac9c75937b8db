"""Does this engine still compute, on this machine, what PyTorch computed? Golden images say so, and how fast it is.

Runs on first use of an engine on a machine: once for each backend, version, number of threads and batch size
(`verdicts.py` remembers it). Every batch size that a run may meet is run: with different images, and with the
highest-scoring one in every place. The batches that are timed are compared as well.

The bounds are the contract's, or tighter: an engine in FP16 that was certified with errors far below the contract must
stay near them, for another CPU's rounding moves a score by as much as the certificate states, not by ten times that.
Ranks and means are left out: on a dozen images, one swapped pair of equal scores would move them.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path

from qfae_runtime.agreement import TYPICAL, Scale
from qfae_runtime.arrays import UInt8
from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.contract import CONTRACTS, Contract, owed
from qfae_runtime.coverage import agreement_at, bounds_at, calls_of
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.batches import chosen_batch
from qfae_runtime.engines.files import EngineFile
from qfae_runtime.engines.opened import OpenedEngine
from qfae_runtime.errors import SelfTestError
from qfae_runtime.golden import Golden, load_golden, read_golden
from qfae_runtime.preprocess import probe
from qfae_runtime.quantities import OF_ALL_IMAGES, QUANTITIES
from qfae_runtime.verdicts import FAILED, PASSED, Runner, Verdict, environment_of, recall, remember

_SHOWN_FAILURES = 6

# On a CPU, a batch that takes longer than this was timed well enough by the test itself: more would cost minutes at
# full size. On a GPU the first run of a batch size may compile kernels for as long as it likes.
_LONG_SECONDS = 2.0
_MOST_TIMED = 8
_TIMED_SECONDS = 0.5
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
_TIGHTENED = (
    "score_abs",
    "score_distance_max",
    "map_abs",
    "map_cosine_min",
    "reconstruction_levels",
    "reconstruction_p999",
    "stress_distance",
    "stress_angle",
    "stress_reconstruction",
)
NOT_ON_FEW_IMAGES = (*(name for name in OF_ALL_IMAGES if name not in TYPICAL), "map_cosine_p1")


def self_test(
    opened: OpenedEngine, *, batch_size: int | None = None, force: bool = False, cache: Path | None = None
) -> Verdict:
    """Score the golden images and hold the outputs against the contract, unless that was done here before.

    What was done to choose the backend is not repeated either.

    `batch_size` is what the engine will be run with (None: what Scorer takes by default). `cache` is the folder for
    remembered verdicts (None: see verdicts.cache_folder); failing to write it is no fault.

    Raises:
        SelfTestError: an output breaks its bound; the message holds the numbers.
        ManifestError: the golden file is missing, damaged, or not the one the manifest names.

    """
    precision = opened.manifest.files[opened.path.name].precision or "fp32"
    contract = contract_for(opened.certificate, owed(precision, opened.engine.backend))
    if opened.manifest.probe not in (None, probe(opened.manifest.preprocess)):
        raise SelfTestError(
            f"{opened.path}: self-test failed: this machine prepares images otherwise than the one that exported the "
            "engine; do not use its scores: install the numpy and qfae that the manifest names, or export again here"
        )
    content = read_golden(opened.manifest, opened.directory, certified=opened.certificate is not None)
    if content is None:
        return Verdict("skipped", "the manifest names no golden file", 0, 0.0, False)
    batch = chosen_batch(batch_size, opened.engine.batches)
    golden_sha256 = hashlib.sha256(content).hexdigest()
    environment = environment_of(opened.sha256, golden_sha256, contract, Runner.of(opened), batch)
    if not force and (just_now := _just_now(opened, batch)) is not None:
        return just_now
    if not force and (before := recall(environment, cache)) is not None and before.status == PASSED:
        return replace(before, status="passed before")
    golden = load_golden(content, opened.manifest.golden or "", opened.manifest.image_size)
    start = time.perf_counter()
    scale = opened.certificate.scale if opened.certificate is not None else None
    if scale is not None and not _plausible(scale, golden):
        raise SelfTestError(
            f"{opened.path}: self-test failed: the certificate's scale (interquartile range {scale.score_iqr:g}) is "
            "beyond what its golden images span; export the engine again"
        )
    reference = golden.reference(scale)
    calls, rate = _run_golden(opened.engine, golden, batch)
    agreement = reference.compare(_first_outputs(calls, len(golden.images)))
    seconds = round(time.perf_counter() - start, 3)
    verdict = Verdict(PASSED, agreement.summary(), len(golden.images), seconds, False, batch, rate)
    names = [f"golden image {number}" for number in range(len(golden.images))]
    shown = contract.failures(agreement, names)
    for size in sorted({len(numbers) for numbers, _ in calls}, reverse=True):
        some = [call for call in calls if len(call[0]) == size]
        numbers = [number for call, _ in some for number in call]
        at_size = agreement_at(reference, numbers, Scores.joined(outputs for _, outputs in some))
        in_batch = bounds_at(contract, at_size).failures(at_size, [names[number] for number in numbers])
        shown += [f"batch {size}: {failure}" for failure in in_batch]
    if shown := shown[:_SHOWN_FAILURES]:
        # Remembered only so that --backend auto need not find it out again; this test is always run again.
        remember(environment, replace(verdict, status=FAILED, summary=shown[0], images_per_second=None), cache)
        raise SelfTestError(
            f"{opened.path}: self-test failed on {environment['backend']} {environment['version']}, "
            f"{environment['device']}: {len(golden.images)} golden images do not give PyTorch's outputs:\n  "
            + "\n  ".join(shown)
            + "\ndo not use its scores; export the engine again, or use the backend version it was certified on"
        )
    return replace(verdict, remembered=remember(environment, verdict, cache))


def verdict_before(
    file: EngineFile, certificate: CertificateEntry, runner: Runner, batch_size: int | None
) -> Verdict | None:
    """Return what a self-test found here before, "passed" or "failed", without opening the engine.

    Raises:
        ManifestError: the golden file is missing or damaged.

    """
    content = read_golden(file.manifest, file.path.parent, certified=True)
    contract = contract_for(certificate)
    batch = chosen_batch(batch_size, file.manifest.batch_sizes)
    golden_sha256 = hashlib.sha256(content or b"").hexdigest()
    return recall(environment_of(file.sha256, golden_sha256, contract, runner, batch))


def contract_for(certificate: CertificateEntry | None, precision: str = "fp32") -> Contract:
    """Return the self-test's bounds: the contract's; but for FP32, tightened to _MARGIN times the certified errors.

    Never tighter than what was certified itself: the golden images are among those, and the worst of them may be one.
    FP32's are in units of what rounding costs, and need no tightening.
    """
    contract = certificate.contract if certificate is not None else CONTRACTS[precision]
    contract = contract.without(NOT_ON_FEW_IMAGES)
    if certificate is None or contract.name == "fp32":
        return contract
    bounds = dict(contract.bounds)
    for name in _TIGHTENED:
        measured = certificate.measured[name]
        if measured is None:
            continue
        least = _LEAST.get(name, _OTHER_LEAST)
        if QUANTITIES[name].larger_is_better:
            bounds[name] = max(1 - max(_MARGIN * (1 - measured), least), min(bounds.get(name, -1.0), measured))
        else:
            bounds[name] = min(max(_MARGIN * measured, least), max(bounds.get(name, math.inf), measured))
    return replace(contract, bounds=bounds)


def _just_now(opened: OpenedEngine, batch: int) -> Verdict | None:
    """Return the verdict that this backend was chosen by, if its self-test was run for that, at this batch size."""
    verdict = opened.choice.verdict if opened.choice is not None else None
    return verdict if verdict is not None and (verdict.status, verdict.batch_size) == (PASSED, batch) else None


def _plausible(scale: Scale, golden: Golden) -> bool:
    """Say whether a scale can be that of images of which the golden ones are the lowest to the highest scores.

    Were it larger, errors would look small beside it.
    """
    scores = golden.scores.score[golden.real]
    return scale.score_iqr <= float(scores.max() - scores.min()) * (1 + 1e-6)


Calls = list[tuple[list[int], Scores]]
"""What was run: the numbers of the golden images of each call, and the outputs on them."""


def _run_golden(engine: Engine, golden: Golden, batch_size: int) -> tuple[Calls, float]:
    """Return what every call gave, at each size that a run at this batch size may meet, and its images a second."""
    sizes = [size for size in engine.batches if size <= batch_size] or [batch_size]
    calls: Calls = []
    seconds = 0.0
    for size, batches in calls_of(golden.scores.score, sizes, golden.stress).items():
        for numbers in batches:
            start = time.perf_counter()
            calls.append((numbers, engine.run(golden.images[numbers])))
            if size == max(sizes):
                seconds = (time.perf_counter() - start) / len(numbers)
    if engine.device != "cpu" or seconds * batch_size < _LONG_SECONDS:
        numbers = [number % len(golden.images) for number in range(batch_size)]
        outputs, seconds = _timed(engine, golden.images[numbers])
        calls += [(numbers, one) for one in outputs]
    return calls, round(1 / max(seconds, 1e-9), 3)


def _timed(engine: Engine, batch: UInt8) -> tuple[list[Scores], float]:
    """Time full batches, the first not counted; the quickest tells the engine apart from what else the machine does.

    Returns the first and the last run's outputs, and the seconds an image took.
    """
    first = last = engine.run(batch)
    times: list[float] = []
    while len(times) < _MOST_TIMED and sum(times) < _TIMED_SECONDS:
        start = time.perf_counter()
        last = engine.run(batch)
        times.append(time.perf_counter() - start)
    return [first, last], min(times) / len(batch)


def _first_outputs(calls: Calls, count: int) -> Scores:
    """Return the outputs on all golden images, each as it first came."""
    first: dict[int, Scores] = {}
    for numbers, outputs in calls:
        for place, number in enumerate(numbers):
            if number not in first:
                first[number] = outputs.of(slice(place, place + 1))
    return Scores.joined(first[number] for number in range(count))
