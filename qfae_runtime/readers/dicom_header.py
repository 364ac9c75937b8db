"""The header of a DICOM file, read within bounds: what is not needed is passed over, what is needed is counted.

Private elements, documents and thumbnails in a header may have gigabytes. pydicom would read them into memory; here it
is told the elements that matter, and given a file that hands out so many bytes and no more. Sequences without a stated
length have to be read to be passed over, and their items take a hundred times the memory they take in the file; so
this process reads short headers alone, and a process of its own (contained.py) the others.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
from functools import lru_cache
from typing import IO, Any

from qfae_runtime.errors import InputError
from qfae_runtime.readers.base import MAX_HEADER_BYTES

SHORT_HEADER_BYTES = 2**20
"""So much of a header is read in this process; look-up tables of 16 bits fit in."""

DEFLATED = "1.2.840.10008.1.2.1.99"
_META_BYTES = 8192
_IMAGE_GROUP = 0x0028
_NEEDED = (
    0x00080016,  # SOPClassUID
    0x52009229,  # SharedFunctionalGroupsSequence
    0x52009230,  # PerFrameFunctionalGroupsSequence
    0x7FE00001,  # ExtendedOffsetTable, with the next: pydicom looks for frames there
    0x7FE00002,  # ExtendedOffsetTableLengths
)


class LongHeaderError(InputError):
    """More of a header has to be read than was allowed."""


@lru_cache(maxsize=1)
def load_pydicom() -> Any:
    """Import pydicom and keep it silent: what it says of a damaged file may hold the patient's data."""
    import pydicom
    import pydicom.pixels

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


def syntax_of(file: IO[bytes]) -> str:
    """Read the transfer syntax from the head of a file, which is left at its start; empty where it has none.

    pydicom's own way there inflates a deflated file on its way, however large it becomes.
    """
    head = file.read(_META_BYTES)
    file.seek(0)
    at = 132 if head[128:132] == b"DICM" else 0
    while head[at : at + 2] == b"\x02\x00" and at + 12 <= len(head):
        element, representation = head[at + 2 : at + 4], head[at + 4 : at + 6]
        wide = representation in (b"OB", b"OW", b"UN", b"SQ", b"UT")
        length = struct.unpack_from("<I" if wide else "<H", head, at + (8 if wide else 6))[0]
        at += 12 if wide else 8
        if element == b"\x10\x00":
            return str(head[at : at + length].decode("ascii", errors="replace").strip(" \0"))
        at += length
    return ""


def read_header(file: IO[bytes], source: str, syntax: str, limit: int = MAX_HEADER_BYTES) -> Any:
    """Read what is needed of a header, up to the pixels, where the file is left; deflated files whole, with pixels.

    Returns:
        A pydicom Dataset.

    Raises:
        LongHeaderError: more than `limit` bytes of it would have to be read.

    """
    pydicom = load_pydicom()
    if syntax == DEFLATED:  # one stream: its pixels cannot be left where they are
        return pydicom.dcmread(file, force=True)
    bounded = _Bounded(file, limit)
    try:
        header = pydicom.dcmread(bounded, force=True, stop_before_pixels=True, specific_tags=_needed_tags())
    except Exception:  # pydicom makes others of what it is raised
        if not bounded.exceeded:
            raise
    if bounded.exceeded:
        raise LongHeaderError(source, f"too large: more than {limit:,} bytes of its header would have to be read")
    return header


@lru_cache(maxsize=1)
def _needed_tags() -> list[int]:
    known = load_pydicom().datadict.DicomDictionary
    return [*_NEEDED, *(tag for tag in known if tag >> 16 == _IMAGE_GROUP)]


class _LimitError(Exception):
    """More was to be read than may be."""


class _Bounded:
    """A file of which so many bytes can be read, wherever, and no more."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit
        self._size = os.fstat(file.fileno()).st_size
        self.exceeded = False
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        # A damaged length is no long header: what is not there is not read.
        there = max(0, self._size - self.tell())
        wanted = there if size < 0 else min(size, there)
        if wanted > self._left:
            self.exceeded = True
            raise _LimitError
        self._left -= wanted
        return self._file.read(wanted)
