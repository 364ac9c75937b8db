"""Progress of a long run: a bar with the time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor

PLAIN_EVERY_S = 60.0
"""Seconds between plain lines where there is no terminal."""


class Reporter:
    """Says on stderr how far a run is."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._done = self._total = self._began_at = 0
        self._began = self._last_line = time.monotonic()

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, markup=False)  # file names may hold brackets

    def track(self, items: Iterable[int], title: str) -> Iterable[int]:
        """Pass items through under a bar, or silently where there is no terminal."""
        return track(items, title, console=self.console, transient=True, disable=not self.console.is_terminal)

    @contextmanager
    def running(self, total: int, done: int) -> Iterator[None]:
        """Show a bar from `done` to `total` steps while the block runs."""
        self._total, self._done, self._began_at = total, done, done
        self._began = self._last_line = time.monotonic()
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )  # fmt: skip
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            progress.add_task("training", total=total, completed=done, loss="")
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def advance(self, description: str, loss: Tensor) -> None:
        """Count one step."""
        self._done += 1
        now = time.monotonic()
        # Reading the loss waits for the device, so it is read a few times a second at most.
        if self._progress is not None and self.console.is_terminal:
            task = self._progress.tasks[0]
            if now - self._last_line > 0.5 or self._done == self._total:
                self._last_line = now
                self._progress.update(task.id, description=description, loss=f"loss {loss.item():.4f}")
            self._progress.update(task.id, completed=self._done)
        elif now - self._last_line > PLAIN_EVERY_S:
            self._last_line = now
            left = (now - self._began) / (self._done - self._began_at) * (self._total - self._done)
            self.say(
                f"{description}: step {self._done}/{self._total}, loss {loss.item():.4f}, {left / 60:.0f} minutes left"
            )
