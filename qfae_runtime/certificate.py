"""The certificate in a manifest: what was measured for one engine file on one backend and device, and against what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from qfae_runtime.agreement import Agreement, Scale
from qfae_runtime.checked import Fields
from qfae_runtime.contract import CONTRACTS, MIN_IMAGES, Contract, that_pytorch_keeps
from qfae_runtime.engines.base import Engine, card_of
from qfae_runtime.hashing import sha256_of_engine
from qfae_runtime.quantities import OF_ALL_IMAGES, QUANTITIES

PYTORCH = "PyTorch FP64"
"""The training modules in float64: the reference. Where a large model was scored so on some images alone, the others'
is PyTorch FP32."""

MAX_FACTORS = 64
"""Most cosine distances that a score may multiply."""


@dataclass(frozen=True)
class Link:
    """One step of the chain from PyTorch to the engine, measured on its own: which step is guilty shows here.

    `contract` names the bounds that the step was held against.
    """

    source: str
    target: str
    images: int
    contract: str
    measured: dict[str, float | None]
    passed: bool

    def keeps(self, pytorch: Mapping[str, float | None] | None) -> bool:
        """Say whether it keeps what a few images show, but for bounds that PyTorch FP32 breaks by these values."""
        contract = CONTRACTS[self.contract].without(OF_ALL_IMAGES)
        return that_pytorch_keeps(contract, pytorch).holds(self.measured)


@dataclass(frozen=True)
class CertificateEntry:
    """What was measured for one engine on one backend, device and card; a hash binds it to its bytes, weights included.

    `reference` is what it was measured against: PyTorch, or, where a plan was built without the checkpoint, an engine
    that was. `measured` holds the worst of every quantity over all batch sizes, on the same images: `images` real ones
    and `stress_images` others; `pytorch` those of PyTorch FP32 itself, None where nobody measured them.
    """

    engine: str
    engine_sha256: str
    backend: str
    backend_version: str
    device: str
    gpu: str | None
    batches: tuple[int, ...]
    images: int
    stress_images: int
    images_from: str
    reference: str
    contract: Contract
    scale: Scale
    measured: dict[str, float | None]
    pytorch: dict[str, float | None] | None
    links: tuple[Link, ...]
    passed: bool
    created: str

    @classmethod
    def issue(
        cls,
        engine_path: Path,
        engine: Engine,
        agreement: Agreement,
        contract: Contract,
        *,
        batches: Iterable[int],
        images_from: str,
        reference: str = PYTORCH,
        links: Iterable[Link] = (),
        images: int | None = None,
        stress_images: int = 0,
        passed: bool = True,
        pytorch: dict[str, float | None] | None = None,
    ) -> Self:
        """Record an agreement with the reference on images taken from `images_from` (said in words).

        `images` is how many different ones there were, where some ran several times, and `stress_images` how many
        stress images. `passed` false: something beside the numbers failed. `pytorch`: of PyTorch FP32 itself.

        Raises:
            ValueError: the outputs could not be compared, so there is nothing to record.

        """
        if agreement.scale is None or agreement.fault is not None:
            raise ValueError(f"nothing was measured: {agreement.fault}")
        return cls(
            engine=engine_path.name,
            engine_sha256=sha256_of_engine(engine_path),
            backend=engine.backend,
            backend_version=engine.version,
            device=engine.device,
            gpu=card_of(engine),
            batches=tuple(batches),
            images=agreement.images if images is None else images,
            stress_images=stress_images,
            images_from=images_from,
            reference=reference,
            contract=contract,
            scale=agreement.scale,
            measured=agreement.values,
            pytorch=pytorch,
            links=tuple(links),
            passed=passed and contract.holds(agreement.values),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        contract = {"name": self.contract.name, "bounds": dict(self.contract.bounds)}
        return {**asdict(self), "contract": contract, "batches": list(self.batches)}


def read_certificate(fields: Fields, where: str) -> tuple[CertificateEntry, ...]:
    """Take 'certificate' (a list or null) from a manifest; errors as in Manifest.from_dict."""
    if fields.is_null("certificate"):
        return ()
    entries = fields.array("certificate")
    return tuple(_read_entry(Fields(entry, where, f"certificate.{n}"), where, n) for n, entry in enumerate(entries))


def _read_entry(fields: Fields, where: str, number: int) -> CertificateEntry:
    batches = fields.array("batches")
    if not batches or any(type(size) is not int or size < 1 for size in batches):
        raise fields.fault("batches", "a list of batch sizes")
    pytorch = None if fields.is_null("pytorch") else _read_measured(fields.inner("pytorch"))
    links = [Fields(link, where, f"certificate.{number}.links.{n}") for n, link in enumerate(fields.array("links"))]
    entry = CertificateEntry(
        engine=fields.text("engine"),
        engine_sha256=fields.digest("engine_sha256"),
        backend=fields.text("backend"),
        backend_version=fields.text("backend_version"),
        device=fields.text("device"),
        gpu=fields.optional_text("gpu"),
        batches=tuple(batches),
        images=fields.whole("images", 1, 2**50),
        stress_images=fields.whole("stress_images", 0, 2**50),
        images_from=fields.text("images_from"),
        reference=fields.text("reference"),
        contract=_read_contract(fields.inner("contract"), pytorch or {}),
        scale=_read_scale(fields.inner("scale")),
        measured=_read_measured(fields.inner("measured")),
        pytorch=pytorch,
        links=tuple(_read_link(link, pytorch) for link in links),
        passed=fields.flag("passed"),
        created=fields.text("created"),
    )
    fields.finish()
    if entry.passed and not entry.contract.holds(entry.measured):
        raise fields.fault("passed", "false, since a measured quantity breaks its bound")
    if entry.passed and entry.images < MIN_IMAGES:
        raise fields.fault("images", f"{MIN_IMAGES} or more, as a certificate needs")
    return entry


def _read_contract(fields: Fields, pytorch: Mapping[str, float | None]) -> Contract:
    bounds = fields.inner("bounds")
    contract = Contract(
        fields.text("name"), {name: bounds.number(name) for name in fields.mapping("bounds") if name in QUANTITIES}
    )
    bounds.finish()
    promised = CONTRACTS.get(contract.name)
    if promised is None:
        raise fields.fault("name", f"one of {', '.join(CONTRACTS)}")
    # A certificate may be stricter than this version asks for, never laxer than what PyTorch FP32 keeps itself.
    promised = that_pytorch_keeps(promised, pytorch)
    if not contract.is_as_strict_as(promised):
        raise fields.fault("bounds", f"bounds at least as strict as {dict(promised.bounds)}")
    fields.finish()
    return contract


def _read_scale(fields: Fields) -> Scale:
    scale = Scale(
        score_iqr=fields.number("score_iqr"),
        threshold=fields.number("threshold"),
        threshold_from=fields.text("threshold_from"),
        factors=fields.whole("factors", 1, MAX_FACTORS),
    )
    fields.finish()
    return scale


def _read_measured(fields: Fields) -> dict[str, float | None]:
    measured: Mapping[str, float | None] = {name: fields.optional_number(name) for name in QUANTITIES}
    fields.finish()
    return dict(measured)


def _read_link(fields: Fields, pytorch: Mapping[str, float | None] | None) -> Link:
    link = Link(
        source=fields.text("source"),
        target=fields.text("target"),
        images=fields.whole("images", 1, 2**50),
        contract=fields.text("contract"),
        measured=_read_measured(fields.inner("measured")),
        passed=fields.flag("passed"),
    )
    fields.finish()
    if link.contract not in CONTRACTS:
        raise fields.fault("contract", f"one of {', '.join(CONTRACTS)}")
    # Some links are of a few images, of which what is of all images says little.
    if link.passed and not link.keeps(pytorch):
        raise fields.fault("passed", "false, since a measured quantity breaks its bound")
    return link
