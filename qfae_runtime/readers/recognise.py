"""What a file is, told from its first bytes. Names and suffixes say nothing."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

RASTER, DICOM, NIFTI = "raster", "dicom", "nifti"

HEAD_BYTES = 1024
GZIP_MAGIC = b"\x1f\x8b"

_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RASTER_MAGICS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", *_TIFF_MAGICS)
_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)
_NIFTI1_SIZE, _NIFTI2_SIZE = 348, 540
# The value representations that the elements at the start of a data set have.
_FIRST_VRS = (b"UL", b"UI", b"OB", b"CS", b"DA", b"TM", b"SH", b"LO", b"PN", b"ST", b"SQ", b"AE", b"DT", b"IS")
_LONGEST_FIRST_ELEMENT = 4096


def kind_of(path: Path) -> str | None:
    """Return "raster", "dicom" or "nifti"; None where the content is nothing that is read here.

    Raises:
        OSError: the file cannot be read.

    """
    with path.open("rb") as file:
        return kind_of_head(file.read(HEAD_BYTES))


def kind_of_head(head: bytes) -> str | None:
    """Return what `kind_of` does, from the first HEAD_BYTES of a file."""
    if head.startswith(GZIP_MAGIC):
        return NIFTI if is_nifti(gunzip_head(head)) else None
    # A DICOM file may carry the header of a TIFF in its first 128 bytes, so that it is both.
    if head[128:132] == b"DICM":
        return DICOM
    if head.startswith(_RASTER_MAGICS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or _is_bmp(head):
        return RASTER
    if is_nifti(head):
        return NIFTI
    return DICOM if _is_bare_dicom(head) else None


def is_tiff(head: bytes) -> bool:
    """Say whether bytes begin as a TIFF or BigTIFF."""
    return head.startswith(_TIFF_MAGICS)


def is_nifti(head: bytes) -> bool:
    """Say whether bytes begin as a NIfTI-1 or NIfTI-2 header, of one file or of a pair."""
    if len(head) < _NIFTI1_SIZE:
        return False
    sizes = {struct.unpack_from(order + "i", head)[0] for order in "<>"}
    return (_NIFTI1_SIZE in sizes and head[344:348] in (b"n+1\0", b"ni1\0")) or (
        _NIFTI2_SIZE in sizes and head[4:7] in (b"n+2", b"ni2")
    )


def gunzip_head(head: bytes) -> bytes:
    """Return the first HEAD_BYTES at most of what gzipped bytes hold, as far as they go."""
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _is_bmp(head: bytes) -> bool:
    return head[:2] == b"BM" and len(head) >= 18 and struct.unpack_from("<I", head, 14)[0] in _BMP_HEADER_SIZES


def _is_bare_dicom(head: bytes) -> bool:
    """Say whether bytes begin as a DICOM data set without preamble: with an early element of group 2 or 8."""
    if len(head) < 8:
        return False
    for order in "<>":
        group, element = struct.unpack_from(order + "HH", head)
        if group not in (2, 8) or element > 0x0100:
            continue
        if head[4:6] in _FIRST_VRS:
            return True
        length = struct.unpack_from("<I", head, 4)[0]
        return order == "<" and 0 < length <= _LONGEST_FIRST_ELEMENT and length % 2 == 0
    return False
