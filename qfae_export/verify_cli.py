"""qfae-export verify: measure an engine again, on this machine, against PyTorch or what PyTorch left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qfae_export.options import MOST_PARITY_IMAGES, faults_of_count
from qfae_export.wide import print_wide
from qfae_runtime.command_line import CONTEXT, fail, unexpected, whole_number
from qfae_runtime.engines import BACKENDS, DEVICES
from qfae_runtime.errors import INTERRUPTED, QfaeError, UsageError
from qfae_runtime.interruption import ended_in_order
from qfae_train.config import presets
from qfae_train.options import config_source, needing_extra, weight_options
from qfae_train.weight_files import parse_weight_files

PROGRAM = "qfae-export verify"

_EPILOG = """\b
Exit codes: 0 the engine keeps its contract; 1 it does not, or could not be measured; 2 wrong usage; 130 interrupted.

\b
Examples:
  qfae-export verify --engine brats.onnx
  qfae-export verify --engine brats.onnx --ckpt brats.pt --backend openvino --record
  qfae-export verify --engine brats.plan --ckpt brats.pt --parity-images scans/ --record
"""


# Values arrive as text, so that every fault can be told at once.
@click.command(PROGRAM, epilog=_EPILOG, context_settings=CONTEXT)
@click.argument("rest", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option("--engine", metavar="FILE", help="Engine to measure, its manifest beside it.  [required]")
@click.option("--ckpt", metavar="FILE", help="The checkpoint it was exported from.  [default: the golden images alone]")
@click.option("--preset", metavar="NAME", help=f"Architecture of the authors' checkpoint: {', '.join(presets())}.")
@click.option("--config", metavar="FILE.toml", help="The same as a file of your own.")
@click.option("--parity-images", metavar="DIR", help="Real images to measure on, normal and anomalous; with --ckpt.")
@click.option("--parity-count", metavar="N", help="How many of them.  [default: 32, or the largest batch if more]")
@click.option("--backend", metavar="|".join(BACKENDS[1:]), help="What runs it.  [default: what it was exported for]")
@click.option("--device", metavar="|".join(DEVICES), default=DEVICES[0], show_default=True, help="Where it runs.")
@click.option("--record", is_flag=True, help="Write what was measured into the manifest, as its certificate here.")
@weight_options
def verify_command(rest: tuple[str, ...], **given: Any) -> None:
    """Measure an engine again: its outputs on this machine against PyTorch's.

    With --ckpt, PyTorch scores the images anew. Without, the engine is held against what PyTorch gave on the golden
    images when it was exported: quick, and needs no checkpoint.
    """
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        with ended_in_order(PROGRAM), needing_extra("verifying"):
            arguments = parse_options(rest, given)
            from qfae_export.verify import verify

            report = verify(**arguments, say=lambda step: err.print(f"{PROGRAM}: {step}", soft_wrap=True, markup=False))
    except KeyboardInterrupt:
        err.print(f"{PROGRAM}: interrupted; the manifest is as it was")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except QfaeError as error:
        fail(PROGRAM, error)
    print_wide(out, report.table())
    out.print(f"measured on: {report.images.origin}", soft_wrap=True, markup=False)
    out.print(f"at batch sizes: {', '.join(map(str, report.batches))}", soft_wrap=True, markup=False)
    for sentence in report.untold():
        out.print(sentence, soft_wrap=True, markup=False)
    if not report:
        for failure in report.failures():
            err.print(f"{PROGRAM}: {failure}", soft_wrap=True, markup=False)
        broken = f"the engine breaks its contract ({report.contract.name}) on this machine; do not use its scores"
        err.print(f"{PROGRAM}: {broken}", soft_wrap=True)
        raise click.exceptions.Exit(1)
    out.print(f"the engine keeps its contract ({report.contract.name})")


def parse_options(rest: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Turn the texts of the command line into the arguments of `verify`.

    Raises:
        UsageError: every fault at once.

    """
    faults = [unexpected(verify_command, text) for text in rest]
    if not given["engine"]:
        faults.append("--engine: missing; name the engine that qfae-export wrote")
    if given["backend"] is not None and given["backend"] not in BACKENDS[1:]:
        faults.append(f"--backend: got {given['backend']!r}, accepted are {', '.join(BACKENDS[1:])}")
    config = config_source(given, faults)
    if not given["ckpt"]:
        faults += [
            f"{name}: means nothing without --ckpt, the checkpoint whose scores are computed anew"
            for name, present in (("--parity-images", given["parity_images"]), ("--preset or --config", config))
            if present
        ]
    count = whole_number("--parity-count", given["parity_count"], MOST_PARITY_IMAGES, faults)
    faults += faults_of_count(count, given["parity_images"])
    weights = parse_weight_files(given["backbone_weights"], given["perceptual_weights"], faults)
    if faults:
        raise UsageError(faults)
    return {
        "engine": Path(given["engine"]),
        "ckpt": Path(given["ckpt"]) if given["ckpt"] else None,
        "config": config,
        "weights": weights,
        "parity_images": Path(given["parity_images"]) if given["parity_images"] else None,
        "parity_count": count,
        "backend": given["backend"],
        "device": given["device"],
        "record": given["record"],
    }
