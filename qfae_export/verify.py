"""Measuring an engine again, where it will run: against PyTorch, or against what PyTorch left in the golden file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qfae_export.chain import Chain
from qfae_export.describe import refuse_other_checkpoint
from qfae_export.errors import ExportError
from qfae_export.file_precision import FileTypes, read_types, refuse_other_policy, refuse_other_precision
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages, choose
from qfae_export.parity import measure
from qfae_export.parity_report import ParityReport, certificate_of
from qfae_export.precision import FP16, Precision
from qfae_export.reference import scale_of
from qfae_runtime import calibration
from qfae_runtime.agreement import Reference
from qfae_runtime.certificate import CertificateEntry
from qfae_runtime.contract import CONTRACTS, MIN_IMAGES, Contract, owed, that_pytorch_keeps
from qfae_runtime.engines import OpenedEngine, open_engine
from qfae_runtime.engines.base import card_of
from qfae_runtime.errors import CalibrationError, ManifestError, OutputError, cure_of_writing
from qfae_runtime.golden import golden_beside
from qfae_runtime.manifest import Manifest, find_manifest
from qfae_runtime.quantities import QUANTITIES
from qfae_runtime.selftest import NOT_ON_FEW_IMAGES
from qfae_train.checkpoint import build_scorer
from qfae_train.config import load as load_config
from qfae_train.official import open_checkpoint
from qfae_train.weight_files import WeightFiles

_DECISIONS = ("flips_share", "flips_beyond")
"""Quantities that a threshold decides."""


def verify(
    engine: Path,
    ckpt: Path | None = None,
    config: str | None = None,
    weights: WeightFiles | None = None,
    parity_images: Path | None = None,
    parity_count: int | None = None,
    backend: str | None = None,
    device: str = "auto",
    record: bool = False,
    say: Callable[[str], None] = lambda step: None,
) -> ParityReport:
    """Measure an engine on this machine; with `record`, write what was measured into the manifest.

    A kept contract makes it a certificate; a broken one takes the certificate back that was there.

    `backend` None: the one that the file is exported for. With a checkpoint, decisions are compared at the threshold of
    the calibration beside the engine, if there is one for it, and at that of the images.

    Of an ONNX file, the precision that chooses the contract is read from the file. That of a plan is the manifest's.

    Raises:
        ExportError: the checkpoint is another than the engine's, or there is nothing to measure with.
        ManifestError: the file computes in other types than the manifest says.
        EngineError, ManifestError, CheckpointError: a file is missing, damaged, or does not fit the others.

    """
    with open_engine(engine, backend=backend, device=device, allow_uncertified=True) as opened:
        precision = opened.manifest.files[engine.name].precision or "fp32"
        policy = opened.manifest.precision.get(engine.name, {}).get("policy")
        if policy != precision:
            raise ManifestError(
                f"{opened.manifest.name}.json: {engine.name} is {precision} in 'files' and {policy} in 'precision'; "
                "export the engine again"
            )
        types = None
        if opened.manifest.files[engine.name].format == "onnx":
            types = read_types(opened.path)
            refuse_other_precision(opened.manifest, engine.name, types)
        else:
            say(f"{engine.name}: that it is {precision} is the manifest's word, for a plan cannot be looked into")
        contract = CONTRACTS[owed(precision, opened.engine.backend)]
        comparing = (
            f"comparing {engine.name} on {opened.engine.backend} {opened.engine.version}, {opened.engine.device}"
        )
        if ckpt is None:
            if record:
                raise ExportError(
                    f"--record: a certificate is measured on {MIN_IMAGES} images or more, and the golden file holds "
                    "fewer; pass --ckpt"
                )
            images, reference = _golden(opened)
            say(comparing)
            report = measure(opened.engine, images, reference, _for_few_images(contract))
        else:
            say("reading the checkpoint")
            chain = _anew(opened, types, ckpt, config, weights or WeightFiles(), parity_images, parity_count, say)
            say(comparing)
            report = _decided_too(chain, chain.measure(opened.engine, contract.name))
        if record:
            _record(opened, report)
    return report


def _golden(opened: OpenedEngine) -> tuple[ParityImages, Reference]:
    golden = golden_beside(opened)
    if golden is None:
        raise ExportError(
            f"{opened.path}: its manifest names no golden images to measure on; pass --ckpt, the checkpoint it is from"
        )
    # Real images first, as everywhere.
    order = [*golden.real, *golden.stress]
    count = len(order)
    names = tuple(f"golden image {number}" for number in order)
    origin = f"the {count} golden images and PyTorch's outputs on them"
    images = ParityImages(golden.images[order], names, origin, (None,) * count, len(golden.stress))
    reference = golden.reference(opened.certificate.scale if opened.certificate is not None else None)
    return images, reference.of(order)


def _for_few_images(contract: Contract) -> Contract:
    few = contract.without(NOT_ON_FEW_IMAGES)
    if "map_cosine_p1" not in contract.bounds:
        return few
    return replace(few, bounds={**few.bounds, "map_cosine_min": contract.bounds["map_cosine_p1"]})


def _anew(
    opened: OpenedEngine,
    types: FileTypes | None,
    ckpt: Path,
    config: str | None,
    weights: WeightFiles,
    folder: Path | None,
    count: int | None,
    say: Callable[[str], None],
) -> Chain:
    """Score images with PyTorch, and again with what the engine's policy rounds: no engine on a CPU shows it all."""
    checkpoint = open_checkpoint(ckpt, load_config(config) if config is not None else None, weights)
    refuse_other_checkpoint(opened.manifest, opened.path.name, ckpt, checkpoint.sha256)
    spec, stored = checkpoint.config.preprocess_spec(), checkpoint.parity_images.numpy()
    if difference := opened.manifest.preprocess.diff(spec):
        raise ExportError(
            f"{opened.manifest.name}.json: prepares images otherwise than the checkpoint it was exported from: "
            f"{'; '.join(difference)}; export the engine again"
        )
    images = choose(folder, spec, opened.engine.max_batch, stored, ckpt.name, count)
    scorer = build_scorer(checkpoint, weights)
    graph = InferenceGraph(scorer)
    if types is not None:
        refuse_other_policy(opened.manifest, opened.path.name, types, graph)
    say(f"scoring {len(images)} images with PyTorch in FP64 and FP32, the reference")
    chain = Chain.begin(scorer, graph, images, _calibrated(opened, say))
    graph.forget()
    policy = Precision.described(opened.manifest.precision[opened.path.name])
    if policy.name == FP16.name:
        say("rounding the graph as FP16 rounds")
        chain.round(graph, policy)
    return chain


def _decided_too(chain: Chain, report: ParityReport) -> ParityReport:
    """Compare decisions at the threshold of the images, too, where they were compared at a calibrated one.

    A calibration lies beside the engine: a threshold that no score comes near would flip nothing.
    """
    images, reference = chain.images, chain.reference
    own = scale_of(images, reference.scores, factors=reference.scale.factors)
    if own.threshold == reference.scale.threshold or report.outputs is None:
        return report
    bounds = {name: bound for name, bound in report.contract.bounds.items() if name in _DECISIONS}
    again = replace(reference, scale=own).compare(report.outputs, images.labels)
    said = replace(report.contract, bounds=bounds).failures(again, images.names)
    faults = tuple(f"at {own.threshold:.7g}, {own.threshold_from}: {one}" for one in said)
    return replace(report, faults=(*report.faults, *faults))


def _calibrated(opened: OpenedEngine, say: Callable[[str], None]) -> float | None:
    """Return the threshold that runs of this engine decide by; None if there is none."""
    path = calibration.path_beside(opened.path)
    if not path.exists():
        return None
    try:
        threshold = calibration.load(path, opened, reading=None).threshold
    except CalibrationError as error:  # it belongs to a run, and says nothing of the engine
        say(f"decisions are not compared at a calibrated threshold: {error}")
        return None
    say(f"decisions are compared at {threshold:.7g}, the threshold of {path.name}")
    return threshold


def _laxer(entry: CertificateEntry, before: CertificateEntry) -> list[str]:
    """Return the bounds that a measurement of the same bytes lacks of the one it would replace and PyTorch keeps."""
    if entry.engine_sha256 != before.engine_sha256 or not entry.passed:
        return []
    asked = that_pytorch_keeps(before.contract, entry.pytorch)
    return [name for name in asked.bounds if not asked.allows(name, entry.contract.bounds.get(name))]


def _stands(entry: CertificateEntry, before: CertificateEntry) -> bool:
    """Say whether a certificate stands as it is: the new measurement says as much, but for bounds PyTorch breaks."""
    same = entry.engine_sha256 == before.engine_sha256 and entry.batches == before.batches
    return same and entry.passed and before.passed and not entry.contract.is_as_strict_as(before.contract)


def _record(opened: OpenedEngine, report: ParityReport) -> None:
    """Put the measurement in the place of what the manifest says of this engine on this backend, device and card."""
    engine = opened.engine
    place = (opened.path.name, engine.backend, engine.device, card_of(engine))
    manifest = Manifest.load(find_manifest(opened.path))  # as it is now: measuring takes minutes
    if manifest.engine_sha256(opened.path.name) != opened.sha256:
        raise ManifestError(f"{opened.path}: was exported anew while it was measured; measure it again")
    before = [one for one in manifest.certificate if (one.engine, one.backend, one.device, one.gpu) == place]
    entries = [one for one in manifest.certificate if one not in before]
    if report.worst.fault is None:
        entry = certificate_of(opened.path, engine, report)
        if lost := {name: one for one in before for name in _laxer(entry, one)}:
            raise ExportError(
                f"--record: {opened.path.name} was measured on {max(one.images for one in lost.values())} images, with "
                f"bounds that these {entry.images} do not show: {', '.join(QUANTITIES[name].title for name in lost)}; "
                "pass --parity-images DIR and --parity-count N with as many images and labels"
            )
        if any(_stands(entry, one) for one in before):
            return
        # The steps of the export are those of the same bytes; measuring the engine again says nothing new of them.
        links = next((one.links for one in before if one.engine_sha256 == entry.engine_sha256), entry.links)
        # What excused a step there may not excuse it here.
        links = tuple(one if one.keeps(entry.pytorch) else replace(one, passed=False) for one in links)
        entries.append(replace(entry, links=links) if entry.passed else entry)
    manifest = replace(manifest, certificate=tuple(entries))
    path = find_manifest(opened.path)
    try:
        manifest.save(path)
    except OSError as error:
        cure = cure_of_writing(error, "another copy of the engine")
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {cure}") from error
