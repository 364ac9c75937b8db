"""How far rounding moves a model's scores: FP32's own against FP64, and what FP16 and BF16 would do, stage by stage.

Judged by the tolerances that an export is held to, on the images that it measures on, so that whether `qfae-export
--fp16` will pass is known before. An engine rounds elsewhere than PyTorch does, so its numbers are as large as these,
not the same.

Letters: N images, B of them in a batch, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qfae_runtime.agreement import Agreement, Scale, measure_agreement
from qfae_runtime.checked import Fields
from qfae_runtime.contract import CONTRACTS, MIN_IMAGES, Contract, that_pytorch_keeps
from qfae_runtime.coverage import spread
from qfae_runtime.engines.base import Scores
from qfae_runtime.errors import ManifestError
from qfae_runtime.quantities import QUANTITIES
from qfae_train.aggregate import factors
from qfae_train.autoencoder import AnomalyScorer, denormalise, normalise
from qfae_train.backbone import is_plain
from qfae_train.float32 import whole_float32
from qfae_train.rounding import Rounding
from qfae_train.stress import stress_images

LARGE_PARAMETERS = 50_000_000
"""A model with more parameters than this is measured on a few images alone: at full size each takes a CPU seconds, and
FP64 twice as long as FP32."""

FEW_IMAGES = 12
"""Images that a large model is measured on, half of them stress images."""

STAGES = ("encoder", "qformer", "decoder", "perceptual")
"""What can be rounded alone, in the order of the computation. The Q-Former's is the projection of its input, too."""

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

ALL = "all"
"""In place of a stage: everything that an engine rounds."""

ROUNDED = {"fp16": STAGES, "bf16": ("perceptual",)}
"""What an engine rounds, by its precision: in BF16, with eight bits, nothing that the reconstruction depends on."""

_BATCH = 8

_TITLES = {ALL: "as an engine", "qformer": "the Q-Former", "perceptual": "the perceptual network"}
_KEPT = (*CONTRACTS["fp16"].bounds, "flips", "reconstruction_levels")
_MOST_ROWS = 64

CLOSE = 1.5
"""Within this factor of a bound only the export can tell: rounding is a draw, and an engine's is another. Engines that
round the same model in slightly different places were seen to differ by up to 1.7 in the mean of the scores' error."""


@dataclass(frozen=True)
class Row:
    """What one way of rounding does.

    precision  "fp32" (as PyTorch computes), "fp16" or "bf16"
    stage      the stage that is rounded alone, or "all" that an engine rounds
    values     by the names of QUANTITIES; None: undefined; empty where there is a fault
    relative   largest error of a score as a share of the larger of score and threshold, stress images left out
    fault      why the outputs cannot be compared, e.g. infinite ones
    """

    precision: str
    stage: str
    values: Mapping[str, float | None]
    relative: float | None
    fault: str | None = None


@dataclass(frozen=True)
class Conditioning:
    """How far rounding moves a model's outputs from FP64's, on `images` real ones and `stress_images` others.

    `threshold` is the 95th percentile of the normal images' scores (of all where nobody said which are normal).
    """

    images: int
    stress_images: int
    threshold: float | None
    rows: tuple[Row, ...]

    def row(self, precision: str, stage: str = ALL) -> Row:
        """Return one of the rows.

        Raises:
            KeyError: it was not measured.

        """
        for row in self.rows:
            if (row.precision, row.stage) == (precision, stage):
                return row
        raise KeyError(f"{precision}, {stage}")

    def shares(self, precision: str, stage: str = ALL) -> dict[str, float]:
        """Return what a row takes of each bound of its precision's tolerances: 1 is the bound; infinite: undefined.

        Left out are bounds that PyTorch FP32 breaks itself, as in an export, and ranks of fewer than MIN_IMAGES images.
        """
        row = self.row(precision, stage)
        contract = that_pytorch_keeps(CONTRACTS[precision], self.row("fp32").values)
        if self.images < MIN_IMAGES:
            contract = contract.without(["spearman"])
        return {name: _share(contract, name, row.values[name]) for name in contract.bounds if name in row.values}

    def passes(self, precision: str) -> bool:
        """Say whether the model, rounded as an engine rounds it, is within the tolerances of an export."""
        return self.row(precision).fault is None and max(self.shares(precision).values(), default=0.0) <= 1

    def sentence(self, precision: str = "fp16") -> str:
        """Say whether an export to a precision will pass, by how much, and which stage would be the cause."""
        name, row = precision.upper(), self.row(precision)
        cure = "; qfae-export --fp16 --bisect finds what must stay FP32" if precision == "fp16" else ""
        if (broken := self.row("fp32").fault) is not None:
            return f"{name} cannot be judged: {broken}"
        if row.fault is not None:
            return f"{name} will be refused: {row.fault}{self._cause(precision, None)}{cure}"
        shares = self.shares(precision)
        worst = max(shares, key=lambda one: shares[one])
        title = QUANTITIES[worst].title
        if shares[worst] <= 1:
            text = f"{name}: within the tolerances of an export, at most {shares[worst]:.2f} of a bound ({title})"
            return text if shares[worst] * CLOSE <= 1 else f"{text}; that is close, and only the export can tell"
        likely = "will probably be refused" if shares[worst] < CLOSE else "will be refused"
        failed = Contract(precision, {worst: CONTRACTS[precision].bounds[worst]}).failures(
            Agreement(self.images, None, dict(row.values), {})
        )
        others = sum(share > 1 for share in shares.values()) - 1
        more = "" if not others else f" (and {others} more bound{'s are' if others > 1 else ' is'} broken)"
        return f"{name} {likely}: {failed[0]}{more}{self._cause(precision, worst)}{cure}"

    def _cause(self, precision: str, quantity: str | None) -> str:
        """Name the stage that is worst alone: in a quantity, or one whose outputs cannot be compared."""
        stages = ROUNDED[precision]
        if len(stages) == 1:
            return f"; all of it comes from {_title(stages[0])}"
        faulty = [stage for stage in stages if self.row(precision, stage).fault is not None]
        if faulty:
            return f"; it comes from {_title(faulty[0])}"
        if quantity is None:
            return "; no stage alone does that"
        alone = {stage: self.shares(precision, stage)[quantity] for stage in stages}
        worst = max(alone, key=lambda stage: alone[stage])
        return f"; most of it comes from {_title(worst)}, alone {alone[worst]:.2f} of the bound"

    def table(self) -> str:
        """Return a line per row; distances and angles as in the tolerances, the reconstruction in grey levels."""
        head = ("score distance", "largest", "Spearman", "map angle", "grey levels", "error / score")
        lines = ["  ".join([f"{'rounded':<24}", *head])]
        for row in self.rows:
            name = "PyTorch FP32" if row.precision == "fp32" else f"{row.precision.upper()}, {_short(row.stage)}"
            if row.fault is not None:
                lines.append(f"{name:<24}  {row.fault}")
                continue
            cells = [
                _cell(row.values.get("score_distance"), ".1e"),
                _cell(row.values.get("score_distance_max"), ".1e"),
                _cell(row.values.get("spearman"), ".5f"),
                _cell(row.values.get("map_angle"), ".1e"),
                _cell(row.values.get("reconstruction_levels"), ".0f"),
                _cell(row.relative, ".1e"),
            ]
            lines.append(
                "  ".join([f"{name:<24}", *(f"{cell:>{len(t)}}" for cell, t in zip(cells, head, strict=True))])
            )
        return "\n".join(lines)

    def text(self) -> str:
        """Return the table and a sentence for FP16 and for BF16, as a terminal shows them."""
        on = f"{self.images} images and {self.stress_images} stress images"
        return "\n".join(
            [f"rounding, against PyTorch FP64 on {on}:", self.table(), *(self.sentence(one) for one in TYPES)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "images": self.images,
            "stress_images": self.stress_images,
            "threshold": self.threshold,
            "rows": [
                {
                    "precision": row.precision,
                    "stage": row.stage,
                    "values": dict(row.values),
                    "relative": row.relative,
                    "fault": row.fault,
                }
                for row in self.rows
            ],
        }

    def said(self) -> dict[str, Any]:
        """Return plain JSON values with what follows from them: whether each precision passes, and the sentence."""
        verdicts = {one: {"passes": self.passes(one), "sentence": self.sentence(one)} for one in TYPES}
        return {**self.to_dict(), "tolerances": verdicts}

    @classmethod
    def from_dict(cls, stored: Any, where: str = "conditioning", cure: str = "measure again") -> Conditioning:
        """Check and read what `to_dict` returned.

        Raises:
            ManifestError: naming the key, what was got and what was expected.

        """
        if not isinstance(stored, dict):
            raise ManifestError(f"{where}: expected a table, got {type(stored).__name__}; {cure}")
        fields = Fields(stored, where, cure=cure)
        rows = fields.array("rows")
        if len(rows) > _MOST_ROWS:
            raise fields.fault("rows", f"up to {_MOST_ROWS} rows")
        read = cls(
            fields.whole("images", 1, 2**50),
            fields.whole("stress_images", 0, 2**50),
            fields.optional_number("threshold"),
            tuple(_read_row(Fields(row, where, f"rows.{number}", cure)) for number, row in enumerate(rows)),
        )
        if [(row.precision, row.stage) for row in read.rows] != _expected_rows():
            raise fields.fault("rows", "FP32, then FP16 and BF16, each of all and of every stage")
        fields.finish()
        return read


@torch.no_grad()
@whole_float32()
def measure(
    scorer: AnomalyScorer, images: Tensor, labels: Sequence[bool | None] = (), threshold: float | None = None
) -> Conditioning:
    """Measure a float32 scorer, where it is, on uint8 images (N, S, S, 3), N at least 1, and on stress images.

    `labels` (True: anomalous) stand in the images' order; `threshold` is taken in place of the one that they give. Of a
    large model FEW_IMAGES are measured. The scorer is left as it was.
    """
    pixels, numbers = _chosen(scorer, images)
    real = len(numbers)
    known = [labels[number] for number in numbers] if len(labels) else []
    training = scorer.training
    scorer.eval()
    try:
        with scorer.in_float64():
            truth = Scores.joined(Pass(scorer, part).outputs("fp32", ()) for part in pixels.split(_BATCH))
        got: dict[tuple[str, str], list[Scores]] = {row: [] for row in _expected_rows()}
        for part in pixels.split(_BATCH):
            passed = Pass(scorer, part)
            for precision, stage in got:
                stages = ROUNDED.get(precision, ()) if stage == ALL else (stage,)
                got[precision, stage].append(passed.outputs(precision, stages))
    finally:
        scorer.train(training)
    single = Scores(truth.score.astype(np.float32), truth.anomaly_map.astype(np.float32), truth.reconstruction)
    scale = Scale.of(single.of(slice(real)), known, threshold, factors(scorer.config.score))
    rows = []
    for (precision, stage), parts in got.items():
        outputs = Scores.joined(parts)
        agreement = measure_agreement(single, outputs, (), scale, None, range(real, len(pixels)))
        values = {name: agreement.values[name] for name in _KEPT} if agreement.fault is None else {}
        relative = None
        if agreement.fault is None:
            unit = np.maximum(truth.score[:real], scale.threshold)
            errors = np.abs(outputs.score[:real].astype(np.float64) - truth.score[:real])
            relative = float((errors / np.maximum(unit, np.finfo(np.float64).tiny)).max())
        rows.append(Row(precision, stage, values, relative, agreement.fault))
    limit = scale.threshold if np.isfinite(scale.threshold) else None
    return Conditioning(real, len(pixels) - real, limit, tuple(rows))


class Pass:
    """One batch through the model in every way of rounding; what two ways have in common is computed once."""

    def __init__(self, scorer: AnomalyScorer, images: Tensor) -> None:
        weight = scorer.autoencoder.qformer.queries
        self._scorer = scorer
        self._images = normalise(images.to(weight.device), weight.dtype)
        self._known: dict[tuple[str, str, tuple[str, ...]], Any] = {}
        self._kept, self._joined = _never_rounded(scorer), _joined(scorer)

    @torch.no_grad()
    def outputs(self, precision: str, stages: Sequence[str]) -> Scores:
        """Return the outputs of the images with these stages rounded."""
        rounded = tuple(stages)
        autoencoder, options = self._scorer.autoencoder, self._scorer.config.score

        def step(what: str, stage: str, before: int, compute: Callable[[], Any]) -> Any:
            """Compute a stage that depends on `before` stages before it, unless it is known."""
            mine = tuple(one for one in (*STAGES[:before], stage) if one in rounded)
            key = (what, precision if mine else "fp32", mine)
            if key not in self._known:
                with Rounding(TYPES[precision], self._kept, self._joined) if stage in rounded else nullcontext():
                    self._known[key] = compute()
            return self._known[key]

        hidden = step("hidden", "encoder", 0, lambda: autoencoder.hidden(self._images))
        queries = step("queries", "qformer", 1, lambda: autoencoder.qformer(autoencoder.context(hidden)))
        pixels = step("pixels", "decoder", 2, lambda: autoencoder.decoder(queries))

        def features(images: Tensor) -> Any:
            return self._scorer.perceptual(images, options.patch_sizes, options.blocks)

        of_images = step("image", "perceptual", 0, lambda: features(self._images))
        of_pixels = step("reconstruction", "perceptual", 3, lambda: features(pixels))
        score, anomaly_map = self._scorer.compare(of_images, of_pixels)
        return Scores(score.cpu().numpy(), anomaly_map.cpu().numpy(), denormalise(pixels).cpu().numpy())


def _never_rounded(scorer: AnomalyScorer) -> list[nn.Module]:
    """Return what an engine keeps in FP32: what reads no image, computed once, and blocks that are not timm's plain."""
    first: Any = scorer.autoencoder.qformer.blocks[0]
    backbones: list[Any] = [encoder.get_submodule("backbone") for encoder in scorer.autoencoder.encoders]
    foreign = [block for backbone in backbones for block in backbone.blocks if not is_plain(block)]
    return [first.attention, first.cross.to_q, *foreign]


def _joined(scorer: AnomalyScorer) -> list[tuple[nn.Linear, nn.Linear]]:
    """Return the layers that an engine makes one product of (see qfae_export's stages)."""
    autoencoder = scorer.autoencoder
    blocks: list[Any] = list(autoencoder.qformer.blocks)
    readers = [block.cross.to_kv for block in blocks if block.cross is not None]
    projections: list[Any] = [encoder.get_submodule("projection") for encoder in autoencoder.encoders]
    return [*product(projections, readers), (blocks[-1].fc2, autoencoder.decoder.embed)]


def _chosen(scorer: AnomalyScorer, images: Tensor) -> tuple[Tensor, list[int]]:
    """Return the images to be measured, real ones first, and these ones' numbers among those given."""
    pixels, _ = stress_images(images.shape[1], images.cpu().numpy())
    stress = torch.from_numpy(pixels)
    numbers = list(range(len(images)))
    if sum(parameter.numel() for parameter in scorer.parameters()) > LARGE_PARAMETERS:
        numbers = spread(len(images), FEW_IMAGES // 2)
        stress = stress[spread(len(stress), FEW_IMAGES // 2)]
    return torch.cat([images[numbers].cpu(), stress]), numbers


def _expected_rows() -> list[tuple[str, str]]:
    return [("fp32", ALL), *product(TYPES, (ALL, *STAGES))]


def _read_row(fields: Fields) -> Row:
    values = fields.inner("values")
    row = Row(
        fields.text("precision"),
        fields.text("stage"),
        {name: values.optional_number(name) for name in fields.mapping("values") if name in QUANTITIES},
        fields.optional_number("relative"),
        fields.optional_text("fault"),
    )
    values.finish()
    fields.finish()
    return row


def _share(contract: Contract, name: str, value: float | None) -> float:
    """Return what a value takes of its bound, 1 at the bound; of ranks and cosines, the distance from 1 counts."""
    if value is None:
        return float("inf")
    bound = contract.bounds[name]
    if QUANTITIES[name].larger_is_better:
        return (1 - value) / (1 - bound)
    if name == "reconstruction_p999":  # whole grey levels, of which the first says nothing: 0.5 may lie on either side
        return max(0.0, value - 1) / (bound - 1)
    return value / bound


def _title(stage: str) -> str:
    return _TITLES.get(stage, f"the {stage}")


def _short(stage: str) -> str:
    return _title(stage).removeprefix("the ")


def _cell(value: float | None, form: str) -> str:
    return "undefined" if value is None else format(value, form)
