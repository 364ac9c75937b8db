"""Ctrl-C and SIGTERM: a command ends in order, and ends at all where a backend does not return.

Python runs its signal handlers between two lines of the main thread. A call into a backend that never returns keeps it
from both, so a thread watches: the interpreter writes each signal's number to a pipe at once. A call that also holds
Python's global lock, as none of the backends does, stops that thread too; only SIGKILL or SIGQUIT end it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from qfae_runtime.errors import INTERRUPTED

GRACE_S = 8.0
"""How long a signal may wait for the main thread; less than the ten seconds that container runtimes give."""

_INSISTS_AFTER_S = 1.0  # two signals nearer together are one: a terminal and a wrapper pass on the same Ctrl-C
_GRACE_INSISTED_S = 2.0
_LAST_WORDS_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2
_SHOW_CURSOR = b"\x1b[?25h"

_last_words: list[Callable[[], str | None]] = []


@contextmanager
def last_words(say: Callable[[], str | None]) -> Iterator[None]:
    """Within, call `say` from another thread before the process is ended by force; it may be cut short.

    What it returns, what is left and how to go on say, ends the sentence that is told.
    """
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


@contextmanager
def ended_in_order(program: str = "") -> Iterator[None]:
    """Within, a request to end (SIGTERM, of a batch system or a shutdown) does what Ctrl-C does: KeyboardInterrupt.

    Otherwise a process ends at once and leaves its temporary files, gigabytes perhaps. Where the main thread does not
    take a signal for GRACE_S, or a second one comes and it does not end, the process is ended by force with the exit
    code of an interruption, after `last_words`.
    """
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread alone
        yield
        return
    taken = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        taken.set()
        raise KeyboardInterrupt

    with _watched(program, taken):
        # What a script has ignored, as for commands in the background, stays ignored.
        ours = [one for one in _SIGNALS if one != signal.SIGINT or signal.getsignal(one) is signal.default_int_handler]
        before: dict[signal.Signals, Any] = {}
        try:
            for one in ours:
                before[one] = signal.signal(one, interrupt)
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


@contextmanager
def _watched(program: str, taken: threading.Event) -> Iterator[None]:
    if os.name == "nt":  # where only sockets can be waited for
        yield
        return
    ended, ends = os.pipe()
    os.set_blocking(ends, False)
    before = signal.set_wakeup_fd(ends, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(ended, program, taken), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(ends, b"\0")  # no signal's number
        thread.join()
        os.close(ends)
        os.close(ended)


def _watch(pipe: int, program: str, taken: threading.Event) -> None:
    """Wait for signals, and for the main thread to take them."""
    first, deadline, insisted = 0.0, float("inf"), False
    while True:
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        if select.select([pipe], [], [], left)[0]:
            numbers = os.read(pipe, 256)
            if 0 in numbers:
                return
            now = time.monotonic()
            if not set(numbers) & set(_SIGNALS):
                continue
            if not first:
                first, deadline = now, now + GRACE_S
            elif now - first >= _INSISTS_AFTER_S and not insisted:
                insisted, deadline = True, min(deadline, now + _GRACE_INSISTED_S)
        elif taken.is_set() and not insisted:
            deadline = float("inf")  # it ends in order, which may take its time
        else:
            _end_by_force(program)


def _end_by_force(program: str) -> None:
    """Record what can be recorded, and leave the process without waiting for any thread."""
    told: list[str] = [f"{program or 'stopped'}: what it was at, a call into the backend perhaps, did not return"]
    thread = threading.Thread(target=_say_last_words, args=(told,), daemon=True)
    thread.start()
    thread.join(_LAST_WORDS_S)
    with suppress(OSError):  # not through sys.stderr, which the main thread may hold
        os.write(_STDERR, (_SHOW_CURSOR if os.isatty(_STDERR) else b"") + "; ".join(told).encode() + b"\n")
    os._exit(INTERRUPTED)


def _say_last_words(told: list[str]) -> None:
    for say in reversed(_last_words):
        with suppress(Exception):
            if text := say():
                told.append(text)
