"""Names of what is written for a source: they must fit a file system, whatever the source is called."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

SPARE_FOLDER = "~"
"""Where pictures lie that cannot have the name of their source. No source leads there."""

# File systems take 255 bytes. A frame's number and what a half-written file is called add up to 20.
_LONGEST = 230
_DIGITS, _SPARE_DIGITS = 16, 32
# A folder of the inputs that is called as a picture of the results would be in the way of it: x.png/ beside x.
_LIKE_A_PICTURE = re.compile(r"(?:\.(?:png|npy|part)|^)~*$", re.IGNORECASE)


def name_for(stem: str, suffix: str) -> str:
    """Return the path of a picture for a source or what is left of it, below the folder of such pictures.

    A last part that is too long for a file system is cut and made unmistakable by a hash of it all. Folders that are
    called as a picture is, x.png, get a ~ more, so that no picture and no folder have the same name.
    """
    path = PurePosixPath(_fitting(f"{stem}{suffix}"))
    folders = [f"{folder}~" if _LIKE_A_PICTURE.search(folder) else folder for folder in path.parts[:-1]]
    return PurePosixPath(*folders, path.name).as_posix()


def spare_name(source: str, suffix: str) -> str:
    """Return the short name of a picture that cannot have its own; the same for a source every time."""
    return f"{SPARE_FOLDER}/{hashlib.sha256(os.fsencode(source)).hexdigest()[:_SPARE_DIGITS]}{suffix}"


def frame_path(path: Path, frame: int | None) -> Path:
    """Name what is drawn of one frame: NAME.f0007.png for frame 7 of what would be NAME.png; `path` without frames."""
    return path if frame is None else path.with_name(f"{path.stem}.f{frame:04d}{path.suffix}")


def _fitting(name: str) -> str:
    path = PurePosixPath(name)
    if len(os.fsencode(path.name)) <= _LONGEST:
        return name
    mark = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:_DIGITS]}{path.suffix}"
    room = _LONGEST - len(os.fsencode(mark))
    stem = path.stem
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return path.with_name(stem + mark).as_posix()
