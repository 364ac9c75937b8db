"""`--backend auto`: the fastest backend that is installed and certified here, by the rates of the self-test.

One candidate is taken as it is. Of several, those that were never tested in this environment are tested now; rates are
remembered with the verdicts, so that a machine pays for the comparison once.
"""

from __future__ import annotations

from dataclasses import replace

from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.engines.backends import lacking, load, runners_of, version_of
from qfae_runtime.engines.batches import chosen_batch
from qfae_runtime.engines.files import EngineFile
from qfae_runtime.engines.opened import Candidate, Choice, OpenedEngine
from qfae_runtime.errors import EngineError, SelfTestError
from qfae_runtime.selftest import self_test, verdict_before
from qfae_runtime.verdicts import PASSED, Runner, Verdict


def choose(file: EngineFile, device: str, threads: int | None, batch_size: int | None) -> Choice | None:
    """Return the fastest backend for a file on a device ("auto": on any) at a batch size; None if none is certified.

    Raises:
        ManifestError: the golden file, which the backends are timed on, is missing or damaged.

    """
    candidates = [_candidate(file, backend, place) for backend, place in runners_of(file, device)]
    fit = [one for one in candidates if one.not_taken is None]
    tested: dict[tuple[str, str], Verdict] = {}
    if len(fit) > 1:
        timed = {(one.backend, one.device): _timed(file, one, threads, batch_size, tested) for one in fit}
        candidates = [timed.get((one.backend, one.device), one) for one in candidates]
        passed = [one for one in candidates if one.not_taken is None]
        if not passed:  # the self-test of the first, the reference, will say with what numbers
            first = fit[0]
            return Choice(first.backend, first.device, "for all have failed their self-test", tuple(candidates))
        fit = passed
    if not fit:
        return None
    best = max(fit, key=lambda one: one.images_per_second or 0.0)
    batch = chosen_batch(batch_size, file.manifest.batch_sizes)
    others = tuple(_slower(one, best) for one in candidates)
    verdict = tested.get((best.backend, best.device))
    return Choice(best.backend, best.device, _why(best, fit, batch), others, verdict)


def _candidate(file: EngineFile, backend: str, device: str) -> Candidate:
    certificate = file.manifest.certified(file.path.name, backend, device)
    reason = lacked = lacking(backend, device)
    if reason is None and certificate is None:
        failed = file.manifest.broken(file.path.name, backend, device)
        reason = "no certificate" if failed is None else "broke its contract when it was compared with PyTorch"
    return Candidate(backend, device, lacked is None, reason)


def _timed(
    file: EngineFile,
    candidate: Candidate,
    threads: int | None,
    batch_size: int | None,
    tested: dict[tuple[str, str], Verdict],
) -> Candidate:
    """Return a candidate with its rate, found before or now; or with what keeps it from running here.

    A verdict that is found now is put into `tested`, by backend and device.
    """
    certificate = file.manifest.certified(file.path.name, candidate.backend, candidate.device)
    assert certificate is not None
    try:
        runner = Runner(candidate.backend, version_of(candidate.backend), candidate.device, threads)
        verdict = verdict_before(file, certificate, runner, batch_size)
        if verdict is None:
            verdict = _tested(file, candidate, certificate, threads, batch_size)
            tested[candidate.backend, candidate.device] = verdict
    except EngineError as error:
        return replace(candidate, not_taken=str(error).splitlines()[0])
    except SelfTestError as error:
        lines = str(error).splitlines()
        return replace(candidate, not_taken=f"self-test failed: {' '.join(lines[1:2]).strip() or lines[0]}")
    if verdict.status != PASSED:
        return replace(candidate, not_taken=f"self-test failed before: {verdict.summary}")
    return replace(candidate, images_per_second=verdict.images_per_second)


def _tested(
    file: EngineFile, candidate: Candidate, certificate: CertificateEntry, threads: int | None, batch_size: int | None
) -> Verdict:
    engine = load(file, candidate.backend, candidate.device, threads)
    with OpenedEngine(engine, file.manifest, file.path, file.sha256, certificate, threads=threads) as opened:
        return self_test(opened, batch_size=batch_size)


def _why(best: Candidate, fit: list[Candidate], batch: int) -> str:
    if best.images_per_second is None:
        return "the only one installed and certified here"
    of = f"of the {len(fit)} installed and certified here" if len(fit) > 1 else "the only one that passed its self-test"
    rate = f"{best.images_per_second:.3g} images a second in batches of {batch}"
    return f"the fastest {of}, {rate}" if len(fit) > 1 else f"{of}, {rate}"


def _slower(one: Candidate, best: Candidate) -> Candidate:
    if one.not_taken is not None or (one.backend, one.device) == (best.backend, best.device):
        return one
    return replace(one, not_taken=f"slower, {one.images_per_second:.3g} images a second")
