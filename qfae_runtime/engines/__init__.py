"""Opening an engine: find and check its manifest, hold its bytes against it, look up its certificate."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Self

from qfae_runtime.engines.base import OUTPUT_NAMES, Engine, Scores
from qfae_runtime.errors import EngineError, ManifestError, UsageError
from qfae_runtime.manifest import CertificateEntry, FileEntry, Manifest, check_digest, find_manifest

__all__ = ["BACKENDS", "DEVICES", "Engine", "OpenedEngine", "Scores", "open_engine"]

BACKENDS = ("auto", "onnxruntime", "tensorrt")
DEVICES = ("auto", "cpu", "cuda:0")

RUNS = {"onnx": ("onnxruntime", "cpu"), "plan": ("tensorrt", "cuda:0"), "rtx-plan": ("tensorrt-rtx", "cuda:0")}
"""By format: the backend that runs it, and where unless a device is named."""


@dataclass(frozen=True)
class OpenedEngine:
    """An engine ready to run, what its manifest says, and its certificate for this backend and device.

    `sha256` is the hash of the bytes that were loaded; `certificate` is None only if the caller allowed it.
    """

    engine: Engine
    manifest: Manifest
    path: Path
    sha256: str
    certificate: CertificateEntry | None

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


def open_engine(
    path: Path | str,
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    allow_uncertified: bool = False,
) -> OpenedEngine:
    """Open an engine file whose manifest lies beside it. Nothing is loaded before its hash has been checked.

    `backend` and `device` "auto" follow the file: ONNX runs in ONNX Runtime on the CPU, a plan in TensorRT on the
    first GPU.

    Raises:
        UsageError: the backend or device is unknown.
        EngineError: the file is missing, cannot be read or loaded, or has no certificate for this backend and device.
        ManifestError: the manifest is missing, damaged, or its hashes do not fit the files.

    """
    _check_choice(backend, device)
    path = Path(path)
    try:
        if not path.is_file():
            raise EngineError(f"{path}: no such engine file; write one with: qfae-export --ckpt NAME.pt")
        manifest_path = find_manifest(path)
        manifest = Manifest.load(manifest_path)
        entry = _entry_of(manifest, path, manifest_path)
        model, digest = _verified_model(manifest, path, entry, manifest_path.name)
    except OSError as error:
        raise EngineError(
            f"{error.filename or path}: cannot be read ({error.strerror or error}); "
            "check who may read the engine's files and their folder"
        ) from None
    chosen, device = _runner(path, entry.format or "onnx", backend, device)
    certificate = manifest.certified(path.name, chosen, device)
    if certificate is None and not allow_uncertified:
        raise EngineError(_uncertified(manifest, path, chosen, device, manifest_path.name))
    engine = _load(model, path, manifest, chosen, device, threads)
    return OpenedEngine(engine, manifest, path, digest, certificate)


def _runner(path: Path, format: str, backend: str, device: str) -> tuple[str, str]:
    """Return the backend and the device that run a file of this format.

    Raises:
        EngineError: what was asked for cannot run it.

    """
    runner, place = RUNS[format]
    if backend != "auto" and not runner.startswith(backend):
        raise EngineError(f"{path}: format {format!r} is run by {runner}, not by {backend}; leave out the backend")
    if device != "auto" and (device == "cpu") != (place == "cpu"):
        raise EngineError(
            f"{path}: format {format!r} runs on {place}, not on {device}; leave out the device"
            + ("" if place != "cpu" else ", or build a plan for the GPU: qfae-export --onnx " + quote(str(path)))
        )
    return runner, place if device == "auto" else device


def _load(
    model: Path | bytes, path: Path, manifest: Manifest, backend: str, device: str, threads: int | None
) -> Engine:
    # Imported here, so that a manifest can be read where a backend is not installed.
    if backend == "onnxruntime":
        from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(model, manifest.image_size, manifest.max_batch, threads)
    from qfae_runtime.engines.tensorrt import TensorRtEngine

    plan = model if isinstance(model, bytes) else model.read_bytes()
    return TensorRtEngine(plan, manifest.image_size, manifest.max_batch, backend=backend, device=device, name=str(path))


def _check_choice(backend: str, device: str) -> None:
    faults = []
    if backend not in BACKENDS:
        faults.append(f"backend: got {backend!r}, accepted are {', '.join(BACKENDS)}")
    if device not in DEVICES:
        faults.append(f"device: got {device!r}, accepted are {', '.join(DEVICES)}")
    if faults:
        raise UsageError(faults)


def _entry_of(manifest: Manifest, path: Path, manifest_path: Path) -> FileEntry:
    entry = manifest.files.get(path.name)
    engines = [name for name, one in manifest.files.items() if one.role == "engine"]
    if entry is None or entry.role != "engine":
        raise ManifestError(
            f"{manifest_path}: lists no engine {path.name!r}, only {', '.join(engines) or 'none'}; "
            "engine and manifest must come from the same export"
        )
    missing = [name for name in OUTPUT_NAMES if name not in {tensor.name for tensor in manifest.outputs}]
    if missing:
        raise EngineError(
            f"{path}: half an engine, without {', '.join(missing)}; it cannot score images by itself: "
            "export the whole with qfae-export, without --part"
        )
    return entry


def _verified_model(manifest: Manifest, path: Path, entry: FileEntry, manifest_name: str) -> tuple[Path | bytes, str]:
    weights = f"{path.name}.data"
    if weights in manifest.files:
        # External data is read by the backend itself, from the folder of the engine.
        manifest.verify_files(path.parent, [path.name, weights])
        return path, entry.sha256
    # Hashed and loaded from one read: the file cannot be exchanged in between, nor refer to other files.
    model = path.read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    check_digest(path, entry, digest, manifest_name)
    return model, digest


def _uncertified(manifest: Manifest, path: Path, backend: str, device: str, manifest_name: str) -> str:
    cure = "export it again with qfae-export, or pass --allow-uncertified to run it all the same"
    mine = [one for one in manifest.certificate if one.engine == path.name]
    if not mine:
        return f"{path}: {manifest_name} certifies nothing: it was never compared with PyTorch; {cure}"
    same = [one for one in mine if (one.backend, one.device) == (backend, device)]
    if not same:
        measured = ", ".join(f"{one.backend} on {one.device}" for one in mine)
        return f"{path}: certified for {measured}, not for {backend} on {device}; {cure}"
    if not any(one.passed for one in same):
        return f"{path}: its comparison with PyTorch failed on {backend}, {device}; {cure}"
    largest = max(max(one.batches) for one in same)
    if largest < manifest.max_batch:
        return (
            f"{path}: certified for batches of up to {largest}, but {manifest_name} allows {manifest.max_batch}; {cure}"
        )
    return f"{path}: the certificate in {manifest_name} was issued for other bytes than this file's; {cure}"
