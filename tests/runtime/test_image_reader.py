from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from qfae_runtime.errors import InputError
from qfae_runtime.readers import base, read_image, read_mask, read_slices
from qfae_runtime.readers import image as reader

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)


def reason_for(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_image(path, source="a/b")
    assert caught.value.source == "a/b"
    assert str(caught.value) == f"a/b: {caught.value.reason}"
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_grey_is_replicated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(GREY).save(path, lossless=True)
    piece = read_image(path)
    assert (piece.source, piece.frame, piece.pixels.dtype.name) == (str(path), None, "uint8")
    np.testing.assert_array_equal(piece.pixels, np.repeat(GREY[:, :, None], 3, axis=2))


def test_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(GREY).save(path, format="PNG")
    assert next(read_slices(path, "x")).pixels[5, 5, 0] == GREY[5, 5]


def test_jpeg_is_close(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "x.jpg").pixels[:, :, 0].astype(int) - GREY).max() < 12


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_keeps_the_high_byte_and_never_saturates(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256, 257, 4095, 32768, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}").pixels[:, :, 1], values >> 8)


def test_an_8_bit_image_stored_in_16_bits_comes_back_exactly(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png").pixels[:, :, 0], GREY)


@pytest.mark.parametrize("form", ["png", "tiff", "tiff-lzw"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours_keep_their_high_byte(tmp_path: Path, form: str, channels: int) -> None:
    """Written by OpenCV, which knows them; Pillow has no mode for them."""
    values = np.random.default_rng(0).integers(0, 65536, (7, 9, channels), dtype=np.uint16)
    values[0, 0, :3] = (255, 256, 65535)
    if channels == 4:
        values[:, :, 3] = 65535
    path = tmp_path / f"x.{form.partition('-')[0]}"
    assert cv2.imwrite(str(path), values, [cv2.IMWRITE_TIFF_COMPRESSION, 5] if form == "tiff-lzw" else [])
    pixels = next(read_slices(path, "x")).pixels
    np.testing.assert_array_equal(pixels, values[:, :, [2, 1, 0]] >> 8)


@pytest.mark.parametrize("inverted", [False, True])
def test_cmyk_jpegs_of_both_kinds(tmp_path: Path, inverted: bool) -> None:
    """Adobe's programs store CMYK inverted and say so in a marker of their own; without it, it is as it is."""
    cmyk = np.zeros((16, 32, 4), np.uint8)
    cmyk[:, :16] = (200, 100, 0, 20)
    cmyk[:, 16:] = (0, 0, 0, 128)
    buffer = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(buffer, "JPEG", quality=100, subsampling=0)
    content = buffer.getvalue()
    at = content.index(b"\xff\xee")
    assert content[at + 4 : at + 9] == b"Adobe"
    if not inverted:
        content = content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]
        cmyk = 255 - cmyk  # what the same stream means without the marker
    (tmp_path / "x").write_bytes(content)
    pixels = next(read_slices(tmp_path / "x", "x")).pixels.astype(float)
    ink = cmyk.astype(float)
    assert np.abs(pixels - (255 - ink[:, :, :3]) * (255 - ink[:, :, 3:]) / 255).max() <= 3


def test_pages_and_frames_are_rows_of_their_own(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.roll(GREY, shift)) for shift in range(4)]
    pages[2] = pages[2].resize((9, 5))
    pages[0].save(
        tmp_path / "x.tiff", save_all=True, append_images=[*pages[1:3], Image.fromarray(GREY.astype(np.uint16))]
    )
    pieces = list(read_slices(tmp_path / "x.tiff", "x"))
    assert [(piece.frame, piece.pixels.shape[:2]) for piece in pieces] == [
        (0, (12, 20)),
        (1, (12, 20)),
        (2, (5, 9)),
        (3, (12, 20)),
    ]
    for piece, page in zip(pieces[:3], pages, strict=False):
        np.testing.assert_array_equal(piece.pixels[:, :, 0], np.asarray(page))
    assert [piece.applied for piece in pieces] == ["page", "page", "page", "page; 16 bit, high byte"]
    for suffix in ("webp", "png"):
        path = tmp_path / f"y.{suffix}"
        pages[0].save(path, save_all=True, append_images=[pages[1], pages[3]], lossless=True)
        pieces = list(read_slices(path, "y"))
        assert [piece.frame for piece in pieces] == [0, 1, 2]
        assert {piece.applied for piece in pieces} == {"animation frame"}
        for piece, shift in zip(pieces, (0, 1, 3), strict=True):
            np.testing.assert_array_equal(piece.pixels[:, :, 0], np.roll(GREY, shift))


def test_a_damaged_page_does_not_take_those_before_it(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (30, 30), np.uint8)) for n in range(4)]
    pages[0].save(tmp_path / "x.tiff", save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate")
    content = (tmp_path / "x.tiff").read_bytes()
    (tmp_path / "x.tiff").write_bytes(content[: len(content) * 5 // 8])
    pieces = read_slices(tmp_path / "x.tiff", "x")
    assert [next(pieces).frame, next(pieces).frame] == [0, 1]
    with pytest.raises(InputError, match="damaged or truncated image"):
        next(pieces)


def test_the_number_of_pages_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.fromarray(np.roll(GREY, shift)) for shift in range(5)]
    pages[0].save(tmp_path / "x.tiff", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(base, "MAX_FRAMES", 3)
    pieces = reader.read_pages(tmp_path / "x.tiff", "x")
    assert [next(pieces).frame for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="too large: 4 pictures in one file, the limit is 3"):
        next(pieces)


def tiff(values: Any, bits: int, photometric: int, content: bytes, order: str = "<") -> bytes:
    """A TIFF of one strip, written by hand: (H, W) pixels, of which `content` are the bytes."""
    height, width = values.shape
    tags = [
        *((256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)),
        *((277, 3, 1), (278, 4, height), (279, 4, len(content))),
    ]
    content += b"\0" * (len(content) % 2)
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}{'I' if kind == 4 else 'H2x'}", value)
        for tag, kind, value in tags
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(content))
    return head + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def test_deep_tiffs_keep_to_what_their_header_says(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (6, 8))
    path = tmp_path / "x.tiff"
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    path.write_bytes(tiff(values, 12, 1, packed.astype(np.uint8).tobytes()))
    piece = next(read_slices(path, "x"))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], values >> 4)
    assert piece.applied == "12 bit, high byte"
    path.write_bytes(tiff(values, 16, 0, (values * 16).astype("<u2").tobytes()))
    piece = next(read_slices(path, "x"))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], 255 - (values >> 4))
    assert piece.applied == "16 bit, high byte; inverted"
    path.write_bytes(tiff(values, 8, 0, (values >> 4).astype(np.uint8).tobytes()))
    piece = next(read_slices(path, "x"))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], 255 - (values >> 4))
    assert piece.applied == "inverted"


def test_a_kind_of_pixels_that_is_not_read_is_not_called_another_format(tmp_path: Path) -> None:
    values = np.zeros((4, 4))
    (tmp_path / "x.tiff").write_bytes(tiff(values, 64, 1, values.tobytes()))
    with pytest.raises(InputError) as caught:
        next(read_slices(tmp_path / "x.tiff", "x"))
    assert caught.value.reason == (
        "begins as a PNG, JPEG, BMP, TIFF or WebP image, but is damaged, or of a kind of pixels that is not read"
    )


def test_a_colour_space_that_is_not_read_is_named(tmp_path: Path) -> None:
    Image.new("LAB", (4, 4)).save(tmp_path / "x.tiff")
    with pytest.raises(InputError) as caught:
        next(read_slices(tmp_path / "x.tiff", "x"))
    assert caught.value.reason == "pixels in the colour space LAB are not read; store the image in RGB"


def test_transparency_lies_on_black(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[:] = (200, 100, 50, 255)
    rgba[0, 0, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "x.png")
    pixels = read_image(tmp_path / "x.png").pixels
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[1, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_common_mode_gives_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.fromarray(np.full((6, 6, 3), 255, np.uint8)).convert(mode).save(path)
    pixels = read_image(path).pixels
    assert pixels.shape == (6, 6, 3)
    assert pixels.min() == 255


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png").pixels[:, :, 0], np.rot90(GREY, -1))


def applied(path: Path) -> str | None:
    """What both ways of reading a picture say of it: they agree."""
    [piece] = read_slices(path, "x")
    assert piece.applied == read_image(path).applied
    return piece.applied


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "jpg"])
def test_of_8_bit_pictures_nothing_is_said(tmp_path: Path, suffix: str) -> None:
    for shape in ((12, 20), (12, 20, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert applied(saved(tmp_path / f"x.{suffix}", Image.fromarray(pixels))) is None
    opaque = np.full((12, 20, 4), 255, np.uint8)
    if suffix != "jpg":
        assert applied(saved(tmp_path / f"x.{suffix}", Image.fromarray(opaque))) is None


@pytest.mark.parametrize("form", ["png", "tiff", "tiff-lzw"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_told(tmp_path: Path, form: str, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65535, (7, 9, channels), dtype=np.uint16)
    path = tmp_path / f"x.{form.partition('-')[0]}"
    assert cv2.imwrite(str(path), values, [cv2.IMWRITE_TIFF_COMPRESSION, 5] if form == "tiff-lzw" else [])
    assert applied(path) == "16 bit, high byte" + ("; alpha on black" if channels == 4 else "")


def test_few_bits_are_told(tmp_path: Path) -> None:
    bilevel = Image.fromarray(GREY).convert("1")
    assert applied(saved(tmp_path / "x.png", bilevel)) == "1 bit"
    assert applied(saved(tmp_path / "x.tiff", bilevel)) == "1 bit"
    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    packed = (values[:, ::2] << 4 | values[:, 1::2]).tobytes()
    (tmp_path / "y.tiff").write_bytes(tiff(values, 4, 0, packed))
    assert applied(tmp_path / "y.tiff") == "4 bit; inverted"
    np.testing.assert_array_equal(read_image(tmp_path / "y.tiff").pixels[:, :, 0], 255 - values * 17)
    header = struct.pack(">IIBBBBB", 4, 4, 4, 0, 0, 0, 0)
    rows = b"".join(b"\0" + packed[at : at + 2] for at in range(0, 8, 2))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    png = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (tmp_path / "y.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    assert applied(tmp_path / "y.png") == "4 bit"
    np.testing.assert_array_equal(read_image(tmp_path / "y.png").pixels[:, :, 0], values * 17)


def test_alpha_palettes_and_colour_spaces_are_told(tmp_path: Path) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
    rgba = rgb.convert("RGBA")
    rgba.putpixel((3, 4), (9, 9, 9, 254))
    for suffix in ("png", "webp", "tiff"):
        assert applied(saved(tmp_path / f"x.{suffix}", rgba, lossless=True)) == "alpha on black"
    assert applied(saved(tmp_path / "x.png", rgba.convert("LA"))) == "alpha on black"
    assert applied(saved(tmp_path / "x.png", rgb, transparency=rgb.getpixel((0, 0)))) == "alpha on black"
    palette = rgb.quantize(200)
    for suffix in ("png", "bmp", "tiff"):
        assert applied(saved(tmp_path / f"x.{suffix}", palette)) == "palette"
    index = palette.getpixel((0, 0))
    assert applied(saved(tmp_path / "x.png", palette, transparency=index)) == "palette; alpha on black"
    cmyk = rgb.convert("CMYK")
    for suffix in ("jpg", "tiff"):
        assert applied(saved(tmp_path / f"x.{suffix}", cmyk)) == "CMYK"
    assert applied(saved(tmp_path / "x.tiff", rgb.convert("YCbCr"))) == "from YBR"


@pytest.mark.parametrize("orientation", range(1, 10))
def test_the_exif_orientation_is_told(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    told = None if orientation in (1, 9) else f"EXIF orientation {orientation}"  # there are eight
    for suffix in ("png", "jpg", "webp"):
        assert applied(saved(tmp_path / f"x.{suffix}", Image.fromarray(GREY), exif=exif)) == told
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    both = "; ".join(filter(None, ("16 bit, high byte", told)))
    assert applied(saved(tmp_path / "x.png", deep, exif=exif)) == both


def test_every_page_says_what_was_done_to_it(tmp_path: Path) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(GREY).convert("1"), Image.fromarray(GREY).convert("CMYK")]
    pages[0].save(tmp_path / "x.tiff", save_all=True, append_images=pages[1:])
    assert [piece.applied for piece in read_slices(tmp_path / "x.tiff", "x")] == ["page", "page; 1 bit", "page; CMYK"]
    frames = [Image.new("RGBA", (8, 8), (level, 0, 0, level)) for level in (255, 90)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert [piece.applied for piece in read_slices(tmp_path / "x.webp", "x")] == [
        "animation frame",
        "animation frame; alpha on black",
    ]


def test_missing_empty_text_and_truncated_files_say_so(tmp_path: Path) -> None:
    assert reason_for(tmp_path / "none.png") == "cannot be read (No such file or directory)"
    (tmp_path / "empty.png").touch()
    assert reason_for(tmp_path / "empty.png") == "the file is empty (0 bytes)"
    (tmp_path / "text.png").write_text("hello, I am no picture")
    assert reason_for(tmp_path / "text.png") == "not a PNG, JPEG, BMP, TIFF or WebP image, whatever its name says"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "bmp", "tiff"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert reason_for(cut).startswith(("damaged or truncated image (", "not a PNG"))
        assert str(tmp_path) not in reason_for(cut)


def test_image_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")

    def forbidden(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", forbidden)
    for read in (read_image, read_mask):
        with pytest.raises(InputError) as caught:
            read(tmp_path / "x.png")
        assert caught.value.reason == "cannot be read (Permission denied)"


def test_absurd_sizes_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (40000, 2)).save(tmp_path / "wide.png")
    assert reason_for(tmp_path / "wide.png") == (
        "too large: got 40000 x 2 pixels, the limit is 67,108,864 pixels and 32,768 a side"
    )
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    assert reason_for(tmp_path / "bomb.png").startswith("too large: its header asks for too many pixels")
    monkeypatch.setattr(base, "MAX_PIXELS", 100)
    Image.fromarray(GREY).save(tmp_path / "x.png")
    assert reason_for(tmp_path / "x.png").startswith("too large: got 20 x 12 pixels")


def test_pixels_without_a_range_and_several_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "f.tiff")
    assert reason_for(tmp_path / "f.tiff") == (
        "floating-point pixels have no stated range; store the image in 8 or 16 bit"
    )
    Image.fromarray(GREY.astype(np.int32)).save(tmp_path / "i.tiff")
    assert reason_for(tmp_path / "i.tiff").startswith("32-bit integer or signed pixels")
    page = Image.fromarray(GREY)
    page.save(tmp_path / "pages.tiff", save_all=True, append_images=[page, page])
    assert reason_for(tmp_path / "pages.tiff") == "holds 3 pictures, expected one; split it into single images"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert reason_for(tmp_path / "pipe.png") == "not a regular file (a pipe, socket or device)"
    assert reason_for(tmp_path) == "a folder that cannot be listed (permission denied?)"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mask_is_true_wherever_it_is_not_zero(tmp_path: Path, dtype: type[np.generic]) -> None:
    values = np.zeros((5, 7), dtype)
    values[2, 3], values[4, 6] = 1, 255
    Image.fromarray(values).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png")
    assert mask.dtype == np.bool_
    assert np.argwhere(mask).tolist() == [[2, 3], [4, 6]]


def test_mask_in_colour_ignores_alpha(tmp_path: Path) -> None:
    values = np.zeros((3, 3, 4), np.uint8)
    values[:, :, 3] = 255
    values[1, 1, 2] = 9
    Image.fromarray(values).save(tmp_path / "m.png")
    assert np.argwhere(read_mask(tmp_path / "m.png")).tolist() == [[1, 1]]
