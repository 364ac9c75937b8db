"""The other end of contained.py: a process that decodes files for another one and may crash or be killed doing so.

A request is a line of JSON with a path and what is to read it; each answer is a line of JSON, that of a picture
followed by its pixels; the line "next" asks for one more, anything else for none. The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qfae_runtime.errors import InputError
from qfae_runtime.readers.base import ReadOptions, Slice
from qfae_runtime.readers.dicom import read_frames
from qfae_runtime.readers.faults import foreign_faults_told
from qfae_runtime.readers.image import read_pages
from qfae_runtime.readers.recognise import DICOM

NEXT = b"next\n"


def main() -> None:
    """Serve requests until the input ends."""
    # Decoders print what they think of a file; it must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; it ends this one
    _limit_memory(int(sys.argv[1]))
    seconds = int(sys.argv[2])
    for line in sys.stdin.buffer:
        request = json.loads(line)
        window, slices = request["window"], request["slices"]
        options = ReadOptions(tuple(window) if window else None, request["axis"], tuple(slices) if slices else None)
        path = Path(request["path"])
        pieces = read_frames(path, "", options) if request["kind"] == DICOM else read_pages(path, "")
        _serve(pieces, path, answers, seconds)


def _serve(pieces: Iterator[Slice], path: Path, answers: IO[bytes], seconds: int) -> None:
    """Answer one request: a picture each time one is asked for, then how it ended."""
    while True:
        pixels = b""
        answer: dict[str, Any]
        _alarm(seconds)
        try:
            with foreign_faults_told(path, "", "cannot be read"):
                piece = next(pieces, None)
                if piece is None:
                    answer = {"end": True}
                else:
                    pixels = piece.pixels.tobytes()
                    answer = {"shape": piece.pixels.shape, "frame": piece.frame, "applied": piece.applied}
        except InputError as error:
            pixels, answer = b"", {"end": True, "error": error.reason}
        except Exception as error:  # a fault of this program: the process that asks raises it again
            pixels, answer = b"", {"end": True, "fault": _in_words(error)}
        except BaseException as error:  # a decoder in Rust that panics raises what is no Exception
            pixels, answer = b"", {"end": True, "error": f"damaged image (its decoder failed: {type(error).__name__})"}
        _alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.write(pixels)
        answers.flush()
        if "end" in answer or sys.stdin.buffer.readline() != NEXT:
            return


def _in_words(error: Exception) -> str:
    """Return what was raised and where, without values: they may be the patient's."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"


def _alarm(seconds: int) -> None:
    """End this process after so many seconds, 0 for never: the one that watches over it may have been killed."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the time limit still holds
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
