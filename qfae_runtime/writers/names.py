"""Names of what is written for a source: they must fit a file system, whatever the source is called."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePosixPath

# File systems take 255 bytes. A frame's number and what a half-written file is called add up to 20.
_LONGEST = 230
_DIGITS = 16


def fitting(name: str) -> str:
    """Return a path whose last part, if too long for a file system, is cut and made unmistakable by a hash of it all.

    The suffix stays.
    """
    path = PurePosixPath(name)
    if len(os.fsencode(path.name)) <= _LONGEST:
        return name
    mark = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:_DIGITS]}{path.suffix}"
    room = _LONGEST - len(os.fsencode(mark))
    stem = path.stem
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return path.with_name(stem + mark).as_posix()
