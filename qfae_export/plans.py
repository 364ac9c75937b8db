"""Plans as a part of an export: which is wanted, building it, measuring it where it can run, and saying so.

Two ways lead here: the export itself, where a plan can be built (`add_plan`), and `--onnx` on the machine with the
GPU, where there is no checkpoint (`rebuild`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from qfae_export.builders import available, current_gpu
from qfae_export.errors import ExportError
from qfae_export.file_precision import read_types, refuse_other_precision
from qfae_export.handover import put_in_place, temporary_inside
from qfae_export.images import ParityImages, choose
from qfae_export.options import FP16_SUFFIX, Options
from qfae_export.parity import measure, run_in_batches
from qfae_export.parity_report import ParityReport, accepted, certificate_of, link
from qfae_export.reference import scale_of
from qfae_export.tensorrt_plan import Plan, build_plan
from qfae_runtime.agreement import Reference
from qfae_runtime.certificate import Link
from qfae_runtime.contract import demanded
from qfae_runtime.engines import OpenedEngine, open_engine
from qfae_runtime.engines.backends import lacking, reference_of
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.tensorrt import TensorRtEngine
from qfae_runtime.errors import EngineError, ManifestError, OutputError, cure_of_writing
from qfae_runtime.golden import golden_beside
from qfae_runtime.manifest import FileEntry, Manifest, find_manifest
from qfae_runtime.yardstick import Yardstick

Say = Callable[[str], None]
Measure = Callable[[Engine, str], ParityReport]
"""Holds a plan, opened, against its reference, or raises ParityError; the text is its file's name."""

SUFFIXES = {"plan": ".plan", "rtx-plan": ".rtx.plan"}


class Planned(NamedTuple):
    """A plan that was built: the manifest with it, its file's name, its measurement, or a note why there is none."""

    manifest: Manifest
    name: str
    report: ParityReport | None
    note: str | None


def wanted(options: Options, onnx: str) -> tuple[str | None, str | None]:
    """Return the kind of plan to build, if any, and why there is none where one was to be expected.

    `onnx` names the file it would be built from.

    Raises:
        ExportError: a plan was asked for that cannot be built here.

    """
    if options.format == "onnx" or options.part != "full":
        return None, None
    if options.format is not None:
        if reason := available(options.format, onnx):
            raise ExportError(f"--format {options.format}: {reason}")
        return options.format, None
    if not options.fp16:
        return None, None
    reason = available("plan", onnx)
    if reason is None:
        return "plan", None
    command = f"qfae-export --onnx {onnx}"
    there = "" if command in reason else f"; on the machine with the GPU run: {command}"
    return None, f"no plan: {reason}{there}"


def add_plan(manifest: Manifest, onnx: Path, kind: str, say: Say, measured: Measure | None) -> Planned:
    """Build the plan of an ONNX engine beside it.

    `measured` None: there is no reference. Where the plan cannot run, it stands in the manifest without a certificate,
    and no runtime takes it before it has one.

    Raises:
        ExportError, OutputError: see build_plan; or the plan cannot be opened on the card it was built for.
        ParityError: the plan does not compute what PyTorch computes.

    """
    path = onnx.with_name(_plan_name(onnx.name, kind))
    kept = manifest.precision.get(onnx.name, {}).get("kept_fp32", [])
    plan = build_plan(onnx, path, kind, manifest.max_batch, kept=kept, say=say)
    say(f"{plan.fusion.summary()}, built in {plan.seconds:.0f} s")
    manifest = _with_file(manifest, plan, onnx.name)
    if measured is None:
        return Planned(manifest, path.name, None, None)
    try:
        engine = _open(plan, manifest)
    except EngineError as error:
        if not _of_another_card(plan):
            raise ExportError(f"{path.name}: was built, but cannot be opened: {error}") from error
        command = f"qfae-export verify --engine {path.name} --ckpt CHECKPOINT --record"
        note = f"{path.name} cannot run here, so it is not certified yet: {error}\non its machine: {command}"
        return Planned(manifest, path.name, None, note)
    with engine:
        say(f"comparing {path.name} on {engine.device}")
        report = measured(engine, path.name)
        certificates = (*manifest.certificate, certificate_of(path, engine, report))
    return Planned(replace(manifest, certificate=certificates), path.name, report, None)


def _of_another_card(plan: Plan) -> bool:
    """Say whether this machine lacks what runs the plan: library, driver, or a card that it was built for."""
    gpu = current_gpu()
    if gpu is None or lacking(reference_of(plan.kind).name, "cuda:0") is not None:
        return True
    return bool(plan.targets) and f"SM{gpu.compute_capability.replace('.', '')}" not in plan.targets


def _with_file(manifest: Manifest, plan: Plan, onnx: str) -> Manifest:
    """Return the manifest with the plan in it, and without what was measured of another of that name."""
    name, precision = plan.path.name, manifest.files[onnx].precision
    plans = {**manifest.provenance.get("plans", {}), name: {"from": onnx, **plan.describe()}}
    return replace(
        manifest,
        files={**manifest.files, name: FileEntry.of(plan.path, "engine", plan.kind, precision)},
        precision={**manifest.precision, name: manifest.precision.get(onnx, {})},
        certificate=tuple(one for one in manifest.certificate if one.engine != name),
        provenance={**manifest.provenance, "plans": plans},
    )


def rebuild(options: Options, say: Say) -> Planned:
    """Build the plan of an exported ONNX file on this machine, beside it.

    It is held against NAME.onnx, the FP32 engine that was certified against PyTorch where it was exported.

    Raises:
        ManifestError, EngineError: the file is none of this project's, or not the one its manifest names.
        ExportError, OutputError, ParityError: see add_plan.

    """
    onnx = options.onnx
    assert onnx is not None
    kind = options.format or "plan"
    manifest, manifest_path = _exported(onnx, kind)
    before = manifest_path.read_bytes()
    name = _plan_name(onnx.name, kind)
    if (onnx.parent / name).exists() and not options.overwrite:
        raise OutputError(f"{onnx.parent / name}: exists already; pass --overwrite to replace it")
    measured = None
    if "random_weights" not in manifest.provenance:
        measured = _against_fp32(options, manifest, onnx, say)
    try:
        with temporary_inside(onnx.parent, name) as made:
            for part in (onnx.name, f"{onnx.name}.data"):
                if part in manifest.files:
                    (made / part).symlink_to((onnx.parent / part).absolute())
            planned = add_plan(manifest, made / onnx.name, kind, say, measured)
            if manifest_path.read_bytes() != before:
                raise ExportError(f"{manifest_path}: was changed while the plan was built; run the command again")
            planned.manifest.save(made / manifest_path.name)
            put_in_place(made, onnx.parent, [name, manifest_path.name])
    except OSError as error:
        cure = cure_of_writing(error, "another copy of the files")
        raise OutputError(f"{onnx.parent}: cannot be written ({error.strerror or error}); {cure}") from error
    return planned


def _exported(onnx: Path, kind: str) -> tuple[Manifest, Path]:
    """Return the manifest of an ONNX engine that a plan can be built from here, and where it is.

    Raises:
        ManifestError, EngineError, ExportError: see rebuild.

    """
    if not onnx.is_file():
        what = "a folder" if onnx.is_dir() else "no such file"
        raise EngineError(f"{onnx}: {what}; name the NAME{FP16_SUFFIX} that qfae-export wrote")
    if reason := available(kind, onnx.name):
        raise ExportError(f"{onnx}: {reason}")
    path = find_manifest(onnx)
    manifest = Manifest.load(path)
    entry = manifest.files.get(onnx.name)
    if entry is None or (entry.role, entry.format) != ("engine", "onnx"):
        raise ManifestError(f"{onnx}: {path.name} does not list it as an ONNX engine; copy both again")
    manifest.verify_files(onnx.parent, [name for name in manifest.files if name in (onnx.name, f"{onnx.name}.data")])
    refuse_other_precision(manifest, onnx.name, read_types(onnx))
    return manifest, path


def _against_fp32(options: Options, manifest: Manifest, onnx: Path, say: Say) -> Measure:
    """Score the images with NAME.onnx; return what holds a plan against those scores.

    Raises:
        ExportError: it is not there, or the images cannot be read.

    """
    fp32 = onnx.parent / f"{manifest.name}.onnx"
    if fp32.name not in manifest.files or not fp32.is_file():
        raise ExportError(
            f"{fp32}: not there; the plan is measured against this certified engine: copy it beside the "
            f"{onnx.name} (its .data too, where it has one)"
        )
    images = choose(options.parity_images, manifest.preprocess, manifest.max_batch, count=options.parity_count)
    say(f"scoring {len(images)} images with {fp32.name}, the certified reference")
    with open_engine(fp32, backend=None) as opened:
        scores = run_in_batches(opened.engine, images.pixels, min(8, opened.engine.max_batch))
        reference = _reference_of(opened, images, scores)
    precision = manifest.files[onnx.name].precision or "fp32"
    contract = demanded(precision, images.labels[: images.real])

    def measured(engine: Engine, file: str) -> ParityReport:
        report = measure(engine, images, reference, contract)
        links: tuple[Link, ...] = ()
        if report.outputs is not None:
            count = len(images)
            links = (link("ONNX FP32", "plan", reference, report.outputs, precision, images.labels, count),)
        return accepted(replace(report, links=links, reference=f"{fp32.name} in ONNX Runtime"), file, engine.backend)

    return measured


def _reference_of(opened: OpenedEngine, images: ParityImages, scores: Scores) -> Reference:
    """Return the outputs of a certified engine as a reference; PyTorch's own errors are what the golden file says."""
    assert opened.certificate is not None
    golden = golden_beside(opened)
    assert golden is not None
    groups, known = (
        [int(number in one.stress) for number in range(count)]
        for one, count in ((images, len(images)), (golden, len(golden.images)))
    )
    yardstick = Yardstick.estimated(scores, groups, golden.yardstick, golden.scores, known)
    scale = scale_of(images, scores, factors=opened.certificate.scale.factors)
    return Reference(scores, scale, yardstick, images.stress)


def _open(plan: Plan, manifest: Manifest) -> Engine:
    return TensorRtEngine(
        plan.path.read_bytes(),
        manifest.image_size,
        manifest.max_batch,
        backend=reference_of(plan.kind).name,
        name=str(plan.path),
    )


def _plan_name(onnx: str, kind: str) -> str:
    return onnx.removesuffix(FP16_SUFFIX).removesuffix(".onnx") + SUFFIXES[kind]
