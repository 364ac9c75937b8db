"""Files of `torch.save`, read without running anything, as far as they are tables, numbers, strings and plain tensors.

torch's own reader allocates what a file claims before it looks at what the file holds: ten megabytes of compressed
entries took gigabytes and minutes. Here claims come first (`torch_archive`, `torch_pickle`), and no more is read than
the file has bytes.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qfae_train.torch_archive import LARGEST_PICKLE, NOT_TORCH, Span, TorchFileError, is_zip, read_archive
from qfae_train.torch_pickle import Claim, Storage, interpret

MOST_VALUES = 1_000_000
"""Entries of all tables and lists together, one that is there twice counted twice."""

DEEPEST = 32
"""Tables in tables; a training run's last checkpoint has 6."""

MOST_SHARED = 4
"""Times that all tensors together may exceed all storages: weights that are tied are few."""

_LEGACY_HEAD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickle of 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_torch_file(path: Path) -> Any:
    """Return what a file of `torch.save` holds: tables, lists, numbers, strings and plain tensors on the CPU.

    Raises:
        TorchFileError: it is none, it holds anything else, or its tensors claim more than its bytes.
        OSError: it cannot be read.

    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if is_zip(file):
            archive = read_archive(file, size)
            file.seek(archive.pickle.start)
            content, spans = interpret(io.BytesIO(file.read(archive.pickle.size))), archive.storages
        else:
            content, spans = _legacy(file, size)
        return _Loader(file, spans).load(content)


def _legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, Span]]:
    """Return table and storages of the layout before torch 1.6: pickles, then each storage, its length first."""
    file.seek(0)
    head = io.BytesIO(file.read(LARGEST_PICKLE))
    if not head.getvalue().startswith(_LEGACY_HEAD):
        raise TorchFileError(NOT_TORCH)
    head.seek(len(_LEGACY_HEAD))
    protocol, system, content, keys = (interpret(head) for _ in range(4))
    little = isinstance(system, dict) and system.get("little_endian") is True
    if protocol != _LEGACY_PROTOCOL or not little or not isinstance(keys, list):
        raise TorchFileError(NOT_TORCH)
    widths = {claim.storage.key: claim.storage.dtype.itemsize for claim in _walk(content) if isinstance(claim, Claim)}
    spans, at = {}, head.tell()
    for key in keys:
        file.seek(at)
        length = int.from_bytes(file.read(8), "little")
        if not isinstance(key, str) or key not in widths or length * widths[key] > size - at - 8:
            raise TorchFileError(NOT_TORCH)
        spans[key] = Span(at + 8, length * widths[key])
        at += 8 + spans[key].size
    return content, spans


def _walk(content: Any) -> list[Any]:
    """Return all values within tables and lists.

    Raises:
        TorchFileError: there are too many, or they are nested too deeply.

    """
    found: list[Any] = []
    level = [content]
    for _ in range(DEEPEST):
        found += level
        groups = [group for group in level if isinstance(group, dict | list | tuple)]
        if len(found) + sum(map(len, groups)) > MOST_VALUES:
            raise TorchFileError(f"its tables hold more than {MOST_VALUES} values")
        level = [value for group in groups for value in (group.values() if isinstance(group, dict) else group)]
        if not level:
            return found
    raise TorchFileError(f"its tables are nested more than {DEEPEST} deep")


class _Loader:
    """Tensors in place of claims, each storage read once."""

    def __init__(self, file: io.BufferedReader, spans: dict[str, Span]) -> None:
        self._file, self._spans = file, spans
        self._bytes: dict[str, tuple[torch.dtype, Tensor]] = {}
        self._tensors: dict[int, Tensor] = {}

    def load(self, content: Any) -> Any:
        found = {id(claim): claim for claim in _walk(content) if isinstance(claim, Claim)}
        for claim in found.values():
            self._check(claim)
        claimed = sum(math.prod(claim.shape) * claim.storage.dtype.itemsize for claim in found.values())
        held = sum(span.size for span in self._spans.values())
        if claimed > MOST_SHARED * held:
            raise TorchFileError(f"its tensors claim {claimed} bytes, all its storages hold {held}")
        return self._plain(content)

    def _check(self, claim: Claim) -> None:
        storage, count = claim.storage, math.prod(claim.shape)
        span = self._spans.get(storage.key)
        if span is None or span.size != storage.count * storage.dtype.itemsize:
            there = "none" if span is None else f"{span.size}"
            raise TorchFileError(
                f"storage {storage.key[:20]!r} claims {storage.count} values of {storage.dtype.itemsize} bytes, "
                f"the file holds {there}"
            )
        steps = zip(claim.shape, claim.strides, strict=True)
        last = claim.offset + sum((side - 1) * stride for side, stride in steps) if count else -1
        if count > storage.count or last >= storage.count:
            raise TorchFileError(
                f"a tensor of shape {claim.shape} and strides {claim.strides} claims more than its storage of "
                f"{storage.count} values"
            )

    def _plain(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._plain(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self._plain(item) for item in value)
        if isinstance(value, Claim):
            if id(value) not in self._tensors:
                self._tensors[id(value)] = self._tensor(value)
            return self._tensors[id(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TorchFileError(NOT_TORCH)

    def _tensor(self, claim: Claim) -> Tensor:
        if math.prod(claim.shape) == 0:
            return torch.empty(claim.shape, dtype=claim.storage.dtype)
        return self._storage(claim.storage).as_strided(claim.shape, claim.strides, claim.offset)

    def _storage(self, storage: Storage) -> Tensor:
        """Return a storage's values [count]; all that share it share memory."""
        if storage.key not in self._bytes:
            span = self._spans[storage.key]
            raw = torch.empty(span.size, dtype=torch.uint8)
            self._file.seek(span.start)
            if self._file.readinto(raw.numpy().data) != span.size:
                raise TorchFileError(NOT_TORCH)
            self._bytes[storage.key] = storage.dtype, raw.view(storage.dtype)
        dtype, values = self._bytes[storage.key]
        if dtype != storage.dtype:
            raise TorchFileError(f"storage {storage.key[:20]!r} is said to be of two types")
        return values
