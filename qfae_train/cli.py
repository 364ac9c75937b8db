"""qfae-train: the command line. Train on a BMAD-layout folder, write a checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import click

from qfae_runtime import __version__
from qfae_runtime.command_line import CONTEXT, fail, unexpected
from qfae_runtime.errors import QfaeError, UsageError
from qfae_train.config import Config, Train, from_dict, load, presets

PROGRAM = "qfae-train"
DEVICES = ("auto", "cpu", "cuda")
INTERRUPTED = 130

_EXTRA = ("torch", "torchvision", "timm", "safetensors", "lightning_fabric")

_EPILOG = """\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted.

\b
Example:
  qfae-train --preset brats --data BMAD/Brain --out runs/brats/brats.pt
"""


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option per field of `config.Train`; left out, the preset's value holds."""
    for spec in reversed(dataclasses.fields(Train)):
        choices, text = spec.metadata["choices"], spec.metadata["help"]
        command = click.option(
            "--" + spec.name.replace("_", "-"),
            spec.name,
            metavar="|".join(choices) or {"int": "N", "float": "X"}[str(spec.type)],
            help=f"{text[0].upper()}{text[1:]}.  [default: the preset's; {spec.default} if it names none]",
        )(command)
    return command


# Values arrive as text, so that every fault can be told at once.
@click.command(
    PROGRAM,
    epilog=_EPILOG,
    context_settings=CONTEXT,
)
@click.argument("rest", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option("--preset", metavar="NAME", help=f"Shipped configuration: {', '.join(presets())}.")
@click.option("--config", metavar="FILE.toml", help="Configuration of your own, in place of --preset.")
@click.option("--data", metavar="DIR", help="Data set in the BMAD folder layout.  [required]")
@click.option("--out", metavar="FILE.pt", help="Checkpoint to write.  [required]")
@click.option("--resume", is_flag=True, help="Go on from the .last checkpoint beside --out.")
@click.option("--overwrite", is_flag=True, help="Start anew where --out exists.")
@click.option("--device", metavar="|".join(DEVICES), default=DEVICES[0], show_default=True, help="Where to train.")
@train_options
@click.version_option(__version__, prog_name=PROGRAM)
def command(rest: tuple[str, ...], **given: Any) -> None:
    """Train the Q-Former autoencoder on normal images.

    Writes the checkpoint with the best validation AUROC to --out and the newest one, to resume from, to
    NAME.last.pt beside it.
    """
    try:
        options = parse_options(rest, given)
        from qfae_train.fit import fit  # torch takes seconds to import; --help and most faults need not wait

        result = fit(**options)
    except KeyboardInterrupt:
        click.echo(f"{PROGRAM}: interrupted; go on with --resume", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        fail(PROGRAM, QfaeError(f"training needs {error.name}, which is not installed: pip install 'qfae[train]'"))
    except QfaeError as error:
        fail(PROGRAM, error)
    auroc = (
        "" if result.best_auroc is None else f", validation AUROC {result.best_auroc:.4f} at epoch {result.best_epoch}"
    )
    click.echo(f"best checkpoint {result.best}{auroc}; newest {result.last}")
    click.echo(f"next: qfae-export --ckpt {quote(str(result.best))}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves through SystemExit with the exit code."""
    command.main(list(sys.argv[1:] if arguments is None else arguments), prog_name=PROGRAM)


def parse_options(rest: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Turn the texts of the command line into the arguments of `fit`.

    Raises:
        UsageError: every fault at once: unknown options, missing ones, impossible values, contradictions.

    """
    faults = [unexpected(command, text) for text in rest]
    if bool(given["preset"]) == bool(given["config"]):
        faults.append("--preset, --config: give exactly one of them")
    if given["config"] and not given["config"].endswith(".toml"):
        faults.append(f"--config: {given['config']!r} does not end in .toml")
    if given["preset"] and given["preset"] not in presets():
        faults.append(f"--preset: got {given['preset']!r}, accepted are {', '.join(presets())}")
    if not given["data"]:
        faults.append("--data: missing; name the data set's folder")
    if not given["out"]:
        faults.append("--out: missing; name the checkpoint to write")
    elif Path(given["out"]).is_dir():
        faults.append(f"--out: {given['out']} is a folder; name a file, such as {Path(given['out']) / 'model.pt'}")
    if given["resume"] and given["overwrite"]:
        faults.append("--resume and --overwrite exclude each other; choose one")
    if given["device"] not in DEVICES:
        faults.append(f"--device: got {given['device']!r}, accepted are {', '.join(DEVICES)}")
    config = _configured(given, faults)
    if faults or config is None:
        raise UsageError(faults)
    return {
        "config": config,
        "data": Path(given["data"]),
        "out": Path(given["out"]),
        "resume": given["resume"],
        "overwrite": given["overwrite"],
        "device": given["device"],
    }


def _configured(given: dict[str, Any], faults: list[str]) -> Config | None:
    """Return the preset or file with the command line's values in it, or None after naming what is wrong."""
    table = load("demo").to_dict()  # where there is no configuration, wrong values are still found in place of it
    source = given["config"] or given["preset"]
    if source and not faults:
        try:
            table = load(source).to_dict()
        except UsageError as error:
            faults += error.faults
    for spec in dataclasses.fields(Train):
        if given[spec.name] is not None:
            table["train"][spec.name] = given[spec.name] if spec.type == "str" else _number(given[spec.name])
    try:
        return from_dict(table)
    except UsageError as error:
        faults += error.faults
        return None


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # the configuration's check says what was expected


if __name__ == "__main__":
    main()
