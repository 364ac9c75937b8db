"""qfae-train evaluate: score a labelled split with a checkpoint, in PyTorch, and measure how well that separates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qfae_runtime.command_line import CONTEXT, fail, unexpected, whole_number
from qfae_runtime.errors import QfaeError, UsageError
from qfae_train.config import load, presets
from qfae_train.options import DEVICES, VERBOSE_HELP, check_device, config_source, needing_extra, weight_options
from qfae_train.weight_files import parse_weight_files

PROGRAM = "qfae-train evaluate"
SPLITS = ("test", "valid")
_MAX_BATCH = 4096

_EPILOG = """\b
Exit codes: 0 done; 1 failed; 2 wrong usage.

\b
Examples:
  qfae-train evaluate --ckpt runs/brats/brats.pt --data BMAD/Brain
  qfae-train evaluate --ckpt last_ckpt.pth --preset brats --data BMAD/Brain
"""


# Values arrive as text, so that every fault can be told at once.
@click.command(PROGRAM, epilog=_EPILOG, context_settings=CONTEXT)
@click.argument("rest", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option("--ckpt", metavar="FILE", help="Checkpoint: qfae-train's, or the authors' last_ckpt.pth.  [required]")
@click.option("--preset", metavar="NAME", help=f"Architecture of the authors' checkpoint: {', '.join(presets())}.")
@click.option("--config", metavar="FILE.toml", help="The same as a file of your own.")
@click.option("--data", metavar="DIR", help="Data set in the BMAD folder layout.  [required]")
@click.option("--split", metavar="|".join(SPLITS), default=SPLITS[0], show_default=True, help="Which images.")
@click.option("--batch-size", metavar="N", help="Images at a time.  [default: the training's]")
@click.option("--device", metavar="|".join(DEVICES), default=DEVICES[0], show_default=True, help="Where to compute.")
@click.option("--verbose", is_flag=True, help=VERBOSE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@weight_options
def evaluate_command(rest: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Score a split with a checkpoint in PyTorch, float32, and measure it.

    Prints image AUROC, image AP, pixel AUROC, pixel AP and AUPRO at 30 % FPR with bootstrap 95 % intervals. Every
    image counts, the incomplete last batch too. Then how far rounding to FP16 and BF16 moves the scores, stage by
    stage, and whether qfae-export --fp16 will pass.
    """
    try:
        with needing_extra("evaluating"):
            options = parse_options(rest, given)
            from qfae_train.evaluate import judge_checkpoint

            metrics, conditioning = judge_checkpoint(**options, say=lambda line: click.echo(line, err=True))
    except QfaeError as error:
        fail(PROGRAM, error)
    values = metrics.to_dict()
    if as_json:
        click.echo(json.dumps({**values, "conditioning": conditioning.said()}, indent=2, allow_nan=False))
    else:
        click.echo("\n".join([*_lines(values), "", conditioning.text()]))


def _lines(values: dict[str, Any]) -> list[str]:
    """Return a line per metric with its 95 % interval, the counts, and why something is undefined."""
    from qfae_runtime.metrics import TITLES

    lines = []
    for name, title in TITLES.items():
        value, ends = values[name], values["intervals_95"].get(name)
        interval = f"   95 % interval {ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
        lines.append(f"{title:<18} {'undefined' if value is None else f'{value:.4f}{interval}'}")
    counts = values["counts"]
    lines.append(f"{counts['good']} good and {counts['ungood']} Ungood images, every one counted")
    return [*lines, *(f"note: {note}" for note in values["notes"])]


def parse_options(rest: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Turn the texts of the command line into the arguments of `judge_checkpoint`.

    Raises:
        UsageError: every fault at once.

    """
    faults = [unexpected(evaluate_command, text) for text in rest]
    if not given["ckpt"]:
        faults.append("--ckpt: missing; name the checkpoint to evaluate")
    if not given["data"]:
        faults.append("--data: missing; name the data set's folder")
    if given["split"] not in SPLITS:
        faults.append(f"--split: got {given['split']!r}, accepted are {', '.join(SPLITS)}")
    check_device(given["device"], faults)
    batch_size = whole_number("--batch-size", given["batch_size"], _MAX_BATCH, faults)
    files = parse_weight_files(given["backbone_weights"], given["perceptual_weights"], faults)
    named: list[str] = []
    source = config_source(given, named)
    faults += named
    config = None
    if source and not named:
        try:
            config = load(source)
            files.applied_to(config)  # again when the weights are read; here, so that its faults are told with the rest
        except UsageError as error:
            faults += error.faults
    if faults:
        raise UsageError(faults)
    return {
        "path": Path(given["ckpt"]),
        "data": Path(given["data"]),
        "split": given["split"],
        "config": config,
        "files": files,
        "batch_size": batch_size,
        "device": given["device"],
        "verbose": given["verbose"],
    }
