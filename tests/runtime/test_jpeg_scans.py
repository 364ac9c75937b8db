"""Scans of a JPEG are counted before it is decoded, as its decoder would go through them."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qfae_runtime.errors import InputError
from qfae_runtime.readers import jpeg, read_image, read_mask, read_slices

NOISE = np.random.default_rng(0).integers(0, 256, (240, 160, 4), dtype=np.uint8)
TOO_MANY = "too large: more than 100 scans in one JPEG, where encoders write about 10; save it anew"


def encoded(pixels: np.typing.NDArray[np.uint8], mode: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def many_scans(count: int) -> bytes:
    """A progressive grey picture of 64 x 64, all black, to which `count` scans add nothing."""
    frame = segment(0xDB, b"\0" + bytes([1] * 64)) + segment(0xC2, struct.pack(">BHHB", 8, 64, 64, 1) + b"\1\x11\0")
    table = segment(0xC4, b"\x10\1" + bytes(15) + b"\x50")  # one code: 32 blocks and more that end here
    run = b"\x3f\x0f\xff"  # twice the code and 5 bits, 63 blocks each
    first, further = (segment(0xDA, b"\1\1\0\1\x3f" + bytes([bits])) + run for bits in (0x01, 0x10))
    return b"\xff\xd8" + frame + table + first + further * (count - 1) + b"\xff\xd9"


def counted(content: bytes, monkeypatch: pytest.MonkeyPatch) -> int:
    """The fewest scans that must be allowed for a JPEG."""
    for limit in range(30):
        monkeypatch.setattr(jpeg, "MAX_SCANS", limit)
        try:
            jpeg.check_scans(io.BytesIO(content), "x")
        except InputError:
            continue
        return limit
    raise AssertionError


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_scans_of_an_encoder_are_counted(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    pixels = NOISE[..., 0] if channels == 1 else NOISE[..., :channels]
    assert counted(encoded(pixels, mode), monkeypatch) == 1
    progressive = encoded(pixels, mode, progressive=True, quality=90)
    assert len(progressive) > jpeg._PIECE
    expected = {"L": 6, "RGB": 10, "CMYK": 18}[mode]
    assert counted(progressive, monkeypatch) == expected


@pytest.mark.parametrize("piece", [2, 3, 7])
def test_a_marker_may_lie_across_two_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(NOISE[..., :3], "RGB", progressive=True, comment=b"\xff\xda" * 500)
    monkeypatch.setattr(jpeg, "_PIECE", piece)
    assert counted(content, monkeypatch) == 10


def test_what_follows_the_end_of_the_image_does_not_count(tmp_path: Path) -> None:
    """Cameras append previews, and telephones films."""
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(NOISE[..., :3], "RGB") + b"\xff\xda\0\2" * 200)
    assert len(list(read_slices(path, "x"))) == 1


def test_too_many_scans_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(many_scans(100))
    [piece] = read_slices(path, "x")
    assert piece.pixels.shape == (64, 64, 3)
    assert (piece.pixels == 128).all()
    path.write_bytes(many_scans(101))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("was opened"))
    for read in (lambda: list(read_slices(path, "x")), lambda: read_image(path), lambda: read_mask(path)):
        with pytest.raises(InputError) as caught:
            read()
        assert caught.value.reason == TOO_MANY


def test_segments_are_limited_too(tmp_path: Path) -> None:
    whole = encoded(NOISE[..., :3], "RGB")
    path = tmp_path / "x"
    path.write_bytes(whole[:2] + b"\xff\xfe\0\2" * 10_001 + whole[2:])
    with pytest.raises(InputError) as caught:
        next(read_slices(path, "x"))
    assert caught.value.reason == "too large: more than 10,000 segments in one JPEG"


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"\xff\xff\xff", b"\xff\xda", b"\xff\xda\0", b"\xff\xe0\0\0\xff\xd9"]
)
def test_a_jpeg_may_end_anywhere(content: bytes) -> None:
    jpeg.check_scans(io.BytesIO(jpeg.MAGIC[:2] + content), "x")
