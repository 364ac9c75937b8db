"""How far a run is: a live bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from qfae_runtime.run import Counts

_SECONDS_BETWEEN_LINES = 15.0


class Reporter:
    """Shows Counts as they grow: done, rate, time left, errors so far."""

    def __init__(self, stream: IO[str], *, quiet: bool) -> None:
        self._console = Console(file=stream)
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start: float | None = None
        self._next_line = 0.0

    def update(self, counts: Counts) -> None:
        """Show the counts; cheap enough to be called for every row."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._next_line = now, now + _SECONDS_BETWEEN_LINES
            if not self._quiet and self._console.is_terminal:
                self._open_bar(counts)
        rate = (counts.done - counts.resumed) / max(now - self._start, 1e-3)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=counts.done, rate=rate, errors=counts.errors)
        elif not self._quiet and now >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            self._console.print(_line(counts, rate), highlight=False)

    def say(self, line: str) -> None:
        """Print a line, unless quiet."""
        if not self._quiet:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _open_bar(self, counts: Counts) -> None:
        self._bar = Progress(
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} a second"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[errors]} errors"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=counts.total, completed=counts.resumed, rate=0.0, errors=0)
        self._bar.start()


def _line(counts: Counts, rate: float) -> str:
    if counts.done == counts.resumed > 0:  # a resumed run makes the maps of its first part again before it goes on
        return f"{counts.done}/{counts.total} files, their maps are being made again for the pixel metrics"
    if counts.done == 0:
        return f"0/{counts.total} files, {counts.rows} pictures of the first one, {counts.errors} errors"
    left = (counts.total - counts.done) / rate
    return f"{counts.done}/{counts.total} files, {rate:.1f} a second, {left:.0f} s left, {counts.errors} errors"
