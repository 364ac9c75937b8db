"""From a file to pixels. Files are recognised by their content, never by their suffix.

PNG, JPEG, BMP, TIFF, WebP: image.py. DICOM: dicom.py. NIfTI: nifti.py. The limits: base.py.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

from qfae_runtime.errors import InputError
from qfae_runtime.readers import dicom, nifti
from qfae_runtime.readers.base import FileState, ReadOptions, Slice, check_regular_file, unreadable
from qfae_runtime.readers.contained import read_contained
from qfae_runtime.readers.dicom_header import SHORT_HEADER_BYTES, LongHeaderError
from qfae_runtime.readers.faults import foreign_faults_told
from qfae_runtime.readers.image import read_image, read_mask, read_pages
from qfae_runtime.readers.recognise import DICOM, GZIP_MAGIC, HEAD_BYTES, NIFTI, RASTER, is_tiff, kind_of, kind_of_head

__all__ = ["ReadOptions", "Slice", "holds_volume", "read_image", "read_mask", "read_slices"]

_CHANGED = "changed while it was being read; score it again when nothing writes to it"


def read_slices(path: Path, source: str, options: ReadOptions | None = None) -> Generator[Slice, None, None]:
    """Read every picture a file holds, in order, one at a time. `source` is the name it goes by in rows.

    Raises:
        InputError: the file, or the picture that is due, cannot be read; the pictures before it have been given.

    """
    before = check_regular_file(path, source)
    try:
        with foreign_faults_told(path, source, "cannot be read"):
            for piece in _pieces(path, source, options or ReadOptions()):
                if _state(path, source) != before:
                    raise InputError(source, _CHANGED)
                yield piece
    except InputError as error:
        if error.reason != _CHANGED and _state(path, source) != before:
            raise InputError(source, _CHANGED) from None
        raise


def holds_volume(path: Path) -> bool:
    """Say whether a file is a volume, to be read whole before its first slice is known; False where it is out of reach.

    Two of them must not be held at once.
    """
    try:
        # What is no regular file must not be opened: a pipe would wait for ever.
        return path.is_file() and kind_of(path) == NIFTI
    except (OSError, ValueError):
        return False


def _pieces(path: Path, source: str, options: ReadOptions) -> Iterator[Slice]:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise InputError(source, unreadable(error)) from None
    kind = kind_of_head(head)
    if kind == RASTER and not is_tiff(head):
        return read_pages(path, source)
    if kind == DICOM and dicom.is_simple(path, source):
        return _frames(path, source, options)
    if kind in (RASTER, DICOM):
        return read_contained(kind, path, source, options)
    if kind == NIFTI:
        return nifti.read_volume(path, source, options)
    if head.startswith(GZIP_MAGIC):
        raise InputError(source, "a gzip file, and what is in it is not a NIfTI volume; unpack it")
    raise InputError(source, "not a PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI image, whatever its name says")


def _frames(path: Path, source: str, options: ReadOptions) -> Iterator[Slice]:
    try:
        yield from dicom.read_frames(path, source, options, SHORT_HEADER_BYTES)
    except LongHeaderError:  # it comes before the first frame
        yield from read_contained(DICOM, path, source, options)


def _state(path: Path, source: str) -> FileState:
    try:
        return check_regular_file(path, source)
    except InputError:
        raise InputError(source, _CHANGED) from None
