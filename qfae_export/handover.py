"""Making files in a folder of their own, and putting them in the place of older ones: all of them or none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qfae_runtime.errors import OutputError
from qfae_runtime.interruption import last_words

_ASIDE = ".before"


@contextmanager
def temporary_inside(folder: Path, name: str) -> Iterator[Path]:
    """Yield a folder inside `folder`, which is removed in the end.

    Raises:
        OSError: it cannot be written.
        OutputError: it was removed, moved or replaced by somebody else in the meantime.

    """
    made = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}-"))
    remove = partial(shutil.rmtree, made, ignore_errors=True)
    try:
        with last_words(remove):
            yield made
    except Exception as error:
        # A backend that finds no file says so in words of its own, and would accuse the export.
        if made.is_dir():
            raise
        raise OutputError(
            f"{folder}: was removed, moved or replaced while the export was writing there, so nothing was exported; "
            "leave it alone until the export has ended, and run the command again"
        ) from error
    finally:
        remove()


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
