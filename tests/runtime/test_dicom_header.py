"""Headers of gigabytes: what is not needed of them is passed over, what is needed has a limit."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian

from qfae_runtime.errors import InputError
from qfae_runtime.readers import Slice, contained, dicom_header, read_slices
from qfae_runtime.readers.base import MAX_HEADER_BYTES

from .dicom_files import dicom_bytes, item, write_dicom

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
GIGABYTES = 2 * 10**9
ITEM, ITEM_END, END = (struct.pack("<HHI", 0xFFFE, element, 0) for element in (0xE000, 0xE00D, 0xE0DD))


def insert(path: Path, content: bytes, at: bytes, gap: int = 0, whole: bytes | None = None) -> Path:
    """Write a small DICOM file with `content` and a hole of `gap` bytes before where `at` begins."""
    whole = dicom_bytes(GREY) if whole is None else whole
    assert whole.count(at) == 1
    place = whole.index(at)
    with path.open("wb") as file:
        file.write(whole[:place] + content)
        file.seek(gap, 1)
        file.write(whole[place:])
    return path


def read_with_peak(path: Path) -> tuple[list[Slice], int]:
    tracemalloc.start()
    try:
        return list(read_slices(path, "a/b")), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def private(representation: bytes, length: int) -> bytes:
    return struct.pack("<HH2sHI", 0x0009, 0x1010, representation, 0, length)


SAMPLES_PER_PIXEL = b"\x28\x00\x02\x00US"
PIXELS = b"\xe0\x7f\x10\x00"


@pytest.fixture(autouse=True)
def _loaded(tmp_path: Path) -> None:
    list(read_slices(write_dicom(tmp_path / "warm", GREY), "warm"))


@pytest.mark.parametrize("representation", [b"OB", b"UN", b"SQ", b"UT"])
def test_a_private_element_of_two_gigabytes_is_passed_over(tmp_path: Path, representation: bytes) -> None:
    path = insert(tmp_path / "x", private(representation, GIGABYTES), SAMPLES_PER_PIXEL, GIGABYTES)
    [piece], peak = read_with_peak(path)
    np.testing.assert_array_equal(piece.pixels[:, :, 0], GREY)
    assert peak < 4 * 2**20


def test_a_needed_element_of_two_gigabytes_is_refused(tmp_path: Path) -> None:
    element = struct.pack("<HH2sHI", 0x0028, 0x3010, b"UN", 0, GIGABYTES)
    path = insert(tmp_path / "x", element, PIXELS, GIGABYTES)
    with pytest.raises(InputError) as caught:
        read_with_peak(path)
    assert caught.value.reason == "too large: more than 67,108,864 bytes of its header would have to be read"
    tracemalloc.start()
    with pytest.raises(InputError):
        list(read_slices(path, "a/b"))
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_sequence_that_is_not_needed_but_has_no_length(tmp_path: Path) -> None:
    """It must be read to be passed over: here if it is short, by a decoding process if it is long."""
    contained.end_all()
    for data, by_another in ((b"x" * 2**19, False), (b"x" * 2**21, True)):
        inner = ITEM[:4] + b"\xff" * 4 + private(b"OB", len(data)) + data + ITEM_END
        path = insert(tmp_path / "x", private(b"SQ", 0xFFFFFFFF) + inner + END, SAMPLES_PER_PIXEL)
        [piece], peak = read_with_peak(path)
        np.testing.assert_array_equal(piece.pixels[:, :, 0], GREY)
        assert bool(contained._idle) is by_another
        assert peak < 4 * 2**20
    hole = private(b"SQ", 0xFFFFFFFF) + ITEM[:4] + b"\xff" * 4 + private(b"OB", GIGABYTES)
    path = insert(tmp_path / "y", hole, SAMPLES_PER_PIXEL, GIGABYTES)
    with pytest.raises(InputError, match=f"more than {MAX_HEADER_BYTES:,} bytes of its header"):
        list(read_slices(path, "a/b"))


def test_many_items_take_their_memory_in_another_process(tmp_path: Path) -> None:
    """Each takes 8 bytes in the file and a hundred times as many as an object."""
    path = insert(tmp_path / "x", private(b"SQ", 0xFFFFFFFF) + ITEM * 160_000 + END, SAMPLES_PER_PIXEL)
    contained.end_all()
    limit = dicom_header.SHORT_HEADER_BYTES
    with path.open("rb") as file, pytest.raises(dicom_header.LongHeaderError, match=f"more than {limit:,} bytes"):
        dicom_header.read_header(file, "x", "1.2.840.10008.1.2.1", limit)


def test_a_length_beyond_the_end_of_the_file_is_damage_and_no_long_header(tmp_path: Path) -> None:
    contained.end_all()
    element = struct.pack("<HH2sHI", 0x0028, 0x3010, b"UN", 0, 2**31)
    with pytest.raises(InputError) as caught:
        list(read_slices(insert(tmp_path / "x", element, PIXELS), "a/b"))
    assert "too large" not in caught.value.reason
    assert contained._idle == []


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_what_is_needed_is_found_in_every_encoding(tmp_path: Path, syntax: UID) -> None:
    """Windows of the groups, tables, padding: the header that is read gives what the whole one gives."""
    shared = item(PixelValueTransformationSequence=[item(RescaleSlope="2", RescaleIntercept="1")])
    own = [item(FrameVOILUTSequence=[item(WindowCenter=str(c), WindowWidth="90")]) for c in (20, 60)]
    frames = np.stack([GREY, GREY + 9]).astype(np.uint16)
    write_dicom(
        tmp_path / "y",
        frames,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=own,
        PixelPaddingValue=3,
        TransferSyntaxUID=syntax,
        PixelData=frames.astype("<u2" if syntax.is_little_endian else ">u2").tobytes(),
    )
    pieces = list(read_slices(tmp_path / "y", "y"))
    for number, (piece, center) in enumerate(zip(pieces, (20, 60), strict=True)):
        stored = GREY.astype(float) + 9 * number
        levels = np.floor(np.clip((2 * stored + 1 - center + 0.5) / 89 + 0.5, 0, 1) * 255 + 0.5)
        np.testing.assert_array_equal(piece.pixels[:, :, 1], np.where(stored == 3, 0, levels))
