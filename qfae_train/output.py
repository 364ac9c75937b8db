"""The files of a run: what they are called, and how each is written whole or not at all. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qfae_runtime.errors import OutputError
from qfae_runtime.writers import whole


def last_beside(out: Path) -> Path:
    """Return where the newest checkpoint of the run that writes `out` goes."""
    return out.with_name(out.stem + ".last" + out.suffix)


def seed_path(out: Path, seed: int) -> Path:
    """Return where the checkpoint of one of several seeds goes."""
    return out.with_name(f"{out.stem}.seed{seed}{out.suffix}")


def check_writable(out: Path) -> None:
    """Try what saving will do, for a run must not end after days with nothing written.

    Raises:
        OutputError: the folder cannot be made or takes no file.

    """
    with _sentences(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tried = whole.part_of(last_beside(out))
        try:
            tried.write_bytes(bytes(4096))
        finally:
            tried.unlink(missing_ok=True)


def refuse_existing(out: Path) -> None:
    """Keep a new run from writing over an earlier one.

    Raises:
        OutputError: there is one.

    """
    last = last_beside(out)
    if last.exists():
        raise OutputError(
            f"'{out}': a run is already there; add --resume to go on with it or --overwrite to start anew"
        )
    if out.exists():
        raise OutputError(
            f"'{out}': a checkpoint is already there, without a '{last.name}' to resume from; add --overwrite to start "
            "anew or name another --out"
        )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path to write to, as the runtime's `whole_file` does; its folder is made.

    Raises:
        OutputError: it cannot be written.

    """
    with _sentences(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole.whole_file(path) as unfinished:
            yield unfinished


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(f"'{path}': cannot be written ({reason}); free the disk or name another --out") from None
