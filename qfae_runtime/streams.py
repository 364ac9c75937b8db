"""Standard output and error of the commands, which may lie on a full disk, end in a pipe nobody reads, or be closed.

What a command does must not depend on whether it can say so: a run whose log is full goes on, and no fault of a stream
is taken for one of the folder with the results. At the end, what could not be said on stdout is an error.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from qfae_runtime.errors import SOME_INPUTS_FAILED

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDIN, _STDOUT, _STDERR = 0, 1, 2


class _Lasting(io.RawIOBase):
    """Writes to a file descriptor as long as that is possible; `fault` is why it no longer was."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.fault: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: ReadableBuffer, /) -> int:
        if self.fault is None:
            try:
                return os.write(self._descriptor, content)
            except OSError as error:
                self.fault = error
        return memoryview(content).nbytes


@contextmanager
def lasting_streams(program: str) -> Iterator[None]:
    """Within, writing to stdout and stderr never fails; leaves through SystemExit where stdout could not be written.

    The exit code is 1 then, unless the command itself failed. A reader that leaves, as `head` does, is no fault:
    it has what it wanted. Streams that were closed before the start lead nowhere, and not into the next file opened.

    """
    if os.name == "nt":  # where a console takes no bytes
        yield
        return
    _fill_closed()
    before = sys.stdout, sys.stderr
    out, err = _Lasting(_STDOUT), _Lasting(_STDERR)
    # A stream that somebody put in their place, a test say, is his.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(out, sys.stdout, line_buffering=out.isatty())
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(err, sys.stderr, line_buffering=True)
    ours = sys.stdout, sys.stderr
    code: object = 0
    try:
        yield
    except SystemExit as leaving:
        code = leaving.code
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before
    if out.fault is not None and out.fault.errno != errno.EPIPE and code in (0, None, SOME_INPUTS_FAILED):
        ours[1].write(
            f"{program}: standard output cannot be written ({out.fault.strerror}); the work itself was done: "
            "free some space there, or send the output elsewhere\n"
        )
        ours[1].flush()
        code = 1
    raise SystemExit(code)


def _fill_closed() -> None:
    """Lead closed streams nowhere: the next file opened would take their number, and receive what is printed."""
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def _text(raw: _Lasting, like: TextIO | None, *, line_buffering: bool) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors=like.errors if like is not None else "replace",
        line_buffering=line_buffering,
    )
