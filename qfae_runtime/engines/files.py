"""An engine's file before anything is loaded: its manifest found and read, its bytes held against it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from qfae_runtime.engines.base import INPUT_NAME, OUTPUT_NAMES, one_too_many
from qfae_runtime.engines.external import external_files, inputs_and_outputs, refuse_scattered
from qfae_runtime.errors import EngineError, ManifestError
from qfae_runtime.hashing import WEIGHTS_SUFFIX, joined
from qfae_runtime.manifest import FileEntry, Manifest, check_digest, find_manifest


class EngineFile(NamedTuple):
    """An engine file whose bytes are those of its manifest.

    `model` is what a backend loads: the bytes, or the path where there is external data, which the backend reads.
    """

    path: Path
    manifest: Manifest
    manifest_name: str
    entry: FileEntry
    model: Path | bytes
    sha256: str

    @property
    def format(self) -> str:
        """What the file is, e.g. "onnx"; one of manifest.FORMATS."""
        return self.entry.format or "onnx"

    @property
    def precision(self) -> str:
        """What the file computes in, e.g. "fp32"."""
        return self.entry.precision or "fp32"


def check_engine_file(path: Path) -> EngineFile:
    """Find the manifest beside an engine file and hold the bytes against it.

    Raises:
        EngineError: the file is missing, cannot be read, or refers to files that the manifest does not list.
        ManifestError: the manifest is missing, damaged, or its hashes do not fit the files.

    """
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
    return EngineFile(path, manifest, manifest_path.name, entry, model, digest)


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
    # Hashed and loaded from one read: the file cannot be exchanged in between.
    model = path.read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    check_digest(path, entry, digest, manifest_name)
    weights = path.name + WEIGHTS_SUFFIX
    listed = weights in manifest.files
    if (entry.format or "onnx") == "onnx":
        for kind, names, expected in zip(
            ("input", "output"), inputs_and_outputs(model, str(path)), ((INPUT_NAME,), OUTPUT_NAMES), strict=True
        ):
            if more := [name for name in names if name not in expected] or names[len(expected) :]:
                raise EngineError(one_too_many(str(path), kind, more[0], expected))
        foreign = sorted(external_files(model, str(path)) - ({weights} if listed else set()))
        if foreign:
            raise EngineError(
                f"{path}: takes weights from {foreign[0]!r}, which {manifest_name} holds no hash of; "
                "export it again with qfae-export"
            )
    if not listed:
        return model, digest
    # External data is read by the backend itself, from the folder of the engine.
    refuse_scattered(path, "every backend", linked_alike=True)
    manifest.verify_files(path.parent, [weights])
    return path, joined(digest, manifest.files[weights].sha256)
