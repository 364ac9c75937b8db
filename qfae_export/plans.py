"""Plans as a part of an export: which is wanted, building it, measuring it where it can run, and saying so.

Two ways lead here: the export itself, where a plan can be built (`add_plan`), and `--onnx` on the machine with the
GPU, where there is no checkpoint (`rebuild`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qfae_export.builders import available
from qfae_export.errors import ExportError
from qfae_export.images import FOLDER_LIMIT, ParityImages, from_folder, from_slices
from qfae_export.options import FP16_SUFFIX, Options
from qfae_export.parity import ParityReport, accepted, certificate_of, link, measure, run_in_batches, scale_of
from qfae_export.tensorrt_plan import Plan, build_plan
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.engines import open_engine
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.tensorrt import TensorRtEngine
from qfae_runtime.errors import EngineError, ManifestError, OutputError
from qfae_runtime.manifest import FileEntry, Manifest, find_manifest

Say = Callable[[str], None]
Measure = Callable[[Engine], ParityReport]

SUFFIXES = {"plan": ".plan", "rtx-plan": ".rtx.plan"}
_BACKENDS = {"plan": "tensorrt", "rtx-plan": "tensorrt-rtx"}


def wanted(options: Options, onnx: str) -> tuple[str | None, str | None]:
    """Return the kind of plan to build, if any, and why there is none where one was to be expected.

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


def add_plan(
    manifest: Manifest, onnx: Path, kind: str, say: Say, measured: Measure | None
) -> tuple[Manifest, str, str | None]:
    """Build the plan of an ONNX engine beside it; return the manifest with it, its file name, and a note if unmeasured.

    `measured` holds an engine against its reference, or raises (None: there is no reference). Where the plan cannot
    run, it stands in the manifest without a certificate, and no runtime takes it before it has one.

    Raises:
        ExportError, OutputError: see build_plan.
        ParityError: the plan does not compute what PyTorch computes.

    """
    entry = manifest.files[onnx.name]
    path = onnx.with_name(_plan_name(onnx.name, kind))
    kept = manifest.precision.get(onnx.name, {}).get("kept_fp32", [])
    plan = build_plan(onnx, path, kind, manifest.max_batch, kept=kept, say=say)
    say(f"{plan.fusion.summary()}, built in {plan.seconds:.0f} s")
    certificates = [one for one in manifest.certificate if one.engine != path.name]
    note = None
    if measured is not None:
        try:
            engine = _open(plan, manifest)
        except EngineError as error:
            note = (
                f"{path.name} cannot run here, so it is not certified yet: {error}\n"
                f"on its machine: qfae-export verify --engine {path.name} --ckpt CHECKPOINT --record"
            )
        else:
            with engine:
                say(f"comparing {path.name} on {engine.device}")
                certificates.append(certificate_of(path, engine, measured(engine)))
    manifest = replace(
        manifest,
        files={**manifest.files, path.name: FileEntry.of(path, "engine", kind, entry.precision)},
        precision={**manifest.precision, path.name: manifest.precision.get(onnx.name, {})},
        certificate=tuple(certificates),
        provenance={
            **manifest.provenance,
            "plans": {**manifest.provenance.get("plans", {}), path.name: {"from": onnx.name, **plan.describe()}},
        },
    )
    return manifest, path.name, note


def rebuild(options: Options, say: Say) -> tuple[Path, Manifest, str, str | None, ParityReport | None]:
    """Build the plan of an exported ONNX file on this machine; return folder, manifest, plan's name, note and report.

    It is held against NAME.onnx, the FP32 engine that was certified against PyTorch where it was exported.

    Raises:
        ManifestError, EngineError: the file is none of this project's, or not the one its manifest names.
        ExportError, OutputError, ParityError: see add_plan.

    """
    onnx = options.onnx
    assert onnx is not None
    kind = options.format or "plan"
    if not onnx.is_file():
        what = "a folder" if onnx.is_dir() else "no such file"
        raise EngineError(f"{onnx}: {what}; name the NAME{FP16_SUFFIX} that qfae-export wrote")
    if reason := available(kind, onnx.name):
        raise ExportError(f"{onnx}: {reason}")
    manifest_path = find_manifest(onnx)
    manifest = Manifest.load(manifest_path)
    entry = manifest.files.get(onnx.name)
    if entry is None or (entry.role, entry.format) != ("engine", "onnx"):
        raise ManifestError(f"{onnx}: {manifest_path.name} does not list it as an ONNX engine; copy both again")
    manifest.verify_files(onnx.parent, [name for name in manifest.files if name in (onnx.name, f"{onnx.name}.data")])
    name = _plan_name(onnx.name, kind)
    if (onnx.parent / name).exists() and not options.overwrite:
        raise OutputError(f"{onnx.parent / name}: exists already; pass --overwrite to replace it")
    random = "random_weights" in manifest.provenance
    images, reference = (None, None) if random else _reference(options, manifest, onnx.parent, say)
    precision = entry.precision or "fp32"
    reports: list[ParityReport] = []

    def measured(engine: Engine) -> ParityReport:
        assert images is not None
        assert reference is not None
        scale = scale_of(images, reference)
        report = measure(engine, images, reference, CONTRACTS[precision], scale)
        assert report.outputs is not None
        step = link("ONNX FP32", "plan", reference, report.outputs, precision, scale, images.labels)
        reports.append(accepted(replace(report, links=(step,)), name, engine.backend))
        return reports[-1]

    try:
        with tempfile.TemporaryDirectory(dir=onnx.parent, prefix=f".{name}-") as made:
            for part in (onnx.name, f"{onnx.name}.data"):
                if part in manifest.files:
                    (Path(made) / part).symlink_to((onnx.parent / part).absolute())
            manifest, name, note = add_plan(manifest, Path(made) / onnx.name, kind, say, None if random else measured)
            (Path(made) / name).replace(onnx.parent / name)
            manifest.save(manifest_path)
    except OSError as error:
        raise OutputError(
            f"{onnx.parent}: cannot be written ({error.strerror or error}); free some space or choose who may write it"
        ) from error
    return onnx.parent, manifest, name, note, reports[-1] if reports else None


def _reference(options: Options, manifest: Manifest, folder: Path, say: Say) -> tuple[ParityImages, Scores]:
    reference = folder / f"{manifest.name}.onnx"
    spec = manifest.preprocess
    if options.parity_images is not None:
        images = from_folder(options.parity_images, spec, max(FOLDER_LIMIT, manifest.max_batch))
    else:
        images = from_slices(spec)
    if reference.name not in manifest.files or not reference.is_file():
        raise ExportError(
            f"{reference}: not there; the plan is measured against this certified engine: copy it beside the "
            f"{manifest.name}{FP16_SUFFIX} (its .data too, where it has one)"
        )
    say(f"scoring {len(images)} images with {reference.name}, the certified reference")
    with open_engine(reference) as opened:
        return images, run_in_batches(opened.engine, images.pixels, min(8, opened.engine.max_batch))


def _open(plan: Plan, manifest: Manifest) -> Engine:
    return TensorRtEngine(
        plan.path.read_bytes(),
        manifest.image_size,
        manifest.max_batch,
        backend=_BACKENDS[plan.kind],
        name=str(plan.path),
    )


def _plan_name(onnx: str, kind: str) -> str:
    return onnx.removesuffix(FP16_SUFFIX).removesuffix(".onnx") + SUFFIXES[kind]
