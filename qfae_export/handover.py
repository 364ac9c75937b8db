"""Putting finished files in the place of older ones: all of them or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_ASIDE = ".before"


def put_in_place(made: Path, folder: Path, names: Sequence[str], stale: Sequence[str] = ()) -> None:
    """Move files of these names from `made` to `folder`, on the same file system, in this order.

    Older files of these names go, and those that are `stale`. If anything stops it, both folders are as before.

    Raises:
        OSError: a file cannot be moved.

    """
    aside = made / _ASIDE
    aside.mkdir()
    moved: list[str] = []
    kept: list[str] = []
    try:
        for name in dict.fromkeys((*names, *stale)):
            if (folder / name).exists():
                (folder / name).replace(aside / name)
                kept.append(name)
        for name in names:
            (made / name).replace(folder / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (folder / name).replace(made / name)
        for name in kept:
            (aside / name).replace(folder / name)
        raise
