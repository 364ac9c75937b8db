"""qfae-bench: the command line. Options in, one call of bench.bench, a table, rows and a page out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.speed.bench import Options, bench
from benchmarks.speed.candidates import BASELINE, CANDIDATES, CPU, CUDA, Candidate, candidates_on
from benchmarks.speed.page import write_page
from benchmarks.speed.rounds import Plan
from benchmarks.speed.rows import Row, save
from benchmarks.speed.subject import Asked
from benchmarks.speed.table import notes, tables
from qfae_runtime import __version__
from qfae_runtime.command_line import CONTEXT, dispatch, fail, unexpected, whole_number
from qfae_runtime.errors import INTERRUPTED, OutputError, QfaeError, UsageError
from qfae_runtime.interruption import ended_in_order
from qfae_runtime.manifest import MAX_BATCH
from qfae_train.config import presets
from qfae_train.options import config_source, needing_extra, parse_seeds, weight_options
from qfae_train.weight_files import parse_weight_files

PROGRAM = "qfae-bench"
DEVICES = (CPU, CUDA)
_WIDTH = 128  # what the tables need; a terminal that is narrower wraps them

_EPILOG = """\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted. A candidate that cannot run here, or fails, is listed
with the reason; the others are measured all the same.

\b
Examples:
  qfae-bench --preset brats --random-weights 0
  qfae-bench --ckpt demo.pt --against torch-plain,openvino --batches 1,8
  qfae-bench --engine demo.onnx
"""


# Values arrive as text, so that every fault can be told at once.
@click.command(PROGRAM, epilog=_EPILOG, context_settings=CONTEXT)
@click.argument("rest", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option("--engine", metavar="FILE", help="An exported engine as it is, its manifest beside it.")
@click.option("--ckpt", metavar="FILE", help="A checkpoint: PyTorch, and engines written of it here.")
@click.option("--preset", metavar="NAME", help=f"Architecture: {', '.join(presets())}.")
@click.option("--config", metavar="FILE.toml", help="The same as a file of your own.")
@click.option(
    "--random-weights", metavar="SEED", help="With --preset or --config: weights of this seed, no checkpoint."
)
@click.option("--images", metavar="DIR", help="Images to measure scores on.  [default: the checkpoint's, or slices]")
@click.option("--against", metavar="NAME,...", help="What to measure.  [default: all that can run here]")
@click.option("--device", metavar="|".join(DEVICES), default=CPU, show_default=True, help="Where to run.")
@click.option("--threads", metavar="N", help="Threads on the processor.  [default: all cores]")
@click.option("--batches", metavar="N,...", help=f"Batch sizes.  [default: {','.join(map(str, Plan.batches))}]")
@click.option("--rounds", metavar="N", help=f"Visits to every candidate at every size.  [default: {Plan.rounds}]")
@click.option("--seconds", metavar="S", help=f"Least seconds of a visit.  [default: {Plan.seconds:g}]")
@click.option("--longest", metavar="S", help=f"Leave out batches that would take longer.  [default: {Plan.longest:g}]")
@click.option("--longest-build", metavar="S", help="Give up what takes longer to build.  [default: nothing]")
@click.option("--files", metavar="N", help=f"Files to score through qfae-run; 0: none.  [default: {Options.files}]")
@click.option("--out", metavar="DIR", default="bench", show_default=True, help="Rows, page, logs, the model's files.")
@weight_options
@click.version_option(__version__, prog_name=PROGRAM)
def command(rest: tuple[str, ...], **given: Any) -> None:
    """Measure how fast every way to run a model is, and how far its scores are from PyTorch's."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    written: list[Path] = []
    try:
        with ended_in_order(PROGRAM), needing_extra("a benchmark"):
            options = parse_options(rest, given)

            def say(step: str) -> None:
                err.print(f"{PROGRAM}: {step}", soft_wrap=True, markup=False)

            def keep(rows: list[Row]) -> None:
                written[:] = _written(rows, options.out)

            rows = bench(options, say, keep)
            keep(rows)
    except KeyboardInterrupt:
        kept = f"what was measured is in {written[0]}" if written else "nothing was written but the model's files"
        err.print(f"{PROGRAM}: interrupted; {kept}", soft_wrap=True, markup=False)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except QfaeError as error:
        fail(PROGRAM, error)
    out.width = max(out.width, _WIDTH)
    for table in tables(rows):
        out.print(table)
    for note in notes(rows):
        out.print(note, soft_wrap=True, markup=False)
    for path in written:
        out.print(f"wrote {path}", soft_wrap=True, markup=False)


def _written(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    paths = [folder / "rows.jsonl", folder / "bench.html"]
    try:
        save(rows, paths[0])
        write_page(rows, paths[1])
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}); choose another --out") from error
    return paths


def parse_options(rest: Sequence[str], given: dict[str, Any]) -> Options:
    """Turn the texts of the command line into options.

    Raises:
        UsageError: every fault at once.

    """
    faults = [unexpected(command, text) for text in rest]
    config = config_source(given, faults)
    seed = next(iter(parse_seeds(given["random_weights"], faults)), None)
    if seed is not None and config is None:
        faults.append("--random-weights: name the architecture with --preset or --config")
    if seed is not None and given["ckpt"]:
        faults.append("--random-weights, --ckpt: give one of them, not both")
    if given["engine"] and given["random_weights"] is not None:
        faults.append("--engine, --random-weights: give one of them, not both")
    elif given["engine"] and config is not None and not given["ckpt"]:
        option = "--config" if given["config"] else "--preset"
        faults.append(f"{option}: describes a checkpoint, and --engine needs none; pass --ckpt too, or leave it out")
    if not given["engine"] and not given["ckpt"] and given["random_weights"] is None:
        faults.append("nothing to measure: name --engine, --ckpt, or --preset with --random-weights")
    weights = parse_weight_files(given["backbone_weights"], given["perceptual_weights"], faults)
    if given["device"] not in DEVICES:
        faults.append(f"--device: got {given['device']!r}, accepted are {', '.join(DEVICES)}")
    candidates = _candidates(given["against"], given["device"], faults)
    plan = Plan(
        batches=_batches(given["batches"], faults) or Plan.batches,
        rounds=whole_number("--rounds", given["rounds"], 1000, faults) or Plan.rounds,
        seconds=_seconds("--seconds", given["seconds"], faults) or Plan.seconds,
        longest=_seconds("--longest", given["longest"], faults) or Plan.longest,
        longest_build=_seconds("--longest-build", given["longest_build"], faults),
    )
    files = 0 if given["files"] == "0" else whole_number("--files", given["files"], 100_000, faults)
    threads = whole_number("--threads", given["threads"], 1024, faults)
    if faults:
        raise UsageError(faults)
    asked = Asked(
        ckpt=given["ckpt"],
        engine=given["engine"],
        config=config,
        random_weights=seed,
        encoders={name: str(path) for name, path in weights.backbones.items()},
        perceptual=str(weights.perceptual) if weights.perceptual is not None else None,
        images=given["images"],
    )
    files = Options.files if files is None else files
    return Options(asked, Path(given["out"]), candidates, plan, given["device"], threads, files)


def _candidates(text: str | None, device: str, faults: list[str]) -> tuple[Candidate, ...]:
    if text is None:
        return CANDIDATES  # those that cannot run here are listed with the reason
    able = candidates_on(device)
    names = [name.strip() for name in text.split(",")]
    known = {one.name: one for one in able}
    for name in names:
        if name not in known:
            elsewhere = any(one.name == name for one in CANDIDATES)
            reason = f"does not run on {device}" if elsewhere else f"accepted are {', '.join(known)}"
            faults.append(f"--against: got {name!r}; {reason}")
    chosen = [known[name] for name in dict.fromkeys(names) if name in known]
    if BASELINE in names or BASELINE not in known:
        return tuple(chosen)
    return (known[BASELINE], *chosen)  # speed-ups are relative to it


def _batches(text: str | None, faults: list[str]) -> tuple[int, ...]:
    found = []
    for word in text.split(",") if text is not None else []:
        number = whole_number("--batches", word.strip(), MAX_BATCH, faults)
        found += [number] if number is not None else []
    return tuple(sorted(set(found)))


def _seconds(option: str, text: str | None, faults: list[str]) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e5:
        faults.append(f"{option}: got {text!r}, expected seconds, more than 0")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; leaves through SystemExit."""
    dispatch(PROGRAM, command, {}, arguments)
