"""Reading an untrusted .npz of which names, types and shapes are known: nothing is allocated before they were checked.

`numpy.load` believes what a header says: 60 bytes that claim 2^40 images take terabytes, or end in a MemoryError.

Letters: n arrays' common first size.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qfae_runtime.engines.base import one_line

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_LONGEST_HEADER = 4096

_MAGIC = b"\x93NUMPY\x01\x00"
# What numpy.savez writes of an array without fields. NumPy's own reader takes any Python literal, and raises whatever
# its tokeniser does.
_SHAPE = r"\d{1,20}(?:, \d{1,20}){0,7},?"
_HEADER = re.compile(
    rf"\{{'descr': '([ -&(-~]{{1,40}})', 'fortran_order': (True|False), 'shape': \(({_SHAPE}|)\), \}} *\n"
)

# What zipfile and zlib raise at damaged and hostile bytes.
_DAMAGED = (ValueError, KeyError, OSError, EOFError, RuntimeError, OverflowError, struct.error, zlib.error)


class Kind(NamedTuple):
    """The type of an array and the shape of each of its n parts."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class NpzError(Exception):
    """What is wrong with the file, without its name."""


def read_npz(content: bytes, kinds: Mapping[str, Kind], most: int) -> dict[str, Any]:
    """Return the arrays of a .npz file by name; each has the same n, 1 <= n <= `most`, and is the caller's.

    Raises:
        NpzError: it is damaged, or holds other arrays, other types or other shapes; or their headers and their sizes
            contradict each other.

    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = _entries(archive, kinds)
            unpacked, allowed = sum(entry.file_size for entry in entries.values()), most_unpacked(kinds, most)
            if unpacked > allowed:
                raise NpzError(f"unpacks to {unpacked} bytes, more than {most} images need")
            found = {name: _header(archive, name, entry) for name, entry in entries.items()}
            _check_shapes(found, kinds, most)
            for name, entry in entries.items():
                _check_size(name, found[name], kinds[name], entry)
            return {name: _array(archive, entry, found[name], kinds[name]) for name, entry in entries.items()}
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        raise NpzError(f"cannot be read ({one_line(error) or type(error).__name__})") from None


def most_unpacked(kinds: Mapping[str, Kind], most: int) -> int:
    """Return how many bytes such a file unpacks to at most."""
    one = sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in kinds.values())
    return most * one + len(kinds) * _LONGEST_HEADER


class _Header(NamedTuple):
    descr: str
    shape: tuple[int, ...]
    fortran: bool
    bytes: int

    def __str__(self) -> str:
        return f"{self.descr} {self.shape}"


def _entries(archive: zipfile.ZipFile, kinds: Mapping[str, Kind]) -> dict[str, zipfile.ZipInfo]:
    """Return the entry of each array. One name twice, and which of the two is read would be left to the library."""
    held = [entry.filename for entry in archive.infolist()]
    wanted = {f"{name}.npy": name for name in kinds}
    if sorted(held) != sorted(wanted):
        shown = ", ".join(repr(name) for name in sorted(held)[: 2 * len(kinds)]) or "nothing"
        raise NpzError(f"holds {shown}; expected {', '.join(repr(name) for name in wanted)}, each once")
    entries = {wanted[entry.filename]: entry for entry in archive.infolist()}
    for name, entry in entries.items():
        if entry.compress_type not in _COMPRESSIONS or entry.flag_bits & _ENCRYPTED:
            raise NpzError(f"array {name!r}: is encrypted or packed in a way that numpy.savez does not use")
    return entries


def _header(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> _Header:
    with archive.open(entry) as file:
        begin = file.read(len(_MAGIC) + 2)
        (length,) = struct.unpack("<H", begin[len(_MAGIC) :])
        text = file.read(min(length, _LONGEST_HEADER)).decode("latin-1")
    found = _HEADER.fullmatch(text)
    if not begin.startswith(_MAGIC) or length > _LONGEST_HEADER or found is None:
        raise NpzError(f"array {name!r}: expected a header as numpy.savez writes it for numbers, got {text[:60]!r}")
    descr, fortran, sizes = found.groups()
    return _Header(descr, tuple(map(int, re.findall(r"\d+", sizes))), fortran == "True", len(begin) + length)


def _check_shapes(found: Mapping[str, _Header], kinds: Mapping[str, Kind], most: int) -> None:
    """Compare the headers with what is expected; the first array's n is that of all."""
    first = next(iter(kinds))
    count = next(iter(found[first].shape), 0)
    for name, kind in kinds.items():
        got, n = found[name], "n" if name == first else str(count)
        expected = f"{kind.dtype} ({', '.join([n, *map(str, kind.shape)])}{'' if kind.shape else ','})"
        if got.descr != kind.dtype.str or got.shape[1:] != kind.shape or not got.shape:
            raise NpzError(f"array {name!r}: expected {expected}, got {got}")
        if name == first and not 1 <= count <= most:
            raise NpzError(f"expected 1..{most} {first}, got {count}")
        if got.shape[0] != count:
            raise NpzError(f"array {name!r}: expected {expected}, got {got}")
        if got.fortran and len(got.shape) > 1:
            raise NpzError(f"array {name!r}: expected the order of C, got that of Fortran")


def _check_size(name: str, header: _Header, kind: Kind, entry: zipfile.ZipInfo) -> None:
    said = header.bytes + math.prod(header.shape) * kind.dtype.itemsize
    if said != entry.file_size:
        raise NpzError(f"array {name!r}: its header says {said} bytes in all, the entry has {entry.file_size}")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, header: _Header, kind: Kind) -> Any:
    content = archive.read(entry)  # at most as long as the entry says, and held against its checksum
    if len(content) != entry.file_size:
        raise ValueError(f"{entry.filename}: cut short")
    return np.frombuffer(bytearray(content), kind.dtype, offset=header.bytes).reshape(header.shape)
