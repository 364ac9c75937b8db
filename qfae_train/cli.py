"""qfae-train: the command line. Train on a BMAD-layout folder, write a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import click

from qfae_runtime import __version__
from qfae_runtime.command_line import CONTEXT, dispatch, fail, unexpected
from qfae_runtime.errors import INTERRUPTED, QfaeError, UsageError
from qfae_train.config import Config, Train, from_dict, load, presets
from qfae_train.evaluate_cli import evaluate_command
from qfae_train.options import (
    DEVICES,
    VERBOSE_HELP,
    check_device,
    config_source,
    needing_extra,
    parse_seeds,
    weight_options,
)
from qfae_train.output import last_beside, seed_path
from qfae_train.weight_files import parse_weight_files

PROGRAM = "qfae-train"

_EPILOG = """\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted.

\b
Examples:
  qfae-train --preset brats --data BMAD/Brain --out runs/brats/brats.pt
  qfae-train evaluate --ckpt runs/brats/brats.pt --data BMAD/Brain
"""

COMMANDS = {"evaluate": evaluate_command}
"""Commands beside training itself, by the first word."""


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
@click.option("--seeds", metavar="N,N,...", help="Train once per seed and score the test split with each.")
@click.option("--verbose", is_flag=True, help=VERBOSE_HELP)
@weight_options
@train_options
@click.version_option(__version__, prog_name=PROGRAM)
def command(rest: tuple[str, ...], **given: Any) -> None:
    """Train the Q-Former autoencoder on normal images.

    Writes the checkpoint with the best validation AUROC to --out and the newest one, to resume from, to
    NAME.last.pt beside it. With --seeds: NAME.seed42.pt and so on, and NAME.seeds.json with every seed's results on the
    test split, their means and standard deviations.
    """
    before: dict[Path, int] | None = None
    try:
        with needing_extra("training"):
            options = parse_options(rest, given)
            lasts = [last_beside(seed_path(options["out"], seed)) for seed in options["seeds"]]
            lasts = lasts or [last_beside(options["out"])]
            before = {} if options["resume"] else _written(lasts)
            _train(options)
    except KeyboardInterrupt:
        # With --overwrite, an earlier run's file may still be there: going on with that one is not meant.
        if before is not None and not _written(lasts).items() <= before.items():
            click.echo(f"{PROGRAM}: interrupted; go on with --resume", err=True)
        else:
            click.echo(f"{PROGRAM}: interrupted before the first checkpoint; nothing was saved", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except QfaeError as error:
        fail(PROGRAM, error)


def _written(files: list[Path]) -> dict[Path, int]:
    """Return the files that are there, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def _train(options: dict[str, Any]) -> None:
    """Run what was asked for and say what came of it."""
    seeds, verbose = options.pop("seeds"), options.pop("verbose")
    if seeds:
        from qfae_train.seeds import fit_seeds

        summary = fit_seeds(seeds=seeds, **options)
        if verbose:
            _say_internals([summary.file.with_name(run["checkpoint"]) for run in summary.runs], options["device"])
        click.echo(summary.text())
        click.echo(f"results of every seed {summary.file}")
        click.echo(f"next: qfae-export --ckpt {quote(str(summary.best))}")
        return
    from qfae_train.fit import fit  # torch takes seconds to import; --help and most faults need not wait

    result = fit(**options)
    if verbose:
        _say_internals([result.best], options["device"])
    auroc = (
        "" if result.best_auroc is None else f", validation AUROC {result.best_auroc:.4f} at epoch {result.best_epoch}"
    )
    click.echo(f"best checkpoint {result.best}{auroc}; newest {result.last}")
    click.echo(result.conditioning.text())
    click.echo(f"next: qfae-export --ckpt {quote(str(result.best))}")


def _say_internals(checkpoints: list[Path], device: str) -> None:
    from qfae_train.evaluate import internals_of

    for path in checkpoints:
        for number, line in enumerate(internals_of(path, device).lines()):
            click.echo(f"{path.name}: {line}" if number == 0 else line, err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves through SystemExit with the exit code."""
    dispatch(PROGRAM, command, COMMANDS, arguments)


def parse_options(rest: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Turn the texts of the command line into the arguments of `fit`.

    Raises:
        UsageError: every fault at once: unknown options, missing ones, impossible values, contradictions.

    """
    faults = [unexpected(command, text) for text in rest]
    named: list[str] = []
    source = config_source(given, named)
    faults += named
    if source is None:
        faults.append("--preset, --config: give one of them")
    if not given["data"]:
        faults.append("--data: missing; name the data set's folder")
    if not given["out"]:
        faults.append("--out: missing; name the checkpoint to write")
    elif Path(given["out"]).is_dir():
        faults.append(f"--out: {given['out']} is a folder; name a file, such as {Path(given['out']) / 'model.pt'}")
    if given["resume"] and given["overwrite"]:
        faults.append("--resume and --overwrite exclude each other; choose one")
    check_device(given["device"], faults)
    seeds = parse_seeds(given["seeds"], faults)
    if seeds and given["seed"] is not None:
        faults.append("--seed and --seeds exclude each other; choose one")
    weights = parse_weight_files(given["backbone_weights"], given["perceptual_weights"], faults)
    config = _configured(given, None if named else source, faults)
    if config is not None:
        try:
            config = weights.applied_to(config)
        except UsageError as error:
            faults += error.faults
    if faults:
        raise UsageError(faults)
    return {
        "config": config,
        "seeds": seeds,
        "data": Path(given["data"]),
        "out": Path(given["out"]),
        "resume": given["resume"],
        "overwrite": given["overwrite"],
        "device": given["device"],
        "verbose": given["verbose"],
    }


def _configured(given: dict[str, Any], source: str | None, faults: list[str]) -> Config | None:
    """Return the preset or file with the command line's values in it, or None after naming what is wrong."""
    table = load("demo").to_dict()  # where there is no configuration, wrong values are still found in place of it
    loaded = False
    if source:
        try:
            table = load(source).to_dict()
            loaded = True
        except UsageError as error:
            faults += error.faults
    for spec in dataclasses.fields(Train):
        if given[spec.name] is not None:
            table["train"][spec.name] = given[spec.name] if spec.type == "str" else _number(given[spec.name])
    try:
        config = from_dict(table)
    except UsageError as error:
        faults += [fault for fault in error.faults if fault not in faults]
        return None
    return config if loaded else None


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # the configuration's check says what was expected


if __name__ == "__main__":
    main()
