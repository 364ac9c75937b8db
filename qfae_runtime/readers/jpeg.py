"""The scans of a JPEG, counted before it is decoded.

A progressive JPEG is stored in scans, each of which goes over all of its pixels: 6 to 20 as encoders write them. A scan
may be as short as a hundred bytes, so that a small file with thousands of them would be decoded for hours, in C,
which no Ctrl-C ends.
"""

from __future__ import annotations

import os
import re
from typing import IO

from qfae_runtime.errors import InputError

MAX_SCANS = 100
"""Scans of one JPEG."""
MAX_SEGMENTS = 10_000
"""Segments of one JPEG, scans among them: tables, comments, metadata, of up to 64 KiB each."""

MAGIC = b"\xff\xd8\xff"
_END_OF_IMAGE, _SCAN, _NO_LENGTH = 0xD9, 0xDA, (0x01, 0xD8)
# Within a scan, 0xFF followed by zero is a value, and the marks D0 to D7 divide it.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_PIECE = 1 << 14


def check_scans(file: IO[bytes], source: str) -> None:
    """Hold the number of scans of a JPEG, up to its end of image, against the limit; the file is left anywhere.

    Raises:
        InputError: there are too many of them, or of segments altogether.

    """
    file.seek(len(MAGIC) - 1)
    scans = segments = 0
    while (marker := _next_marker(file)) not in (None, _END_OF_IMAGE):
        segments += 1
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            raise InputError(
                source,
                f"too large: more than {MAX_SCANS} scans in one JPEG, where encoders write about 10; save it anew",
            )
        if segments > MAX_SEGMENTS:
            raise InputError(source, f"too large: more than {MAX_SEGMENTS:,} segments in one JPEG")
        if marker not in _NO_LENGTH:
            file.seek(max(0, int.from_bytes(file.read(2), "big") - 2), os.SEEK_CUR)


def _next_marker(file: IO[bytes]) -> int | None:
    """Go behind the next marker and return its second byte; None where there is none."""
    while len(piece := file.read(_PIECE)) > 1:
        if found := _MARKER.search(piece):
            file.seek(found.end() - len(piece), os.SEEK_CUR)
            return piece[found.end() - 1]
        if piece.endswith(b"\xff"):  # the first half of one, perhaps
            file.seek(-1, os.SEEK_CUR)
    return None
