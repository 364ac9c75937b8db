"""Lists of inputs in place of inputs: @FILE and - (stdin).

One path a line, in whatever bytes the file system has; empty lines are passed over. A list that holds a NUL byte has
its paths between NULs instead (find -print0), for names with line breaks. Paths are relative to the list's folder,
those of stdin to the working folder. A file whose own name begins with @ is named ./@NAME; within a list an @ means
nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MAX_LIST_BYTES = 2**30
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_list(text: str, faults: list[str]) -> tuple[Path, ...]:
    """Read the paths of a list that a command line names as @FILE or -; a fault where it cannot be read."""
    try:
        if text == "-":
            content, folder = sys.stdin.buffer.read(MAX_LIST_BYTES + 1), Path.cwd()
        else:
            folder = Path(text[1:]).parent
            with Path(text[1:]).open("rb") as file:
                content = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        faults.append(f"{text}: the list cannot be read ({error.strerror}); a file of that name is ./{text}")
        return ()
    if len(content) > MAX_LIST_BYTES:
        faults.append(f"{text}: the list is longer than {MAX_LIST_BYTES:,} bytes; name folders instead")
        return ()
    paths = _split(content.removeprefix(_BYTE_ORDER_MARK))
    if not paths:
        faults.append(f"{text}: the list is empty; expected one path a line")
    return tuple(folder / os.fsdecode(path) for path in paths)


def _split(content: bytes) -> list[bytes]:
    if b"\0" in content:
        return [path for path in content.split(b"\0") if path]
    return [line for line in (line.removesuffix(b"\r") for line in content.split(b"\n")) if line]
