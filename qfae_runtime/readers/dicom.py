"""DICOM to uint8 RGB, frame by frame, with pydicom and its plug-ins; what is done to the values: dicom_values.py.

Compressed frames are decoded by libraries written in C and C++, which a damaged file can crash or send astray. Such
files are therefore read in a process of their own (contained.py); `is_simple` says which are not.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qfae_runtime.errors import InputError
from qfae_runtime.readers.base import MAX_HEADER_BYTES, ReadOptions, Slice, check_frames, check_size, unreadable
from qfae_runtime.readers.dicom_header import DEFLATED, load_pydicom, read_header, syntax_of
from qfae_runtime.readers.dicom_objects import without_image
from qfae_runtime.readers.dicom_values import Format, UnreadableValuesError, draw_colour, draw_grey, rule_of
from qfae_runtime.readers.faults import faults_told

MISSING = "DICOM files need pydicom; install it with: pip install 'qfae[medical]'"
_FLOATS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}
_PIXEL_DATA = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_ELEMENT_BYTES = 12  # of the head of a pixel data element, before its value
_ITEM, _END_OF_IMAGE, _END_BYTES = b"\xfe\xff\x00\xe0", b"\xff\xd9", 64
_NATIVE = (_IMPLICIT, _EXPLICIT, _BIG_ENDIAN)
# Where several plug-ins can decode a syntax, the one whose results are known to be right is taken: GDCM converts
# some JPEG colours twice, and fails on JPEG-LS of 6 or 7 bits.
_BEST = {
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pylibjpeg",
}
_OTHER_COLOURS = ("HSV", "ARGB", "CMYK", "XYB", "YBR_PARTIAL_420", "YBR_PARTIAL_422")
_RGB_AFTER_DECODING = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


def is_simple(path: Path, source: str) -> bool:
    """Say whether a file's pixels are neither compressed nor deflated, so that nothing but numpy touches them.

    Raises:
        InputError: the file cannot be read.

    """
    try:
        with path.open("rb") as file:
            return (syntax_of(file) or _IMPLICIT) in _NATIVE
    except OSError as error:
        raise InputError(source, unreadable(error)) from None


def read_frames(path: Path, source: str, options: ReadOptions, header_bytes: int = MAX_HEADER_BYTES) -> Iterator[Slice]:
    """Read a DICOM file frame by frame, in this process; `frame` counts them where there are several.

    Raises:
        InputError: the file, or the frame that is due, cannot be read; the frames before it have been given.
        LongHeaderError: more than `header_bytes` of its header would have to be read.

    """
    with _faults_told(path, source), path.open("rb") as file:
        pydicom = load_pydicom()
        syntax = syntax_of(file)
        header = read_header(file, source, syntax, header_bytes)
        syntax = syntax or _guessed_syntax(header)
        start = file.tell()
        kept_in = _pixels_in(header, None if syntax == DEFLATED else file)
        form, frames = _check(header, source, kept_in)
        if form.floating and syntax not in (*_NATIVE, DEFLATED):
            raise UnreadableValuesError("floating-point pixels in a compressed syntax, which DICOM does not have")
        if kept_in is None:
            raise InputError(source, f"no image to score: {_without_pixels(header, 'a DICOM header')}")
        if syntax in _NATIVE:
            _check_length(file, start, header, form, frames)
        options_of_pydicom: dict[str, Any] = {
            "correct_unused_bits": False,  # Format.cut does it, for every high bit
            "apply_j2k_sign_correction": False,
            "apply_jls_sign_correction": False,
            "decoding_plugin": _plugin(syntax, form, source),
            "number_of_frames": frames,
        }
        pixels: Any = header if syntax == DEFLATED else file
        if pixels is file:
            options_of_pydicom["transfer_syntax_uid"] = pydicom.uid.UID(syntax)
        if syntax in _JPEG_LS:
            _check_ends(path, start + _ELEMENT_BYTES)
        number = 0
        for stored in pydicom.pixels.iter_pixels(pixels, **options_of_pydicom):
            if number == frames:
                break
            drawn, applied = _draw(stored, header, number, form, options)
            yield Slice(drawn, source, number if frames > 1 else None, applied)
            number += 1
        if number < frames:
            raise InputError(source, f"damaged or truncated DICOM image ({number} of {frames} frames are there)")


def _pixels_in(header: Any, file: IO[bytes] | None) -> str | None:
    """Return the keyword of the element that holds the pixels: the next in the file, which stays there.

    None where there is none. Without a file, the header has been read with its pixels.
    """
    if file is None:
        return next((keyword for keyword in _PIXEL_DATA.values() if keyword in header), None)
    start = file.tell()
    head = file.read(4)
    file.seek(start)
    if not head:
        return None
    group, element = struct.unpack("<HH" if header.original_encoding[1] else ">HH", head.ljust(4, b"\0"))
    return _PIXEL_DATA.get(group << 16 | element, "PixelData")


def _check_length(file: IO[bytes], start: int, header: Any, form: Format, frames: int) -> None:
    """Hold the size of a file against that of uncompressed pixels, whose element begins at byte `start`."""
    bits = int(header.Rows) * int(header.Columns) * int(header.SamplesPerPixel) * int(header.BitsAllocated) * frames
    if form.photometric == "YBR_FULL_422":  # two pixels share their colours
        bits = bits * 2 // 3
    wanted = (bits + 7) // 8
    head = _ELEMENT_BYTES - 4 if header.original_encoding[0] else _ELEMENT_BYTES
    there = max(0, os.fstat(file.fileno()).st_size - start - head)
    if there < wanted:
        raise UnreadableValuesError(f"{there:,} of {wanted:,} bytes of pixels are there; the file is cut short")


def _check_ends(path: Path, start: int) -> None:
    """Hold the end of a JPEG-LS file's pixels, which begin at byte `start`, against the mark that ends them.

    CharLS takes seconds of a core to find that even a small stream was cut short.
    """
    last = b""
    with path.open("rb") as file:
        file.seek(start)
        while len(head := file.read(8)) == 8 and head.startswith(_ITEM):
            length = int.from_bytes(head[4:], "little")
            file.seek(max(0, length - _END_BYTES), os.SEEK_CUR)
            last = file.read(min(length, _END_BYTES))
            if len(last) < min(length, _END_BYTES):
                raise UnreadableValuesError("its JPEG-LS stream is cut short")
    if not last.rstrip(b"\0").endswith(_END_OF_IMAGE):
        raise UnreadableValuesError("its JPEG-LS stream is cut short")


def _draw(stored: Any, header: Any, frame: int, form: Format, options: ReadOptions) -> tuple[Any, str | None]:
    if form.photometric in ("MONOCHROME1", "MONOCHROME2"):
        if stored.ndim != 2:
            raise UnreadableValuesError(f"expected grey values (H, W), got {stored.shape}")
        return draw_grey(stored, form, rule_of(header, frame, form), options.window)
    if form.photometric == "PALETTE COLOR":
        coloured = load_pydicom().pixels.apply_color_lut(form.cut(stored), header)[..., :3]
        bits = 8 * coloured.dtype.itemsize
        drawn, applied = draw_colour(coloured, Format(bits, bits - 1, False, "RGB"))
        return drawn, "; ".join(filter(None, ("palette", applied)))
    drawn, applied = draw_colour(stored, form)
    converted = "from YBR" if form.photometric.startswith("YBR") else None
    return drawn, "; ".join(filter(None, (converted, applied))) or None


def _guessed_syntax(header: Any) -> str:
    implicit, little = header.original_encoding
    return _IMPLICIT if implicit else (_EXPLICIT if little else _BIG_ENDIAN)


def _check(header: Any, source: str, kept_in: str | None) -> tuple[Format, int]:
    """Hold a header against what can be read, before any pixel is; those are in the element `kept_in`."""
    name = _class_name(header)
    if words := without_image(name):
        raise InputError(source, f"no image to score: {words}")
    if "Rows" not in header or "BitsAllocated" not in header:
        raise InputError(source, f"no image to score: {_without_pixels(header)}")
    missing = [
        key
        for key in ("Columns", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation")
        if header.get(key) is None and not (key == "PixelRepresentation" and kept_in in _FLOATS)
    ]
    if header.Rows is None or header.BitsAllocated is None or missing:
        raise InputError(source, f"damaged DICOM image (its header lacks {', '.join(missing or ['Rows'])})")
    check_size(int(header.Columns), int(header.Rows), source)
    frames = _frames(header)
    allocated, samples = int(header.BitsAllocated), int(header.SamplesPerPixel)
    check_frames(frames, int(header.Columns) * int(header.Rows) * max(1, allocated // 8) * samples, source)
    photometric = str(header.PhotometricInterpretation).strip()
    if kept_in in _FLOATS:
        return _check_floats(allocated, _FLOATS[kept_in], photometric, source), frames
    stored = int(header.get("BitsStored") or allocated)
    high = header.get("HighBit")
    high = stored - 1 if high is None else int(high)
    if photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", *_RGB_AFTER_DECODING):
        colours = photometric if photometric in _OTHER_COLOURS else "an unknown colour space"
        raise InputError(source, f"colours in {colours} are not read; convert the file to RGB")
    if not (1 <= stored <= high + 1 <= allocated <= 64):
        raise InputError(
            source, f"damaged DICOM image (bits allocated {allocated}, stored {stored}, high bit {high} cannot be)"
        )
    return Format(stored, high, header.get("PixelRepresentation") == 1, photometric), frames


def _class_uid(header: Any) -> str:
    return str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")


def _class_name(header: Any) -> str:
    """Return the name of a header's SOP class; empty where the standard has none.

    What pydicom does not know is the header's own text, which may be anything: the patient's name in a damaged one. It
    is neither told nor searched for words.
    """
    uid = _class_uid(header)
    name = str(load_pydicom().uid.UID(uid).name)
    return "" if name == uid else name


def _without_pixels(header: Any, what: str | None = None) -> str:
    """Return what an object without pixels is in words; `what`, where it has the header of a picture."""
    name = _class_name(header)
    if "Image Storage" in name:
        return f"{name}, cut short or without its pixels"
    if what is not None:
        return f"{what} without the pixels it describes"
    known = name or ("of an unknown class" if _class_uid(header) else "of no stated class")
    return f"a DICOM object ({known}) without pixels"


def _check_floats(allocated: int, bits: int, photometric: str, source: str) -> Format:
    """Hold floating-point pixels against PS3.3 C.7.6.24: grey, and all of their bits count."""
    if allocated != bits:
        raise InputError(
            source, f"damaged DICOM image (bits allocated {allocated}, where floating-point pixels have {bits})"
        )
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError(
            source,
            "floating-point pixels that are not grey are not read, nor does DICOM allow them; convert the file to grey",
        )
    return Format(bits, bits - 1, True, photometric, floating=True)


def _frames(header: Any) -> int:
    text = header.get("NumberOfFrames")
    try:
        return max(1, int(text or 1))
    except (TypeError, ValueError):
        raise UnreadableValuesError("its number of frames is no number") from None


def _syntax_in_words(uid: Any) -> str:
    return "an unknown syntax" if uid.name == str(uid) else str(uid.name)


def _plugin(syntax: str, form: Format, source: str) -> str:
    """Choose who decodes a syntax; empty for uncompressed pixels.

    Raises:
        InputError: no plug-in is installed that can.

    """
    pydicom = load_pydicom()
    uid = pydicom.uid.UID(syntax)
    try:
        decoder = pydicom.pixels.get_decoder(uid)
    except NotImplementedError:
        raise InputError(
            source, f"compressed as {_syntax_in_words(uid)}, which is not read; convert the file"
        ) from None
    if uid in (*_NATIVE, DEFLATED):
        return ""
    if not decoder.is_available:
        raise InputError(
            source, f"compressed as {_syntax_in_words(uid)}; its decoder comes with: pip install 'qfae[medical]'"
        )
    if syntax == _JPEG_EXTENDED and form.bits > 8 and "pylibjpeg" not in decoder.available_plugins:
        raise InputError(
            source,
            f"compressed as JPEG Extended with {form.bits} bits, for which no decoder is installed; convert the file, "
            "or install one with: pip install pylibjpeg-libjpeg (its licence is the GPL)",
        )
    best = _BEST.get(syntax, "")
    return best if best in decoder.available_plugins else ""


@contextmanager
def _faults_told(path: Path, source: str) -> Iterator[None]:
    """Make an InputError of whatever pydicom and its plug-ins raise at a damaged file."""
    with faults_told(path, source, "damaged or truncated DICOM image", needs=("pydicom", MISSING)):
        try:
            yield
        except UnreadableValuesError as error:
            raise InputError(source, f"damaged DICOM image ({error})") from None
