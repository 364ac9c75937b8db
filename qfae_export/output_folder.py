"""The folder an export is written to: may it be, is there room, and where files are made until they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qfae_export.handover import temporary_inside
from qfae_export.options import FP16_SUFFIX, INT8_SUFFIX, Options
from qfae_export.plans import SUFFIXES
from qfae_runtime.command_line import size_text
from qfae_runtime.errors import OutputError, cure_of_writing


@contextmanager
def made_in(options: Options) -> Iterator[Path]:
    """Yield a folder inside --out, so that moving a file to its final name is one step that cannot run out of space.

    Raises:
        OutputError: it cannot be written, or was removed in the meantime: whatever that led to is no fault of its own.

    """
    new = not options.folder.exists()
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with temporary_inside(options.folder, options.engine_name) as made:
            yield made
    except OSError as error:
        raise OutputError(
            f"{options.folder}: cannot be written ({error.strerror or error}); "
            f"nothing was exported: {cure_of_writing(error, 'another --out')}"
        ) from error
    finally:
        with suppress(OSError):
            if new and not any(options.folder.iterdir()):
                options.folder.rmdir()


def possible_files(name: str) -> list[str]:
    """Return every file name that an export of this name may write, the manifest last."""
    suffixes = (".onnx", INT8_SUFFIX, FP16_SUFFIX)
    onnx = [name + suffix + data for suffix in suffixes for data in ("", ".data")]
    return [*onnx, *(name + suffix for suffix in (*SUFFIXES.values(), ".golden.npz", ".json"))]


def refuse_existing(options: Options) -> None:
    """Refuse to write over an engine, unless that is asked for.

    Raises:
        OutputError: files of its name are there.

    """
    existing = [name for name in possible_files(options.engine_name) if (options.folder / name).exists()]
    if existing and not options.overwrite:
        raise OutputError(
            f"{options.folder}: already holds {', '.join(existing)}; pass --overwrite to replace it, "
            "or another --out or --name"
        )


def refuse_full_disk(options: Options, weights: int, int8: int) -> None:
    """Say now what would otherwise be found out after minutes of scoring.

    `weights` and `int8` are the bytes of the FP32 weights, and of the INT8 file's where there will be one.

    Raises:
        OutputError: the disk has not as much room.

    """
    needed = weights + (weights // 2 if options.fp16 else 0) + int8
    needed += weights if options.bisect else 0  # a trial, and what stays FP32
    needed += weights // 2 if options.fp16 and options.format != "onnx" else 0  # a plan
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        raise OutputError(
            f"{options.folder}: {size_text(free)} are free, but the engine takes {size_text(needed)}; "
            "nothing was exported: free some space or choose another --out"
        )
