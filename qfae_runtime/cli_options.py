"""What the commands of qfae-run share on the command line: images, the engine and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from qfae_runtime.command_line import unknown_option, whole_number
from qfae_runtime.engines import BACKENDS, DEVICES
from qfae_runtime.lists import read_list
from qfae_runtime.options import Options
from qfae_runtime.readers.base import AXES, ReadOptions, parse_slices, parse_window

_MAX_WHOLE = 4096

Command = TypeVar("Command", bound=Callable[..., Any])


def engine_options(command: Command) -> Command:
    """Add the options that say which engine scores, and how."""
    for add in reversed(
        (
            click.option(
                "--engine", metavar="FILE", help="Engine file, e.g. demo.onnx; its manifest lies beside it.  [required]"
            ),
            click.option(
                "--batch-size", metavar="N", help="Images per run of the engine.  [default: 16, or what it takes]"
            ),
            click.option(
                "--backend",
                metavar="|".join(BACKENDS),
                help="What runs it; auto: the fastest that is installed and certified here.  "
                f"[default: {Options.backend}]",
            ),
            click.option("--device", metavar="|".join(DEVICES), help=f"Where it runs.  [default: {Options.device}]"),
            click.option("--threads", metavar="N", help="Compute threads of the engine.  [default: all cores]"),
            click.option("--selftest", is_flag=True, help="Run the self-test even if it passed here before."),
            click.option(
                "--allow-uncertified", is_flag=True, help="Run an engine that was never compared with PyTorch."
            ),
        )
    ):
        command = add(command)
    return command


def parse_engine_options(given: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """Turn their texts into the fields of Options that they stand for."""
    if not given["engine"]:
        faults.append("--engine: missing; name the engine file that qfae-export wrote")
    return {
        "engine": Path(given["engine"] or ""),
        "batch_size": whole_number("--batch-size", given["batch_size"], _MAX_WHOLE, faults),
        "threads": whole_number("--threads", given["threads"], _MAX_WHOLE, faults),
        "backend": _choice("--backend", given["backend"] or Options.backend, BACKENDS, faults),
        "device": _choice("--device", given["device"] or Options.device, DEVICES, faults),
        "selftest": given["selftest"],
        "allow_uncertified": given["allow_uncertified"],
    }


def reading_options(command: Command) -> Command:
    """Add the options that say how medical files are read."""
    for add in reversed(
        (
            click.option(
                "--window",
                metavar="CENTER,WIDTH",
                help="Grey window of DICOM and NIfTI, e.g. 40,400.  [default: the file's]",
            ),
            click.option(
                "--axis", metavar="|".join(AXES), help=f"How NIfTI volumes are sliced.  [default: {ReadOptions.axis}]"
            ),
            click.option(
                "--slices", metavar="FROM:TO", help="Slices of NIfTI volumes, TO not included.  [default: all]"
            ),
        )
    ):
        command = add(command)
    return command


def parse_reading_options(given: dict[str, Any], faults: list[str]) -> ReadOptions:
    """Turn their texts into ReadOptions; its defaults where one is wrong."""
    window = parse_window(given["window"], faults)
    slices = parse_slices(given["slices"], faults)
    axis = _choice("--axis", given["axis"] or ReadOptions.axis, AXES, faults)
    return ReadOptions(window, axis, slices) if axis in AXES else ReadOptions()


def parse_images(
    command: click.Command, texts: Sequence[str], name: str, faults: list[str]
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the images that are named, and those that lists name; unknown options are among the texts."""
    faults += [
        unknown_option(command, text, f"; a file of that name is ./{text}")
        for text in texts
        if text.startswith("-") and text != "-"
    ]
    lists = dict.fromkeys(text for text in texts if text == "-" or text.startswith("@"))
    listed = tuple(path for text in lists for path in read_list(text, faults))
    if not texts:
        faults.append(f"{name}: missing; name the files or folders to score")
    return tuple(Path(text) for text in texts if not text.startswith(("-", "@"))), listed


def rate(option: str, text: str | None, faults: list[str]) -> float | None:
    """Return the rate between 0 and 1 that `text` says."""
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if 0 < value < 1:
        return value
    got = "missing" if text is None else f"got {text!r}"
    faults.append(f"{option}: {got}, expected a rate between 0 and 1, e.g. 0.05")
    return None


def _choice(option: str, text: str, accepted: Sequence[str], faults: list[str]) -> str:
    if text not in accepted:
        faults.append(f"{option}: got {text!r}, accepted are {', '.join(accepted)}")
    return text
