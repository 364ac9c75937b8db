"""A double of a disk that fills up: from a chosen moment on, nothing below a folder can be written any more.

Files are opened by the genuine `open`; what is written to them passes a raw file that takes as much as there is room
for and then fails as Linux does, buffers and encodings above it included. Cutting files short, renaming and removing
need no room.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_open = io.open


class FullDisk:
    """Full from the moment when a file that `fills(path)` holds `bytes_fit` bytes; 0: from its creation on.

    `path` is where the bytes lie, a temporary name perhaps. `failed` are the files whose writing failed.
    """

    def __init__(self, folder: Path, fills: Callable[[Path], bool], bytes_fit: int) -> None:
        self.folder, self.fills, self.bytes_fit = folder, fills, bytes_fit
        self.full = False
        self.failed: list[str] = []
        self.biggest = 0  # of the files that it looked at, in bytes
        self._mkdir = os.mkdir

    def mount(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(io, "open", self._opened)
        monkeypatch.setattr(builtins, "open", self._opened)
        monkeypatch.setattr(os, "mkdir", self._made)

    def no_room(self, path: Path) -> OSError:
        self.full = True
        self.failed.append(path.name)
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _made(self, path: Any, *arguments: Any, **options: Any) -> None:
        if self.full and Path(path).is_relative_to(self.folder) and not Path(path).exists():
            raise self.no_room(Path(path))
        self._mkdir(path, *arguments, **options)

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        path = Path(os.path.realpath(f"/proc/self/fd/{file}" if isinstance(file, int) else os.fspath(file)))
        if not set(mode) & set("wax+") or not path.is_relative_to(self.folder):
            return _open(file, mode, buffering, *arguments, **options)
        new = set(mode) & set("wax")
        if new and (self.full or (self.fills(path) and self.bytes_fit == 0)):
            raise self.no_room(path)
        raw = _Raw(self, path, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *arguments, **options)


class _Raw(io.FileIO):
    def __init__(self, disk: FullDisk, path: Path, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._disk, self._path = disk, path

    def write(self, content: Any) -> int:
        disk, room = self._disk, memoryview(content).nbytes
        if disk.full:
            raise disk.no_room(self._path)
        if disk.fills(self._path):
            room = min(room, disk.bytes_fit - self.tell())
            if room <= 0:
                raise disk.no_room(self._path)
            disk.biggest = max(disk.biggest, self.tell() + room)
        return super().write(memoryview(content).cast("B")[:room])
