"""How far an engine may be from PyTorch FP32: the bounds, as data, and the sentences about those that were broken.

Absolute AND relative bounds must hold: with "either fits", maps of tiny values would always pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from qfae_runtime.agreement import QUANTITIES, Agreement

MIN_IMAGES = 32
"""An engine is certified on so many images or more: fewer say too little about percentiles and ranks."""

_AXES = {
    "score": ("image",),
    "map": ("image", "y", "x"),
    "reconstruction": ("image", "y", "x", "channel"),
}


@dataclass(frozen=True)
class Contract:
    """Bounds by quantity (see agreement.QUANTITIES): at most that much, or at least where larger is better."""

    name: str
    bounds: Mapping[str, float]

    def holds(self, values: Mapping[str, float | None]) -> bool:
        """Say whether every bounded quantity is defined and within its bound."""
        return all(self.allows(name, values.get(name)) for name in self.bounds)

    def allows(self, name: str, value: float | None) -> bool:
        """Say whether one quantity is within its bound; what is not bounded always is, what is undefined never."""
        if name not in self.bounds:
            return True
        if value is None:
            return False
        return value >= self.bounds[name] if QUANTITIES[name].larger_is_better else value <= self.bounds[name]

    def failures(self, agreement: Agreement, names: Sequence[str] = ()) -> list[str]:
        """Say which bounds were broken, where and by how much; `names` are the images'. Empty when none was."""
        if agreement.fault is not None:
            return [agreement.fault]
        broken = [name for name in self.bounds if not self.allows(name, agreement.values.get(name))]
        return [self._sentence(name, agreement, names) for name in broken]

    def without(self, names: Collection[str]) -> Contract:
        """Return the contract that bounds everything but these quantities."""
        return replace(self, bounds={name: bound for name, bound in self.bounds.items() if name not in names})

    def is_as_strict_as(self, other: Contract) -> bool:
        """Say whether whatever fits this contract fits the other."""
        return all(name in self.bounds and other.allows(name, self.bounds[name]) for name in other.bounds)

    def _sentence(self, name: str, agreement: Agreement, names: Sequence[str]) -> str:
        quantity, value, bound = QUANTITIES[name], agreement.values.get(name), self.bounds[name]
        if value is None:
            return (
                f"{quantity.title} is undefined: the reference does not tell these images apart; "
                "measure on images of which some are normal and some are not"
            )
        relation = "falls below" if quantity.larger_is_better else "exceeds"
        text = f"{quantity.title}: {_short(value)} {relation} {bound:g}"
        worst = agreement.worst.get(name)
        if worst is None:
            return text
        axes = _AXES[name.partition("_")[0]]
        where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, worst.index, strict=False))
        named = f" ({names[worst.index[0]]})" if worst.index[0] < len(names) else ""
        if len(worst.index) < len(axes):
            return f"{text}, worst at {where}{named}"
        return f"{text}, worst at {where}{named}: expected {worst.reference:.7g}, got {worst.got:.7g}"


def _short(value: float) -> str:
    # Close to 1, three digits would round a cosine to its bound.
    return f"{value:.6f}" if 0.9 < value < 1 else f"{value:.3g}"


_EVERY = {
    "score_iqr": 0.01,
    "spearman": 0.999,
    "flips_beyond": 0.0,
    "map_share": 0.01,
    "map_cosine_p1": 0.9995,
}
_HALF = {**_EVERY, "map_pixel": 0.02, "reconstruction_p999": 2.0}

CONTRACTS = {
    "fp32": Contract(
        "fp32",
        {
            **_EVERY,
            "score_abs": 1e-4,
            "score_rel": 1e-3,
            "map_abs": 1e-4,
            "map_rel": 1e-3,
            "reconstruction_levels": 1.0,
        },
    ),
    "fp16": Contract("fp16", _HALF),
    "bf16": Contract("bf16", _HALF),
    "int8": Contract(
        "int8",
        {
            "score_median": 0.05,
            "score_iqr": 2.0,
            "spearman": 0.995,
            "flips_share": 0.05,
            "flips_beyond": 0.0,
            "map_share": 0.05,
            "map_pixel": 0.25,
            "map_cosine_p1": 0.75,
            "map_cosine_min": 0.5,
            "reconstruction_p999": 4.0,
        },
    ),
}
"""What each precision promises. FP32 adds bounds on every single value; the others allow what rounding costs.

INT8 promises that images are told apart as before, not that their scores are the same.
"""

AUROC_CHANGE = 0.003
"""What INT8 may change the area under the ROC curve by, where enough labels are known."""

MIN_PAIRS = 10 / AUROC_CHANGE
"""Pairs of a normal and an anomalous image, so that one of them changing places is a tenth of AUROC_CHANGE."""

_OF_BACKEND = {"openvino-bf16": "bf16"}

_ONE_SCORE = ("fp32", "fp16")
"""Contracts whose engines score alike, each within a hundredth of the scores' spread, whatever backend runs them."""


def demanded(precision: str, labels: Sequence[bool | None]) -> Contract:
    """Return what is asked of an engine on images with these labels (True: anomalous, None: unknown)."""
    contract = CONTRACTS[precision]
    if precision != "int8" or pairs(labels) < MIN_PAIRS:
        return contract
    return replace(contract, bounds={**contract.bounds, "auroc_change": AUROC_CHANGE})


def pairs(labels: Sequence[bool | None]) -> int:
    """Return how many pairs of a normal and an anomalous image there are."""
    return labels.count(True) * labels.count(False)


def owed(precision: str, backend: str) -> str:
    """Name the contract that a backend owes on a file of this precision: the file's, or that of its own arithmetic."""
    return _OF_BACKEND.get(backend, precision)


def scores_agree(precision: str, one: str, other: str) -> bool:
    """Say whether a threshold found on one backend's scores holds for another's, on one file of this precision.

    Two backends round BF16 and INT8 each in its own way, and may differ by as much as either does from PyTorch.
    """
    return one == other or owed(precision, one) == owed(precision, other) in _ONE_SCORE
