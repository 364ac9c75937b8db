"""NAME.json, the manifest: what an engine is, which bytes it is made of, and what was measured about it.

A manifest is untrusted until it has been checked here; an engine is not opened before its bytes fit it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from qfae_runtime.certificate import CertificateEntry, read_certificate
from qfae_runtime.checked import Fields, escaped, parse_json
from qfae_runtime.contract import owed
from qfae_runtime.errors import ManifestError
from qfae_runtime.hashing import WEIGHTS_SUFFIX, joined, sha256_of
from qfae_runtime.preprocess import MAX_IMAGE_SIZE, PreprocessSpec

__all__ = [
    "CertificateEntry",
    "FileEntry",
    "Manifest",
    "TensorSpec",
    "find_manifest",
    "sha256_of",
]

SCHEMA_VERSION = 6
ROLES = ("engine", "weights", "golden")
FORMATS = ("onnx", "plan", "rtx-plan")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MAX_BATCH = 4096
MOST_BATCH_SIZES = 32
_MAX_MANIFEST_BYTES = 16 * 2**20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


@dataclass(frozen=True)
class FileEntry:
    """One file beside the manifest. Only engines have `format` and `precision`; weights: external data."""

    role: str
    sha256: str
    bytes: int
    format: str | None = None
    precision: str | None = None

    @classmethod
    def of(cls, path: Path, role: str, format: str | None = None, precision: str | None = None) -> Self:
        """Describe a file that exists."""
        return cls(role, sha256_of(path), path.stat().st_size, format, precision)


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of an input or output; the first dimension is "batch"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything `NAME.json` says. `certificate` is empty for an engine that nobody measured.

    `batch_sizes` are the only sizes that its ONNX engines are run with, ascending from 1; a plan has those it was built
    for. `files` maps plain file names (same folder) to their entries; a model may have several engines.
    `probe` is the exporter's preprocess.probe. `precision` says by engine file what is computed in which type; it and
    `provenance` are free-form JSON objects of finite numbers, strings and the like.
    """

    name: str
    preprocess: PreprocessSpec
    batch_sizes: tuple[int, ...]
    files: dict[str, FileEntry]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    golden: str | None
    probe: str | None = None
    precision: dict[str, Any] = field(default_factory=dict)
    certificate: tuple[CertificateEntry, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """S, in pixels."""
        return self.preprocess.image_size

    @property
    def max_batch(self) -> int:
        """Most images that one batch may hold."""
        return self.batch_sizes[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "image_size": self.image_size,
            "batch_sizes": list(self.batch_sizes),
            "files": {name: dataclasses.asdict(entry) for name, entry in self.files.items()},
            "golden": self.golden,
            "inputs": [dataclasses.asdict(tensor) for tensor in self.inputs],
            "outputs": [dataclasses.asdict(tensor) for tensor in self.outputs],
            "preprocess": {
                "spec": self.preprocess.to_dict(),
                "sha256": self.preprocess.sha256(),
                "probe": self.probe,
            },
            "precision": self.precision,
            "certificate": [entry.to_dict() for entry in self.certificate] or None,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, stored: Any, where: str = "manifest") -> Manifest:
        """Check and read what `to_dict` wrote; `where` names the file in errors.

        Raises:
            ManifestError: naming the key, what was got and what was expected.

        """
        fields = Fields(stored, where)
        _check_schema_version(stored, where)
        fields.whole("schema_version", SCHEMA_VERSION, SCHEMA_VERSION)
        files = {
            _plain_name(name, where): _read_file_entry(fields.inner("files"), name) for name in fields.mapping("files")
        }
        spec, prepared = _read_preprocess(fields.inner("preprocess"), where)
        manifest = cls(
            name=_plain_name(fields.text("name"), where),
            preprocess=spec,
            probe=prepared,
            batch_sizes=_read_batch_sizes(fields),
            files=files,
            inputs=_read_tensors(fields.array("inputs"), where, "inputs"),
            outputs=_read_tensors(fields.array("outputs"), where, "outputs"),
            golden=fields.optional_text("golden"),
            precision=fields.free_form("precision"),
            certificate=read_certificate(fields, where),
            provenance=fields.free_form("provenance"),
        )
        size = fields.whole("image_size", 1, MAX_IMAGE_SIZE)
        if size != manifest.image_size:
            raise fields.fault("image_size", f"{manifest.image_size}, as in 'preprocess.spec'")
        if manifest.golden is not None and files.get(manifest.golden) is None:
            raise fields.fault("golden", f"one of the names in 'files' ({', '.join(files) or 'none'})")
        fields.finish()
        return manifest

    def save(self, path: Path) -> None:
        """Write the manifest, atomically.

        Raises:
            ManifestError: it holds what a manifest must not (a number that is not finite, say).

        """
        try:
            # Names of files and folders, say: anything may be in them.
            text = json.dumps(escaped(self.to_dict()), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ManifestError(f"{path.name}: cannot be written as JSON: {error}") from None
        Manifest.from_dict(parse_json(text, path.name), path.name)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read and check a manifest.

        Raises:
            ManifestError: it is missing, no JSON, of another schema version, or says something impossible.

        """
        try:
            if path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise ManifestError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes, this is no manifest")
            text = path.read_bytes()
        except OSError as error:
            raise ManifestError(
                f"{path}: cannot be read ({error.strerror}); qfae-export writes it beside the engine"
            ) from None
        return cls.from_dict(parse_json(text, path.name), path.name)

    def verify_files(self, directory: Path, names: Iterable[str] | None = None) -> None:
        """Hold the bytes of the files (all, or only `names`) against the manifest.

        Raises:
            ManifestError: a file is not listed, is missing, or has other bytes.

        """
        for name in self.files if names is None else names:
            entry = self.files.get(name)
            if entry is None:
                raise ManifestError(
                    f"{self.name}.json does not list {name!r}, only {', '.join(self.files)}; "
                    "use an engine that qfae-export wrote together with this manifest"
                )
            path = directory / name
            if not path.is_file():
                raise ManifestError(f"{path}: listed in {self.name}.json but not there; copy it beside the engine")
            check_digest(path, entry, sha256_of(path), f"{self.name}.json")

    def engine_sha256(self, engine: str) -> str | None:
        """Return the hash that certificates bind an engine by, its weights included; None where it is not listed."""
        entry, weights = self.files.get(engine), self.files.get(engine + WEIGHTS_SUFFIX)
        return None if entry is None else joined(entry.sha256, weights.sha256 if weights is not None else None)

    def certified(
        self,
        engine: str,
        backend: str,
        device: str,
        gpu: str | None = None,
        batches: Collection[int] | None = None,
    ) -> CertificateEntry | None:
        """Return the passed certificate for these very bytes on a backend, device and card, if there is one.

        `gpu` None: on any card. `batches` are the sizes that the engine will be run with, each of which must have been
        measured; None: those of this manifest, and for a plan, whose own are known once it is open, any.
        """
        entry = self.files.get(engine)
        if entry is None:
            return None
        if batches is None:
            batches = self.batch_sizes if entry.format == "onnx" else ()
        bound_to = (self.engine_sha256(engine), owed(entry.precision or "fp32", backend))
        for one in self.certificate:
            same = (one.engine, one.backend, one.device) == (engine, backend, device)
            same = same and gpu in (None, one.gpu)
            mine = (one.engine_sha256, one.contract.name) == bound_to
            if same and mine and one.passed and set(batches) <= set(one.batches):
                return one
        return None

    def broken(self, engine: str, backend: str, device: str) -> CertificateEntry | None:
        """Return the measurement of these very bytes on a backend and device that broke its contract, if any."""
        for one in self.certificate:
            same = (one.engine, one.backend, one.device) == (engine, backend, device)
            if same and one.engine_sha256 == self.engine_sha256(engine) and not one.passed:
                return one
        return None


def check_digest(path: Path, entry: FileEntry, digest: str, manifest: str) -> None:
    """Refuse a file whose hash is not the manifest's.

    Raises:
        ManifestError: both hashes' beginnings, and the cure.

    """
    if digest != entry.sha256:
        raise ManifestError(
            f"{path}: its bytes do not match {manifest}: SHA-256 {digest[:16]}..., "
            f"expected {entry.sha256[:16]}...; "
            "the file was altered, cut short or belongs to another export: copy both again, or export again"
        )


def find_manifest(engine_path: Path) -> Path:
    """Find the manifest beside an engine: brats.onnx, brats.fp16.onnx and brats.plan all have brats.json.

    Raises:
        ManifestError: there is none.

    """
    stem = engine_path.name.rpartition(".")[0] or engine_path.name
    candidates = [stem]
    while "." in stem:
        stem = stem.rpartition(".")[0]
        candidates.append(stem)
    for candidate in candidates:
        path = engine_path.with_name(candidate + ".json")
        if path.is_file():
            return path
    raise ManifestError(
        f"{engine_path}: no manifest beside it (looked for {', '.join(c + '.json' for c in candidates)}); "
        "copy the .json that qfae-export wrote with the engine, or export again"
    )


def _check_schema_version(stored: dict[str, Any], where: str) -> None:
    version = stored.get("schema_version")
    if type(version) is int and version < SCHEMA_VERSION:
        raise ManifestError(
            f"{where}: schema_version is {version}, this qfae reads {SCHEMA_VERSION}; export the engine again, or use "
            f"the qfae that wrote it"
        )
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ManifestError(
            f"{where}: schema_version is {version}, this qfae reads {SCHEMA_VERSION}; "
            f"install a qfae that reads schema_version {version} (pip install --upgrade qfae)"
        )


def _read_batch_sizes(fields: Fields) -> tuple[int, ...]:
    sizes = fields.array("batch_sizes")
    whole = all(type(size) is int and 1 <= size <= MAX_BATCH for size in sizes)
    if not whole or not 1 <= len(sizes) <= MOST_BATCH_SIZES or sizes[0] != 1 or sizes != sorted(set(sizes)):
        raise fields.fault(
            "batch_sizes", f"1 to {MOST_BATCH_SIZES} whole numbers in 1..{MAX_BATCH}, ascending, the first of them 1"
        )
    return tuple(sizes)


def _plain_name(name: str, where: str) -> str:
    # A manifest may come from anywhere: a name in it must not lead out of its folder.
    if not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise ManifestError(
            f"{where}: file name {name!r}: expected a plain name in the same folder (letters, digits and _ . + -)"
        )
    return name


def _read_file_entry(files: Fields, name: str) -> FileEntry:
    fields = files.inner(name)
    entry = FileEntry(
        role=fields.text("role"),
        sha256=fields.digest("sha256"),
        bytes=fields.whole("bytes", 0, 2**50),
        format=fields.optional_text("format"),
        precision=fields.optional_text("precision"),
    )
    fields.finish()
    if entry.role not in ROLES:
        raise fields.fault("role", f"one of {', '.join(ROLES)}")
    engine = entry.role == "engine"
    if entry.format not in (FORMATS if engine else (None,)):
        raise fields.fault("format", f"one of {', '.join(FORMATS)}" if engine else "null (only engines have one)")
    if entry.precision not in (PRECISIONS if engine else (None,)):
        raise fields.fault("precision", f"one of {', '.join(PRECISIONS)}" if engine else "null")
    return entry


def _read_preprocess(fields: Fields, where: str) -> tuple[PreprocessSpec, str | None]:
    try:
        spec = PreprocessSpec.from_dict(fields.mapping("spec"))
    except ManifestError as error:
        raise ManifestError(f"{where}: {error}") from None
    if fields.digest("sha256") != spec.sha256():
        raise fields.fault("sha256", f"{spec.sha256()}, the hash of 'preprocess.spec'")
    prepared = None if fields.is_null("probe") else fields.digest("probe")
    fields.finish()
    return spec, prepared


def _read_tensors(stored: list[Any], where: str, key: str) -> tuple[TensorSpec, ...]:
    tensors = []
    for number, value in enumerate(stored):
        fields = Fields(value, where, f"{key}.{number}")
        shape = fields.array("shape")
        sizes = [size for size in shape[1:] if type(size) is not int or size < 1]
        if not shape or shape[0] != "batch" or sizes:
            raise fields.fault("shape", '["batch", sizes...]')
        tensors.append(TensorSpec(fields.text("name"), fields.text("dtype"), tuple(shape)))
        fields.finish()
    return tuple(tensors)
