"""Does the engine compute what PyTorch computes? Every image, and every batch size that it will be run with.

The reference is the training modules in FP64, not the rewritten graph (reference.py).

Letters: N images, B images in a batch, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qfae_export.images import ParityImages
from qfae_export.parity_report import Measured, ParityReport
from qfae_runtime.agreement import Agreement, Reference
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import Contract, that_pytorch_keeps
from qfae_runtime.coverage import agreement_at, calls_of, spread
from qfae_runtime.engines.base import UNWRITTEN, Engine, Poisonable, Scores
from qfae_runtime.errors import EngineError
from qfae_runtime.golden import MAX_IMAGES, Golden


def measure(
    engine: Engine,
    images: ParityImages,
    reference: Reference,
    contract: Contract,
    pytorch: Agreement | None = None,
) -> ParityReport:
    """Run every image once at least, and some at every size that the engine's backend is called with.

    Which images at which size, see coverage.calls_of. Bounds that `pytorch`, PyTorch FP32 on these images, breaks
    itself are left out.

    Raises:
        EngineError: the backend failed.

    """
    contract = that_pytorch_keeps(contract, pytorch.values if pytorch is not None else None)
    rows: list[Measured] = []
    seen = _FirstOutputs(len(images))
    sizes = [min(size, engine.max_batch) for size in engine.batches]  # a plan fills its largest size up
    for size, calls in calls_of(reference.scores.score, sizes, reference.stress).items():
        outputs = [engine.run(images.pixels[numbers]) for numbers in calls]
        if not rows:
            _refuse_unwritten(engine, images.pixels[calls[0]], outputs[0].reconstruction)
        numbers = [number for call in calls for number in call]
        seen.keep(numbers, joined := Scores.joined(outputs))
        agreement = _placed(agreement_at(reference, numbers, joined), numbers)
        rows.append(Measured(size, len(set(numbers)), agreement))
    whole, of_all = None, seen.complete()
    if of_all is not None:
        whole = reference.compare(of_all, images.labels)
    return ParityReport(tuple(reversed(rows)), images, contract, whole, of_all, pytorch=pytorch)


def run_in_batches(engine: Engine, images: UInt8, size: int) -> Scores:
    """Return the engine's outputs on uint8 (N, S, S, 3), `size` images at a time; the last batch may be smaller."""
    size = min(size, engine.max_batch)  # a plan's largest size may be more than it is given: it fills up
    return Scores.joined(engine.run(images[start : start + size]) for start in range(0, len(images), size))


def golden_of(images: ParityImages, reference: Reference) -> Golden:
    """Return what the self-test asks: every stress image, and parity images from the lowest to the highest score."""
    stress = list(images.stress)[:MAX_IMAGES]
    by_score = np.argsort(reference.scores.score[: images.real], kind="stable")
    parity = spread(images.real, MAX_IMAGES - len(stress))
    numbers = [*(int(by_score[place]) for place in parity), *stress]
    chosen = reference.of(numbers)
    assert chosen.yardstick is not None
    return Golden(images.pixels[numbers], chosen.scores, chosen.yardstick, reference.scale.factors, chosen.stress)


class _FirstOutputs:
    """What an engine gave on each of N images when it first came; nothing once an output had not the right rows."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[Scores] | None = []
        self._numbers: list[int] = []

    def keep(self, numbers: Sequence[int], outputs: Scores) -> None:
        """Keep the rows of images that had not come before."""
        if self._parts is None or any(len(output) != len(numbers) for output in outputs):
            self._parts = None
            return
        rows = {number: row for row, number in reversed(list(enumerate(numbers))) if number not in self._numbers}
        self._numbers += rows
        self._parts.append(outputs.of(list(rows.values())))

    def complete(self) -> Scores | None:
        """Return the outputs on all images in their order; None if there are not those of each."""
        if self._parts is None or len(self._numbers) != self._count:
            return None
        return Scores.joined(self._parts).of([int(place) for place in np.argsort(self._numbers)])


def _refuse_unwritten(engine: Engine, images: UInt8, reconstruction: UInt8) -> None:
    """Refuse an engine that leaves pixels as they were: a uint8 buffer shows it only when filled with another byte.

    Scores and maps need no such run: what is not written of them is NaN.

    Raises:
        EngineError: some pixels are what the buffer was filled with, both times.

    """
    if not isinstance(engine, Poisonable):
        return
    engine.poison(0)
    try:
        again = engine.run(images).reconstruction
    finally:
        engine.poison()
    before = reconstruction[: len(again)]
    if before.shape != again.shape:
        return  # a fault of its own
    left = int(((again == 0) & (before == UNWRITTEN)).sum())
    if left:
        raise EngineError(
            f"output 'reconstruction': {left} of {again.size} values were not written in a batch of {len(images)}; "
            "do not use this plan: build it with another TensorRT, and report this line"
        )


def _placed(agreement: Agreement, numbers: Sequence[int]) -> Agreement:
    """Say of some images which of all they are."""
    worst = {name: replace(one, index=(numbers[one.index[0]], *one.index[1:])) for name, one in agreement.worst.items()}
    image = agreement.fault_image
    return replace(agreement, worst=worst, fault_image=None if image is None else numbers[image])
