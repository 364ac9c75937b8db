"""From a file to pixels. Files are recognised by their content, never by their suffix."""

from __future__ import annotations

from pathlib import Path

from qfae_runtime.readers.image import Slice, read_image, read_mask

__all__ = ["Slice", "read_image", "read_mask", "read_slices"]


def read_slices(path: Path, source: str) -> list[Slice]:
    """Read every picture a file holds, in order. `source` is the name it goes by in rows.

    Raises:
        InputError: the file cannot be read as a picture.

    """
    return [read_image(path, source=source)]
