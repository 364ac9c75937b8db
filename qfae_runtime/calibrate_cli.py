"""qfae-run calibrate: its command line."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import click

from qfae_runtime import conformal
from qfae_runtime.calibrate import Calibrated, calibrate
from qfae_runtime.cli_options import (
    engine_options,
    parse_engine_options,
    parse_images,
    parse_reading_options,
    rate,
    reading_options,
)
from qfae_runtime.command_line import CONTEXT, fail
from qfae_runtime.errors import INTERRUPTED, SOME_INPUTS_FAILED, QfaeError, UsageError
from qfae_runtime.interruption import ended_in_order
from qfae_runtime.progress import Reporter
from qfae_runtime.run import Options

PROGRAM = "qfae-run calibrate"
_SHOWN = 10

_EPILOG = """\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some files could not be scored and were left out;
130 interrupted (Ctrl-C, SIGTERM).

\b
Example:
  qfae-run calibrate normal-scans/ --engine brats.plan --fpr 0.05
"""


# Values arrive as text, so that every fault can be told at once.
@click.command(PROGRAM, epilog=_EPILOG, context_settings=CONTEXT)
@click.argument("images", nargs=-1, metavar="NORMALS...", type=click.UNPROCESSED)
@engine_options
@reading_options
@click.option(
    "--fpr", metavar="RATE", help="Share of normal images that may be called anomalous, e.g. 0.05.  [required]"
)
@click.option("--calibration", metavar="FILE", help="Where it is written.  [default: ENGINE.calibration.json]")
@click.option("--overwrite", is_flag=True, help="Replace a calibration that is there.")
@click.option("--quiet", is_flag=True, help="No progress, no summary; errors still go to stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate_command(images: tuple[str, ...], quiet: bool, as_json: bool, **given: Any) -> None:
    """Find the decision threshold of an engine on normal images alone.

    NORMALS are files or folders of normal images, none of them used in training. The threshold is split-conformal: a
    new normal image exceeds it with a probability of at most --fpr. It is written beside the engine; from then on
    qfae-run decides, and gives each image its p-value.
    """
    try:
        options, fpr = parse_options(images, given)
        with ended_in_order(PROGRAM), Reporter(sys.stderr, quiet=quiet) as reporter:
            done = calibrate(options, fpr, reporter.update, lambda line: reporter.say(f"{PROGRAM}: {line}"))
    except KeyboardInterrupt:
        click.echo(f"{PROGRAM}: interrupted; nothing was written", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except QfaeError as error:
        fail(PROGRAM, error)
    for reason, count in Counter(done.unreadable).most_common(_SHOWN):
        click.echo(f"{PROGRAM}: left out, {count} x: {reason}", err=True)
    if done.unreadable:
        click.echo(f"{PROGRAM}: which files these are, qfae-run on the same images says in its rows", err=True)
    for warning in done.calibration.warnings():
        click.echo(f"{PROGRAM}: warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps({**done.calibration.summary(), "file": str(done.path)}, indent=2))
    elif not quiet:
        click.echo(_text(done, options))
    if done.unreadable:
        raise click.exceptions.Exit(SOME_INPUTS_FAILED)


def parse_options(images: Sequence[str], given: dict[str, Any]) -> tuple[Options, float]:
    """Turn the texts of the command line into Options and the rate.

    Raises:
        UsageError: every fault at once.

    """
    faults: list[str] = []
    paths, listed = parse_images(calibrate_command, images, "NORMALS", faults)
    fpr = rate("--fpr", given["fpr"], faults)
    engine = parse_engine_options(given, faults)
    reading = parse_reading_options(given, faults)
    if faults:
        raise UsageError(faults)
    assert fpr is not None
    chosen = Path(given["calibration"]) if given["calibration"] else None
    options = Options(
        images=paths, listed=listed, reading=reading, calibration=chosen, overwrite=given["overwrite"], **engine
    )
    return options, fpr


def _text(done: Calibrated, options: Options) -> str:
    made = done.calibration
    low, high = conformal.rate_interval(made.images, made.fpr)
    return "\n".join(
        [
            f"threshold {made.threshold:.6g}: {made.how}",
            f"a new normal image exceeds it with a probability of at most {made.fpr:g}; with these {made.images} "
            f"images the rate lies between {low:.2g} and {high:.2g} (95 %)",
            f"scored by {made.backend} on {made.device}",
            f"wrote {done.path}",
            f"next: qfae-run IMAGES --engine {quote(str(options.engine))} --out results/",
        ]
    )
