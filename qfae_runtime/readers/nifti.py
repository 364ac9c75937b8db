"""NIfTI volumes to uint8 RGB, slice by slice, with nibabel's knowledge of headers and orientations.

Rules, stated once:
- the volume is turned to the closest canonical orientation (first axis to the patient's right, second to the front,
  third to the head), without resampling; `frame` is the number of a slice along the asked axis in it;
- slices are shown upright in the radiological manner: axial with the front on top and coronal with the head on top,
  both with the patient's right on the left; sagittal with the head on top and the front on the left;
- grey levels come from the window that was asked for, else from the 0.5th and 99.5th percentile of all finite values
  of the volume, one range for all of its slices; unsigned 8-bit values without scaling are drawn as they are;
- voxels are drawn as square, whatever their size.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import InputError
from qfae_runtime.readers import base
from qfae_runtime.readers.base import AXES, ReadOptions, Slice, check_frames, check_size, plain
from qfae_runtime.readers.faults import faults_told
from qfae_runtime.readers.recognise import GZIP_MAGIC
from qfae_runtime.readers.window import Range, Values, Window, grey

MISSING = "NIfTI files need nibabel; install it with: pip install 'qfae[medical]'"
_HEADER_BYTES = 540  # of NIfTI-2, the longer of the two
_MOST_EXTENSION_BYTES = 64 * 2**20
_PIECE = 4 * 2**20


@dataclass(frozen=True)
class _Header:
    """What of a header matters here: where the values lie, of what type and shape, what they mean, how they lie."""

    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
    offset: int
    slope: float
    intercept: float
    affine: np.typing.NDArray[np.float64]
    placed: bool

    @property
    def scaled(self) -> bool:
        return (self.slope, self.intercept) != (1.0, 0.0)


def read_volume(path: Path, source: str, options: ReadOptions) -> Iterator[Slice]:
    """Read a .nii or .nii.gz slice by slice along `options.axis`.

    The volume is held whole as it is stored, once or for an instant twice.

    Raises:
        InputError: the file cannot be read, or holds no volume of three dimensions.

    """
    with _faults_told(path, source):
        with _opened(path) as file:
            head = file.read(_HEADER_BYTES)
            header = _parse(head, source)
            wanted = _wanted(header, options, source)
            stored = _values(file, len(head), header, source)
        volume = _canonical(stored, header)
        with _without_warnings():
            rule = _rule(stored, header, options)
        for number in wanted:
            with _without_warnings():
                drawn, how = _drawn(_plane(volume, options.axis, number), header, rule)
            applied = [options.axis, *([how] if how else [])]
            if header.scaled:
                applied.insert(1, f"rescaled {header.slope:.6g},{header.intercept:.6g}")
            if not header.placed:
                applied.append("orientation not stated")
            yield Slice(drawn, source, number, "; ".join(applied))


def _without_warnings() -> np.errstate:
    """Keep numpy from warning of values that overflow; never over a yield, where others compute meanwhile."""
    return np.errstate(over="ignore", invalid="ignore")


def _parse(head: bytes, source: str) -> _Header:
    nibabel = _nibabel()
    two = head[4:7] in (b"n+2", b"ni2")
    if (b"ni2" if two else b"ni1\0") in (head[4:7], head[344:348]):
        raise InputError(source, "a NIfTI header whose voxels are in another file (.img); convert the pair to one .nii")
    kind = nibabel.nifti2.Nifti2Header if two else nibabel.nifti1.Nifti1Header
    length = 540 if two else 348
    if len(head) < length:
        raise InputError(source, "damaged or truncated NIfTI volume (its header is cut short)")
    order = "<" if int.from_bytes(head[:4], "little") == length else ">"
    header = kind(head[:length], endianness=order, check=False)
    shape = tuple(int(side) for side in header.get_data_shape())
    dtype = header.get_data_dtype()
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and length <= offset <= _MOST_EXTENSION_BYTES):
        raise InputError(source, f"damaged NIfTI volume (its voxels begin at byte {offset:g})")
    slope, intercept = (float(header[name]) for name in ("scl_slope", "scl_inter"))
    if not math.isfinite(slope) or slope == 0.0:  # a slope of zero means: not scaled
        slope, intercept = 1.0, 0.0
    if not math.isfinite(intercept):
        intercept = 0.0
    sides = _three(shape, source)
    placed = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise InputError(source, "damaged NIfTI volume (its orientation is not one: the affine is singular)")
    if not (dtype.names or dtype.kind in "uif"):
        raise InputError(source, f"voxels of type {dtype} are not read; convert the volume to numbers")
    return _Header(dtype, sides, int(offset), slope, intercept, affine, placed)


def _three(shape: tuple[int, ...], source: str) -> tuple[int, int, int]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise InputError(
            source,
            f"a {len(shape)}-D NIfTI of shape {' x '.join(map(str, shape))}, expected 3-D; "
            "split it into single volumes (nibabel's four_to_three, or fslsplit)",
        )
    if not shape:
        raise InputError(source, "damaged NIfTI volume (it has no dimensions)")
    padded = (*shape, 1, 1)
    return padded[0], padded[1], padded[2]


def _wanted(header: _Header, options: ReadOptions, source: str) -> range:
    """Return the slices to draw, after the sizes have been held against the limits."""
    nibabel = _nibabel()
    if min(header.shape) < 1:
        raise InputError(source, f"the volume has no voxels ({' x '.join(map(str, header.shape))})")
    ends = nibabel.orientations.io_orientation(header.affine)[:, 0]
    sides = [0, 0, 0]
    for side, end in zip(header.shape, ends, strict=True):
        sides[int(end)] = side
    index = AXES.index(options.axis)
    other = [side for at, side in enumerate(sides) if at != index]
    check_size(other[0], other[1], source)
    check_frames(sides[index], 0, source)
    size = math.prod(header.shape) * header.dtype.itemsize
    if size > base.MAX_VOLUME_BYTES:
        raise InputError(source, f"too large: a volume of {size:,} bytes, the limit is {base.MAX_VOLUME_BYTES:,}")
    first, last = options.slices or (None, None)
    wanted = range(sides[index])[first:last]
    if not wanted:
        raise InputError(
            source,
            f"has {sides[index]} {options.axis} slices, from 0, and the asked range of slices holds none of them",
        )
    return wanted


def _values(file: IO[bytes], at: int, header: _Header, source: str) -> Values:
    """Read the voxels, and not a byte more than the header says there are: (X, Y, Z), as stored."""
    size = math.prod(header.shape) * header.dtype.itemsize
    # What was read beyond a short header belongs to the voxels or to an extension.
    file.seek(header.offset)
    content = bytearray()
    while len(content) < size:
        piece = file.read(min(_PIECE, size - len(content)))
        if not piece:
            raise InputError(
                source, f"damaged or truncated NIfTI volume ({len(content):,} of {size:,} bytes of voxels are there)"
            )
        content += piece
    return np.frombuffer(content, header.dtype).reshape(header.shape, order="F")


def _canonical(stored: Values, header: _Header) -> Values:
    nibabel = _nibabel()
    return np.asarray(
        nibabel.orientations.apply_orientation(stored, nibabel.orientations.io_orientation(header.affine))
    )


def _plane(volume: Values, axis: str, number: int) -> Values:
    """Cut a slice out of a canonical volume, upright: rows from the top, columns from the left of the picture."""
    if axis == "axial":
        return volume[::-1, ::-1, number].T
    if axis == "coronal":
        return volume[::-1, number, ::-1].T
    return volume[number, ::-1, ::-1].T


def _rule(stored: Values, header: _Header, options: ReadOptions) -> Window | Range | None:
    """Return how values become grey levels; None where they are grey levels or colours already."""
    if header.dtype.names:
        return None
    if options.window is not None:
        return Window(*options.window, origin="asked for")
    if header.dtype == np.uint8 and not header.scaled:
        return None
    span = Range.of(stored, "volume")
    ends = sorted(value * header.slope + header.intercept for value in (span.low, span.high))
    return Range(ends[0], ends[1], span.origin)


def _drawn(plane: Values, header: _Header, rule: Window | Range | None) -> tuple[UInt8, str | None]:
    if header.dtype.names:
        channels = [plane[name] for name in "RGB"]
        return np.ascontiguousarray(np.stack(channels, axis=-1), dtype=np.uint8), None
    if rule is None:
        return grey(plane.astype(np.uint8)), None
    values = plane * header.slope + header.intercept if header.scaled else plane
    return grey(rule.levels(values)), str(rule)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if not packed:
            yield raw
            return
        with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
            yield io.BufferedReader(unpacked)


@lru_cache(maxsize=1)
def _nibabel() -> Any:
    """Import nibabel and keep it silent: what is wrong with a file stands in its row."""
    import nibabel
    import nibabel.nifti2
    import nibabel.orientations

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="nibabel")
    return nibabel


@contextmanager
def _faults_told(path: Path, source: str) -> Iterator[None]:
    """Make an InputError of whatever nibabel, numpy and zlib raise at a damaged file."""
    with faults_told(path, source, "damaged or truncated NIfTI volume", needs=("nibabel", MISSING)):
        try:
            yield
        except (zlib.error, gzip.BadGzipFile, EOFError) as error:
            raise InputError(source, f"damaged or truncated gzip file ({plain(error, path)})") from None
