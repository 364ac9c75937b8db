"""How far an engine may be from PyTorch: the bounds, as data, and the sentences about those that were broken.

All bounds must hold: with "either fits", maps of tiny values would always pass.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from qfae_runtime.agreement import Agreement
from qfae_runtime.quantities import QUANTITIES

MIN_IMAGES = 32
"""An engine is certified on so many images or more: fewer say too little about percentiles and ranks."""

_AXES = {
    "score": ("image",),
    "map": ("image", "y", "x"),
    "reconstruction": ("image", "y", "x", "channel"),
    "stress": ("image",),
}

_OF_WHOLE_IMAGES = (
    "map_angle_max",
    "map_cosine_p1",
    "map_cosine_min",
    "stress_angle",
    "stress_cosine",
    "stress_reconstruction",
)
"""Quantities of an image as a whole, of which no single value is the worst."""


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
            number = agreement.fault_image
            named = f" ({names[number]})" if number is not None and number < len(names) else ""
            return [f"{agreement.fault}{named}"]
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
        if name in _OF_WHOLE_IMAGES:
            return f"{text}, worst at {where}{named}"
        return f"{text}, worst at {where}{named}: expected {worst.reference:.7g}, got {worst.got:.7g}"


def _short(value: float) -> str:
    # Close to 1, three digits would round a cosine to its bound.
    return f"{value:.6f}" if 0.9 < value < 1 else f"{value:.3g}"


_HALF = {
    "score_distance": 1e-3,
    "score_distance_max": 0.01,
    "spearman": 0.999,
    "map_angle": 1e-3,
    "map_angle_max": 5e-3,
    "reconstruction_p999": 2.0,
    "stress_distance": 0.01,
    "stress_share": 0.025,
    "stress_angle": 0.015,
    "stress_cosine": 0.995,
    "stress_reconstruction": 1.2,
}

CONTRACTS = {
    "fp32": Contract(
        "fp32",
        {
            "score_typical": 5.0,
            "score_worst": 30.0,
            "spearman": 0.999,
            "flips_beyond": 0.0,
            "map_typical": 5.0,
            "map_worst": 30.0,
            "map_pixel": 30.0,
            "map_cosine_p1": 0.9995,
            "reconstruction_typical": 5.0,
            "reconstruction_worst": 30.0,
            "reconstruction_levels": 1.0,
        },
    ),
    "fp16": Contract("fp16", _HALF),
    "bf16": Contract("bf16", _HALF),
    "int8": Contract(
        "int8",
        {
            "score_distance": 0.01,
            "score_distance_max": 0.15,
            "spearman": 0.995,
            "map_angle": 0.01,
            "map_angle_max": 0.02,
            "map_cosine_p1": 0.75,
            "map_cosine_min": 0.5,
            "reconstruction_p999": 4.0,
            "stress_distance": 0.04,
            "stress_share": 0.1,
            "stress_angle": 0.25,
            "stress_cosine": 0.9,
            "stress_reconstruction": 20.0,
        },
    ),
}
"""What each precision promises. FP32: to round about as much as PyTorch FP32 does; the others: what rounding costs.

INT8 promises that images are told apart as before, not that their scores are the same.
"""

FLIPS_SHARE = {"fp16": 0.02, "bf16": 0.02, "int8": 0.05}
"""Decisions that may change, as a share of the images, where one of them is no more than that."""

AUROC_CHANGE = {"fp16": 0.001, "bf16": 0.001, "int8": 0.003}
"""What a precision may change the area under the ROC curve by, where enough labels are known."""

_OF_BACKEND = {"openvino-bf16": "bf16"}

_ONE_SCORE = ("fp32", "fp16")
"""Contracts whose engines score alike, each within 0.001 as distance in the mean, whatever backend runs them."""


def demanded(precision: str, labels: Sequence[bool | None]) -> Contract:
    """Return what is asked of an engine on real images with these labels (True: anomalous, None: unknown).

    A bound that so few images cannot show is left out: see min_images and min_pairs.
    """
    contract, bounds = CONTRACTS[precision], {}
    if precision in FLIPS_SHARE and len(labels) >= min_images(precision):
        bounds["flips_share"] = FLIPS_SHARE[precision]
    if precision in AUROC_CHANGE and pairs(labels) >= min_pairs(precision):
        bounds["auroc_change"] = AUROC_CHANGE[precision]
    return replace(contract, bounds={**contract.bounds, **bounds})


def beyond_pytorch(contract: Contract, pytorch: Mapping[str, float | None]) -> list[str]:
    """Return the bounds that PyTorch FP32 breaks itself on the images measured, by its own values of QUANTITIES.

    Where it does not keep them, an engine that does not either is not at fault.
    """
    known = {name: pytorch.get(name) for name in contract.bounds}
    return [name for name, value in known.items() if value is not None and not contract.allows(name, value)]


def that_pytorch_keeps(contract: Contract, pytorch: Mapping[str, float | None] | None) -> Contract:
    """Return the contract without the bounds that PyTorch FP32 breaks itself; None: nobody measured it."""
    return contract.without(beyond_pytorch(contract, pytorch or {}))


def min_images(precision: str) -> int:
    """Return the images that a bound on flipped decisions needs: one flip is a share that it allows."""
    return math.ceil(1 / FLIPS_SHARE[precision])


def min_pairs(precision: str) -> int:
    """Return the pairs of a normal and an anomalous image that a bound on AUROC needs: one pair is a tenth of it."""
    return math.ceil(10 / AUROC_CHANGE[precision])


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
