"""Work in threads, in order and in bounded memory, and the seconds that each stage of it takes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

STAGES = ("decoding", "preprocessing", "engine", "drawing", "writing")
"""What the time of scoring is spent on; docs/running.md says what each of them is."""


class Seconds:
    """Where the time of scoring goes, by stage. Stages in several threads add up over these."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Count the time within for a stage, less what stages within it take; from any thread."""
        around, self._thread.inner = getattr(self._thread, "inner", 0.0), 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            with self._lock:
                self._spent[stage] += took - self._thread.inner
            self._thread.inner = around + took

    def to_dict(self) -> dict[str, float]:
        """Return the seconds by stage."""
        return dict(self._spent)


class Pool(Protocol):
    """What runs work in threads: an executor, or one that keeps the time."""

    def submit(self, function: Callable[..., Result], /, *arguments: Any) -> Future[Result]:
        """Run the function in a thread, as soon as one is free."""
        ...


class TimedPool:
    """An executor whose work is counted for a stage."""

    def __init__(self, pool: ThreadPoolExecutor, seconds: Seconds, stage: str) -> None:
        self._pool, self._seconds, self._stage = pool, seconds, stage

    def submit(self, function: Callable[..., Result], /, *arguments: Any) -> Future[Result]:
        """Run the function in a thread, as soon as one is free, and count its time."""
        return self._pool.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        with self._seconds.measured(self._stage):
            return function(*arguments)


def in_order(
    pool: Pool, function: Callable[[Item], Result], items: Iterable[Item], depth: int, *, at_once: bool = False
) -> Iterator[Result]:
    """Map `function` over `items` in the pool; results come in order, at most `depth` items are under way.

    A result is held back until `depth` items are, so that there is work while it is used; with `at_once`, only until
    it is there when the next item comes.
    """
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        while pending and (len(pending) >= depth or (at_once and pending[0].done())):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def in_pieces(pool: Pool, items: Generator[Item, None, None], size: int) -> Generator[list[Item], None, None]:
    """Take items in lists of `size`, the next list in the pool while the last is used; closes `items` in the end.

    Whoever ends it early waits for the item that is being made, not for the list.
    """
    ended = threading.Event()
    pending = pool.submit(_take, items, size, ended)
    try:
        while piece := pending.result():
            pending = pool.submit(_take, items, size, ended)
            yield piece
    finally:
        ended.set()
        if not pending.cancel():
            wait([pending])
        items.close()


def _take(items: Iterator[Item], size: int, ended: threading.Event) -> list[Item]:
    taken: list[Item] = []
    while len(taken) < size and not ended.is_set():
        try:
            taken.append(next(items))
        except StopIteration:
            break
    return taken
