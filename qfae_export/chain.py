"""The chain of links from PyTorch to an engine: PyTorch FP32 -> graph FP32 -> ONNX FP32 -> ONNX FP16 -> plan.

Every engine is held against PyTorch itself; the links beside it tell which step an error comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages, spread
from qfae_export.parity import (
    ROUNDED,
    ParityReport,
    accepted,
    link,
    measure,
    pytorch_scores,
    reference_scores,
    scale_of,
)
from qfae_export.precision import Precision
from qfae_export.rounded import RoundedEngine
from qfae_runtime.agreement import Scale
from qfae_runtime.certificate import PYTORCH, Link
from qfae_runtime.contract import demanded, owed
from qfae_runtime.engines.base import Engine, Scores
from qfae_train.autoencoder import AnomalyScorer

GRAPH = "graph FP32"

# The graph in PyTorch is measured on a few images: it is there to tell a fault of the rewriting from one of the export.
_LINK_IMAGES = 6


@dataclass
class Chain:
    """The reference on all images, the links measured so far, and the outputs of the last step on some of the images.

    `numbers` are those images; `last` is the step's name.
    """

    images: ParityImages
    reference: Scores
    scale: Scale
    links: list[Link]
    last: str
    outputs: Scores
    numbers: list[int]
    of_graph: Scores | None = None
    few: tuple[int, ...] = ()
    rounded: Link | None = None

    @classmethod
    def begin(
        cls, scorer: AnomalyScorer, graph: InferenceGraph, images: ParityImages, threshold: float | None = None
    ) -> Chain:
        """Score the images with the training modules, and a few with the inference graph if it is a whole one.

        Decisions are taken at `threshold`, if one was calibrated.

        Raises:
            ExportError: PyTorch's own outputs are not finite.

        """
        reference = reference_scores(scorer, images.pixels)
        scale = scale_of(images, reference, threshold)
        chain = cls(images, reference, scale, [], PYTORCH, reference, list(range(len(images))))
        if graph.part == "full":
            few = spread(len(images), _LINK_IMAGES)
            chain.of_graph, chain.few = pytorch_scores(graph, images.pixels[few]), tuple(few)
            chain._add(GRAPH, "fp32", chain.of_graph, few)
        return chain

    def round(self, graph: InferenceGraph, precision: Precision) -> None:
        """Measure what a policy's rounding does to the FP32 graph; ONNX Runtime on a CPU does not round everything."""
        if self.of_graph is not None:
            few = list(self.few)
            with RoundedEngine(graph, precision, len(few)) as engine:
                outputs = engine.run(self.images.pixels[few])
            labels = [self.images.labels[number] for number in few]
            self.rounded = link(GRAPH, ROUNDED, self.of_graph, outputs, precision.name, self.scale, labels)

    def measure(self, engine: Engine, precision: str) -> ParityReport:
        """Measure an engine against PyTorch, by the precision's contract, and pass no verdict.

        An FP16 engine's report has the link to what its rounding does in PyTorch; false if that breaks the bounds.
        """
        report = self._measured(engine, precision)
        return replace(report, links=self._rounded(precision))

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
        """Measure what the chain does not go on from, and pass no verdict: another backend, or an INT8 engine.

        `precision` is the file's. The report's links are the chain's and one from its last step to this.
        """
        contract = owed(precision, engine.backend)
        report = self._measured(engine, contract)
        if report.outputs is None:
            return report
        labels = [self.images.labels[number] for number in self.numbers]
        got = report.outputs.of(self.numbers)
        step_link = link(self.last, step, self.outputs, got, contract, self.scale, labels)
        return replace(report, links=(*self.links, step_link))

    def _measured(self, engine: Engine, contract: str) -> ParityReport:
        bounds = demanded(contract, self.images.labels)
        return measure(engine, self.images, self.reference, bounds, self.scale)

    def _rounded(self, precision: str) -> tuple[Link, ...]:
        return (self.rounded,) if self.rounded is not None and self.rounded.contract == precision else ()

    def _add(self, step: str, precision: str, outputs: Scores, numbers: list[int]) -> None:
        """Measure the step from the last one to this one, on the images that both have seen."""
        both = [number for number in self.numbers if number in numbers]
        before = self.outputs.of([self.numbers.index(number) for number in both])
        after = outputs.of([numbers.index(number) for number in both])
        labels = [self.images.labels[number] for number in both]
        self.links.append(link(self.last, step, before, after, precision, self.scale, labels))
        self.last, self.outputs, self.numbers = step, outputs, numbers
