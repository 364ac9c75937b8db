"""Where the parts of a file of `torch.save` lie, its claims compared with its bytes before any of them is read.

Two layouts are known: a zip archive without compression (since torch 1.6), and a row of pickles followed by the bytes
of the storages. Nothing here unpickles; see `torch_pickle`.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

LARGEST_PICKLE = 16 * 2**20
"""Bytes. That of the full BraTS model with its optimiser's state has 0.3 MB."""

LARGEST_DIRECTORY = 8 * 2**20
"""Bytes of a zip's directory, about 100,000 tensors."""

NOT_TORCH = "not a file that torch.save wrote, or cut short"

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")


class TorchFileError(Exception):
    """A file is none of plain tensors; the text says why, without the file's name."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    start: int
    size: int


@dataclass(frozen=True)
class Archive:
    """A zip archive of `torch.save`: its pickle, and the storages by their keys."""

    pickle: Span
    storages: dict[str, Span]


def is_zip(file: BinaryIO) -> bool:
    """Tell whether a file begins as a zip archive does."""
    file.seek(0)
    return file.read(4) == b"PK\3\4"


def read_archive(file: BinaryIO, size: int) -> Archive:
    """Return where the parts of a zip archive of `size` bytes lie.

    Raises:
        TorchFileError: no such archive, or entries that are compressed, encrypted, there twice, or overlap.

    """
    directory = _directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        raise TorchFileError(NOT_TORCH) from None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise TorchFileError("it holds a TorchScript program; only plain tensors are read")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise TorchFileError(
                f"its part {entry.filename[:80]!r} is compressed, {entry.compress_size} bytes for {entry.file_size}; "
                "torch.save compresses nothing"
            )
        if entry.flag_bits & 1:
            raise TorchFileError(f"its part {entry.filename[:80]!r} is encrypted; torch.save encrypts nothing")
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise TorchFileError("it holds two parts of the same name; torch.save writes each once")
    spans = _spans(file, entries, directory)
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1 or not all(name.startswith(roots[0]) for name in names):
        raise TorchFileError(NOT_TORCH)
    parts = {name.removeprefix(roots[0]): span for name, span in spans.items()}
    _check_byte_order(file, parts.get("byteorder"))
    if parts["data.pkl"].size > LARGEST_PICKLE:
        raise TorchFileError(
            f"its table of contents has {parts['data.pkl'].size} bytes; accepted are up to {LARGEST_PICKLE}"
        )
    storages = {name.removeprefix("data/"): span for name, span in parts.items() if name.startswith("data/")}
    return Archive(parts["data.pkl"], storages)


def _directory(file: BinaryIO, size: int) -> int:
    """Return where the directory begins, which must end where the archive's last record begins: no second one fits."""
    if size < _END.size:
        raise TorchFileError(NOT_TORCH)
    file.seek(size - _END.size)
    sign, disk, first, here, count, length, start, comment = _END.unpack(file.read(_END.size))
    if sign != b"PK\5\6" or comment:
        raise TorchFileError(NOT_TORCH)
    end = size - _END.size
    if size >= _END.size + _END64_LOCATOR.size + _END64.size:
        file.seek(end - _END64_LOCATOR.size)
        sign, _, at, _ = _END64_LOCATOR.unpack(file.read(_END64_LOCATOR.size))
        if sign == b"PK\6\7":
            end -= _END64_LOCATOR.size + _END64.size
            if at != end:
                raise TorchFileError(NOT_TORCH)
            file.seek(end)
            sign, _, _, _, disk, first, here, count, length, start = _END64.unpack(file.read(_END64.size))
            if sign != b"PK\6\6":
                raise TorchFileError(NOT_TORCH)
    if disk or first or here != count or start + length != end:
        raise TorchFileError(NOT_TORCH)
    if length > LARGEST_DIRECTORY:
        raise TorchFileError(f"its directory has {length} bytes; accepted are up to {LARGEST_DIRECTORY}")
    return int(start)


def _spans(file: BinaryIO, entries: list[zipfile.ZipInfo], directory: int) -> dict[str, Span]:
    """Return where each entry's bytes lie, by its own header, which must say what the directory says."""
    spans, end = {}, 0
    for entry in sorted(entries, key=lambda one: one.header_offset):
        file.seek(entry.header_offset)
        header = file.read(_LOCAL.size)
        if entry.header_offset < end or len(header) < _LOCAL.size:
            raise TorchFileError(f"its part {entry.filename[:80]!r} lies on another; torch.save lays them in a row")
        sign, _, flags, method, *_, name, extra = _LOCAL.unpack(header)
        if sign != b"PK\3\4" or method != zipfile.ZIP_STORED or flags & 1 or file.read(name) != _raw_name(entry):
            raise TorchFileError(f"its part {entry.filename[:80]!r} is not what its directory says")
        start = entry.header_offset + _LOCAL.size + name + extra
        end = start + entry.file_size
        spans[entry.filename] = Span(start, entry.file_size)
    if end > directory:
        raise TorchFileError(NOT_TORCH)
    return spans


def _raw_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")


def _check_byte_order(file: BinaryIO, part: Span | None) -> None:
    if part is None:  # torch before 2.1 does not say
        return
    file.seek(part.start)
    order = file.read(min(part.size, 16))
    if order != sys.byteorder.encode():
        raise TorchFileError(f"its numbers are in the byte order {order!r}, this machine's are {sys.byteorder}")
