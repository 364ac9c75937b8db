"""Keeps a library from changing where signal handlers of a thread run."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """stack_t of <signal.h> on Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give this thread back, afterwards, the stack for signal handlers that it had before.

    OpenVINO's CPU plugin sets one for the thread that loads it and unmaps it when the plugin ends. Where that happens
    in another thread, the first one keeps the address: the next signal that Python handles there (Ctrl-C, SIGTERM, the
    SIGCHLD of a data loader) ends the process by SIGSEGV.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    known = library.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            library.sigaltstack(ctypes.byref(before), None)
