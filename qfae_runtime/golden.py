"""NAME.golden.npz: a few input images, PyTorch's outputs on them, and how far PyTorch FP32 is from those itself."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qfae_runtime.agreement import Reference, Scale
from qfae_runtime.arrays import UInt8
from qfae_runtime.certificate import MAX_FACTORS
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.opened import OpenedEngine
from qfae_runtime.errors import ManifestError
from qfae_runtime.manifest import Manifest, check_digest
from qfae_runtime.npz import Kind, NpzError, most_unpacked, read_npz
from qfae_runtime.yardstick import COLUMNS, Yardstick

MAX_IMAGES = 32
_RECOMPUTE = "export the engine again"


class Golden(NamedTuple):
    """`images` uint8 (n, S, S, 3), 1 <= n <= 32, and the reference `scores` on them, FP64's as far as there are any.

    `yardstick` is PyTorch FP32's own error on them; `factors` (1..64) how many cosine distances their scores multiply;
    `stress` are the numbers of the stress images, at least one is none.
    """

    images: UInt8
    scores: Scores
    yardstick: Yardstick
    factors: int
    stress: tuple[int, ...] = ()

    def reference(self, scale: Scale | None = None) -> Reference:
        """Return what an engine's outputs on these images are compared with.

        `scale` is that of the engine's certificate; None, where it has none: that of the images here.

        Raises:
            ManifestError: the certificate is of scores that multiply another number of distances.

        """
        if scale is None:
            scale = Scale.of(self.scores.of(self.real), factors=self.factors)
        elif scale.factors != self.factors:
            raise ManifestError(
                f"the certificate is of scores that multiply {scale.factors} distances, the golden file's multiply "
                f"{self.factors}; {_RECOMPUTE}"
            )
        return Reference(self.scores, scale, self.yardstick, self.stress)

    @property
    def real(self) -> list[int]:
        """Numbers of the images that are no stress images."""
        return [number for number in range(len(self.images)) if number not in self.stress]


def save_golden(path: Path, golden: Golden) -> None:
    """Write a golden file; the keys are `images`, `stress`, `factors`, the names of the outputs and of a yardstick."""
    stress = np.zeros(len(golden.images), np.uint8)
    stress[list(golden.stress)] = 1
    factors = np.full(len(golden.images), golden.factors, np.uint8)
    with path.open("wb") as file:
        arrays = {**golden.scores._asdict(), **golden.yardstick._asdict()}
        np.savez_compressed(file, images=golden.images, stress=stress, factors=factors, **arrays)


def load_golden(content: bytes, name: str, image_size: int) -> Golden:
    """Read a golden file from its bytes (already held against the manifest); never unpickles.

    Raises:
        ManifestError: it is no golden file for this image size.

    """
    try:
        arrays = read_npz(content, _kinds(image_size), MAX_IMAGES)
    except NpzError as error:
        raise ManifestError(f"{name}: not a golden file for images of {image_size} px: {error}; {_RECOMPUTE}") from None
    yardstick = Yardstick(*(arrays[name] for name in Yardstick._fields))
    for one in (yardstick.own[yardstick.known], yardstick.unit):
        if not (np.isfinite(one).all() and (one >= 0).all()):
            raise ManifestError(f"{name}: PyTorch's own errors must be finite and not below 0; {_RECOMPUTE}")
    scores = Scores(*(arrays[name] for name in Scores._fields))
    stress = tuple(int(number) for number in np.flatnonzero(arrays["stress"]))
    if len(stress) == len(scores.score):
        raise ManifestError(
            f"{name}: all of its {len(stress)} images are marked as stress images, expected others too, whose scores "
            f"errors are compared with; {_RECOMPUTE}"
        )
    factors = sorted({int(one) for one in arrays["factors"]})
    if len(factors) != 1 or not 1 <= factors[0] <= MAX_FACTORS:
        raise ManifestError(
            f"{name}: scores multiply {', '.join(map(str, factors))} distances, expected one number in "
            f"1..{MAX_FACTORS}; {_RECOMPUTE}"
        )
    return Golden(arrays["images"], scores, yardstick, factors[0], stress)


def _kinds(size: int) -> dict[str, Kind]:
    return {
        "images": Kind(np.dtype(np.uint8), (size, size, 3)),
        "score": Kind(np.dtype(np.float32), ()),
        "anomaly_map": Kind(np.dtype(np.float32), (size, size)),
        "reconstruction": Kind(np.dtype(np.uint8), (size, size, 3)),
        "stress": Kind(np.dtype(np.uint8), ()),
        "factors": Kind(np.dtype(np.uint8), ()),
        **{name: Kind(np.dtype(np.float64), (len(COLUMNS),)) for name in Yardstick._fields},
    }


def golden_beside(opened: OpenedEngine) -> Golden | None:
    """Return the golden images of an opened engine; None if it is uncertified and has none.

    Raises:
        ManifestError: the golden file is missing, damaged, or not the one the manifest names.

    """
    manifest = opened.manifest
    content = read_golden(manifest, opened.directory, certified=opened.certificate is not None)
    return None if content is None else load_golden(content, manifest.golden or "", manifest.image_size)


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
    # Zipped, noise takes a little more than what it unpacks to.
    most = 2 * most_unpacked(_kinds(manifest.image_size), MAX_IMAGES)
    try:
        # Without O_NONBLOCK a pipe under its name would keep a run waiting for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            content = file.read(most + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError as error:
        raise ManifestError(
            f"{path}: the golden file cannot be read ({error.strerror}); "
            "copy it beside the engine, the self-test needs it"
        ) from None
    if content is None or len(content) > most:
        raise ManifestError(f"{path}: no golden file, or longer than {most} bytes; {_RECOMPUTE}")
    digest = hashlib.sha256(content).hexdigest()
    check_digest(path, manifest.files[name], digest, f"{manifest.name}.json")
    return content
