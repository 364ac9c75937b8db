"""How far an engine may be from the PyTorch FP32 reference, and the element-wise comparison that finds out.

Absolute AND relative bounds must hold: with "either fits", maps of tiny values would always pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qfae_runtime.engines.base import OUTPUT_NAMES, Scores

_AXES = {
    "score": ("image",),
    "anomaly_map": ("image", "y", "x"),
    "reconstruction": ("image", "y", "x", "channel"),
}


@dataclass(frozen=True)
class Contract:
    """The bounds. `rel` applies wherever |reference| > `rel_floor`; the reconstruction counts grey levels."""

    abs: float = 1e-4
    rel: float = 1e-3
    rel_floor: float = 1e-3
    reconstruction_levels: int = 1


@dataclass(frozen=True)
class Worst:
    """The largest error of one kind: its size, where it is, and both values there."""

    error: float
    index: tuple[int, ...]
    reference: float
    got: float


@dataclass(frozen=True)
class OutputComparison:
    """One output compared element by element. `relative` is None where the contract has no relative bound.

    `fault` is set when the values could not be compared at all (shapes differ, not finite, nothing there).
    """

    name: str
    elements: int
    absolute: Worst | None
    relative: Worst | None
    bound_abs: float
    bound_rel: float | None
    fault: str | None = None

    @property
    def max_abs(self) -> float:
        """Largest |got - reference|."""
        return self.absolute.error if self.absolute else 0.0

    @property
    def max_rel(self) -> float | None:
        """Largest |got - reference| / |reference| above the floor; None where there is no relative bound."""
        return None if self.bound_rel is None else (self.relative.error if self.relative else 0.0)

    def __bool__(self) -> bool:
        return not self.failures()

    def failures(self) -> list[str]:
        """Say which bound was broken, where and by how much; empty when none was."""
        if self.fault is not None:
            return [f"{self.name}: {self.fault}"]
        found = []
        if self.absolute and self.absolute.error > self.bound_abs:
            found.append(self._sentence("absolute", self.absolute, self.bound_abs))
        if self.relative and self.bound_rel is not None and self.relative.error > self.bound_rel:
            found.append(self._sentence("relative", self.relative, self.bound_rel))
        return found

    def _sentence(self, kind: str, worst: Worst, bound: float) -> str:
        axes = zip(_AXES[self.name], worst.index, strict=True)
        where = ", ".join(f"{axis} {index}" for axis, index in axes)
        return (
            f"{self.name}: {kind} error {worst.error:.3g} exceeds {bound:g} at {where}: "
            f"expected {worst.reference:.7g}, got {worst.got:.7g}"
        )


@dataclass(frozen=True)
class Comparison:
    """All outputs compared; true when every bound holds. Its errors are the least bounds that would pass."""

    outputs: dict[str, OutputComparison]

    def __bool__(self) -> bool:
        return all(self.outputs.values())

    def failures(self) -> list[str]:
        """Every broken bound of every output, one sentence each."""
        return [sentence for output in self.outputs.values() for sentence in output.failures()]

    def summary(self) -> str:
        """One line of the measured errors, e.g. for a log."""
        parts = []
        for output in self.outputs.values():
            relative = "" if output.max_rel is None else f" abs, {output.max_rel:.2g} rel"
            parts.append(f"{output.name} {output.max_abs:.2g}{relative or ' levels'}")
        return "; ".join(parts)


def compare(reference: Scores, got: Scores, contract: Contract | None = None) -> Comparison:
    """Hold an engine's outputs against the reference, element by element, in float64.

    A value that is not finite on either side fails, as do differing shapes and an empty batch.
    """
    contract = contract or Contract()
    levels = float(contract.reconstruction_levels)
    return Comparison(
        {
            "score": _compare("score", reference, got, contract.abs, contract),
            "anomaly_map": _compare("anomaly_map", reference, got, contract.abs, contract),
            "reconstruction": _compare("reconstruction", reference, got, levels, None),
        }
    )


def worst_of(comparisons: Iterable[Comparison]) -> Comparison:
    """Merge comparisons (of several batches, say) into one that holds the worst of each output.

    Image numbers stay those of the comparison the worst value came from.

    Raises:
        ValueError: there is nothing to merge.

    """
    every = list(comparisons)
    if not every:
        raise ValueError("worst_of: no comparison was given; compare at least one batch")
    return Comparison({name: _worst_output([one.outputs[name] for one in every]) for name in OUTPUT_NAMES})


def _worst_output(parts: list[OutputComparison]) -> OutputComparison:
    first = parts[0]
    return OutputComparison(
        name=first.name,
        elements=sum(part.elements for part in parts),
        absolute=_largest(part.absolute for part in parts),
        relative=_largest(part.relative for part in parts),
        bound_abs=first.bound_abs,
        bound_rel=first.bound_rel,
        fault=next((part.fault for part in parts if part.fault is not None), None),
    )


def _largest(candidates: Iterable[Worst | None]) -> Worst | None:
    return max((one for one in candidates if one is not None), key=lambda one: one.error, default=None)


def _compare(
    name: str, reference: Scores, got: Scores, bound_abs: float, relative_to: Contract | None
) -> OutputComparison:
    want: npt.NDArray[np.float64] = np.asarray(getattr(reference, name), dtype=np.float64)
    have: npt.NDArray[np.float64] = np.asarray(getattr(got, name), dtype=np.float64)
    bound_rel = relative_to.rel if relative_to else None
    fault = _incomparable(want, have)
    if fault is not None:
        return OutputComparison(name, int(want.size), None, None, bound_abs, bound_rel, fault)
    error = np.abs(have - want)
    relative = None
    if relative_to is not None:
        counts = np.abs(want) > relative_to.rel_floor
        scaled = np.divide(error, np.abs(want), out=np.zeros_like(error), where=counts)
        relative = _worst(scaled, want, have) if counts.any() else None
    return OutputComparison(name, int(want.size), _worst(error, want, have), relative, bound_abs, bound_rel, None)


def _incomparable(want: npt.NDArray[np.float64], have: npt.NDArray[np.float64]) -> str | None:
    if want.shape != have.shape:
        return f"expected shape {want.shape}, got {have.shape}"
    if want.size == 0:
        return "nothing to compare: the batch is empty"
    for side, values in (("the reference", want), ("the engine", have)):
        odd = ~np.isfinite(values)
        if odd.any():
            index = tuple(int(i) for i in np.argwhere(odd)[0])
            return f"{side} has {int(odd.sum())} values that are not finite, the first at index {index}"
    return None


def _worst(error: npt.NDArray[np.float64], want: npt.NDArray[np.float64], have: npt.NDArray[np.float64]) -> Worst:
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
    return Worst(float(error[index]), index, float(want[index]), float(have[index]))
