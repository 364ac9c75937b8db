"""What an error of one file costs: that file. A fault of this program is seen."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom.data
import pytest
from PIL import Image

from qfae_runtime.errors import InputError
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_runtime.readers import contained, dicom_values, read_slices
from qfae_runtime.readers.faults import faults_told, foreign_faults_told, raised_here
from qfae_runtime.readers.recognise import HEAD_BYTES, kind_of_head
from qfae_runtime.run import Options, Summary, execute

from .conftest import write_png
from .dicom_files import write_dicom
from .test_contained import COMPRESSED
from .tiny import export_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures; the second is the bright one."""
    for name, level in (("a", 60), ("b", 250), ("c", 90)):
        write_png(tmp_path / "in" / f"{name}.png", np.full((20, 24), level, np.uint8))
    return tmp_path / "in"


def scored(folder: Path, tmp_path: Path, **engine: Any) -> tuple[Summary, dict[str, str | None]]:
    """Run; the reason of each row."""
    summary = execute(Options((folder,), export_tiny(tmp_path / "e", **engine), tmp_path / "out", maps=False))
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    return summary, {row["source"]: row["error"] for row in rows}


def is_bright(pixels: np.typing.NDArray[Any]) -> bool:
    return bool(pixels.max() > 200)


def test_an_error_of_opencv_costs_one_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = cv2.bilateralFilter

    def failing(image: Any, *arguments: Any) -> Any:
        return genuine(image[:0] if is_bright(image) else image, *arguments)  # what OpenCV itself says of no pixels

    monkeypatch.setattr(cv2, "bilateralFilter", failing)
    summary, reasons = scored(folder, tmp_path, kind="liver")
    assert (summary.counts.done, summary.counts.errors) == (3, 1)
    assert (reasons["a.png"], reasons["c.png"]) == (None, None)
    assert (reasons["b.png"] or "").startswith("cannot be prepared (OpenCV(")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "cannot be read (Input/output error)"),
        (OSError(errno.ESTALE, "Stale file handle"), "cannot be read (Stale file handle)"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "cannot be read (File name too long)"),
        (OSError("image file is truncated"), "cannot be prepared (image file is truncated)"),
        (struct.error("unpack requires 4 bytes"), "cannot be prepared (unpack requires 4 bytes)"),
        (RecursionError("maximum depth exceeded"), "cannot be prepared (maximum depth exceeded)"),
        (ValueError("bad 'Doe^Jane'"), "cannot be prepared (bad ...)"),
        (MemoryError(), "decoding it takes more memory than there is"),
    ],
)
def test_what_foreign_code_raises_is_the_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    genuine = preprocess

    def failing(pixels: Any, spec: Any) -> Any:
        if is_bright(pixels):
            raise error
        return genuine(pixels, spec)

    monkeypatch.setattr("qfae_runtime.pipeline.preprocess", failing)
    summary, reasons = scored(folder, tmp_path)
    assert summary.counts.errors == 1
    assert reasons == {"a.png": None, "b.png": reason, "c.png": None}


def test_an_error_before_a_reader_is_chosen_is_the_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = kind_of_head

    def failing(head: bytes) -> str | None:
        return genuine(head) if head != bright else str(struct.unpack("<I", b"x"))

    bright = (folder / "b.png").read_bytes()[:HEAD_BYTES]
    monkeypatch.setattr("qfae_runtime.readers.kind_of_head", failing)
    assert scored(folder, tmp_path)[1] == {
        "a.png": None,
        "b.png": "cannot be read (unpack requires a buffer of 4 bytes)",
        "c.png": None,
    }


def test_a_picture_that_does_not_fit_into_the_memory_of_the_reading_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoding process had room for it; this one has not."""

    def full(size: int) -> None:
        raise MemoryError

    monkeypatch.setattr(contained, "bytearray", full, raising=False)
    with pytest.raises(InputError, match="a/b: decoding it takes more memory than there is"):
        list(read_slices(COMPRESSED, "a/b"))


def test_a_fault_of_this_program_ends_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfae_runtime.pipeline.preprocess", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        scored(folder, tmp_path)


def test_a_fault_within_a_reader_is_not_called_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "x", np.zeros((4, 4), np.uint8))
    monkeypatch.delattr(dicom_values, "grey")
    with pytest.raises(NameError, match="name 'grey' is not defined"):
        list(read_slices(path, "x"))


@pytest.fixture
def _fresh_processes() -> Iterator[None]:
    contained.end_all()
    yield
    contained.end_all()


@pytest.mark.usefixtures("_fresh_processes")
def test_a_fault_in_the_decoding_process_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import qfae_runtime.readers.dicom_values as values\ndel values.grey\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(RuntimeError, match=r"the decoding process failed: NameError in dicom_values\.py, line \d+$"):
        list(read_slices(COMPRESSED, "x"))
    colour = Path(pydicom.data.__file__).parent / "test_files" / "SC_rgb_small_odd_jpeg.dcm"
    assert len(list(read_slices(colour, "y"))) == 1  # which needs no grey levels


def test_where_an_exception_was_raised() -> None:
    with pytest.raises(ValueError, match="expected uint8") as ours:
        preprocess(np.zeros((2, 2), np.uint8), PreprocessSpec())
    assert raised_here(ours.value)
    with pytest.raises(TypeError) as foreign:
        Image.fromarray(np.zeros((2, 2), np.complex64))
    assert not raised_here(foreign.value)


def test_both_borders_let_reasons_and_ours_through(tmp_path: Path) -> None:
    told = InputError("x", "as it is")
    for border in (faults_told, foreign_faults_told):
        with pytest.raises(InputError) as caught, border(tmp_path, "x", "damaged"):
            raise told
        assert caught.value is told
        with pytest.raises(InputError, match=r"^x: damaged \(no such key\)$"), border(tmp_path, "x", "damaged"):
            raise LookupError("no such key")
        with pytest.raises(KeyboardInterrupt), border(tmp_path, "x", "damaged"):
            raise KeyboardInterrupt
