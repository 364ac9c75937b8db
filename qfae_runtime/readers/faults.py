"""Whose fault an exception is: that of a file, which costs it its picture, or of this program, which must be seen.

What a file holds goes through foreign code, the decoders, numpy, the system, and comes back as an exception of any
type. The border has two parts:

- Within a reader (`faults_told`) every value is the file's, down to its type: any exception is taken for the file's,
  but for NameError and AssertionError of a line of this project, which no file can cause.
- Around the readers, and where pixels are made ready for the engine (`foreign_faults_told`), the values are known.
  What memory, the system or a foreign type of exception says is the file's, and so is what a foreign line raises; a
  built-in exception that a line of this project raises (TypeError, KeyError, IndexError, ...) is a fault of this
  program. It goes on and ends the command with its traceback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qfae_runtime.errors import InputError, QfaeError
from qfae_runtime.readers.base import NO_MEMORY, plain, unreadable

_OURS = str(Path(__file__).parents[1]) + os.sep
_NEVER_A_FILES = (NameError, AssertionError)


@contextmanager
def faults_told(path: Path, source: str, damaged: str, needs: tuple[str, str] | None = None) -> Iterator[None]:
    """Make an InputError of whatever reading a file within raises.

    `damaged` says what the file is then ("damaged or truncated image"). `needs` names the package of an extra, and the
    sentence for where it is not installed.
    """
    try:
        yield
    except QfaeError:
        raise
    except Exception as error:
        if isinstance(error, _NEVER_A_FILES) and raised_here(error):
            raise
        if needs is not None and isinstance(error, ModuleNotFoundError) and error.name == needs[0]:
            raise InputError(source, needs[1]) from None
        raise InputError(source, _reason(error, path, damaged)) from None


@contextmanager
def foreign_faults_told(path: Path, source: str, failed: str) -> Iterator[None]:
    """Make an InputError of what memory, the system and foreign code raise within; what this project raises goes on.

    `failed` says what did not succeed ("cannot be prepared").
    """
    try:
        yield
    except QfaeError:
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        raise InputError(source, _reason(error, path, failed)) from None


def raised_here(error: BaseException) -> bool:
    """Say whether the line that raised an exception, or called the compiled code that did, is one of this project."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS)


def _is_ours(error: Exception) -> bool:
    # An OSError, and running out of stack or memory, is never the fault of the line where it comes up.
    if isinstance(error, (OSError, MemoryError, RecursionError)):
        return False
    return type(error).__module__ == "builtins" and raised_here(error)


def _reason(error: Exception, path: Path, what: str) -> str:
    if isinstance(error, OSError) and error.errno is not None:  # of the system: those of libraries have no number
        return unreadable(error)
    if isinstance(error, MemoryError):
        return NO_MEMORY
    return f"{what} ({plain(error, path)})"
