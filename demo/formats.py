"""What each format of the demonstration's engine does to its answers, on labelled slices, against PyTorch in FP64.

    qfae-export --ckpt demo/weights/demo.pt --fp16 --int8 --out build/demo/formats
    python -m demo.formats                  prints the table; `make demo-spread` writes it into README and results.json

Every image is scored once by every format. What is said of each:

AUROC           of images and of pixels, and by how much they differ from FP64's
Spearman        rank correlation of its scores with FP64's
decisions       A score above a threshold means "anomalous". For each R of FALSE_POSITIVES the threshold lies halfway
                between the k-th highest of the normal images' FP64 scores and the next lower one, k being R % of their
                number, rounded, at least 1. Counted are the images, normal or not, for which the format's score and
                FP64's lie on different sides of that threshold.
largest error   of a score, as a share of what matters there: of the FP64 score, or of the 95th percentile of the normal
                images' FP64 scores where that is more
tolerances      whether it keeps what its precision promises (qfae_runtime/contract.py), on these images and the stress
                images
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import click
import numpy as np
import numpy.typing as npt

from qfae_export.describe import refuse_other_checkpoint
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages
from qfae_export.options import FP16_SUFFIX, INT8_SUFFIX
from qfae_export.parity import run_in_batches
from qfae_export.precision import FP16, Precision
from qfae_export.reference import Measured64, reference_of
from qfae_export.rounded import RoundedEngine
from qfae_runtime.arrays import Bool, UInt8
from qfae_runtime.contract import Contract, demanded, owed, that_pytorch_keeps
from qfae_runtime.engines.backends import lacking, load_onnx
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.errors import EngineError, QfaeError
from qfae_runtime.manifest import Manifest
from qfae_runtime.metrics import PixelMetrics
from qfae_runtime.metrics import measure as metrics_of
from qfae_train.checkpoint import build_scorer
from qfae_train.data import DataError, load_split
from qfae_train.official import open_checkpoint

CHECKPOINT = Path("demo/weights/demo.pt")
ENGINES = Path("build/demo/formats")
DATA = Path("build/demo/data")

FALSE_POSITIVES = (1, 5, 10)
"""Shares of normal images that a threshold calls anomalous, in percent."""

BATCH = 16

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What a format does to the answers; see the module. Changes and shares are of 1, `flips` are numbers of images.

    `tolerances` names the contract it owes, None for FP64, which is the truth; `broken` says which bounds it broke.
    """

    title: str
    image_auroc: float
    pixel_auroc: float
    image_auroc_change: float
    pixel_auroc_change: float
    spearman: float
    flips: dict[str, int]
    largest_error: float
    tolerances: str | None
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """The rows, FP64's first; the formats that could not be run, with the reason; the images and the thresholds."""

    rows: tuple[Row, ...]
    skipped: dict[str, str]
    images: int
    normal: int
    thresholds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]  # tuples become lists

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Self:
        """Return what `to_dict` gave."""
        rows = tuple(Row(**{**row, "broken": tuple(row["broken"])}) for row in stored["rows"])
        return cls(**{**stored, "rows": rows})


class Format(NamedTuple):
    """A way to score: its title, the contract that it owes, what it lacks to run here if anything, and its engine."""

    title: str
    contract: str
    missing: str | None
    open: Callable[[], Engine]


class Slices(NamedTuple):
    """The labelled images: `pixels` uint8 (N, S, S, 3), `anomalous` bool (N,), `masks` uint8 (N, S, S)."""

    pixels: UInt8
    anomalous: Bool
    masks: UInt8


def formats_of(folder: Path, name: str, manifest: Manifest, graph: InferenceGraph) -> Iterator[Format]:
    """Yield the formats that are measured, PyTorch's own left out."""
    size = manifest.image_size
    policy = manifest.precision.get(name + FP16_SUFFIX)
    precision = FP16 if policy is None else Precision.described(policy)
    yield Format("FP16, as a GPU rounds", "fp16", None, lambda: RoundedEngine(graph, precision, BATCH))
    for file, of_file, backend, title in (
        (f"{name}.onnx", "fp32", "onnxruntime", "FP32, ONNX Runtime"),
        (name + FP16_SUFFIX, "fp16", "onnxruntime", "FP16, ONNX Runtime"),
        (f"{name}.onnx", "fp32", "openvino", "FP32, OpenVINO"),
        (f"{name}.onnx", "fp32", "openvino-bf16", "BF16, OpenVINO"),
        (name + INT8_SUFFIX, "int8", "onnxruntime", "INT8, ONNX Runtime"),
        (name + INT8_SUFFIX, "int8", "openvino", "INT8, OpenVINO"),
    ):
        missing = f"no {file}" if file not in manifest.files else lacking(backend, "cpu")
        opened = _opener(folder / file, size, backend)
        yield Format(title, owed(of_file, backend), missing, opened)


def _opener(path: Path, size: int, backend: str) -> Callable[[], Engine]:
    return lambda: load_onnx(path, size, BATCH, backend)


def measure(engines: Path, checkpoint: Path, data: Path, say: Callable[[str], None] = lambda step: None) -> Measured:
    """Measure every format of an exported folder on the test slices of a data set in BMAD's layout.

    Raises:
        ExportError: the engines are another checkpoint's, or the model is too large for FP64 on every image.
        ManifestError: the engines' manifest is missing or does not fit them.
        CheckpointError, DataError, InputError: checkpoint or data set cannot be read.

    """
    name = checkpoint.stem
    manifest = Manifest.load(engines / f"{name}.json")
    manifest.verify_files(engines)
    opened = open_checkpoint(checkpoint)
    refuse_other_checkpoint(manifest, f"{name}.onnx", checkpoint, opened.sha256)
    slices = slices_of(data, manifest)
    images = parity_images(slices, data)
    scorer = build_scorer(opened)
    graph = InferenceGraph(scorer)
    say(f"scoring {len(images)} images with PyTorch in FP64 and FP32")
    truth = reference_of(scorer, graph, images)
    if len(truth.exact) < len(images):
        raise ExportError(
            f"{checkpoint}: a model this large is scored in FP64 on {len(truth.exact)} images only, expected all "
            f"{len(images)}; this table is for small models, see qfae-export verify"
        )
    graph.forget()
    comparison = Comparison(slices, images, truth)
    rows = [comparison.row("PyTorch FP64", None, truth.reference.scores)]
    rows.append(comparison.row("PyTorch FP32", "fp32", truth.modules))
    skipped = {}
    for one in formats_of(engines, name, manifest, graph):
        if one.missing is not None:
            skipped[one.title] = one.missing
            continue
        say(one.title)
        try:
            with one.open() as engine:
                rows.append(comparison.row(one.title, one.contract, run_in_batches(engine, images.pixels, BATCH)))
        except EngineError as error:
            skipped[one.title] = str(error)
    normal = int((~slices.anomalous).sum())
    return Measured(tuple(rows), skipped, len(slices.pixels), normal, comparison.thresholds)


def slices_of(data: Path, manifest: Manifest) -> Slices:
    """Read the test slices, prepared as for the engine.

    Raises:
        DataError: there are not two normal ones and an anomalous one with a mask, or they are not in BMAD's layout.
        InputError: one cannot be read.

    """
    split = load_split(data, "test", manifest.preprocess, quiet=True)
    normal, marked = int((~split.anomalous).sum()), int(split.masks.any(dim=2).any(dim=1).sum())
    if normal < 2 or not marked:
        raise DataError(
            f"data '{data}': {normal} normal test images and {marked} anomalous ones with a mask; expected 2 and 1 at "
            "least: thresholds and AUROC are made of both"
        )
    return Slices(split.rgb(slice(None)).contiguous().numpy(), split.anomalous.numpy(), split.masks.numpy())


def parity_images(slices: Slices, data: Path) -> ParityImages:
    """Return the slices as images that engines are compared on, with stress images behind them."""
    names = tuple(f"slice {number}" for number in range(len(slices.pixels)))
    labels = tuple(bool(one) for one in slices.anomalous)
    return ParityImages(slices.pixels, names, f"test slices in {data}", labels).with_stress()


class Comparison:
    """FP64's answers on the slices, and what is said of others' answers."""

    def __init__(self, slices: Slices, images: ParityImages, truth: Measured64) -> None:
        self._slices, self._images, self._truth = slices, images, truth
        self._want = truth.reference.scores.score[: images.real].astype(np.float64)
        normal = self._want[~slices.anomalous]
        self.thresholds = {str(share): threshold(normal, share) for share in FALSE_POSITIVES}
        self._heights = np.maximum(self._want, np.percentile(normal, 95))
        self._areas = self._areas_of(truth.reference.scores)

    def row(self, title: str, contract: str | None, scores: Scores) -> Row:
        """Return what is said of the outputs on all images, stress images among them.

        Raises:
            EngineError: the outputs cannot be compared.

        """
        compared = self._truth.reference.compare(scores, self._images.labels)
        if compared.fault is not None:
            raise EngineError(compared.fault)
        got = scores.score[: self._images.real].astype(np.float64)
        image, pixel = self._areas_of(scores)
        return Row(
            title,
            image,
            pixel,
            image - self._areas[0],
            pixel - self._areas[1],
            compared.values["spearman"] or 0.0,
            {share: int(((got > at) != (self._want > at)).sum()) for share, at in self.thresholds.items()},
            float((np.abs(got - self._want) / self._heights).max()),
            contract,
            () if contract is None else tuple(self._promised(contract).failures(compared, self._images.names)),
        )

    def _promised(self, contract: str) -> Contract:
        labels = self._images.labels[: self._images.real]
        return that_pytorch_keeps(demanded(contract, labels), self._truth.pytorch.values)

    def _areas_of(self, scores: Scores) -> tuple[float, float]:
        """Return the AUROC of images and of pixels."""
        pixels = PixelMetrics(keep_images=False)
        for anomaly_map, mask in zip(scores.anomaly_map, self._slices.masks, strict=False):  # no stress images
            pixels.add(anomaly_map.astype(np.float32), mask)
        areas = metrics_of(scores.score[: self._images.real], self._slices.anomalous, pixels)
        assert areas.image_auroc is not None  # slices_of has seen to it
        assert areas.pixel_auroc is not None
        return areas.image_auroc, areas.pixel_auroc


def threshold(normal: Float64, percent: float) -> float:
    """Return the score above which that many percent of the normal scores (N,) lie, at least one; see the module."""
    ranked = np.sort(normal)[::-1]
    above = min(max(round(len(ranked) * percent / 100), 1), len(ranked) - 1)
    return float((ranked[above - 1] + ranked[above]) / 2)


def right(row: Row, images: int) -> str:
    """Say in plain words whether a format's answers are right."""
    most = max(row.flips.values())
    if row.tolerances is None:
        return "the truth"
    if row.broken:
        more = f", and {len(row.broken) - 1} more" if len(row.broken) > 1 else ""
        return f"no: {row.broken[0].partition(', worst')[0]}{more}"
    if most:
        return f"yes, within its tolerances; up to {most} of {images} decisions change"
    return "yes: every decision is the same"


def table(measured: Measured) -> str:
    """Return the rows as Markdown, with what the columns are."""
    flips = ", ".join(measured.thresholds)
    heads = ["format", "image AUROC", "pixel AUROC", "Spearman", f"decisions at {flips} %", "largest error", "right?"]
    lines = [heads, ["---", *["---:"] * 5, "---"]]
    for row in measured.rows:
        areas = (
            f"{area:.4f}" if row.tolerances is None else f"{area:.4f} ({change:+.4f})"
            for area, change in ((row.image_auroc, row.image_auroc_change), (row.pixel_auroc, row.pixel_auroc_change))
        )
        changed = ", ".join(str(count) for count in row.flips.values())
        cells = [*areas, f"{row.spearman:.5f}", changed, f"{row.largest_error:.1e}", right(row, measured.images)]
        lines.append([row.title, *cells])
    said = (
        f"On {measured.images} slices, {measured.normal} of them normal; changes in parentheses. *Decisions*: how many "
        f"change at the thresholds that call {flips} % of the normal slices anomalous. *Largest error* of a score, as "
        "a share of that score or of the normal slices' 95th percentile, whichever is more. *Right*: whether the "
        "format keeps what its precision promises ([docs/export.md](docs/export.md)), here and on images made by code."
    )
    skipped = [f"- not measured: {title}: {reason}" for title, reason in measured.skipped.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", said, *([""] if skipped else []), *skipped])


@click.command()
@click.option(
    "--engines", type=click.Path(path_type=Path), default=ENGINES, show_default=True, help="What was exported."
)
@click.option("--ckpt", type=click.Path(path_type=Path), default=CHECKPOINT, show_default=True, help="What it is of.")
@click.option(
    "--data", type=click.Path(path_type=Path), default=DATA, show_default=True, help="Folder that holds test/."
)
def main(engines: Path, ckpt: Path, data: Path) -> None:
    """Say what each format of an exported model does to its answers on the demonstration's test slices."""
    try:
        click.echo(table(measure(engines, ckpt, data, lambda step: click.echo(step, err=True))))
    except QfaeError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
