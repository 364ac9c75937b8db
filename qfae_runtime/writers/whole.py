"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path to write to, beside `path`; when all is written it takes the name, after an error it is removed."""
    temporary = part_of(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # what went wrong is told, not what could not be cleared away after it
            temporary.unlink(missing_ok=True)
        raise


def part_of(path: Path) -> Path:
    """Return what a file is called while it is written."""
    return path.with_name(f".{path.name}.part")
