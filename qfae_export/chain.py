"""The chain of links from PyTorch to an engine: PyTorch FP32 -> graph FP32 -> ONNX FP32 -> ONNX FP16 -> plan.

Every engine is held against PyTorch in FP64 itself; the links beside it tell in which step an error arises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages
from qfae_export.parity import measure
from qfae_export.parity_report import ROUNDED, ParityReport, accepted, link
from qfae_export.precision import FP16, Precision
from qfae_export.reference import reference_of
from qfae_export.rounded import RoundedEngine
from qfae_runtime.agreement import Agreement, Reference, incomparable
from qfae_runtime.certificate import PYTORCH, Link
from qfae_runtime.contract import demanded, owed
from qfae_runtime.coverage import spread
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.yardstick import errors_of, steps_of, typical_ratios
from qfae_train.autoencoder import AnomalyScorer

MODULES, GRAPH = "PyTorch FP32", "graph FP32"

_ROUNDED_IMAGES = 6
"""The rounding of FP16 is emulated on so many images: it takes longer than FP32 does."""

_ROUNDING_RATIO = 4.0
"""How much an FP16 engine may err in units of what FP16's rounding costs the model, in PyTorch: sound ones 0.3 to 1."""


@dataclass
class Chain:
    """The reference on all images, the links measured so far, and the outputs of the last step on some of the images.

    pytorch  PyTorch FP32, measured against the reference
    numbers  the images that the last step ran; `last` is its name, `outputs` what it gave
    against  the reference in words
    few      the images on which FP16's rounding is emulated; `of_graph` what the graph gave on them, `of_rounded` what
             it gives rounded
    """

    images: ParityImages
    reference: Reference
    pytorch: Agreement
    links: list[Link]
    last: str
    outputs: Scores
    numbers: list[int]
    of_graph: Scores
    few: list[int]
    against: str = PYTORCH
    rounded: Link | None = None
    of_rounded: Scores | None = None

    @classmethod
    def begin(
        cls, scorer: AnomalyScorer, graph: InferenceGraph, images: ParityImages, threshold: float | None = None
    ) -> Chain:
        """Score the images with the training modules and the whole inference graph; see reference_of.

        Decisions are taken at `threshold`, if one was calibrated.

        Raises:
            ExportError: PyTorch's own outputs are not finite, or the graph does not compute what the modules do.

        """
        whole = graph if graph.part == "full" else InferenceGraph(scorer)
        measured = reference_of(scorer, whole, images, threshold)
        exact = list(measured.exact)
        chain = cls(
            images,
            measured.reference,
            measured.pytorch,
            [],
            MODULES,
            measured.modules.of(exact),
            exact,
            measured.graph,
            exact,
        )
        if graph.part == "full":
            chain._add(GRAPH, "fp32", measured.graph, exact)
        if len(exact) < len(images):
            chain.against = f"{PYTORCH} ({len(exact)} images) and FP32 (the others)"
        chosen = spread(len(exact), _ROUNDED_IMAGES)
        chain.few, chain.of_graph = [exact[place] for place in chosen], measured.graph.of(chosen)
        return chain

    def round(self, graph: InferenceGraph, precision: Precision) -> None:
        """Measure what a policy's rounding does to the FP32 graph; ONNX Runtime on a CPU does not round everything."""
        with RoundedEngine(graph, precision, len(self.few)) as engine:
            outputs = engine.run(self.images.pixels[self.few])
        self.rounded = self._link(GRAPH, ROUNDED, self.of_graph, outputs, precision.name, self.few)
        self.of_rounded = outputs

    def measure(self, engine: Engine, precision: str) -> ParityReport:
        """Measure an engine against PyTorch, by the precision's contract, and judge nothing.

        An FP16 engine's report has the link to what its rounding does in PyTorch; false if that breaks the bounds, or
        if the engine errs more than that explains.
        """
        report = self._measured(engine, precision)
        faults: list[str] = []
        if self.of_rounded is not None and precision == FP16.name and report.outputs is not None:
            truth = self.reference.scores.of(self.few)
            faults = beyond_rounding(truth, self.of_rounded, report.outputs.of(self.few))
        return replace(report, links=self._rounded(precision), faults=tuple(faults))

    def accept(self, report: ParityReport, file: str, step: str, backend: str) -> ParityReport:
        """Make an engine that was measured the chain's last step, and return the report with its links.

        Raises:
            ParityError: a bound of its contract was broken.

        """
        if report.outputs is not None:
            self._add(step, report.contract.name, report.outputs, list(range(len(self.images))))
        links = (*self.links, *self._rounded(report.contract.name))
        return accepted(replace(report, links=links), file, backend)

    def branch(self, engine: Engine, step: str, precision: str) -> ParityReport:
        """Measure what the chain does not go on from, and judge nothing: another backend, or an INT8 engine.

        `precision` is the file's. The report's links are the chain's and one from its last step to this.
        """
        contract = owed(precision, engine.backend)
        report = self._measured(engine, contract)
        if report.outputs is None:
            return report
        got = report.outputs.of(self.numbers)
        return replace(
            report, links=(*self.links, self._link(self.last, step, self.outputs, got, contract, self.numbers))
        )

    def _measured(self, engine: Engine, contract: str) -> ParityReport:
        bounds = demanded(contract, self.images.labels[: self.images.real])
        return replace(measure(engine, self.images, self.reference, bounds, self.pytorch), reference=self.against)

    def _rounded(self, precision: str) -> tuple[Link, ...]:
        return (self.rounded,) if self.rounded is not None and self.rounded.contract == precision else ()

    def _add(self, step: str, precision: str, outputs: Scores, numbers: list[int]) -> None:
        """Measure the step from the last one to this one, on the images that both have seen."""
        both = [number for number in self.numbers if number in numbers]
        before = self.outputs.of([self.numbers.index(number) for number in both])
        after = outputs.of([numbers.index(number) for number in both])
        self.links.append(self._link(self.last, step, before, after, precision, both))
        self.last, self.outputs, self.numbers = step, outputs, numbers

    def _link(
        self, source: str, target: str, before: Scores, after: Scores, precision: str, numbers: list[int]
    ) -> Link:
        start = replace(self.reference.of(numbers), scores=before)
        labels = [self.images.labels[number] for number in numbers]
        return link(source, target, start, after, precision, labels, len(self.images), self.pytorch)


def beyond_rounding(truth: Scores, rounded: Scores, got: Scores) -> list[str]:
    """Say where an FP16 engine errs more than its rounding explains, in the geometric mean over a few images.

    `rounded` is what PyTorch gives, rounded as FP16 rounds. A fault may be small beside the bounds of FP16 and yet many
    times what rounding costs this model. Outputs that are not finite are another bound's.
    """
    if incomparable(truth, rounded) or incomparable(truth, got):
        return []
    steps = steps_of(truth)
    ratios = typical_ratios(errors_of(truth, got), errors_of(truth, rounded), steps)
    return [
        f"{name} errors are {ratio:.3g} times what FP16's rounding costs this model in PyTorch ({len(truth.score)} "
        f"images), at most {_ROUNDING_RATIO:g} expected"
        for name, ratio in zip(("score", "map"), ratios, strict=False)
        if not ratio <= _ROUNDING_RATIO
    ]
