"""Where an interrupted run is resumed: at the beginning of the batch that it was in.

The last digits of a score or a map may depend on its batch. So that every row is the one that an uninterrupted run
would have written, the batch in which the rows end is composed and scored again as it was; of its pictures, those that
have a row are not written again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from qfae_runtime.batching import BEGIN, Grouping, Start
from qfae_runtime.writers.records import Row, has_image


class Restart(NamedTuple):
    """The border between two batches: where it is in the run, in which file, and behind how many of its pictures."""

    start: Start = BEGIN
    file: int = 0
    skip: int = 0

    def from_the_first(self) -> Restart:
        """Return the beginning of the run, with the rows that are trusted here."""
        return Restart(Start(trusted=self.start.trusted))


def restart_of(rows: Iterable[Row], batch_size: int, *, canaries: bool) -> Restart:
    """Return the last border before the end of the `rows` that a run has written."""
    grouping, restart = Grouping(batch_size, canaries=canaries), Restart()
    file, before, source = -1, 0, None
    for row in rows:
        if row.source != source:
            file, before, source = file + 1, 0, row.source
        if grouping.is_full_for(has_image(row)):
            restart = Restart(grouping.close(), file, before)
        before += 1
        if grouping.add(has_image(row)):
            restart = Restart(grouping.close(), file, before)
    return restart
