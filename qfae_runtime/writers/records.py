"""scores.jsonl, row by row while the run goes on, and scores.csv, whole at its end.

A score is written with 9 significant digits: enough to give every float32 back exactly.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from qfae_runtime.calibration import Decider
from qfae_runtime.errors import OutputError
from qfae_runtime.writers.whole import whole_file

OK = "ok"
ERROR = "error"
_NOT_FINITE = "the engine returned a score that is not finite"


@dataclass(frozen=True)
class Row:
    """One picture's line. Not calibrated: `threshold`, `decision`, `p_value` are None. An error: `error` says why.

    `source` is the path below the run's root, with forward slashes; `frame` the picture's number in a file of several;
    `label` is "good", "Ungood" or None; `applied` what was done to stored values ("window 40,400 (file)"), if anything.
    `heatmap` and `anomaly_map` are the paths of its pictures below the results folder, None where there are none.
    """

    source: str
    frame: int | None
    score: float | None
    threshold: float | None
    decision: str | None
    p_value: float | None
    status: str
    error: str | None
    label: str | None
    applied: str | None = None
    heatmap: str | None = None
    anomaly_map: str | None = None


COLUMNS = tuple(field.name for field in fields(Row))


def scored_row(
    source: str,
    frame: int | None,
    score: np.float32,
    decider: Decider | None,
    label: str | None,
    applied: str | None = None,
) -> Row:
    """Make the row of a scored picture; a score that is not finite makes it an error row."""
    if not math.isfinite(score):
        reason = f"{_NOT_FINITE} ({score}); report the image and the engine"
        return error_row(source, frame, reason, label, applied)
    exact = float(format(float(score), ".9g"))
    if decider is None:
        return Row(source, frame, exact, None, None, None, OK, None, label, applied)
    decision = "anomalous" if exact > decider.threshold else "normal"
    return Row(source, frame, exact, decider.threshold, decision, decider.p_value(exact), OK, None, label, applied)


def error_row(source: str, frame: int | None, reason: str, label: str | None, applied: str | None = None) -> Row:
    """Make the row of a picture that could not be scored."""
    return Row(source, frame, None, None, None, None, ERROR, reason, label, applied)


def has_image(row: Row) -> bool:
    """Say whether the engine ran a row's picture: all but those that could not be read or prepared."""
    return row.status == OK or (row.error or "").startswith(_NOT_FINITE)


class RowWriter:
    """Appends rows to scores.jsonl, one unbuffered write each: an interrupted run holds whole rows only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, io.SEEK_END)

    def write(self, row: Row) -> None:
        """Append one row, whole or not at all.

        Raises:
            OSError: it cannot be written; the rows before it are as they were.
            OutputError: the file is not there any more: what is written would go with it.

        """
        if not self._path.exists():
            raise removed(self._path)
        line = (json.dumps(asdict(row), allow_nan=False) + "\n").encode("ascii")
        left = memoryview(line)
        try:
            while left:  # a raw write may take less than it was given
                left = left[self._file.write(left) or 0 :]
        except OSError:
            with suppress(OSError):  # what is left of the row is cut off by --resume too
                self._file.truncate(self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def removed(path: Path) -> OutputError:
    """Return the error of a results file or folder that somebody took away during a run."""
    return OutputError(
        f"{path}: was removed, moved or replaced while the run was writing there; leave it alone until the run has "
        "ended, and start the run again (with --resume, if the rows are put back)"
    )


def read_rows(path: Path) -> Iterator[Row]:
    """Read scores.jsonl row by row.

    Raises:
        OutputError: a line is no row.

    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _parse_row(line, path, number)


def drop_torn_line(path: Path) -> bool:
    """Cut an unfinished last line off scores.jsonl; True if there was one."""
    with path.open("r+b") as file:
        size = file.seek(0, io.SEEK_END)
        position = size
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position == size:
            return False
        file.truncate(position)
        return True


def keep_rows(path: Path, number: int) -> None:
    """Cut scores.jsonl after its first `number` rows."""
    with path.open("r+b") as file:
        for _ in range(number):
            file.readline()
        file.truncate(file.tell())


def write_csv(rows_path: Path, csv_path: Path) -> None:
    """Write scores.csv from scores.jsonl, atomically: the same rows in the same order, null as empty cells."""
    # File names may hold any bytes; surrogateescape writes them as they are on disk.
    with (
        whole_file(csv_path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.write(_line(COLUMNS))
        for row in read_rows(rows_path):
            file.write(_line(_cell(value) for value in asdict(row).values()))


def _line(cells: Iterable[str]) -> str:
    """Return one line of a table. A cell is quoted if it holds a line's end of any system, a lone CR included."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return format(value, ".9g") if isinstance(value, float) else str(value)


def _parse_row(line: bytes, path: Path, number: int) -> Row:
    try:
        values = json.loads(line)
        if set(values) != set(COLUMNS):
            raise ValueError(f"columns {sorted(values)}")
        return Row(**values)
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{path}: line {number} is no row of qfae-run ({error}); start afresh with --overwrite"
        ) from None
