"""NAME.golden.npz: a few input images and the PyTorch FP32 model's outputs on them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.opened import OpenedEngine
from qfae_runtime.errors import ManifestError
from qfae_runtime.manifest import Manifest, check_digest

MAX_IMAGES = 16
_RECOMPUTE = "export the engine again"


class Golden(NamedTuple):
    """`images` uint8 (n, S, S, 3), 1 <= n <= 16, and the reference `scores` on them."""

    images: UInt8
    scores: Scores


def save_golden(path: Path, golden: Golden) -> None:
    """Write a golden file; the keys are `images` and the names of the outputs."""
    with path.open("wb") as file:
        np.savez_compressed(file, images=golden.images, **golden.scores._asdict())


def load_golden(content: bytes, name: str, image_size: int) -> Golden:
    """Read a golden file from its bytes (already held against the manifest); never unpickles.

    Raises:
        ManifestError: it is no golden file for this image size.

    """
    size = image_size
    wanted = {
        "images": (np.dtype(np.uint8), (size, size, 3)),
        "score": (np.dtype(np.float32), ()),
        "anomaly_map": (np.dtype(np.float32), (size, size)),
        "reconstruction": (np.dtype(np.uint8), (size, size, 3)),
    }
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        # Compressed data may unpack to anything; what a golden file can hold at most is known.
        if unpacked > MAX_IMAGES * (size * size * 10 + 4) + 2**16:
            raise ManifestError(f"{name}: unpacks to {unpacked} bytes, more than {MAX_IMAGES} images need")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in wanted}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ManifestError(f"{name}: not a golden file ({error}); {_RECOMPUTE}") from None
    count = len(arrays["images"]) if arrays["images"].ndim else 0
    if not 1 <= count <= MAX_IMAGES:
        raise ManifestError(f"{name}: expected 1..{MAX_IMAGES} images, got {count}; {_RECOMPUTE}")
    for key, (dtype, shape) in wanted.items():
        got = arrays[key]
        if got.dtype != dtype or got.shape != (count, *shape):
            raise ManifestError(
                f"{name}: array {key!r}: expected {dtype} {(count, *shape)}, got {got.dtype} {got.shape}; {_RECOMPUTE}"
            )
    images = arrays.pop("images")
    return Golden(images, Scores(**arrays))


def golden_bytes(opened: OpenedEngine) -> bytes | None:
    """Read the golden file beside an engine; see read_golden."""
    return read_golden(opened.manifest, opened.directory, certified=opened.certificate is not None)


def read_golden(manifest: Manifest, directory: Path, *, certified: bool) -> bytes | None:
    """Read the golden file of a manifest, held against it; None if an uncertified engine has none.

    Raises:
        ManifestError: it is missing, has other bytes, or a certified engine names none.

    """
    name = manifest.golden
    if name is None:
        if certified:
            raise ManifestError(f"{manifest.name}.json: certified, but names no golden file; {_RECOMPUTE}")
        return None
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"{path}: the golden file cannot be read ({error.strerror}); "
            "copy it beside the engine, the self-test needs it"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    check_digest(path, manifest.files[name], digest, f"{manifest.name}.json")
    return content
