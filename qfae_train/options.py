"""Command-line options that training, evaluation and export share. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from qfae_runtime.errors import QfaeError
from qfae_train.config import MAX_SEED, presets
from qfae_train.weight_files import BACKBONE_HELP, BACKBONE_OPTION, PERCEPTUAL_HELP, PERCEPTUAL_OPTION

VERBOSE_HELP = "Say what decides how much rounding the model bears: ranks, gains, attention logits (stderr)."

DEVICES = ("auto", "cpu", "cuda")

_EXTRA = ("torch", "torchvision", "timm", "safetensors", "lightning_fabric")


@contextmanager
def needing_extra(what: str) -> Iterator[None]:
    """Turn a missing package of the extra `train` into one sentence; `what` is what cannot be done without it.

    Raises:
        QfaeError: a package is not installed.

    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        message = f"{what} needs {error.name}, which is not installed: pip install 'qfae[train]'"
        raise QfaeError(message) from None


def check_device(device: str, faults: list[str]) -> None:
    """Append what is wrong with --device to `faults`."""
    if device not in DEVICES:
        faults.append(f"--device: got {device!r}, accepted are {', '.join(DEVICES)}")
    elif device == "cuda":
        import torch  # takes seconds

        if not torch.cuda.is_available():
            faults.append("--device: cuda was asked for, but torch finds no CUDA device; use cpu or auto")


def weight_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name files of frozen weights."""
    command = click.option(PERCEPTUAL_OPTION, metavar="FILE", help=PERCEPTUAL_HELP)(command)
    return click.option(BACKBONE_OPTION, metavar="NAME=FILE", multiple=True, help=BACKBONE_HELP)(command)


def config_source(given: dict[str, Any], faults: list[str]) -> str | None:
    """Return the preset's name or the TOML file's path that was given; what is wrong is appended to `faults`."""
    preset, config = given["preset"], given["config"]
    if preset and config:
        faults.append("--preset, --config: give one of them, not both")
    if config and not config.endswith(".toml"):
        faults.append(f"--config: {config!r} does not end in .toml")
    if preset and preset not in presets():
        faults.append(f"--preset: got {preset!r}, accepted are {', '.join(presets())}")
    source: str | None = config or preset
    return source


def parse_seeds(text: str | None, faults: list[str]) -> list[int]:
    """Return the seeds of --seeds, none where it is not given; what is wrong is appended to `faults`."""
    words = [word.strip() for word in text.split(",")] if text is not None else []
    if not all(word.isascii() and word.isdigit() for word in words) or len(set(words)) != len(words):
        faults.append(f"--seeds: got {text!r}, expected different whole numbers with commas between, such as 42,7,13")
        return []
    digits = len(str(MAX_SEED))  # Python refuses to read thousands of digits
    too_large = [word for word in words if len(word.lstrip("0")) > digits or int(word) > MAX_SEED]
    faults.extend(f"--seeds: got {word}; accepted are seeds from 0 to {MAX_SEED}" for word in too_large)
    return [] if too_large else [int(word) for word in words]
