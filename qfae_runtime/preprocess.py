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
from PIL import Image

from qfae_runtime.arrays import Bool, Float32, UInt8
from qfae_runtime.errors import ManifestError, UsageError

SPEC_VERSION = 1
PREPROCESS_KINDS = ("resize",)
MAX_IMAGE_SIZE = 4096

# Facts that every spec of version 1 shares. They stand in the hash so that a later change cannot pass unseen.
_FIXED = {
    "version": SPEC_VERSION,
    "colour": "rgb",
    "bits": 8,
    "resampling": "pillow-bilinear-antialias",
    "layout": "HWC uint8",
}


@dataclass(frozen=True)
class Geometry:
    """How the (S, S) square an engine sees lies on the (H, W) image it was made from."""

    height: int
    width: int
    size: int

    def map_back(self, anomaly_map: Float32) -> Float32:
        """Bring a map float32 (S, S) to the original float32 (H, W), bilinear; values keep their unit."""
        square = Image.fromarray(np.ascontiguousarray(anomaly_map, dtype=np.float32))
        back = square.resize((self.width, self.height), Image.Resampling.BILINEAR)
        return np.asarray(back, dtype=np.float32)

    def warp_mask(self, mask: Bool | UInt8) -> UInt8:
        """Bring a mask (H, W), non-zero where anomalous, to uint8 (S, S) of 0 and 1, nearest neighbour.

        Raises:
            ValueError: the mask does not have the image's height and width.

        """
        if mask.shape != (self.height, self.width):
            raise ValueError(f"mask: expected (H, W) = {(self.height, self.width)}, got {mask.shape}")
        full = Image.fromarray((np.asarray(mask) != 0).astype(np.uint8))
        return np.asarray(full.resize((self.size, self.size), Image.Resampling.NEAREST), dtype=np.uint8)


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
        return {**_FIXED, "kind": self.kind, "image_size": self.image_size}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> PreprocessSpec:
        """Read what `to_dict` wrote.

        Raises:
            ManifestError: a key is missing or unknown, or a value is not one this version can honour.

        """
        faults = [f"unknown key {key!r}" for key in stored if key not in _FIXED | {"kind": "", "image_size": 0}]
        faults += [f"key {key!r} is missing" for key in (*_FIXED, "kind", "image_size") if key not in stored]
        faults += [
            f"{key}: got {stored[key]!r}, this version of qfae knows only {fixed!r}"
            for key, fixed in _FIXED.items()
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
        return [f"{key}: {theirs[key]!r} -> {ours[key]!r}" for key in ours if ours[key] != theirs[key]]


def preprocess(pixels: UInt8, spec: PreprocessSpec) -> Prepared:
    """Turn decoded pixels uint8 (H, W, 3) into the uint8 (S, S, 3) an engine takes; nothing is normalised.

    kind "resize": Pillow's antialiased bilinear on 8-bit values, straight to S x S (aspect not kept).
    The result owns its memory.

    Raises:
        ValueError: the pixels are not uint8 (H, W, 3).

    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}; see read_image")
    height, width, _ = pixels.shape
    square = Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (spec.image_size, spec.image_size), Image.Resampling.BILINEAR
    )
    return Prepared(np.array(square, dtype=np.uint8), Geometry(height, width, spec.image_size))
