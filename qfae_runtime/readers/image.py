"""PNG, JPEG, BMP, TIFF and WebP to uint8 RGB.

Rules, stated once:
- grey is replicated to three channels;
- 16-bit values keep their high byte (value // 256: 65535 -> 255, and an 8-bit image stored as value * 257
  comes back exactly); nothing saturates. 12-bit data stored unscaled in 16 bits look dark: scale them first;
- transparency is laid on black, the background of medical images;
- EXIF orientation is applied;
- 32-bit integer and floating-point images have no stated range and are refused;
- at most MAX_PIXELS pixels and MAX_SIDE pixels a side; the header is checked before anything is decoded.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from qfae_runtime.arrays import Bool, UInt8
from qfae_runtime.errors import InputError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
MAX_SIDE = 32768

Image.init()  # registers the decoders now: Pillow would do it on first use, in several threads at once

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Slice:
    """One picture as read: `pixels` uint8 (H, W, 3) RGB, its file, its frame (None in one-picture files)."""

    pixels: UInt8
    source: str
    frame: int | None = None


def read_image(path: Path | str, source: str | None = None) -> Slice:
    """Read one picture as uint8 (H, W, 3) RGB by the rules at the top of this module.

    Raises:
        InputError: the file cannot be read as one picture; `reason` says why.

    """
    with _decoded(Path(path), source or str(path)) as image:
        return Slice(_to_rgb(image), source or str(path))


def read_mask(path: Path | str) -> Bool:
    """Read a mask as bool (H, W): True wherever any colour channel is not zero (alpha does not count).

    Raises:
        InputError: the file cannot be read as one picture.

    """
    with _decoded(Path(path), str(path)) as image:
        if image.mode == "P" or "A" in image.getbands():
            image = image.convert("RGB")
        values = np.asarray(image)
        return np.asarray(values.any(axis=2) if values.ndim == 3 else values != 0, dtype=np.bool_)


@contextmanager
def _decoded(path: Path, source: str) -> Iterator[Image.Image]:
    """Open, check, decode and orient; whatever Pillow throws at a damaged file becomes an InputError."""
    _check_regular_file(path, source)
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_header(image, source)
            image.load()
            yield _oriented(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        reason = "not a PNG, JPEG, BMP, TIFF or WebP image, whatever its name says"
        raise InputError(source, reason) from None
    except Image.DecompressionBombError:
        raise InputError(source, _too_large("its header asks for too many pixels")) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        if isinstance(error, OSError) and error.errno is not None:  # of the system, Pillow's own have no number
            raise InputError(source, f"cannot be read ({error.strerror or 'unknown reason'})") from None
        text = " ".join(str(error).split()).replace(str(path), "the file") or type(error).__name__
        raise InputError(source, f"damaged or truncated image ({text})") from None


def _check_regular_file(path: Path, source: str) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(source, f"cannot be read ({error.strerror or 'unknown reason'})") from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError(source, "a folder that cannot be listed (permission denied?)")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(source, "not a regular file (a pipe, socket or device)")
    if status.st_size == 0:
        raise InputError(source, "the file is empty (0 bytes)")


def _check_header(image: Image.Image, source: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(source, f"the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(source, _too_large(f"got {width} x {height} pixels"))
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a JPEG to which a camera appended previews
        raise InputError(source, f"holds {frames} pictures, expected one; split it into single images")
    if image.mode in ("F", "I") and not (image.mode == "I" and image.format == "PNG"):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise InputError(source, f"{kind} pixels have no stated range; store the image in 8 or 16 bit")


def _too_large(what: str) -> str:
    return f"too large: {what}, the limit is {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side"


def _oriented(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels, which have been decoded by now
        orientation = 1
    operation = _TRANSPOSE.get(orientation)
    return image if operation is None else image.transpose(operation)


def _to_rgb(image: Image.Image) -> UInt8:
    # Pillow's own convert("RGB") would cut 16-bit values at 255.
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        coloured = image.convert("RGBA")
        black = Image.new("RGBA", coloured.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, coloured)
    return np.array(image.convert("RGB"), dtype=np.uint8)
