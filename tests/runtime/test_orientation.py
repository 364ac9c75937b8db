"""The EXIF orientation of TIFFs, which Pillow turns itself, and files that are cut short while they are decoded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qfae_runtime.readers import read_image, read_mask, read_slices

Values = np.typing.NDArray[Any]
GREY = np.arange(200, dtype=np.uint8).reshape(10, 20)
TURNED: dict[int, Callable[[Values], Values]] = {
    1: lambda values: values,
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.T,
    6: lambda values: values[::-1].T,
    7: lambda values: values[::-1, ::-1].T,
    8: lambda values: values.T[::-1],
}


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once_and_says_so(tmp_path: Path, orientation: int, compression: str) -> None:
    path, told = tmp_path / "x.tiff", [f"EXIF orientation {orientation}"] if orientation > 1 else []
    for stored, depth in ((GREY, []), (GREY.astype(np.uint16) * 257, ["16 bit, high byte"])):
        Image.fromarray(stored).save(path, exif=exif(orientation), compression=compression)
        for piece in (*read_slices(path, "x"), read_image(path)):
            np.testing.assert_array_equal(piece.pixels[:, :, 0], TURNED[orientation](GREY))
            assert piece.applied == ("; ".join([*depth, *told]) or None)
        np.testing.assert_array_equal(read_mask(path), TURNED[orientation](GREY) > 0)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_each_page_has_an_orientation_of_its_own(tmp_path: Path, compression: str) -> None:
    pages = []
    for orientation in TURNED:
        page = Image.fromarray(GREY + orientation)
        page.encoderinfo = {"tiffinfo": {0x0112: orientation}}
        pages.append(page)
    pages[0].save(tmp_path / "x.tiff", save_all=True, append_images=pages[1:], compression=compression)
    pieces = list(read_slices(tmp_path / "x.tiff", "x"))
    assert len(pieces) == len(pages)
    for orientation, piece in zip(TURNED, pieces, strict=True):
        np.testing.assert_array_equal(piece.pixels[:, :, 0], TURNED[orientation](GREY + orientation))
        assert piece.applied == ("page" if orientation == 1 else f"page; EXIF orientation {orientation}")


@pytest.mark.skipif(not hasattr(os, "truncate"), reason="the file could not be cut short here")
@pytest.mark.parametrize("when", ["check_size", "_to_rgb"])
@pytest.mark.parametrize("suffix", ["bmp", "tiff"])
def test_a_file_that_is_cut_short_while_it_is_read_does_not_end_the_process(
    tmp_path: Path, suffix: str, when: str
) -> None:
    """Before its pixels are read, and after; pixels that were only mapped into memory would raise SIGBUS."""
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.full((2000, 2000), 7, np.uint8)).save(path)
    code = f"""
import os
from qfae_runtime.errors import InputError
from qfae_runtime.readers import image
genuine = image.{when}
def cutting(*given):
    os.truncate({str(path)!r}, 20000)
    return genuine(*given)
image.{when} = cutting
try:
    print(image.read_image({str(path)!r}, "x").pixels.min())
except InputError as error:
    print(error.reason)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("damaged or truncated image (" if when == "check_size" else "7")
