"""Opening an engine: its file checked, its backend chosen or named, its certificate looked up."""

from __future__ import annotations

from pathlib import Path

from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.engines.auto import choose
from qfae_runtime.engines.backends import BACKENDS, DEVICES, load, measuring, reference_of, runner
from qfae_runtime.engines.base import Engine, card_of
from qfae_runtime.engines.files import EngineFile, check_engine_file
from qfae_runtime.engines.opened import OpenedEngine
from qfae_runtime.errors import EngineError, UsageError
from qfae_runtime.quantities import QUANTITIES

_SHOWN_BROKEN = 3


def open_engine(
    path: Path | str,
    *,
    backend: str | None = "auto",
    device: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    allow_uncertified: bool = False,
) -> OpenedEngine:
    """Open an engine file whose manifest lies beside it. Nothing is loaded before its hash has been checked.

    `backend` "auto" takes the fastest that is installed and certified here, and says so in `choice`: where several are,
    those not yet tested on this machine score the golden images first, at `batch_size` (None: what Scorer takes by
    default). A named one is taken as it is, and None is the one that the file is exported for. `device` "auto" is any
    device for the backend "auto", and the first that it runs on for the others. `threads` bounds the compute threads on
    the processor, 1 or more (None: all cores).

    Raises:
        UsageError: the backend or device is unknown, or a number is less than 1.
        EngineError: the file is missing, cannot be read or loaded, or has no certificate for this backend and device.
        ManifestError: the manifest is missing, damaged, or its hashes do not fit the files.

    """
    _check_choice(backend, device, threads, batch_size)
    file = check_engine_file(Path(path))
    choice = choose(file, device, threads, batch_size) if backend == "auto" else None
    if choice is not None:
        chosen, device = choice.backend, choice.device
    else:
        chosen, device = runner(file, backend, device)
    certificate = file.manifest.certified(file.path.name, chosen, device)
    if certificate is None and not allow_uncertified:
        raise EngineError(_uncertified(file, chosen, device))
    engine = load(file, chosen, device, threads)
    if certificate is not None:
        fault, certificate = _fitting(file, engine, certificate)
        if certificate is None and not allow_uncertified:
            engine.close()
            raise EngineError(fault)
    return OpenedEngine(engine, file.manifest, file.path, file.sha256, certificate, choice, threads)


def _check_choice(backend: str | None, device: str, threads: int | None, batch_size: int | None) -> None:
    faults = [
        f"{name}: got {got!r}, accepted are {', '.join(accepted)}"
        for name, got, accepted in (("backend", backend, BACKENDS), ("device", device, DEVICES))
        if got is not None and got not in accepted
    ]
    faults += [
        f"{name}: got {got}, expected 1 or more"
        for name, got in (("threads", threads), ("batch_size", batch_size))
        if got is not None and got < 1
    ]
    if faults:
        raise UsageError(faults)


def _uncertified(file: EngineFile, backend: str, device: str) -> str:
    path, manifest, manifest_name = file.path, file.manifest, file.manifest_name
    cure = "export it again with qfae-export, or pass --allow-uncertified to run it all the same"
    mine = [one for one in manifest.certificate if one.engine == path.name]
    if not mine:
        return f"{path}: {manifest_name} certifies nothing: it was never compared with PyTorch; {cure}"
    if (backend, device) != (reference_of(file.format).name, reference_of(file.format).devices[0]):
        cure = f"measure it here: {measuring(path, backend, device)}"
    same = [one for one in mine if (one.backend, one.device) == (backend, device)]
    if not same:
        measured = ", ".join(f"{one.backend} on {one.device}" for one in mine if one.passed) or "nothing"
        return f"{path}: certified for {measured}, not for {backend} on {device}; {cure}"
    if (failed := manifest.broken(path.name, backend, device)) is not None:
        broken = _broken(failed)
        return f"{path}: its comparison with PyTorch failed on {backend}, {device}{broken}; name another backend"
    if (some := manifest.certified(path.name, backend, device, batches=())) is not None:
        return _not_measured(file, some, manifest.batch_sizes)
    return f"{path}: the certificate in {manifest_name} was issued for other bytes than this file's; {cure}"


def _fitting(file: EngineFile, engine: Engine, certificate: CertificateEntry) -> tuple[str, CertificateEntry | None]:
    """Return the certificate for this card and these batch sizes, now that both are known; or a fault and None."""
    card, name = card_of(engine), file.path.name
    backend, device = certificate.backend, certificate.device
    if (fitting := file.manifest.certified(name, backend, device, card, engine.batches)) is not None:
        return "", fitting
    if (here := file.manifest.certified(name, backend, device, card, ())) is not None:
        return _not_measured(file, here, engine.batches), None
    return (
        f"{file.path}: certified on {certificate.gpu}, but this card is {card}, which computes with other "
        f"kernels; measure it here: {measuring(file.path, backend, device)}"
    ), None


def _not_measured(file: EngineFile, certificate: CertificateEntry, batches: tuple[int, ...]) -> str:
    missing = ", ".join(str(size) for size in batches if size not in certificate.batches)
    measured = ", ".join(str(size) for size in certificate.batches)
    return (
        f"{file.path}: runs in batches of {missing} too, but it was measured in batches of {measured} only; "
        f"measure all: {measuring(file.path, certificate.backend, certificate.device)}"
    )


def _broken(entry: CertificateEntry) -> str:
    """Return what a measurement broke, in parentheses; nothing where its numbers say nothing."""
    bounds, measured = entry.contract.bounds, entry.measured
    broken = [name for name in bounds if not entry.contract.allows(name, measured[name])]
    said = [
        f"{QUANTITIES[name].title} {measured[name]:.3g}, bound {bounds[name]:g}"
        if measured[name] is not None
        else f"{QUANTITIES[name].title} undefined"
        for name in broken
    ]
    more = f" and {len(said) - _SHOWN_BROKEN} more" if len(said) > _SHOWN_BROKEN else ""
    return f" ({'; '.join(said[:_SHOWN_BROKEN])}{more})" if said else ""
