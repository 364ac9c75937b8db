"""The one preprocessing, from decoded pixels to what an engine takes; training, export and scoring call it.

Letters: H, W height and width of an image as read; S the engine's `image_size`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import ManifestError, UsageError
from qfae_runtime.geometry import Geometry
from qfae_runtime.liver import LIVER_FACTS, fit_liver
from qfae_runtime.resample import resize

SPEC_VERSION = 1
MAX_IMAGE_SIZE = 4096

# What every spec of a kind holds fixed. It stands in the hash so that a later change cannot pass unseen.
_RESIZE = {
    "version": SPEC_VERSION,
    "colour": "rgb",
    "bits": 8,
    "resampling": "bilinear-antialias-16bit-weights",
    "layout": "HWC uint8",
}
_FIXED: dict[str, dict[str, Any]] = {"resize": _RESIZE, "liver": {**_RESIZE, **LIVER_FACTS}}
PREPROCESS_KINDS = tuple(_FIXED)


class Prepared(NamedTuple):
    """One image ready for an engine: `image` uint8 (S, S, 3) in RGB, and where it came from geometrically."""

    image: UInt8
    geometry: Geometry


@dataclass(frozen=True)
class PreprocessSpec:
    """Everything that decides which pixels an engine sees. Stored and hashed in checkpoints and manifests.

    Raises:
        UsageError: the kind is unknown, or the size is not a whole number in 1..4096.

    """

    kind: str = "resize"
    image_size: int = 224

    def __post_init__(self) -> None:
        faults = []
        if self.kind not in PREPROCESS_KINDS:
            accepted = ", ".join(repr(kind) for kind in PREPROCESS_KINDS)
            faults.append(f"preprocess kind: got {self.kind!r}, accepted are {accepted}")
        size: object = self.image_size
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_IMAGE_SIZE:
            faults.append(f"image_size: got {size!r}, expected a whole number in 1..{MAX_IMAGE_SIZE}")
        if faults:
            raise UsageError(faults)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole specification as plain JSON values, the fixed facts and the version included."""
        return {**_FIXED[self.kind], "kind": self.kind, "image_size": self.image_size}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> PreprocessSpec:
        """Read what `to_dict` wrote.

        Raises:
            ManifestError: a key is missing or unknown, or a value is not one this version can honour.

        """
        kind: Any = stored.get("kind")
        known = kind in PREPROCESS_KINDS  # what an unknown kind holds cannot be judged
        facts = _FIXED[kind] if known else {"version": SPEC_VERSION}
        expected = (*facts, "kind", "image_size")
        faults = [f"key {key!r} is missing" for key in expected if key not in stored]
        faults += [f"unknown key {key!r}" for key in stored if known and key not in expected]
        faults += [
            f"{key}: got {stored[key]!r}, this version of qfae knows only {fixed!r}"
            for key, fixed in facts.items()
            if key in stored and stored[key] != fixed
        ]
        if not faults:
            try:
                return cls(kind=stored["kind"], image_size=stored["image_size"])
            except UsageError as error:
                faults = error.faults
        raise ManifestError(
            "preprocessing specification: " + "; ".join(faults) + "; use the qfae version that wrote it"
        )

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON of `to_dict`."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def diff(self, other: PreprocessSpec) -> list[str]:
        """List what differs as 'key: theirs -> ours' lines (`other` is theirs); empty when equal."""
        ours, theirs = self.to_dict(), other.to_dict()
        return [
            f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}"
            for key in dict.fromkeys((*ours, *theirs))
            if ours.get(key) != theirs.get(key)
        ]


def probe(spec: PreprocessSpec) -> str | None:
    """Return the SHA-256 (hex) of a coloured test image after preparation; None where it is not the same everywhere.

    An engine's manifest holds the exporter's: another value on this machine means that engines would be given other
    pixels here. Liver images pass OpenCV's filters, whose last grey level depends on the version.
    """
    if spec.kind != "resize":
        return None
    y, x, channel = np.ogrid[:301, :197, :3]
    image = ((x * y // 7 + 31 * x * (channel + 1) + 57 * y * (3 - channel)) % 256).astype(np.uint8)
    return hashlib.sha256(preprocess(image, spec).image.tobytes()).hexdigest()


def preprocess(pixels: UInt8, spec: PreprocessSpec) -> Prepared:
    """Turn decoded pixels uint8 (H, W, 3) into the uint8 (S, S, 3) an engine takes; nothing is normalised.

    kind "resize": antialiased bilinear on 8-bit values as torchvision has it, straight to S x S (aspect not kept).
    kind "liver": see liver.py. The result owns its memory.

    Raises:
        ValueError: the pixels are not uint8 (H, W, 3).

    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}; see read_image")
    if spec.kind == "liver":
        return Prepared(*fit_liver(pixels, spec.image_size))
    height, width, _ = pixels.shape
    square = resize(pixels, spec.image_size, spec.image_size)
    return Prepared(square, Geometry.whole(height, width, spec.image_size))
