"""The starts of a run: one at first, and one for each --resume. What run.json says of each, and of all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

RUNNING, DONE, INTERRUPTED, FAILED, KILLED = "running", "done", "interrupted", "failed", "killed"
TOTAL = "total"


@dataclass(frozen=True)
class Part:
    """One start of a run. `started` and `ended` are times in UTC as `now` writes them.

    status     "running", "done", "interrupted" (Ctrl-C, SIGTERM), "failed", or "killed": it left no word of its end
    ended      None while it runs; of a killed one, the last that is known of it
    seconds    by stage, as in run.json; of a killed one the total alone
    rows       the rows of scores.jsonl that it wrote
    batches    how often it ran the engine in batches of each size; of a killed one nothing is known
    canaries   the golden images that rode in them and were compared; of a killed one nothing is known
    untrusted_from_row  where one of them was wrong: the first row, from 1, whose score is not to be trusted
    self_test  the verdict's status
    machine    where it is not the one of the first start: platform and hardware
    """

    started: str
    self_test: str
    status: str = RUNNING
    ended: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    machine: dict[str, Any] | None = None
    batches: dict[str, int] = field(default_factory=dict)
    canaries: int = 0
    untrusted_from_row: int | None = None


def earlier_parts(stored: dict[str, Any], rows: int, last_seen: float) -> tuple[Part, ...]:
    """Return the parts of a run that is gone on with, from its run.json; none where it holds none that are legible.

    `rows` are those that are kept, of which a part has what it wrote; `last_seen` is when the run wrote last, in
    seconds since 1970: it is the end of a part that could not write its own.
    """
    try:
        parts = [Part(**values) for values in stored["parts"]]
        return tuple(_ended(part, last_seen) for part in _with_rows(parts, rows))
    except (KeyError, TypeError, ValueError):
        return ()


def _with_rows(parts: Sequence[Part], rows: int) -> list[Part]:
    counted = []
    for part in parts:
        # A killed part could not count; and the rows of a file that was not finished may have been taken back.
        wrote = rows if part.status == RUNNING else min(part.rows, rows)
        counted.append(replace(part, rows=wrote))
        rows -= wrote
    return counted


def _ended(part: Part, last_seen: float) -> Part:
    if part.status != RUNNING:
        return part
    seconds = max(0.0, last_seen - datetime.fromisoformat(part.started).timestamp())
    ended = datetime.fromtimestamp(last_seen, UTC).isoformat(timespec="seconds")
    return replace(part, status=KILLED, ended=ended, seconds={TOTAL: round(seconds, 3)})


def told(parts: Sequence[Part]) -> dict[str, Any]:
    """Return what run.json says of them: how the last one stands, the first's start, the sums of all, and each."""
    steps = dict.fromkeys(step for part in parts for step in part.seconds if step != TOTAL)
    seconds = {step: sum(part.seconds.get(step, 0.0) for part in parts) for step in (*steps, TOTAL)}
    sizes = sorted({size for part in parts for size in part.batches}, key=int, reverse=True)
    return {
        "status": parts[-1].status,
        "untrusted_from_row": parts[-1].untrusted_from_row,
        "started": parts[0].started,
        "seconds": {step: round(value, 6) for step, value in seconds.items()},
        "batches": {size: sum(part.batches.get(size, 0) for part in parts) for size in sizes},
        "canaries": sum(part.canaries for part in parts),
        "parts": [asdict(part) for part in parts],
    }


def now() -> str:
    """Return the time, UTC, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
