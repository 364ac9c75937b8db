"""The manifest of an export: which files, made of what, by which versions, measured how."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.int8 import products_in_int8
from qfae_export.onnx_file import OPSETS, PIXELS_NAME, tensor_names
from qfae_export.precision import Precision
from qfae_runtime import __version__
from qfae_runtime.engines.base import INPUT_NAME
from qfae_runtime.engines.batches import sizes_up_to
from qfae_runtime.manifest import CertificateEntry, FileEntry, Manifest, TensorSpec
from qfae_runtime.preprocess import probe
from qfae_train.checkpoint import Checkpoint, portable_config
from qfae_train.config import Config

_BUILDERS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


def manifest_of(
    name: str,
    config: Config,
    part: str,
    max_batch: int,
    written: Mapping[str, tuple[list[Path], Precision]],
    golden: Path | None,
    certificate: Iterable[CertificateEntry],
    provenance: dict[str, Any],
) -> Manifest:
    """Describe the ONNX engines of one export; `written` holds each engine's files and policy by its file name."""
    files = {}
    for paths, precision in written.values():
        files[paths[0].name] = FileEntry.of(paths[0], "engine", "onnx", precision.name)
        files |= {weights.name: FileEntry.of(weights, "weights") for weights in paths[1:]}
    if golden is not None:
        files[golden.name] = FileEntry.of(golden, "golden")
    inputs, outputs = tensor_names(part)
    spec = config.preprocess_spec()
    return Manifest(
        name=name,
        preprocess=spec,
        batch_sizes=sizes_up_to(max_batch),
        files=files,
        inputs=tuple(_tensor(one, spec.image_size) for one in inputs),
        outputs=tuple(_tensor(one, spec.image_size) for one in outputs),
        golden=golden.name if golden is not None else None,
        probe=probe(spec),
        precision={engine: precision.describe() for engine, (_, precision) in written.items()},
        certificate=tuple(certificate),
        provenance={**provenance, "part": part, "exported_by": _versions()},
    )


def provenance_of(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    """Say where the weights come from, as plain JSON values."""
    return {
        "checkpoint": {"file": file, "sha256": checkpoint.sha256},
        "config": portable_config(checkpoint.config),
        "frozen": checkpoint.frozen,
        "training": {key: _plain(value) for key, value in checkpoint.record.items()},
        "conditioning": checkpoint.conditioning.to_dict() if checkpoint.conditioning is not None else None,
    }


def refuse_other_checkpoint(manifest: Manifest, engine: str, ckpt: Path, sha256: str) -> None:
    """Refuse a checkpoint file of this SHA-256 beside an engine that was not exported from it.

    Raises:
        ExportError: the manifest does not name this checkpoint.

    """
    said = manifest.provenance.get("checkpoint", {}).get("sha256")
    if said != sha256:
        source = "random weights" if "random_weights" in manifest.provenance else f"{str(said)[:16]}..."
        raise ExportError(
            f"{ckpt}: SHA-256 {sha256[:16]}..., but {engine} was exported from {source}; "
            "pass the checkpoint it was exported from"
        )


def bytes_of(graph: InferenceGraph) -> int:
    """Return how many bytes the graph's weights take in their present types."""
    return sum(tensor.nbytes for tensor in graph.buffers())


def bytes_in_int8(graph: InferenceGraph, policy: Precision) -> int:
    """Return how many bytes an FP32 graph's weights will take in an INT8 policy: one byte a value of its products."""
    return bytes_of(graph) - sum(one.weight.nbytes * 3 // 4 for one in products_in_int8(graph, policy).values())


def _tensor(name: str, size: int) -> TensorSpec:
    square: tuple[int | str, ...] = ("batch", size, size)
    return {
        INPUT_NAME: TensorSpec(name, "uint8", (*square, 3)),
        PIXELS_NAME: TensorSpec(name, "float32", (*square, 3)),
        "score": TensorSpec(name, "float32", ("batch",)),
        "anomaly_map": TensorSpec(name, "float32", square),
        "reconstruction": TensorSpec(name, "uint8", (*square, 3)),
    }[name]


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"qfae": __version__, "python": platform.python_version(), "opsets": OPSETS}
    for name in _BUILDERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # another distribution of the same module, such as onnxruntime-gpu
            found[name] = "unknown"
    return found


def _plain(value: Any) -> Any:
    """Return what JSON can hold: training may have recorded a loss that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
