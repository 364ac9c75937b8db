"""What every reader shares: the picture it gives, what can be asked of it, and the limits that no file may pass."""

from __future__ import annotations

import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import InputError, UsageError

MAX_PIXELS = 64 * 1024 * 1024
"""Pixels of one picture."""
MAX_SIDE = 32768
"""Pixels of a picture's longer side."""
MAX_FRAMES = 20_000
"""Pictures in one file."""
MAX_DECODED_BYTES = 4 * 2**30
"""Bytes of all pictures of one file together, as stored, decompressed."""
MAX_VOLUME_BYTES = 2**30
"""Bytes of a NIfTI volume, which is held whole: its window comes from all of it."""
MAX_HEADER_BYTES = 64 * 2**20
"""Bytes of a DICOM header that are read; what is not needed of it is passed over, however long."""

NO_MEMORY = "decoding it takes more memory than there is"

_QUOTED = re.compile(r"(?<!\w)(?:'[^']*'|\"[^\"]*\")(?!\w)")

AXES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class Slice:
    """One picture as read.

    `pixels` uint8 (H, W, 3) RGB; `source`, the name its file goes by; `frame`, its number from 0 in a file of several
    (None in one-picture files); `applied`, what was done to stored values on the way ("window 40,400 (file);
    inverted"), None where 8-bit values are as they were.
    """

    pixels: UInt8
    source: str
    frame: int | None = None
    applied: str | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What can be asked of the readers of DICOM and NIfTI; other files pay no heed to it.

    `window` is (center, width) in the file's unit, after rescaling; None: the file's own, else percentiles. `axis` is
    the direction a NIfTI volume is cut in, one of AXES; `slices` the half-open range (from, to) of slices along it,
    an end may be None.

    Raises:
        UsageError: an option has a value that it cannot have.

    """

    window: tuple[float, float] | None = None
    axis: str = "axial"
    slices: tuple[int | None, int | None] | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.window is not None and not (
            all(math.isfinite(value) for value in self.window) and self.window[1] >= 1.0
        ):
            faults.append(f"window: got {self.window!r}, expected (center, width) with a width of 1 or more")
        if self.axis not in AXES:
            faults.append(f"axis: got {self.axis!r}, accepted are {', '.join(AXES)}")
        start, stop = self.slices or (None, None)
        if (start or 0) < 0 or (stop is not None and stop <= (start or 0)):
            faults.append(f"slices: got {self.slices!r}, expected (from, to) with 0 <= from < to")
        if faults:
            raise UsageError(faults)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for records."""
        return {
            "window": list(self.window) if self.window else None,
            "axis": self.axis,
            "slices": list(self.slices) if self.slices else None,
        }


def parse_window(text: str | None, faults: list[str]) -> tuple[float, float] | None:
    """Read the `--window CENTER,WIDTH` of a command line; None where it is not given or wrong."""
    if text is None:
        return None
    try:
        center, width = (float(part) for part in text.split(","))
        return ReadOptions(window=(center, width)).window
    except (ValueError, UsageError):
        faults.append(f"--window: got {text!r}, expected CENTER,WIDTH, two numbers, the width at least 1, e.g. 40,400")
        return None


def parse_slices(text: str | None, faults: list[str]) -> tuple[int | None, int | None] | None:
    """Read the `--slices FROM:TO` of a command line; None where it is not given or wrong."""
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if colon and all(not part or (part.isascii() and part.isdigit() and len(part) < 10) for part in (start, stop)):
        try:
            return ReadOptions(slices=(int(start) if start else None, int(stop) if stop else None)).slices
        except UsageError:
            pass
    faults.append(
        f"--slices: got {text!r}, expected FROM:TO, whole numbers from 0, TO not included and larger than FROM, e.g. "
        "40:120, 40: or :120"
    )
    return None


def check_size(width: int, height: int, source: str) -> None:
    """Hold the size of a picture, as its header states it, against the limits.

    Raises:
        InputError: there is no pixel in it, or there are too many.

    """
    if width < 1 or height < 1:
        raise InputError(source, f"the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(source, too_large(f"got {width} x {height} pixels"))


def check_frames(frames: int, bytes_of_one: int, source: str) -> None:
    """Hold the number of pictures in a file, and their decoded bytes together, against the limits.

    Raises:
        InputError: there are too many.

    """
    if frames > MAX_FRAMES:
        raise InputError(source, f"too large: {frames:,} pictures in one file, the limit is {MAX_FRAMES:,}")
    if frames * bytes_of_one > MAX_DECODED_BYTES:
        raise InputError(
            source,
            f"too large: {frames * bytes_of_one:,} bytes of pixels in one file, the limit is {MAX_DECODED_BYTES:,}",
        )


def too_large(what: str) -> str:
    """Return the reason for refusing a picture that is larger than the limits."""
    return f"too large: {what}, the limit is {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side"


@dataclass(frozen=True)
class FileState:
    """What tells that a file is still the one that was opened."""

    size: int
    changed_ns: int
    inode: int


def check_regular_file(path: Path, source: str) -> FileState:
    """Return the state of a file that may be opened; opening a pipe would wait for ever.

    Raises:
        InputError: it is no regular file, empty, or out of reach.

    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(source, unreadable(error)) from None
    except ValueError:  # a NUL byte in a name
        raise InputError(source, "cannot be read (no file can have this name)") from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError(source, "a folder that cannot be listed (permission denied?)")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(source, "not a regular file (a pipe, socket or device)")
    if status.st_size == 0:
        raise InputError(source, "the file is empty (0 bytes)")
    return FileState(status.st_size, status.st_mtime_ns, status.st_ino)


def unreadable(error: OSError) -> str:
    """Return the reason for a file that the system would not give."""
    return f"cannot be read ({error.strerror or 'unknown reason'})"


def _without_values(words: str) -> str:
    """Leave out what stands in quotation marks: a value of the file, a patient's name perhaps.

    A mark without its partner, and an apostrophe, which cannot be told from one, end the sentence.
    """
    return re.sub(r"['\"].*", "...", _QUOTED.sub("...", words))


def plain(error: BaseException, path: Path) -> str:
    """Return a library's own words on a fault, on one line, short, without the file's path."""
    words = _without_values(" ".join(str(error).split()).replace(str(path), "the file"))
    return (words[:300] + " ...") if len(words) > 300 else (words or type(error).__name__)
