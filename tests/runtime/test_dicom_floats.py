"""Float Pixel Data and Double Float Pixel Data (PS3.3 C.7.6.24): by the rules for others."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from qfae_runtime.errors import InputError
from qfae_runtime.readers import ReadOptions, Slice, read_slices

from .dicom_files import item, write_dicom

PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
VALUES = np.random.default_rng(8).normal(0.8e-3, 0.3e-3, (2, 6, 7))  # diffusion in mm2/s
KINDS = [np.float32, np.float64]


def levels(share: Any) -> Any:
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5)


def read(path: Path, options: ReadOptions | None = None) -> list[Slice]:
    return list(read_slices(path, "a/b", options))


def reason_for(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    return caught.value.reason


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_them_as_the_standard_says(tmp_path: Path, kind: type[np.floating[Any]]) -> None:
    """The bytes under the tag of the standard, by hand: a test file must not be made by the code it is to test."""
    content = write_dicom(tmp_path / "x", VALUES.astype(kind)).read_bytes()
    element, representation = (8, b"OF") if kind == np.float32 else (9, b"OD")
    stored = VALUES.astype(kind).astype(np.dtype(kind).newbyteorder("<")).tobytes()
    assert content.endswith(struct.pack("<HH2sHI", 0x7FE0, element, representation, 0, len(stored)) + stored)
    for tag in (0x0101, 0x0102, 0x0103):  # bits stored, high bit, representation
        assert struct.pack("<HH2s", 0x0028, tag, b"US") not in content


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, None])
def test_percentiles_of_each_frame(tmp_path: Path, kind: type[np.floating[Any]], syntax: UID | None) -> None:
    stored = VALUES.astype(kind)
    more: dict[str, Any] = {}
    if syntax is not None:
        more["TransferSyntaxUID"] = syntax
    if syntax == ExplicitVRBigEndian:
        keyword = "FloatPixelData" if kind == np.float32 else "DoubleFloatPixelData"
        more[keyword] = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
    pieces = read(write_dicom(tmp_path / "x", stored, SOPClassUID=PARAMETRIC_MAP, **more))
    assert [piece.frame for piece in pieces] == [0, 1]
    for piece, frame in zip(pieces, stored, strict=True):
        low, high = np.percentile(frame, (0.5, 99.5))
        expected = levels((frame.astype(float) - low) / (high - low))
        np.testing.assert_array_equal(piece.pixels, np.repeat(expected[:, :, None], 3, axis=2))
        assert piece.applied == f"range {low:.6g}..{high:.6g} (percentiles 0.5 and 99.5 of the frame)"


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_and_windows(tmp_path: Path, kind: type[np.floating[Any]]) -> None:
    stored = VALUES[0].astype(kind)
    more = {"RescaleSlope": "1000000", "RescaleIntercept": "-5"}
    path = write_dicom(tmp_path / "x", stored, WindowCenter="800", WindowWidth="900", **more)
    [piece] = read(path)
    values = stored * 1e6 - 5
    np.testing.assert_array_equal(piece.pixels[:, :, 0], levels((values - 799.5) / 899 + 0.5))
    assert piece.applied == "rescaled 1e+06,-5; window 800,900 (file)"
    [piece] = read(path, ReadOptions(window=(700.0, 400.0)))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], levels((values - 699.5) / 399 + 0.5))
    exact = item(WindowCenter="0.0008", WindowWidth="0.0005", VOILUTFunction="LINEAR_EXACT")
    shared = item(FrameVOILUTSequence=[exact])
    [piece] = read(write_dicom(tmp_path / "y", stored, SharedFunctionalGroupsSequence=[shared]))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], levels((stored.astype(float) - 8e-4) / 5e-4 + 0.5))
    assert piece.applied == "window 0.0008,0.0005 linear-exact (file)"


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(tmp_path: Path, kind: type[np.floating[Any]], photometric: str) -> None:
    """Left out of the percentiles; NaN is black, inverted or not, infinities are beyond the range's ends."""
    stored = VALUES[0].astype(kind)
    stored[0, :3] = np.nan, np.inf, -np.inf
    finite = stored[np.isfinite(stored)]
    low, high = np.percentile(finite, (0.5, 99.5))
    expected = levels((stored.astype(float) - low) / (high - low))
    expected[0, :3] = 0, 255, 0
    if photometric == "MONOCHROME1":
        expected = 255 - expected
        expected[0, 0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [piece] = read(write_dicom(tmp_path / "x", stored, PhotometricInterpretation=photometric))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], expected)
    nothing = np.full((4, 5), np.nan, kind)
    [piece] = read(write_dicom(tmp_path / "y", nothing, PhotometricInterpretation=photometric))
    assert not piece.pixels.any()
    assert (piece.applied or "").startswith("range 0..0 (no finite value in the frame)")


def test_values_at_the_ends_of_what_a_number_holds(tmp_path: Path) -> None:
    stored = np.array([[-1.7e308, 0.0], [1e300, 1.7e308]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [piece] = read(write_dicom(tmp_path / "x", stored, RescaleSlope="4"))
    assert piece.pixels.shape == (2, 2, 3)


@pytest.mark.parametrize(("kind", "name"), [(np.float32, "Float"), (np.float64, "DoubleFloat")])
def test_padding_has_elements_of_its_own(tmp_path: Path, kind: type[np.floating[Any]], name: str) -> None:
    stored = VALUES[0].astype(kind)
    stored[1, :4] = -8.5, -9.0, -10.0, -10.5
    padding = {f"{name}PixelPaddingValue": -10.0, f"{name}PixelPaddingRangeLimit": -8.5, "PixelPaddingValue": 0}
    [piece] = read(write_dicom(tmp_path / "x", stored, PhotometricInterpretation="MONOCHROME1", **padding))
    known = np.delete(stored.ravel(), [7, 8, 9])
    low, high = np.percentile(known, (0.5, 99.5))
    expected = 255 - levels((stored.astype(float) - low) / (high - low))
    assert expected[1, 0] == 255
    expected[1, :3] = 0
    np.testing.assert_array_equal(piece.pixels[:, :, 0], expected)
    assert (piece.applied or "").endswith("of the frame); inverted; padding black")


def test_what_the_standard_does_not_allow_is_named(tmp_path: Path) -> None:
    colour = write_dicom(tmp_path / "x", VALUES[0].astype(np.float32), PhotometricInterpretation="PALETTE COLOR")
    assert reason_for(colour) == (
        "floating-point pixels that are not grey are not read, nor does DICOM allow them; convert the file to grey"
    )
    wrong = write_dicom(tmp_path / "x", VALUES[0].astype(np.float32), BitsAllocated=64)
    assert reason_for(wrong) == "damaged DICOM image (bits allocated 64, where floating-point pixels have 32)"
    cut = write_dicom(tmp_path / "x", VALUES[0])
    cut.write_bytes(cut.read_bytes()[:-9])
    assert reason_for(cut).endswith(" bytes of pixels are there; the file is cut short)")
    lacking = write_dicom(tmp_path / "x", np.zeros((4, 4), np.uint16), BitsAllocated=32, PixelRepresentation=None)
    assert reason_for(lacking) == "damaged DICOM image (its header lacks PixelRepresentation)"
    packed = write_dicom(tmp_path / "x", VALUES[0].astype(np.float32), TransferSyntaxUID=RLELossless)
    assert reason_for(packed) == (
        "damaged DICOM image (floating-point pixels in a compressed syntax, which DICOM does not have)"
    )
