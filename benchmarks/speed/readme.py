"""The README's table of speed, made of the committed rows: `python -m benchmarks.speed.readme` writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.documents import between
from benchmarks.speed.rows import Row, read
from benchmarks.speed.table import SPEED, engine_rows_of, notes, speed_cells, title_of
from qfae_runtime.errors import QfaeError

RESULTS = Path("benchmarks/results")
MARKS = ("<!-- bench-results -->", "<!-- /bench-results -->")


def block(measurements: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Return the lines between the marks: a table of each file, and sentences below it.

    The table is of the batch size that most candidates were measured at, of several such sizes the largest. Whoever was
    not measured at it is named below the table.

    Raises:
        QfaeError: a file has no row of an engine.

    """
    parts = []
    for name, rows in measurements:
        first = next(row for row in rows if row["kind"] == "conditions")
        engines = engine_rows_of(rows)
        size = _shown_size(name, engines)
        title, versions = title_of(first).split("\n")
        parts += [f"{title}:", "", _line(SPEED), _line(["---", *["---:"] * (len(SPEED) - 1)])]
        parts += [_line(speed_cells(row)) for row in engines if row["batch"] == size]
        parts += ["", f"With {versions}; every row is in [{name}]({RESULTS.as_posix()}/{name})."]
        parts += ["", *(f"- {note}" for note in notes(rows))]
        parts.append("")
    return "\n".join(parts).rstrip()


def _shown_size(name: str, engines: Sequence[Row]) -> int:
    measured: Counter[int] = Counter(row["batch"] for row in engines)
    if not measured:
        raise QfaeError(f"{name}: no engine was measured; expected rows of kind 'engine': measure again, or remove it")
    return max(measured, key=lambda size: (measured[size], size))


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def with_results(text: str, measurements: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Return a text with the block between its marks."""
    return between(text, MARKS, block(measurements))


def committed(root: Path) -> list[tuple[str, list[Row]]]:
    """Return the committed rows, by file name."""
    return [(path.name, read(path)) for path in sorted((root / RESULTS).glob("*.jsonl"))]


def main() -> None:
    """Write the README of the working directory."""
    readme = Path("README.md")
    readme.write_text(with_results(readme.read_text(encoding="utf-8"), committed(Path())), encoding="utf-8")


if __name__ == "__main__":
    main()
