"""What the three command lines share: how faults are told, all at once, in plain words."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from qfae_runtime.errors import QfaeError, UsageError
from qfae_runtime.streams import lasting_streams

CONTEXT: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
"""Settings of a click command whose unknown options arrive as arguments, so that every fault can be told at once."""


def fail(program: str, error: QfaeError) -> NoReturn:
    """Say what stopped the command in plain words on stderr and leave with its exit code."""
    if isinstance(error, UsageError):
        lines = [f"{program}: {fault}" for fault in error.faults]
        click.echo("\n".join([*lines, f"Try '{program} --help'."]), err=True)
    else:
        click.echo(f"{program}: {error}", err=True)
    raise click.exceptions.Exit(error.exit_code)


def dispatch(
    program: str, command: click.Command, others: Mapping[str, click.Command], arguments: Sequence[str] | None
) -> None:
    """Run the command of `others` that the first word names, else `command`; leaves through SystemExit.

    What Pillow warns of does not come between the lines of a command.

    `arguments` None: those of the process.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what matters about a picture is said of its file
    given = list(sys.argv[1:] if arguments is None else arguments)
    other = others.get(given[0]) if given else None
    with lasting_streams(program):
        if other is None:
            command.main(given, prog_name=program)
        else:
            other.main(given[1:], prog_name=f"{program} {given[0]}")


def unknown_option(command: click.Command, text: str, otherwise: str = "") -> str:
    """Return the fault of an option that `command` does not have: its nearest neighbour, or `otherwise`."""
    name = text.partition("=")[0]
    known = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"{name}: no such option" + (f"; did you mean {close[0]}?" if close else otherwise)


def unexpected(command: click.Command, text: str) -> str:
    """Return the fault of an argument in a command that takes options alone."""
    if text.startswith("-"):
        return unknown_option(command, text)
    return f"{text!r}: unexpected; everything is named by an option"


def whole_number(option: str, text: str | None, largest: int, faults: list[str]) -> int | None:
    """Return the whole number from 1 to `largest` that `text` says; None where it is not given or not one."""
    if text is None:
        return None
    if text.isascii() and text.isdigit() and 1 <= int(text) <= largest:
        return int(text)
    faults.append(f"{option}: got {text!r}, expected a whole number in 1..{largest}")
    return None


def size_text(count: int) -> str:
    """Return a number of bytes as people read it."""
    for unit, bytes_in_unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_in_unit:
            return f"{count / bytes_in_unit:.1f} {unit}"
    return f"{count} B"
