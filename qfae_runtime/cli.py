"""qfae-run: the command line. Options in, one call of run.execute, a summary out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from qfae_runtime import __version__
from qfae_runtime.calibrate_cli import calibrate_command
from qfae_runtime.cli_options import (
    engine_options,
    parse_engine_options,
    parse_images,
    parse_reading_options,
    reading_options,
)
from qfae_runtime.command_line import CONTEXT, dispatch, fail
from qfae_runtime.errors import SOME_INPUTS_FAILED, QfaeError, RunInterruptedError, UsageError
from qfae_runtime.interruption import ended_in_order
from qfae_runtime.progress import Reporter
from qfae_runtime.run import Options, Summary, execute

PROGRAM = "qfae-run"

_EPILOG = """\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some files could not be scored (each has its row);
130 interrupted (Ctrl-C, SIGTERM): --resume goes on.

\b
Examples:
  qfae-run calibrate normal-scans/ --engine demo.onnx --fpr 0.05
  qfae-run scans/ --engine demo.onnx --out results/
"""


# Values arrive as text, so that every fault can be told at once.
@click.command(
    PROGRAM,
    epilog=_EPILOG,
    context_settings=CONTEXT,
)
@click.argument("images", nargs=-1, metavar="IMAGES...", type=click.UNPROCESSED)
@engine_options
@click.option("--out", metavar="DIR", help=f"Folder for the results.  [default: {Options.out}]")
@click.option("--no-maps", is_flag=True, help="Scores only: no heat maps, no pixel metrics.")
@click.option(
    "--save-maps", is_flag=True, help="Keep every anomaly map in maps/, float16 .npy in the image's own size."
)
@click.option("--labels", metavar="FILE.csv", help="Labels (source,label) in place of the folder names good/Ungood.")
@reading_options
@click.option("--overwrite", is_flag=True, help="Replace the results in --out; removes only what qfae-run wrote.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in --out.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="Threshold to decide by, from qfae-run calibrate.  [default: ENGINE.calibration.json, if there is one]",
)
@click.option(
    "--deidentify",
    metavar="KEYFILE",
    help="Put keyed hashes in the place of paths and UIDs in all results; the file holds the key.",
)
@click.option("--hash-inputs", is_flag=True, help="Put a SHA-256 of all input files in run.json; reads them twice.")
@click.option("--quiet", is_flag=True, help="No progress, no summary; errors still go to stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.version_option(__version__, prog_name=PROGRAM)
def run_command(images: tuple[str, ...], quiet: bool, as_json: bool, **given: Any) -> None:
    """Score images with an exported engine.

    IMAGES are files or folders (walked recursively): PNG, JPEG, BMP, TIFF, WebP, and DICOM and NIfTI with the extra
    'medical'; or lists of them, one path a line: @FILE, or - for stdin. Writes scores.csv, scores.jsonl, heatmaps/,
    report.html and run.json, metrics.json where labels are known from folders named good and Ungood, and maps/ on
    request. For research use; not a medical device.
    """
    try:
        options = parse_options(images, given)
        with ended_in_order(PROGRAM), Reporter(sys.stderr, quiet=quiet) as reporter:
            summary = execute(options, reporter.update, lambda line: reporter.say(f"{PROGRAM}: {line}"))
    except QfaeError as error:
        fail(PROGRAM, error)
    except KeyboardInterrupt:  # while the engine was opened or the report written
        fail(
            PROGRAM,
            RunInterruptedError("stopped; rows already written are whole: the same command with --resume goes on"),
        )
    if as_json:
        click.echo(json.dumps(_summary_values(summary), indent=2))
    elif not quiet:
        click.echo(_summary_text(summary))
    if summary.counts.errors:
        raise click.exceptions.Exit(SOME_INPUTS_FAILED)


# Every further command of qfae-run has its entry here; anything else is an image to score.
COMMANDS: dict[str, click.Command] = {"calibrate": calibrate_command}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves through SystemExit with the exit code."""
    dispatch(PROGRAM, run_command, COMMANDS, arguments)


def parse_options(images: Sequence[str], given: dict[str, Any]) -> Options:
    """Turn the texts of the command line into Options.

    Raises:
        UsageError: every fault at once: unknown options, missing ones, impossible values, contradictions.

    """
    faults: list[str] = []
    paths, listed = parse_images(run_command, images, "IMAGES", faults)
    engine = parse_engine_options(given, faults)
    reading = parse_reading_options(given, faults)
    if given["overwrite"] and given["resume"]:
        faults.append("--overwrite and --resume exclude each other; choose one")
    if given["no_maps"] and given["save_maps"]:
        faults.append("--no-maps and --save-maps exclude each other; choose one")
    out = Path(given["out"]) if given["out"] else Options.out
    if _is_file(out):
        faults.append(f"--out: {out} is a file; name a folder")
    if faults:
        raise UsageError(faults)
    return Options(
        images=paths,
        out=out,
        maps=not given["no_maps"],
        save_maps=given["save_maps"],
        overwrite=given["overwrite"],
        resume=given["resume"],
        labels=Path(given["labels"]) if given["labels"] else None,
        calibration=Path(given["calibration"]) if given["calibration"] else None,
        deidentify=Path(given["deidentify"]) if given["deidentify"] else None,
        hash_inputs=given["hash_inputs"],
        reading=reading,
        listed=listed,
        **engine,
    )


def _is_file(out: Path) -> bool:
    try:
        return out.exists() and not out.is_dir()
    except OSError:  # out of reach: the run says so when it makes the folder
        return False


def _summary_values(summary: Summary) -> dict[str, Any]:
    counts = summary.counts
    return {
        "out": str(summary.folder.root),
        "files": counts.total,
        "rows": counts.rows,
        "scored": counts.rows - counts.errors,
        "errors": counts.errors,
        "resumed": counts.resumed,
        "seconds": round(summary.seconds, 3),
        "self_test": summary.verdict.to_dict(),
        "metrics": summary.metrics,
        "exit_code": SOME_INPUTS_FAILED if counts.errors else 0,
    }


def _summary_text(summary: Summary) -> str:
    counts, folder = summary.counts, summary.folder
    new = counts.done - counts.resumed
    lines = [f"{new} images in {summary.seconds:.1f} s ({new / summary.seconds:.1f} a second)"]
    if summary.nothing_left:
        lines = [
            f"nothing was left to do: all {counts.total} images had been scored before; the results are as they were"
        ]
    elif counts.resumed:
        lines[0] += f"; {counts.resumed} had been done before"
    if counts.rows != counts.done:
        lines[0] += f"; {counts.rows} pictures are in all {counts.done} files"
    lines.append(f"self-test {summary.verdict.status}: {summary.verdict.summary}")
    if summary.metrics:
        lines += _metrics_lines(summary.metrics)
    if counts.errors:
        lines.append(f"{counts.errors} files could not be scored; see status and error in {folder.csv}")
    lines += [f"scores   {folder.csv}", f"report   {folder.report}   (open it in a browser)"]
    return "\n".join(lines)


def _metrics_lines(metrics: dict[str, Any]) -> list[str]:
    """Return the AUROCs that are defined, on one line, and the notes."""
    found = []
    for key, name in (("image_auroc", "image AUROC"), ("pixel_auroc", "pixel AUROC")):
        if metrics[key] is not None:
            interval = metrics["intervals_95"][key]
            ends = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            found.append(f"{name} {metrics[key]:.4f}{ends}")
    text = ", ".join(found) + (" (95 % intervals)" if any("[" in one for one in found) else "")
    return [*([text] if found else []), *(f"note: {note}" for note in metrics["notes"])]


if __name__ == "__main__":
    main()
