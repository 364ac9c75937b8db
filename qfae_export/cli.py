"""qfae-export: the command line. Options in, one call of export.export, the measurement and the next command out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qfae_export.errors import ExportError
from qfae_export.options import DEFAULT_MAX_BATCH, MOST_PARITY_IMAGES, PARTS, REFERENCE, Options
from qfae_export.verify_cli import verify_command
from qfae_export.wide import print_wide
from qfae_runtime import __version__
from qfae_runtime.command_line import (
    CONTEXT,
    dispatch,
    fail,
    size_text,
    unexpected,
    whole_number,
)
from qfae_runtime.engines import CPU_BACKENDS
from qfae_runtime.errors import INTERRUPTED, QfaeError, UsageError
from qfae_runtime.interruption import ended_in_order
from qfae_runtime.manifest import FORMATS, MAX_BATCH
from qfae_train.config import presets
from qfae_train.options import config_source, weight_options
from qfae_train.weight_files import parse_weight_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from qfae_export.export import Exported
    from qfae_export.parity_report import ParityReport

PROGRAM = "qfae-export"

_EPILOG = """\b
Exit codes: 0 done; 1 failed (nothing is left under the engine's name); 2 wrong usage; 130 interrupted.

\b
Examples:
  qfae-export --ckpt demo.pt --out engines/
  qfae-export --ckpt brats.pt --fp16
  qfae-export --ckpt brats.pt --backends onnxruntime,openvino,openvino-bf16
  qfae-export --ckpt brats.pt --int8 --calibration-images normals/
  qfae-export --onnx brats.fp16.onnx
  qfae-export verify --engine brats.onnx --ckpt brats.pt
"""

COMMANDS = {"verify": verify_command}
"""Commands beside exporting itself, by the first word."""

_EXTRA = ("torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "safetensors", "lightning_fabric")


# Values arrive as text, so that every fault can be told at once.
@click.command(
    PROGRAM,
    epilog=_EPILOG,
    context_settings=CONTEXT,
)
@click.argument("rest", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option(
    "--ckpt", metavar="FILE", help="Checkpoint: qfae-train's, or the authors' last_ckpt.pth.  [required, or --onnx]"
)
@click.option("--preset", metavar="NAME", help=f"Architecture of the authors' checkpoint: {', '.join(presets())}.")
@click.option("--config", metavar="FILE.toml", help="The same as a file of your own.")
@weight_options
@click.option(
    "--fp16", is_flag=True, help="Write NAME.fp16.onnx as well, and its TensorRT plan where that can be built."
)
@click.option(
    "--int8", is_flag=True, help="Write NAME.int8.onnx as well, for CPUs: most products in eight bits (docs/int8.md)."
)
@click.option(
    "--int8-keep",
    metavar="PLACE,...|none",
    help="What stays FP32 in it beside what always does, e.g. decoder,encoder.3,perceptual.7.fc1; none is faster, and "
    "uses more of what the contract allows.  [default: decoder]",
)
@click.option(
    "--calibration-images",
    metavar="DIR",
    help="Normal images of your kind, 32 or more, that INT8's scales are taken from; others than those measured on.  "
    "[default: brain slices that come with qfae]",
)
@click.option(
    "--format",
    metavar="|".join(FORMATS),
    help="Stop at ONNX, or insist on a plan: of TensorRT, or of TensorRT-RTX, which needs no GPU to build.  "
    "[default: with --fp16 a plan where one can be built, else onnx]",
)
@click.option(
    "--backends",
    metavar=",".join(CPU_BACKENDS),
    default=REFERENCE,
    show_default=True,
    help="What the FP32 and INT8 engines are measured on here; each that keeps its contract gets a certificate.",
)
@click.option("--bisect", is_flag=True, help="Where FP16 breaks its contract, find what must stay FP32.")
@click.option("--part", metavar="|".join(PARTS), default=PARTS[0], show_default=True, help="The whole graph or a half.")
@click.option("--onnx", metavar="FILE", help="Build the plan of an exported ONNX file, on this machine.")
@click.option(
    "--random-weights", metavar="SEED", help="An engine without training, for benchmarks; with --preset or --config."
)
@click.option("--out", metavar="DIR", help="Folder for the engine.  [default: the checkpoint's folder]")
@click.option(
    "--parity-images",
    metavar="DIR",
    help="Real images to measure on, normal and anomalous.  [default: the validation images in the checkpoint; "
    "where it has none, brain slices that come with qfae]",
)
@click.option(
    "--parity-count",
    metavar="N",
    help="How many of --parity-images to measure on, evenly spread.  [default: 32, or --max-batch if that is more]",
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

    Writes NAME.onnx, NAME.json (the manifest, with the certificate) and NAME.golden.npz, after comparing scores, maps
    and reconstructions with PyTorch's in FP64, on real images and on stress images, at every batch size that the engine
    will be run with. If one bound of the contract is broken, nothing is written. With --fp16 there is NAME.fp16.onnx
    too, measured in the same way, and with --int8 NAME.int8.onnx.
    """
    warnings.filterwarnings("ignore", module="torch")  # what matters about a checkpoint is said in a sentence
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        options = parse_options(rest, given)
        with ended_in_order(PROGRAM), _steps(err) as say:
            exported = _export(options, say)
    except KeyboardInterrupt:
        err.print(f"{PROGRAM}: interrupted; nothing was written")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except QfaeError as error:
        report: ParityReport | None = getattr(error, "report", None)
        if report is not None:
            _show_report(report, err)
        fail(PROGRAM, error)
    _show(exported, options, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves through SystemExit with the exit code."""
    dispatch(PROGRAM, command, COMMANDS, arguments)


def parse_options(rest: Sequence[str], given: dict[str, Any]) -> Options:
    """Turn the texts of the command line into Options.

    Raises:
        UsageError: every fault at once: unknown options, missing ones, impossible values.

    """
    faults = [unexpected(command, text) for text in rest]
    weights = parse_weight_files(given["backbone_weights"], given["perceptual_weights"], faults)
    options = Options(
        config=config_source(given, faults),
        weights=weights,
        ckpt=Path(given["ckpt"]) if given["ckpt"] else None,
        out=Path(given["out"]) if given["out"] else None,
        parity_images=Path(given["parity_images"]) if given["parity_images"] else None,
        name=given["name"],
        max_batch=whole_number("--max-batch", given["max_batch"], MAX_BATCH, faults),
        overwrite=given["overwrite"],
        fp16=given["fp16"],
        int8=given["int8"],
        int8_keep=_places(given["int8_keep"], faults),
        calibration_images=Path(given["calibration_images"]) if given["calibration_images"] else None,
        parity_count=whole_number("--parity-count", given["parity_count"], MOST_PARITY_IMAGES, faults),
        format=given["format"],
        bisect=given["bisect"],
        backends=tuple(dict.fromkeys(given["backends"].split(","))),
        part=given["part"],
        onnx=Path(given["onnx"]) if given["onnx"] else None,
        random_weights=_seed(given["random_weights"], faults),
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
        yield lambda step: console.print(f"{PROGRAM}: {step}", soft_wrap=True, markup=False)
        return
    with console.status("starting") as status:
        yield lambda step: status.update(Text(f"{step} ..."))  # as a text of its own: names may hold brackets


def _show(exported: Exported, options: Options, console: Console) -> None:
    for report in exported.reports.values():
        _show_report(report, console)
    for (engine_name, backend), report in exported.others.items():
        _show_other(engine_name, backend, report, console)
    if exported.bisected is not None:
        print_wide(console, exported.bisected.table())
    if exported.reports:
        _show_images(exported, options, console)
    elif options.random_weights is not None:
        console.print("nothing was measured: random weights are for benchmarks alone", soft_wrap=True)
    for name, report in exported.reports.items():
        if flips := report.worst.values.get("flips"):
            console.print(
                f"warning: {name} decides {flips:.0f} of {report.images.real} images otherwise than PyTorch: their "
                "scores lie within its error of the threshold",
                soft_wrap=True,
            )
    for file in exported.written:
        console.print(f"wrote {file} ({size_text(file.stat().st_size)})", soft_wrap=True, markup=False)
    for note in exported.notes:
        console.print(note, soft_wrap=True, markup=False)
    engine = quote(str(exported.engine))
    if options.part != "full":
        console.print("next: load it with ONNX Runtime; qfae-run takes whole engines", soft_wrap=True)
        return
    if exported.notes and not exported.reports and options.random_weights is None:
        return  # the note says what to do next
    extra = "" if exported.reports else " --allow-uncertified"
    console.print(f"next: qfae-run IMAGES --engine {engine} --out results/{extra}", soft_wrap=True, markup=False)


def _show_other(engine: str, backend: str, report: ParityReport, console: Console) -> None:
    console.print(f"{engine} in {backend}:")
    print_wide(console, report.table())
    if report:
        console.print(f"{backend}: keeps its contract ({report.contract.name}) and is certified", soft_wrap=True)
        return
    for failure in report.failures():
        console.print(f"{backend}: {failure}", soft_wrap=True, markup=False)
    console.print(
        f"{backend}: breaks its contract ({report.contract.name}) and is not certified; qfae-run does not take it",
        soft_wrap=True,
    )


def _show_images(exported: Exported, options: Options, console: Console) -> None:
    images = exported.report.images
    console.print(f"measured on: {images.origin}", soft_wrap=True, markup=False)
    if images.stress:
        console.print(
            f"and {len(images.stress)} stress images: constants, ramps, noise, colours, bright corners and borders",
            soft_wrap=True,
        )
    known = {label for label in images.labels[: images.real] if label is not None}
    if len(known) == 1:
        kind = "anomalous" if known.pop() else "normal"
        console.print(f"warning: all of these images are {kind}; add some that are not", soft_wrap=True)
    if images.stands_in:
        console.print(
            "warning: these are not images of your kind; pass --parity-images DIR to measure on your own",
            soft_wrap=True,
        )
    for report in exported.reports.values():
        for sentence in report.untold():
            console.print(sentence, soft_wrap=True, markup=False)
    largest = exported.manifest.max_batch
    if options.max_batch is None and largest < DEFAULT_MAX_BATCH:
        console.print(
            f"largest batch {largest}, the number of images measured on; "
            "for a larger one pass --parity-images DIR with more",
            soft_wrap=True,
        )


def _show_report(report: ParityReport, console: Console) -> None:
    print_wide(console, report.table())
    if len(report.links) > 1:
        print_wide(console, report.chain())


def _places(text: str | None, faults: list[str]) -> tuple[str, ...] | None:
    """Return what stays FP32 in INT8; None where nothing is said, no place for "none"."""
    if text is None:
        return None
    places = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
    if "" in places:
        faults.append(
            f"--int8-keep: got {text!r}, expected places with a comma between, e.g. decoder,encoder.3, or none"
        )
    return places


def _seed(text: str | None, faults: list[str]) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        faults.append(f"--random-weights: got {text!r}, expected a seed, a whole number in 0..999999999")
        return None
    return int(text)


if __name__ == "__main__":
    main()
