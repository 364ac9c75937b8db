"""PNG, JPEG, BMP, TIFF and WebP to uint8 RGB.

Rules, stated once:
- grey is replicated to three channels;
- 16-bit values, grey or colour, keep their high byte (value // 256: 65535 -> 255, and an 8-bit image stored as
  value * 257 comes back exactly); nothing saturates. 12-bit data stored unscaled in 16 bits look dark: scale them
  first; a TIFF that says it has 12 bits keeps the upper 8 of them;
- a TIFF whose white is zero is inverted;
- transparency is laid on black, the background of medical images;
- CMYK becomes (255 - C)(255 - K) / 255; it is stored inverted in a JPEG with Adobe's marker, and in no other;
- no colour profile is applied;
- EXIF orientation is applied;
- the pages of a TIFF, and the frames of an animation, are pictures of their own, each with its number from 0;
- 32-bit integer, signed and floating-point images have no stated range and are refused;
- the limits are those of base.py; each header is checked before anything is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from qfae_runtime.arrays import Bool, UInt8
from qfae_runtime.errors import InputError
from qfae_runtime.readers import jpeg
from qfae_runtime.readers.base import Slice, check_frames, check_regular_file, check_size, too_large
from qfae_runtime.readers.faults import faults_told
from qfae_runtime.readers.window import grey

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")

Image.init()  # registers the decoders now: Pillow would do it on first use, in several threads at once

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_COLOUR_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
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
_BITS_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 258, 262, 0
_COLOURS_IN_WORDS = {"CMYK": "CMYK", "P": "palette", "PA": "palette", "YCbCr": "from YBR"}
_NO_IMAGE = "not a PNG, JPEG, BMP, TIFF or WebP image, whatever its name says"
_UNKNOWN_KIND = (
    "begins as a PNG, JPEG, BMP, TIFF or WebP image, but is damaged, or of a kind of pixels that is not read"
)


def read_image(path: Path | str, source: str | None = None) -> Slice:
    """Read one picture as uint8 (H, W, 3) RGB by the rules at the top of this module.

    Raises:
        InputError: the file cannot be read as one picture; `reason` says why.

    """
    name = source or str(path)
    with _decoded(Path(path), name) as image:
        pixels, applied = _to_rgb(image, name)
        return Slice(pixels, name, applied="; ".join(applied) or None)


def read_pages(path: Path, source: str) -> Iterator[Slice]:
    """Read every picture of a file, one after another; `frame` counts them where there are several.

    Raises:
        InputError: the file, or the page that is due, cannot be read; the pages before it have been given.

    """
    check_regular_file(path, source)
    with _faults_told(path, source, _UNKNOWN_KIND), _opened(path, source) as image:
        if several := _has_page(image, 1):
            image.seek(0)
        frame = decoded_bytes = 0
        while frame == 0 or _has_page(image, frame):
            decoded_bytes += image.width * image.height * 4
            check_frames(frame + 1, decoded_bytes // (frame + 1), source)
            pixels, applied = _to_rgb(_loaded(image, source), source)
            kind = [] if not several else ["page"] if image.format == "TIFF" else ["animation frame"]
            yield Slice(pixels, source, frame if several else None, "; ".join([*kind, *applied]) or None)
            frame += 1
            if not several:
                break


def read_mask(path: Path | str) -> Bool:
    """Read a mask as bool (H, W): True wherever any colour channel is not zero (alpha does not count).

    Raises:
        InputError: the file cannot be read as one picture.

    """
    with _decoded(Path(path), str(path)) as loaded:
        image = loaded.image
        if image.mode == "P" or "A" in image.getbands():
            image = image.convert("RGB")
        values = np.asarray(image)
        return np.asarray(values.any(axis=2) if values.ndim == 3 else values != 0, dtype=np.bool_)


@contextmanager
def _decoded(path: Path, source: str) -> Iterator[_Loaded]:
    """Open, check, decode and orient a file of one picture."""
    check_regular_file(path, source)
    with _faults_told(path, source), _opened(path, source) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise InputError(source, f"holds {frames} pictures, expected one; split it into single images")
        yield _loaded(image, source)


@contextmanager
def _opened(path: Path, source: str) -> Iterator[Image.Image]:
    """Open a picture; nothing is decoded yet.

    Pillow is given no path, for it would map uncompressed pixels into memory: a file that is cut short meanwhile then
    ends the process (SIGBUS), and a TIFF whose EXIF turns it on its side comes out scrambled.
    """
    with path.open("rb") as file:
        if file.read(len(jpeg.MAGIC)) == jpeg.MAGIC:
            jpeg.check_scans(file, source)
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            yield image


@contextmanager
def _faults_told(path: Path, source: str, unidentified: str = _NO_IMAGE) -> Iterator[None]:
    """Make an InputError of whatever Pillow throws at a damaged file."""
    with faults_told(path, source, "damaged or truncated image"):
        try:
            yield
        except UnidentifiedImageError:
            raise InputError(source, unidentified) from None
        except Image.DecompressionBombError:
            raise InputError(source, too_large("its header asks for too many pixels")) from None


def _has_page(image: Image.Image, number: int) -> bool:
    """Go to a page if there is one; pages are not counted ahead, for a file may say that there are millions."""
    if image.format == "MPO":  # a JPEG to which a camera appended previews
        return number == 0
    try:
        image.seek(number)
    except EOFError:
        image.seek(number - 1)
        return False
    return True


class _Loaded(NamedTuple):
    """A decoded and turned picture, and how it was stored: bits of a channel, white as zero, EXIF orientation."""

    image: Image.Image
    bits: int
    white_is_zero: bool
    orientation: int


def _loaded(image: Image.Image, source: str) -> _Loaded:
    check_size(*image.size, source)
    if image.mode in ("F", "I") and not (image.mode == "I" and image.format == "PNG"):
        kind = "floating-point" if image.mode == "F" else "32-bit integer or signed"
        raise InputError(source, f"{kind} pixels have no stated range; store the image in 8 or 16 bit")
    bits = _bits(image)  # before the decoding, after which a PNG does not know any more
    # Pillow turns a TIFF itself while decoding it, and forgets that it was turned; a PNG may say it behind its pixels.
    stated = _orientation(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else 1
    image.load()
    decoded, white_is_zero = image, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white_is_zero = image.tag_v2.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for one of Adobe's, and those alone are stored inverted.
        decoded = ImageChops.invert(image)
    left = _orientation(image)
    if left != 1:
        decoded = decoded.transpose(_TRANSPOSE[left])
    return _Loaded(decoded, bits, white_is_zero, max(stated, left))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a picture that is still to be applied, 1 to 8."""
    try:
        stated = image.getexif().get(_ORIENTATION_TAG)
        return stated if stated in _TRANSPOSE else 1
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _bits(image: Image.Image) -> int:
    """Return how many bits a channel has in the file; 8 for a palette, whose colours have them."""
    if image.mode in ("P", "PA"):
        return 8
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(max(image.tag_v2.get(_BITS_TAG, (1,))))
    if isinstance(image, PngImagePlugin.PngImageFile) and image.tile:
        stored = str(image.tile[0][3])  # "L;4", "RGB;16B": the mode, and the bits where it does not say
        if found := re.search(r";(\d+)", stored):
            return int(found.group(1))
    return 1 if image.mode == "1" else 16 if image.mode in (*_SIXTEEN_BIT_MODES, "I") else 8


def _to_rgb(loaded: _Loaded, source: str) -> tuple[UInt8, list[str]]:
    """Return decoded pixels as uint8 (H, W, 3), and in words what was applied to them."""
    image, bits = loaded.image, loaded.bits
    applied = [] if bits == 8 else [f"{bits} bit"] if bits < 8 else [f"{bits} bit, high byte"]
    applied += ["inverted"] if loaded.white_is_zero else []
    turned = [] if loaded.orientation == 1 else [f"EXIF orientation {loaded.orientation}"]
    # Pillow's own convert("RGB") would cut 16-bit grey at 255. Its decoders keep the high byte of 16-bit colours.
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        levels = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        # Of fewer bits Pillow does this itself.
        return grey(255 - levels if loaded.white_is_zero else levels), applied + turned
    if image.mode not in _COLOUR_MODES:
        raise InputError(source, f"pixels in the colour space {image.mode} are not read; store the image in RGB")
    if image.mode in _COLOURS_IN_WORDS:
        applied.append(_COLOURS_IN_WORDS[image.mode])
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        coloured = image.convert("RGBA")
        if coloured.getchannel("A").getextrema() != (255, 255):
            black = Image.new("RGBA", coloured.size, (0, 0, 0, 255))
            coloured = Image.alpha_composite(black, coloured)
            applied.append("alpha on black")
        image = coloured
    return np.array(image.convert("RGB"), dtype=np.uint8), applied + turned
