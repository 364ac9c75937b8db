"""Golden images that ride in the batches of a run: an engine that goes wrong meanwhile is noticed, and from which row.

The self-test says that an engine is right before the first image. After that, a golden image takes a place in every
few batches and in the last one, and must still give what PyTorch gave. It is run in the same call as images to be
scored, by the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from qfae_runtime.agreement import Reference
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import Contract, owed
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.opened import OpenedEngine
from qfae_runtime.golden import Golden, golden_beside
from qfae_runtime.quantities import OF_ALL_IMAGES
from qfae_runtime.selftest import contract_for

Compare = Callable[[Sequence[int], Scores], list[str]]
"""Says what is wrong with an engine's outputs on the golden images of these numbers; nothing where all is right."""


class Canary:
    """The golden images of an engine, and what tells whether its outputs on them are still right."""

    def __init__(self, golden: Golden, compare: Compare) -> None:
        self.golden = golden
        self._order = [int(number) for number in np.argsort(-golden.scores.score, kind="stable")]
        self.compare = compare

    @classmethod
    def of(cls, opened: OpenedEngine) -> Self | None:
        """Return the canary of an opened engine, held to the bounds of its self-test; None: it has no golden file.

        Raises:
            ManifestError: the golden file is missing, damaged, or not the one the manifest names.

        """
        golden = golden_beside(opened)
        if golden is None:
            return None
        entry = opened.certificate
        precision = opened.manifest.files[opened.path.name].precision or "fp32"
        contract = contract_for(entry, owed(precision, opened.engine.backend)).without(OF_ALL_IMAGES)
        reference = golden.reference(entry.scale if entry is not None else None)
        return cls(golden, lambda numbers, got: row_failures(reference, numbers, got, contract))

    def numbers(self, first: int, count: int) -> list[int]:
        """Return the numbers of `count` golden images, the highest score first, beginning with the one `first`."""
        return [self._order[(first + number) % len(self._order)] for number in range(count)]

    def image(self, number: int) -> UInt8:
        """Return a golden image, uint8 (S, S, 3)."""
        image: UInt8 = self.golden.images[number]
        return image


def row_failures(reference: Reference, numbers: Sequence[int], got: Scores, contract: Contract) -> list[str]:
    """Say which bounds the outputs on some golden images break, each image on its own; of scores alone, if `got` is."""
    failures = []
    for place, number in enumerate(numbers):
        want, have = reference.of([number]), got.of(slice(place, place + 1))
        if not len(got.anomaly_map):  # a run without maps
            have = Scores(have.score, want.scores.anomaly_map, want.scores.reconstruction)
        failures += contract.failures(want.compare(have), (f"golden image {number}",))
    return failures
