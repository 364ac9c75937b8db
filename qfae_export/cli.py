"""qfae-export: the command line. Options in, one call of export.export, the measurement and the next command out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from qfae_export.errors import ExportError
from qfae_export.options import DEFAULT_MAX_BATCH, Options
from qfae_runtime import __version__
from qfae_runtime.command_line import CONTEXT, fail, unexpected, whole_number
from qfae_runtime.errors import QfaeError, UsageError
from qfae_runtime.manifest import MAX_BATCH
from qfae_train.config import presets
from qfae_train.options import config_source, weight_options
from qfae_train.weight_files import parse_weight_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from qfae_export.export import Exported
    from qfae_export.parity import ParityReport

PROGRAM = "qfae-export"
INTERRUPTED = 130

_EPILOG = """\b
Exit codes: 0 done; 1 failed (nothing is left under the engine's name); 2 wrong usage.

\b
Example:
  qfae-export --ckpt demo.pt --out engines/
"""

_EXTRA = ("torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "safetensors", "lightning_fabric")


# Values arrive as text, so that every fault can be told at once.
@click.command(
    PROGRAM,
    epilog=_EPILOG,
    context_settings=CONTEXT,
)
@click.argument("rest", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option("--ckpt", metavar="FILE", help="Checkpoint: qfae-train's, or the authors' last_ckpt.pth.  [required]")
@click.option("--preset", metavar="NAME", help=f"Architecture of the authors' checkpoint: {', '.join(presets())}.")
@click.option("--config", metavar="FILE.toml", help="The same as a file of your own.")
@weight_options
@click.option("--out", metavar="DIR", help="Folder for the engine.  [default: the checkpoint's folder]")
@click.option(
    "--parity-images",
    metavar="DIR",
    help="Real images to measure on, normal and anomalous.  [default: the validation images in the checkpoint; "
    "where it has none, brain slices that come with qfae]",
)
@click.option("--name", metavar="NAME", help="Name of the engine.  [default: the checkpoint's, without .pt]")
@click.option(
    "--max-batch",
    metavar="N",
    help=f"Largest batch of the engine.  [default: {DEFAULT_MAX_BATCH}, or the number of parity images if smaller]",
)
@click.option("--overwrite", is_flag=True, help="Replace an engine of that name.")
@click.version_option(__version__, prog_name=PROGRAM)
def command(rest: tuple[str, ...], **given: Any) -> None:
    """Export a checkpoint to an engine that is proven to score like PyTorch.

    Writes NAME.onnx, NAME.json (the manifest, with the certificate) and NAME.golden.npz, after comparing every output
    with PyTorch's, element by element, on real images at batch 1, an odd batch and the largest batch. If one value
    disagrees, nothing is written.
    """
    warnings.filterwarnings("ignore", module="torch")  # what matters about a checkpoint is said in a sentence
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        options = parse_options(rest, given)
        with _steps(err) as say:
            exported = _export(options, say)
    except KeyboardInterrupt:
        err.print(f"{PROGRAM}: interrupted; nothing was written")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except QfaeError as error:
        report: ParityReport | None = getattr(error, "report", None)
        if report is not None:
            err.print(report.table())
        fail(PROGRAM, error)
    _show(exported, options, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves through SystemExit with the exit code."""
    command.main(list(sys.argv[1:] if arguments is None else arguments), prog_name=PROGRAM)


def parse_options(rest: Sequence[str], given: dict[str, Any]) -> Options:
    """Turn the texts of the command line into Options.

    Raises:
        UsageError: every fault at once: unknown options, missing ones, impossible values.

    """
    faults = [unexpected(command, text) for text in rest]
    if not given["ckpt"]:
        faults.append("--ckpt: missing; name the checkpoint that qfae-train wrote")
    weights = parse_weight_files(given["backbone_weights"], given["perceptual_weights"], faults)
    options = Options(
        config=config_source(given, faults),
        weights=weights,
        ckpt=Path(given["ckpt"] or "missing.pt"),
        out=Path(given["out"]) if given["out"] else None,
        parity_images=Path(given["parity_images"]) if given["parity_images"] else None,
        name=given["name"],
        max_batch=whole_number("--max-batch", given["max_batch"], MAX_BATCH, faults),
        overwrite=given["overwrite"],
    )
    faults += options.faults()
    if faults:
        raise UsageError(faults)
    return options


def _export(options: Options, say: Callable[[str], None]) -> Exported:
    try:
        from qfae_export.export import export  # torch takes seconds to import; --help and faults need not wait
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ExportError(f"exporting needs {error.name}, which is not installed: pip install 'qfae[export]'") from None
    return export(options, say)


@contextmanager
def _steps(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the step at work: a spinner on a terminal, one line a step elsewhere."""
    if not console.is_terminal:
        yield lambda step: console.print(f"{PROGRAM}: {step}", soft_wrap=True)
        return
    with console.status("starting") as status:
        yield lambda step: status.update(f"{step} ...")


def _show(exported: Exported, options: Options, console: Console) -> None:
    report, manifest = exported.report, exported.manifest
    console.print(report.table())
    console.print(f"measured on: {report.images.origin}", soft_wrap=True, markup=False)
    if report.images.stands_in:
        console.print(
            "warning: these are not images of your kind; pass --parity-images DIR to measure on your own",
            soft_wrap=True,
        )
    if options.max_batch is None and manifest.max_batch < DEFAULT_MAX_BATCH:
        console.print(
            f"largest batch {manifest.max_batch}, the number of images measured on; "
            "for a larger one pass --parity-images DIR with more",
            soft_wrap=True,
        )
    for file in exported.files:
        console.print(f"wrote {file} ({_size(file.stat().st_size)})", soft_wrap=True, markup=False)
    engine = quote(str(exported.engine))
    console.print(f"next: qfae-run IMAGES --engine {engine} --out results/", soft_wrap=True, markup=False)


def _size(count: int) -> str:
    for unit, bytes_in_unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_in_unit:
            return f"{count / bytes_in_unit:.1f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    main()
