"""Every test file that pydicom, nibabel and Pillow ship: the right picture or a clear reason."""

from __future__ import annotations

import io
import re
from pathlib import Path

import nibabel
import numpy as np
import PIL
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import InputError
from qfae_runtime.readers import Slice, read_slices

DICOM = Path(pydicom.data.__file__).parent
NIFTI = Path(nibabel.__file__).parent
TEST_FILES = DICOM / "test_files"

NO_IMAGE = "no image to score: "
FOREIGN = "not a PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI image, whatever its name says"
PACKED = "a gzip file, and what is in it is not a NIfTI volume; unpack it"
DIRECTORY = f"{NO_IMAGE}a DICOM directory (DICOMDIR): name the files it lists instead (Media Storage Directory Storage)"
DOSE = f"{NO_IMAGE}a radiotherapy dose grid (RT Dose Storage)"
TWELVE_BITS = (
    "compressed as JPEG Extended with 12 bits, for which no decoder is installed; convert the file, or install one "
    "with: pip install pylibjpeg-libjpeg (its licence is the GPL)"
)
# File names of pydicom as patterns, the first that fits counts; the reason, or what it begins with.
REASONS_PYDICOM = {
    r"README.*|.*\.(txt|json|dump|icc|md)|DICOMDIR.*\.json": FOREIGN,
    r"DICOMDIR.*": DIRECTORY,
    r"zipMR\.gz": PACKED,
    r"IM0000..": f"{NO_IMAGE}CT Image Storage, cut short or without its pixels",
    r"(fall|hotiron|hotmetalblue|pet|pet20step|spring|summer|winter)\.dcm": (
        f"{NO_IMAGE}a colour palette (Color Palette Storage)"
    ),
    r"ExplVR_.*NoMeta\.dcm": f"{NO_IMAGE}a treatment plan (RT Ion Plan Storage)",
    r"rtplan.*\.dcm": f"{NO_IMAGE}a treatment plan (RT Plan Storage)",
    r"rtstruct\.dcm": f"{NO_IMAGE}a radiotherapy structure set: contours (RT Structure Set Storage)",
    r"rtdose.*\.dcm|badVR\.dcm": DOSE,
    r"liver_.*\.dcm": f"{NO_IMAGE}a segmentation: regions drawn in an image (Segmentation Storage)",
    r"reportsi.*\.dcm": f"{NO_IMAGE}a structured report (Basic Text SR Storage)",
    r"test-SR\.dcm": f"{NO_IMAGE}a structured report (Comprehensive SR Storage)",
    r"waveform_ecg\.dcm": f"{NO_IMAGE}a waveform (12-lead ECG Waveform Storage)",
    r"UN_sequence\.dcm": f"{NO_IMAGE}CT Image Storage, cut short or without its pixels",
    r"priv_SQ\.dcm": f"{NO_IMAGE}MR Image Storage, cut short or without its pixels",
    r"no_meta_group_length\.dcm": f"{NO_IMAGE}RT Image Storage, cut short or without its pixels",
    r"(empty_charset_LEI|meta_missing_tsyntax|nested_priv_SQ)\.dcm": (
        f"{NO_IMAGE}a DICOM object (of no stated class) without pixels"
    ),
    r"chrSQEncoding1?\.dcm": f"{NO_IMAGE}MR Image Storage, cut short or without its pixels",
    r"chr(JapMulti|JapMultiExplicitIR6|KoreanMulti)\.dcm": (
        f"{NO_IMAGE}Computed Radiography Image Storage, cut short or without its pixels"
    ),
    r"no_meta\.dcm": FOREIGN,  # a blank stands before its first element
    r"JPEG-lossy\.dcm|JPGExtended\.dcm": TWELVE_BITS,
    r"JPEG2000-embedded-sequence-delimiter\.dcm": "damaged or truncated DICOM image (",
    r"MR_truncated\.dcm": "damaged DICOM image (8,130 of 8,192 bytes of pixels are there; the file is cut short)",
    r"SC_rgb_jpeg\.dcm": "damaged or truncated DICOM image (",
}
FOUR_D = r"a 4-D NIfTI of shape .*, expected 3-D; split it into single volumes (nibabel's four_to_three, or fslsplit)"
REASONS_NIBABEL = {
    r"example4d\.nii\.gz": FOUR_D.replace(".*", "128 x 96 x 24 x 2"),
    r"example_nifti2\.nii\.gz": FOUR_D.replace(".*", "32 x 20 x 12 x 2"),
    r"functional\.nii": FOUR_D.replace(".*", "17 x 21 x 3 x 20"),
    r"row_major\.dconn\.nii": "a 6-D NIfTI of shape 1 x 1 x 1 x 1 x 10 x 10, expected 3-D;",
    r"nifti[12]\.hdr": "a NIfTI header whose voxels are in another file (.img); convert the pair to one .nii",
    r"csa_slice_norm\.dcm": f"{NO_IMAGE}MR Image Storage, cut short or without its pixels",
    r".*\.(gz|mgz)": PACKED,
    r".*": FOREIGN,
}


def shipped(root: Path) -> list[Path]:
    """The data files of an installed package."""
    return [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix not in (".py", ".pyc")]


def outcome(path: Path) -> list[Slice] | str:
    try:
        return list(read_slices(path, path.name))
    except InputError as error:
        return error.reason


def check(files: list[Path], reasons: dict[str, str]) -> int:
    """Hold every file against the table of reasons; the number of those that give pictures."""
    faults, read = [], 0
    for path in files:
        got = outcome(path)
        if isinstance(got, str):
            expected = next((text for name, text in reasons.items() if re.fullmatch(name, path.name)), None)
            if expected is None or not got.startswith(expected):
                faults.append(f"{path}: {got!r}, expected {expected!r}")
            continue
        read += 1
        for piece in got:
            assert piece.pixels.dtype == np.uint8
            assert piece.pixels.shape[2] == 3
        assert [piece.frame for piece in got] == ([None] if len(got) == 1 else list(range(len(got))))
    assert not faults, "\n".join(faults)
    return read


def test_every_file_of_pydicom() -> None:
    files = [path for path in shipped(DICOM) if path.name != ".DS_Store"]
    assert len(files) >= 170
    read = check(files, REASONS_PYDICOM)
    assert read >= 85  # 91 with pydicom 3.0.2


def test_every_file_of_nibabel() -> None:
    files = [path for path in shipped(NIFTI) if "data" in path.parts]
    assert len(files) >= 90
    assert check(files, REASONS_NIBABEL) >= 8


def test_pillow_ships_no_images() -> None:
    assert [path for path in shipped(Path(PIL.__file__).parent) if path.suffix in (".png", ".jpg", ".tif")] == []


def grey_by_pydicom(path: Path) -> UInt8:
    """The first frame of a grey file with a window, by pydicom's own functions alone."""
    header = pydicom.dcmread(path, force=True)
    values = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header, prefer_lut=False)
    stored, signed = header.BitsStored, header.PixelRepresentation == 1
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    low, high = low * slope + intercept, high * slope + intercept
    share = (np.asarray(values, np.float64) - low) / (high - low)
    levels: UInt8 = np.floor(share * 255 + 0.5).astype(np.uint8)
    return 255 - levels if header.PhotometricInterpretation == "MONOCHROME1" else levels


WINDOWED = (
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "examples_overlay.dcm",
    "dicomdirtests/77654033/CR1/6154",
    "dicomdirtests/77654033/CT2/17106",
    "dicomdirtests/98892003/MR1/15820",
)


@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_pixels_are_those_of_pydicoms_functions(name: str) -> None:
    [piece] = read_slices(TEST_FILES / name, name)
    expected = grey_by_pydicom(TEST_FILES / name)
    assert len(np.unique(expected)) > 4
    # Halves may fall to either side: the two compute in another order.
    difference = np.abs(piece.pixels[:, :, 0].astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert (piece.pixels == piece.pixels[:, :, :1]).all()


def raw_pixels(name: str) -> tuple[bytes, pydicom.Dataset]:
    """The stored bytes after the last tag (7FE0,0010), and the header."""
    content = (TEST_FILES / name).read_bytes()
    header = pydicom.dcmread(TEST_FILES / name, stop_before_pixels=True)
    at = content.rindex(b"\xe0\x7f\x10\x00" if header.original_encoding[1] else b"\x7f\xe0\x00\x10")
    explicit = not header.original_encoding[0]
    return content[at + (12 if explicit else 8) :], header


def test_ct_from_its_bytes_by_percentiles() -> None:
    """No window in the file: the 0.5th and 99.5th percentile of the frame, from bytes and numpy alone."""
    content, header = raw_pixels("CT_small.dcm")
    values = np.frombuffer(content[: 128 * 128 * 2], "<i2").reshape(128, 128) * float(header.RescaleSlope)
    values += float(header.RescaleIntercept)
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.floor(np.clip((values - low) / (high - low), 0, 1) * 255 + 0.5)
    [piece] = read_slices(TEST_FILES / "CT_small.dcm", "x")
    np.testing.assert_array_equal(piece.pixels[:, :, 0], expected)
    assert piece.applied == f"rescaled 1,-1024; range {low:.6g}..{high:.6g} (percentiles 0.5 and 99.5 of the frame)"


def test_mr_from_its_bytes_by_the_standards_formula() -> None:
    content, _ = raw_pixels("MR_small.dcm")
    values = np.frombuffer(content[: 64 * 64 * 2], "<i2").reshape(64, 64).astype(float)
    expected = np.floor(np.clip((values - 599.5) / 1599 + 0.5, 0, 1) * 255 + 0.5)
    [piece] = read_slices(TEST_FILES / "MR_small.dcm", "x")
    np.testing.assert_array_equal(piece.pixels[:, :, 1], expected)
    assert piece.applied == "window 600,1600 (file)"


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "ExplVR_BigEnd.dcm", "SC_rgb_small_odd.dcm"])
def test_colours_from_their_bytes(name: str) -> None:
    content, header = raw_pixels(name)
    rows, columns = header.Rows, header.Columns
    stored = np.frombuffer(content[: rows * columns * 3], np.uint8)
    planar = header.PlanarConfiguration == 1
    expected = stored.reshape(3, rows, columns).transpose(1, 2, 0) if planar else stored.reshape(rows, columns, 3)
    [piece] = read_slices(TEST_FILES / name, "x")
    np.testing.assert_array_equal(piece.pixels, expected)
    assert piece.applied is None


def test_ybr_from_its_bytes() -> None:
    """4:2:2, two luminances and one pair of colours each; PS3.3 C.7.6.3.1.2 turned around."""
    content, _ = raw_pixels("SC_ybr_full_422_uncompressed.dcm")
    four = np.frombuffer(content[: 100 * 100 * 2], np.uint8).reshape(100, 50, 4).astype(float)
    y = four[:, :, :2].reshape(100, 100)
    cb, cr = (np.repeat(four[:, :, at], 2, axis=1) - 128 for at in (2, 3))
    expected = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1).clip(0, 255)
    [piece] = read_slices(TEST_FILES / "SC_ybr_full_422_uncompressed.dcm", "x")
    assert np.abs(piece.pixels - expected).max() <= 1
    assert piece.applied == "from YBR"


def test_palette_from_its_tables() -> None:
    content, header = raw_pixels("examples_palette.dcm")
    indices = np.frombuffer(content[: 350 * 800], np.uint8).reshape(350, 800)
    channels = []
    for colour in ("Red", "Green", "Blue"):
        entries, first, bits = header[f"{colour}PaletteColorLookupTableDescriptor"].value
        assert bits == 16
        table = np.frombuffer(header[f"{colour}PaletteColorLookupTableData"].value, "<u2")
        channels.append(table[np.clip(indices.astype(int) - first, 0, (entries or 65536) - 1)] >> 8)
    [piece] = read_slices(TEST_FILES / "examples_palette.dcm", "x")
    np.testing.assert_array_equal(piece.pixels, np.stack(channels, axis=-1))


def test_jpeg_from_its_own_stream() -> None:
    """The JPEG in the DICOM file, cut out and opened by Pillow alone."""
    content = (TEST_FILES / "SC_rgb_small_odd_jpeg.dcm").read_bytes()
    start = content.index(b"\xff\xd8\xff")
    stream = content[start : content.rindex(b"\xff\xd9") + 2]
    with Image.open(io.BytesIO(stream)) as image:
        expected = np.asarray(image.convert("RGB"))
    [piece] = read_slices(TEST_FILES / "SC_rgb_small_odd_jpeg.dcm", "x")
    assert np.abs(piece.pixels.astype(int) - expected).max() <= 1


def test_all_frames_of_a_compressed_film_in_order() -> None:
    """Thirty JPEGs, each cut out of the file and opened by Pillow alone, which knows them for YBR."""
    path = TEST_FILES / "examples_ybr_color.dcm"
    header = pydicom.dcmread(path)
    streams = list(generate_frames(header.PixelData, number_of_frames=30))
    pieces = list(read_slices(path, "x"))
    assert [(piece.frame, piece.applied) for piece in pieces] == [(number, "from YBR") for number in range(30)]
    for piece, stream in zip(pieces, streams, strict=True):
        with Image.open(io.BytesIO(stream)) as image:
            assert np.abs(piece.pixels.astype(int) - np.asarray(image.convert("RGB"))).max() <= 1
    assert (pieces[0].pixels != pieces[29].pixels).any()
