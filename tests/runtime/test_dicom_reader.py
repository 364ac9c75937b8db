"""DICOM, rule by rule, on files made here; the expected levels come from the standard's formulas."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.data
import pydicom.pixels
import pytest
from PIL import Image
from pydicom.uid import ImplicitVRLittleEndian, RLELossless

from qfae_runtime.errors import InputError
from qfae_runtime.readers import ReadOptions, Slice, base, dicom, dicom_header, read_slices
from qfae_runtime.readers.base import plain

from .dicom_files import dicom_bytes, item, write_dicom

RAMP = np.arange(-1000, 1000, 100, dtype=np.int16).reshape(4, 5)


def read(path: Path, options: ReadOptions | None = None) -> list[Slice]:
    return list(read_slices(path, "a/b", options))


def reason_for(path: Path, options: ReadOptions | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(path, options)
    assert caught.value.source == "a/b"
    return caught.value.reason


def levels(share: Any) -> Any:
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5)


def test_the_files_window_comes_after_rescaling(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "noname",
        RAMP,
        RescaleSlope="2",
        RescaleIntercept="-100",
        WindowCenter=["40", "9"],
        WindowWidth=["400", "3"],
    )
    [piece] = read(path)
    expected = levels((RAMP * 2.0 - 100 - 39.5) / 399 + 0.5)
    np.testing.assert_array_equal(piece.pixels, np.repeat(expected[:, :, None], 3, axis=2))
    assert piece.applied == "rescaled 2,-100; window 40,400 (file)"
    assert (piece.frame, piece.source) == (None, "a/b")


def test_a_window_that_is_asked_for_wins(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "x", RAMP, WindowCenter="40", WindowWidth="400")
    [piece] = read(path, ReadOptions(window=(-100.0, 1000.0)))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], levels((RAMP + 100.5) / 999 + 0.5))
    assert piece.applied == "window -100,1000 (asked for)"


@pytest.mark.parametrize(
    ("function", "formula", "name"),
    [
        ("LINEAR_EXACT", lambda x: (x - 40) / 400 + 0.5, " linear-exact"),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 40) / 400)), " sigmoid"),
        ("LINEAR", lambda x: (x - 39.5) / 399 + 0.5, ""),
    ],
)
def test_window_functions(tmp_path: Path, function: str, formula: Any, name: str) -> None:
    path = write_dicom(tmp_path / "x", RAMP, WindowCenter="40", WindowWidth="400", VOILUTFunction=function)
    [piece] = read(path)
    np.testing.assert_array_equal(piece.pixels[:, :, 2], levels(formula(RAMP.astype(float))))
    assert piece.applied == f"window 40,400{name} (file)"


@pytest.mark.parametrize("width", ["0", "0.5", "-3"])
def test_an_impossible_window_gives_way_to_percentiles(tmp_path: Path, width: str) -> None:
    path = write_dicom(tmp_path / "x", RAMP, WindowCenter="40", WindowWidth=width)
    low, high = np.percentile(RAMP, (0.5, 99.5))
    [piece] = read(path)
    np.testing.assert_array_equal(piece.pixels[:, :, 0], levels((RAMP - low) / (high - low)))
    assert piece.applied == f"range {low:.6g}..{high:.6g} (percentiles 0.5 and 99.5 of the frame)"


def test_a_window_of_width_one_is_a_step(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "x", RAMP, WindowCenter="0.5", WindowWidth="1")
    np.testing.assert_array_equal(read(path)[0].pixels[:, :, 0], np.where(RAMP > 0, 255, 0))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    [piece] = read(write_dicom(tmp_path / "x", grey, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], 255 - grey)
    assert piece.applied == "inverted"


def test_8_bit_grey_without_a_window_is_as_it_is(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 200, (6, 10), dtype=np.uint8)
    [piece] = read(write_dicom(tmp_path / "x", grey))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], grey)
    assert piece.applied is None
    wide = write_dicom(tmp_path / "y", grey.astype(np.uint16), BitsStored=8, HighBit=7)
    np.testing.assert_array_equal(read(wide)[0].pixels, piece.pixels)


@pytest.mark.parametrize("inverted", [False, True])
def test_padding_is_black_and_left_out_of_the_percentiles(tmp_path: Path, inverted: bool) -> None:
    values = RAMP.copy()
    values[0, :3] = -2000
    kind = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    path = write_dicom(tmp_path / "x", values, PixelPaddingValue=-2000, **kind)
    known = values[values != -2000]
    low, high = np.percentile(known, (0.5, 99.5))
    expected = levels((values - low) / (high - low))
    expected = 255 - expected if inverted else expected
    expected[0, :3] = 0
    [piece] = read(path)
    np.testing.assert_array_equal(piece.pixels[:, :, 0], expected)
    assert (piece.applied or "").endswith("inverted; padding black" if inverted else "frame); padding black")


def test_padding_may_be_a_range(tmp_path: Path) -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    [piece] = read(write_dicom(tmp_path / "x", grey, PixelPaddingValue=59, PixelPaddingRangeLimit=50))
    np.testing.assert_array_equal(piece.pixels[:, :, 0], np.where(grey >= 50, 0, grey))


@pytest.mark.parametrize("signed", [False, True])
def test_unused_bits_are_cut_off(tmp_path: Path, signed: bool) -> None:
    """Twelve bits in sixteen, at either end of them; the others hold an overlay."""
    rng = np.random.default_rng(1)
    values = rng.integers(-2048, 2048, (6, 7)) if signed else rng.integers(0, 4096, (6, 7))
    low_end = ((values & 0xFFF) | (rng.integers(0, 16, values.shape) << 12)).astype(np.uint16)
    high_end = (((values & 0xFFF) << 4) | rng.integers(0, 16, values.shape)).astype(np.uint16)
    expected = levels((values - 99.5) / 2999 + 0.5)
    for stored, high in ((low_end, 11), (high_end, 15)):
        path = write_dicom(
            tmp_path / "x",
            stored,
            BitsStored=12,
            HighBit=high,
            PixelRepresentation=int(signed),
            WindowCenter="100",
            WindowWidth="3000",
        )
        np.testing.assert_array_equal(read(path)[0].pixels[:, :, 0], expected)


def test_look_up_tables(tmp_path: Path) -> None:
    grey = np.array([[0, 1, 2, 3, 4, 250]], np.uint8)
    table = item(LUTDescriptor=[4, 1, 12], LUTData=[0, 1000, 2000, 4095])
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    [piece] = read(write_dicom(tmp_path / "x", grey, VOILUTSequence=[table], WindowCenter="1", WindowWidth="2"))
    expected = levels(np.array([0, 0, 1000, 2000, 4095, 4095]) / 4095)
    np.testing.assert_array_equal(piece.pixels[0, :, 0], expected)
    assert piece.applied == "voi table (file)"
    modality = item(LUTDescriptor=[3, 0, 16], LUTData=[100, 50, 0], ModalityLUTType="US")
    modality["LUTDescriptor"].VR, modality["LUTData"].VR = "US", "US"
    [piece] = read(write_dicom(tmp_path / "y", grey, ModalityLUTSequence=[modality]), ReadOptions(window=(50.5, 101.0)))
    np.testing.assert_array_equal(piece.pixels[0, :, 0], levels(np.array([100, 50, 0, 0, 0, 0]) / 100))
    assert piece.applied == "modality table; window 50.5,101 (asked for)"


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    table = item(LUTDescriptor=[40, 1, 12], LUTData=[0, 1000, 2000, 4095])
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    path = write_dicom(tmp_path / "x", np.zeros((4, 4), np.uint8), VOILUTSequence=[table])
    assert reason_for(path) == "damaged DICOM image (its look-up table is damaged (4 of 40 entries))"


@pytest.mark.parametrize("planar", [0, 1])
def test_planar_configurations(tmp_path: Path, planar: int) -> None:
    colour = np.random.default_rng(2).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    content = pydicom.dcmread(write_dicom(tmp_path / "x", colour))
    content.PlanarConfiguration = planar
    content.PixelData = (colour.transpose(2, 0, 1) if planar else colour).tobytes()
    content.save_as(tmp_path / "y")
    np.testing.assert_array_equal(read(tmp_path / "y")[0].pixels, colour)


def test_frames_have_windows_of_their_own(tmp_path: Path) -> None:
    """An enhanced object: the rescaling of all frames in the shared group, a window for each in its own."""
    frames = np.stack([RAMP, RAMP + 50])
    shared = item(PixelValueTransformationSequence=[item(RescaleSlope="2", RescaleIntercept="1")])
    own = [item(FrameVOILUTSequence=[item(WindowCenter=str(c), WindowWidth="300")]) for c in (0, 100)]
    path = write_dicom(
        tmp_path / "x",
        frames,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=own,
    )
    pieces = read(path)
    for number, (piece, center) in enumerate(zip(pieces, (0, 100), strict=True)):
        x = frames[number] * 2.0 + 1
        np.testing.assert_array_equal(piece.pixels[:, :, 0], levels((x - center + 0.5) / 299 + 0.5))
        assert (piece.frame, piece.applied) == (number, f"rescaled 2,1; window {center},300 (file)")


def test_frames_before_a_damaged_one_are_given(tmp_path: Path) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (6, 16, 16), dtype=np.uint8)
    whole = pydicom.dcmread(write_dicom(tmp_path / "x", frames))
    whole.compress(RLELossless)
    whole.save_as(tmp_path / "y")
    assert [piece.frame for piece in read(tmp_path / "y")] == list(range(6))
    content = bytearray((tmp_path / "y").read_bytes())
    starts = [at for at in range(len(content) - 8) if content[at : at + 4] == b"\xfe\xff\x00\xe0"]
    header_of_frame_4 = starts[1 + 4] + 8
    content[header_of_frame_4 : header_of_frame_4 + 64] = b"\xff" * 64
    (tmp_path / "z").write_bytes(content)
    pieces = read_slices(tmp_path / "z", "z")
    given = [next(pieces) for _ in range(4)]
    with pytest.raises(InputError, match="damaged or truncated DICOM image"):
        next(pieces)
    assert [piece.frame for piece in given] == [0, 1, 2, 3]
    np.testing.assert_array_equal(given[3].pixels[:, :, 1], frames[3])


def test_a_jpeg_ls_stream_that_is_cut_short_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CharLS would take seconds to say so."""
    whole = (Path(pydicom.data.__file__).parent / "test_files" / "MR_small_jpeg_ls_lossless.dcm").read_bytes()
    end = whole.rindex(b"\xff\xd9")
    monkeypatch.setattr(pydicom.pixels, "iter_pixels", lambda *_, **__: pytest.fail("was decoded"))
    for content in (whole[: end - 500], whole[:end], whole[:end] + b"\0\0" + whole[end + 2 :]):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(InputError) as caught:
            list(dicom.read_frames(tmp_path / "x", "a/b", ReadOptions()))
        assert caught.value.reason == "damaged DICOM image (its JPEG-LS stream is cut short)"


def test_truncated_and_contradictory_headers(tmp_path: Path) -> None:
    whole = dicom_bytes(RAMP)
    (tmp_path / "cut").write_bytes(whole[:-10])
    reason = "damaged DICOM image (30 of 40 bytes of pixels are there; the file is cut short)"
    assert reason_for(tmp_path / "cut") == reason
    implicit = dicom_bytes(RAMP, TransferSyntaxUID=ImplicitVRLittleEndian)
    (tmp_path / "cut").write_bytes(implicit[:-10])
    assert reason_for(tmp_path / "cut") == reason
    film = dicom_bytes(np.zeros((3, 6, 5), np.uint8))
    (tmp_path / "cut").write_bytes(film[:-25])
    assert reason_for(tmp_path / "cut") == reason.replace("30 of 40", "65 of 90")
    start = whole.index(b"\xe0\x7f\x10\x00")
    for end in (start, whole.index(b"\x28\x00\x02\x00")):
        (tmp_path / "cut").write_bytes(whole[:end])
        assert reason_for(tmp_path / "cut") == (
            "no image to score: Secondary Capture Image Storage, cut short or without its pixels"
        )
    for name, value, reason in (
        ("Rows", 0, "the image has no pixels (5 x 0)"),
        ("Rows", 60000, "too large: got 5 x 60000 pixels, the limit is 67,108,864 pixels and 32,768 a side"),
        ("NumberOfFrames", "2000000", "too large: 2,000,000 pictures in one file, the limit is 20,000"),
        ("HighBit", 3, "damaged DICOM image (bits allocated 16, stored 16, high bit 3 cannot be)"),
        ("PhotometricInterpretation", "HSV", "colours in HSV are not read; convert the file to RGB"),
    ):
        assert reason_for(write_dicom(tmp_path / "x", RAMP, **{name: value})) == reason
    path = write_dicom(tmp_path / "x", np.zeros((4, 4), np.uint8), Rows=32768, Columns=2048, NumberOfFrames="100")
    assert reason_for(path) == ("too large: 6,710,886,400 bytes of pixels in one file, the limit is 4,294,967,296")


def test_objects_without_an_image_are_named(tmp_path: Path) -> None:
    for uid, words in (
        ("1.2.840.10008.5.1.4.1.1.66.4", "a segmentation: regions drawn in an image (Segmentation Storage)"),
        ("1.2.840.10008.5.1.4.1.1.481.2", "a radiotherapy dose grid (RT Dose Storage)"),
        (
            "1.2.840.10008.5.1.4.1.1.11.1",
            "a presentation state: how to show an image (Grayscale Softcopy Presentation State Storage)",
        ),
        ("1.2.840.10008.5.1.4.1.1.104.1", "an encapsulated document (Encapsulated PDF Storage)"),
    ):
        path = write_dicom(tmp_path / "x", RAMP, SOPClassUID=uid)
        assert reason_for(path) == f"no image to score: {words}"


def test_no_patient_data_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A name where a number should be: pydicom quotes it in what it raises and logs."""
    path = write_dicom(tmp_path / "x", RAMP, PatientName="Doe^Jane", WindowCenter="40", WindowWidth="400")
    content = path.read_bytes().replace(b"DS\x04\x00400 ", b"DS\x04\x00Jane")
    assert content != path.read_bytes()
    path.write_bytes(content)
    caplog.set_level(logging.DEBUG)
    assert "Jane" not in reason_for(path)
    assert "Jane" not in caplog.text
    assert "Jane" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "words",
    [
        "could not convert string to float: 'Doe^Jane'",
        "value doesn't fit: 'Doe^Jane' here",
        "value 'Doe^Jane " + "x" * 400 + "' is too long",
        'no "Doe^Jane',
        "it's Doe^Jane's",
    ],
)
def test_values_are_left_out_of_what_a_library_says(words: str) -> None:
    assert "Jane" not in plain(ValueError(words), Path("/x"))


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("NumberOfFrames", "Jane", "damaged DICOM image (its number of frames is no number)"),
        (
            "PhotometricInterpretation",
            "JANE",
            "colours in an unknown colour space are not read; convert the file to RGB",
        ),
    ],
)
def test_header_text_is_not_repeated(tmp_path: Path, keyword: str, value: str, reason: str) -> None:
    path = write_dicom(tmp_path / "x", RAMP, **{keyword: "MONOCHROME2" if keyword[0] == "P" else "1111"})
    content = path.read_bytes()
    before = b"MONOCHROME2 " if keyword[0] == "P" else b"1111"
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, value.encode().ljust(len(before))))
    assert reason_for(path) == reason


@pytest.mark.parametrize("words", ["Jane Plan", "Jane SR", "Jane Image Storage", "Jane RT Dose " * 30])
@pytest.mark.parametrize("rows", [True, False])
def test_a_class_that_is_not_known_is_not_repeated(tmp_path: Path, words: str, rows: bool) -> None:
    """Where a header is damaged, whatever stands in it may come in the place of its class."""
    whole = pydicom.dcmread(write_dicom(tmp_path / "x", RAMP))
    whole["SOPClassUID"] = pydicom.DataElement("SOPClassUID", "LO", words)
    if not rows:
        del whole.Rows
    whole.save_as(tmp_path / "x")
    if rows:
        assert len(read(tmp_path / "x")) == 1
    else:
        assert reason_for(tmp_path / "x") == "no image to score: a DICOM object (of an unknown class) without pixels"


def test_a_reason_has_a_longest_length() -> None:
    error = InputError("a/b", "Jane" * 1000)
    assert error.reason == "Jane" * 125 + " ..."
    assert str(error) == f"a/b: {error.reason}"


def test_a_missing_extra_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "pydicom":
            raise ModuleNotFoundError("No module named 'pydicom'", name="pydicom")
        return genuine(name, *arguments, **more)

    path = write_dicom(tmp_path / "x", RAMP)
    dicom_header.load_pydicom.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    reason = reason_for(path)
    monkeypatch.undo()
    assert reason == "DICOM files need pydicom; install it with: pip install 'qfae[medical]'"


def test_a_dicom_file_that_begins_as_a_tiff_is_dicom(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "x", RAMP)
    path.write_bytes(b"II*\0" + path.read_bytes()[4:])
    assert (read(path)[0].applied or "").startswith("range")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "x", np.zeros((3, 4, 4), np.uint8))
    pieces = read_slices(path, "a/b")
    assert next(pieces).frame == 0
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError) as caught:
        next(pieces)
    assert caught.value.reason == "changed while it was being read; score it again when nothing writes to it"
    pieces = read_slices(path, "a/b")
    next(pieces)
    path.unlink()
    with pytest.raises(InputError, match="changed while it was being read"):
        next(pieces)


def test_the_limit_of_pixels_is_that_of_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_PIXELS", 10)
    assert reason_for(write_dicom(tmp_path / "x", RAMP)).startswith("too large: got 5 x 4 pixels")
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "x.png")
    assert reason_for(tmp_path / "x.png").startswith("too large: got 5 x 4 pixels")
