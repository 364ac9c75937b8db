"""Decoders that crash, hang or eat memory, planted in the process that decodes: the reader goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from qfae_runtime.errors import InputError
from qfae_runtime.readers import contained, dicom, read_slices
from qfae_runtime.readers.base import ReadOptions

from .dicom_files import dicom_bytes, write_dicom

COMPRESSED = Path(pydicom.data.__file__).parent / "test_files" / "MR_small_jp2klossless.dcm"
# Runs when the decoding process starts, and puts itself before the genuine reader.
PLANT = """
import os, qfae_runtime.readers.dicom as dicom
genuine = dicom.read_frames
def planted(path, source, options):
    if "bad" in path.name:
        {fault}
    yield from genuine(path, source, options)
dicom.read_frames = planted
"""


@pytest.fixture(autouse=True)
def _fresh_processes() -> Iterator[None]:
    contained.end_all()
    yield
    contained.end_all()


def plant(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plant a fault for files called bad; such a file."""
    (folder / "sitecustomize.py").write_text(PLANT.format(fault=fault))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    (folder / "bad").write_bytes(COMPRESSED.read_bytes())
    return folder / "bad"


def reason_for(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_slices(path, "a/b"))
    return caught.value.reason


def test_the_same_pixels_in_either_process() -> None:
    [here] = dicom.read_frames(COMPRESSED, "x", ReadOptions())
    [there] = read_slices(COMPRESSED, "x")
    np.testing.assert_array_equal(here.pixels, there.pixels)
    assert (here.applied, here.frame, here.source) == (there.applied, there.frame, there.source)


def test_one_process_serves_many_files() -> None:
    list(read_slices(COMPRESSED, "x"))
    [first] = contained._idle
    for _ in range(3):
        list(read_slices(COMPRESSED, "x"))
    assert contained._idle == [first]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_crash_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = plant(tmp_path, "os.kill(os.getpid(), 11)", monkeypatch)
    assert reason_for(bad) == "damaged image (its decoder crashed, exit -11)"
    assert len(list(read_slices(COMPRESSED, "x"))) == 1
    assert reason_for(bad) == "damaged image (its decoder crashed, exit -11)"


def test_a_decoder_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = plant(tmp_path, "import time; time.sleep(600)", monkeypatch)
    list(read_slices(COMPRESSED, "x"))  # starts the process, whose own alarm is set for minutes
    monkeypatch.setattr(contained, "SECONDS_PER_PICTURE", 2.0)
    begin = time.monotonic()
    assert reason_for(bad) == "damaged image (decoding was given up after 2 s)"
    assert time.monotonic() - begin < 20
    monkeypatch.undo()
    assert len(list(read_slices(COMPRESSED, "x"))) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_hanging_process_ends_itself_when_nobody_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = plant(tmp_path, "import time; time.sleep(600)", monkeypatch)
    monkeypatch.setattr(contained, "SECONDS_PER_PICTURE", 0.5)
    monkeypatch.setattr(contained._Deadline, "_pass", lambda _: None)
    assert reason_for(bad) == "damaged image (its decoder crashed, exit -14)"


def test_a_decoder_that_panics_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Rust raises is no Exception."""
    bad = plant(tmp_path, 'raise type("PanicException", (BaseException,), {})("Jane")', monkeypatch)
    list(read_slices(COMPRESSED, "x"))
    [child] = contained._idle
    assert reason_for(bad) == "damaged image (its decoder failed: PanicException)"
    assert contained._idle == [child]
    assert len(list(read_slices(COMPRESSED, "x"))) == 1


def test_nothing_of_the_working_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be that of the images, and hold a file that is called as a module is."""
    for name in ("rle", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text("open('was run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert len(list(read_slices(COMPRESSED, "x"))) == 1
    assert not (tmp_path / "was run").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_decoding_processes_are_no_part_of_the_group(tmp_path: Path) -> None:
    """Ctrl-C, and what a batch system sends, go to a whole group: the one that asks ends the others, in order."""
    list(read_slices(COMPRESSED, "x"))
    [child] = contained._idle
    assert os.getpgid(child.process.pid) == child.process.pid != os.getpgid(0)


@pytest.mark.skipif(os.name == "nt", reason="the limit is POSIX's")
def test_memory_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = plant(tmp_path, "bytearray(5 * 2**30)", monkeypatch)
    assert reason_for(bad) == "decoding it takes more memory than there is"
    assert len(list(read_slices(COMPRESSED, "x"))) == 1


@pytest.mark.skipif(os.name == "nt", reason="the limit is POSIX's")
def test_a_deflated_bomb_is_contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of a few kilobytes that becomes 3 GiB; pydicom inflates it whole."""
    monkeypatch.setattr(contained, "MEMORY_BYTES", 2**30)
    small = dicom_bytes(np.zeros((4, 4), np.uint8), TransferSyntaxUID=DeflatedExplicitVRLittleEndian)
    meta = small[: 144 + int.from_bytes(small[140:144], "little")]
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = squeeze.compress(bytes(16 * 2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "bomb").write_bytes(meta + block * 192)
    assert reason_for(tmp_path / "bomb") == "decoding it takes more memory than there is"


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b'caf\xe9\n"x')
    path.write_bytes(COMPRESSED.read_bytes())
    assert len(list(read_slices(path, "x"))) == 1


def test_libtiff_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It prints what it thinks of a damaged file; a hundred of them would bury the progress of a run."""
    path = tmp_path / "x.tiff"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(path, compression="tiff_lzw")
    assert len(list(read_slices(path, "x"))) == 1
    content = bytearray(path.read_bytes())
    content[40:400] = b"\xff" * 360
    path.write_bytes(content)
    assert reason_for(path).startswith("damaged or truncated image (")
    assert capfd.readouterr() == ("", "")


def test_what_a_decoder_prints_does_not_come_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = plant(
        tmp_path, "os.write(1, b'{}' + bytes([10])); os.write(2, b'noise'); print('noise', flush=True)", monkeypatch
    )
    assert len(list(read_slices(bad, "x"))) == 1


def test_a_file_that_is_left_in_the_middle_leaves_a_process_of_use(tmp_path: Path) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (6, 16, 16), dtype=np.uint8)
    whole = pydicom.dcmread(write_dicom(tmp_path / "x", frames))
    whole.compress(RLELossless)
    whole.save_as(tmp_path / "y")
    pieces = read_slices(tmp_path / "y", "y")
    assert [next(pieces).frame, next(pieces).frame] == [0, 1]
    [] = contained._idle
    pieces.close()
    [child] = contained._idle
    again = list(read_slices(tmp_path / "y", "y"))
    assert [piece.frame for piece in again] == list(range(6))
    for piece, frame in zip(again, frames, strict=True):
        np.testing.assert_array_equal(piece.pixels[:, :, 0], frame)
    assert contained._idle == [child]


class TimerThatFiresWhenCancelled:
    """The worst moment: the time is up just as the answer has come."""

    def __init__(self, _: float, function: Callable[[], None]) -> None:
        self.function, self.daemon = function, False

    def start(self) -> None:
        pass

    def cancel(self) -> None:
        self.function()


def test_a_process_that_answers_at_the_last_moment_is_neither_killed_nor_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "Timer", TimerThatFiresWhenCancelled)
    frames = np.random.default_rng(3).integers(0, 256, (4, 16, 16), dtype=np.uint8)
    whole = pydicom.dcmread(write_dicom(tmp_path / "x", frames))
    whole.compress(RLELossless)
    whole.save_as(tmp_path / "y")
    for _ in range(3):
        assert len(list(read_slices(tmp_path / "y", "y"))) == 4
    [child] = contained._idle
    assert child.process.poll() is None


class TimerThatFiresAtOnce(TimerThatFiresWhenCancelled):
    """The process is killed before it answers, or while it does."""

    def start(self) -> None:
        self.function()

    def cancel(self) -> None:
        pass


def test_a_process_that_was_killed_is_not_kept_whatever_it_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    list(read_slices(COMPRESSED, "x"))
    [child] = contained._idle
    monkeypatch.setattr(child.process, "kill", lambda: None)  # it lives on long enough for its answer
    monkeypatch.setattr(threading, "Timer", TimerThatFiresAtOnce)
    monkeypatch.setattr(contained._Child, "end", lambda self: ended.append(self))
    ended: list[contained._Child] = []
    assert reason_for(COMPRESSED) == "damaged image (decoding was given up after 60 s)"
    assert (ended, contained._idle) == ([child], [])
    monkeypatch.undo()
    child.end()


def test_a_deadline_kills_or_is_called_off_never_both() -> None:
    for called_off_first in (True, False):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        deadline = contained._Deadline(process, 3600.0)
        if called_off_first:
            assert deadline.kept()
        deadline._pass()
        assert deadline.kept() is called_off_first
        process.communicate(b"\n")
        assert (process.returncode == 0) is called_off_first


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_process_that_closes_its_pipe_and_lives_on_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = "import time; os.closerange(3, 64); time.sleep(600)"
    bad = plant(tmp_path, fault, monkeypatch)
    monkeypatch.setattr(contained, "_SECONDS_TO_END", 0.5)
    begin = time.monotonic()
    assert "its decoding process was killed" in reason_for(bad)
    assert time.monotonic() - begin < 30


def test_two_files_at_once_have_a_process_each() -> None:
    one, other = read_slices(COMPRESSED, "x"), read_slices(COMPRESSED, "y")
    next(one), next(other)
    assert list(one) == list(other) == []
    assert len(contained._idle) == 2
