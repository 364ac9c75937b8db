"""Files whose decoders may crash, hang or take all memory are read in a process of their own.

Such a process is started once and kept: each thread that reads takes an idle one, or starts another. One that crashes
or takes too long for a picture is given up, and its file gets the reason; nothing else is touched.
"""

from __future__ import annotations

import atexit
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from qfae_runtime.children import importing_alike
from qfae_runtime.errors import InputError
from qfae_runtime.readers.base import ReadOptions, Slice

SECONDS_PER_PICTURE = 60.0
"""After so many seconds without a picture a file is given up."""
MEMORY_BYTES = 4 * 2**30
"""Address space of a decoding process; what asks for more fails."""

_NEXT, _STOP = b"next\n", b"stop\n"
_SECONDS_TO_END = 5.0
_idle: list[_Child] = []
_lock = threading.Lock()


def read_contained(kind: str, path: Path, source: str, options: ReadOptions) -> Iterator[Slice]:
    """Read a file as dicom.read_frames or image.read_pages do, in another process, each picture as it is taken.

    `kind` is what recognise.py says of the file.

    Raises:
        InputError: the file, or the picture that is due, cannot be read; or decoding it crashed or took too long.

    """
    try:
        child = _take()
    except OSError as error:  # too many processes, files or too little memory
        raise InputError(source, f"its decoding process could not be started ({error.strerror or error})") from None
    unharmed = False
    try:
        child.ask(kind, path, options)
        while (piece := child.answer(source)) is not None:
            unharmed = True
            yield piece
            unharmed = False
            child.tell(_NEXT)
        unharmed = True
    except GeneratorExit:
        if unharmed:
            child.tell(_STOP)
        raise
    except _ToldError as error:
        unharmed = True
        raise InputError(source, str(error)) from None
    finally:
        child.back() if unharmed else child.end()


class _ToldError(Exception):
    """The child said what is wrong with the file; it is well itself."""


class _LostError(Exception):
    """The child ended in the middle of an answer, or before it."""


class _Deadline:
    """Kills a process that is not done in time, unless that was called off: one or the other, never both.

    Only who waits for the process takes note of its end, and calls the deadline off before. So no process is killed
    that has answered in time, nor another one that was given the number of one that is gone.
    """

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._passed = self._called_off = False
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True
        self._timer.start()

    def kept(self) -> bool:
        """Call the deadline off; False if it has passed and the process was killed."""
        with self._lock:
            self._called_off = True
        self._timer.cancel()
        return not self._passed

    def _pass(self) -> None:
        with self._lock:
            if not self._called_off:
                self._passed = True
                self._process.kill()


class _Child:
    """A decoding process and the pipes to it."""

    def __init__(self) -> None:
        limit = str(2 * math.ceil(SECONDS_PER_PICTURE))
        self.process = subprocess.Popen(
            # -P: nothing is imported from the working folder, which may be that of the images: a file in it that is
            # called as a module (rle.py, numpy.py) would be run.
            [sys.executable, "-P", "-m", "qfae_runtime.readers.child", str(MEMORY_BYTES), limit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends a whole group of processes is for the one that asks
            env={**importing_alike(), "OPENBLAS_NUM_THREADS": "1"},
        )

    def ask(self, kind: str, path: Path, options: ReadOptions) -> None:
        request = {
            "kind": kind,
            "path": str(path.absolute()),
            "window": options.window,
            "axis": options.axis,
            "slices": options.slices,
        }
        self.tell(json.dumps(request).encode() + b"\n")

    def tell(self, line: bytes) -> None:
        with suppress(OSError):  # it has died: the answer that does not come will say so
            self._pipe(self.process.stdin).write(line)
            self._pipe(self.process.stdin).flush()

    def answer(self, source: str) -> Slice | None:
        """Wait for the next picture; None after the last."""
        deadline = _Deadline(self.process, SECONDS_PER_PICTURE)
        try:
            return self._read(source)
        except _LostError:
            pass
        finally:
            # Whatever came meanwhile: a process that was killed gives no further picture, and must not be kept.
            if not deadline.kept():
                reason = f"damaged image (decoding was given up after {SECONDS_PER_PICTURE:.0f} s)"
                raise InputError(source, reason)
        raise InputError(source, self._fate())

    def _read(self, source: str) -> Slice | None:
        answers = self._pipe(self.process.stdout)
        line = answers.readline()
        if not line.endswith(b"\n"):
            raise _LostError
        answer: dict[str, Any] = json.loads(line)
        if "fault" in answer:
            raise RuntimeError(f"the decoding process failed: {answer['fault']}")
        if "error" in answer:
            raise _ToldError(answer["error"])
        if "end" in answer:
            return None
        height, width, channels = answer["shape"]
        size = height * width * channels
        content = bytearray(size)
        if answers.readinto(content) != size:  # type: ignore[attr-defined]
            raise _LostError
        pixels = np.frombuffer(content, np.uint8).reshape(height, width, channels)
        return Slice(pixels, source, answer["frame"], answer["applied"])

    def back(self) -> None:
        """Keep the process for the next file."""
        with _lock:
            _idle.append(self)

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                self._pipe(pipe).close()
        self.process.wait()

    def _fate(self) -> str:
        try:
            code = self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            self.process.kill()
            code = self.process.wait()
        if code == 1:  # Python ended in order, which it does not do at a damaged file
            return "the decoding process could not be started; see that qfae can be imported by its Python"
        if -code in (signal.SIGKILL, signal.SIGTERM):
            return "its decoding process was killed, for want of memory perhaps; score the file again by itself"
        return f"damaged image (its decoder crashed, exit {code})"

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def _take() -> _Child:
    with _lock:
        while _idle:
            child = _idle.pop()
            if child.process.poll() is None:
                return child
            child.end()
    return _Child()


@atexit.register
def end_all() -> None:
    """End the idle decoding processes; those in use end with the pipes to them."""
    with _lock:
        while _idle:
            _idle.pop().end()
