"""A tiny engine without torch: how far an image is from its own blur. Same inputs and outputs as a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qfae_runtime.agreement import measure_agreement
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS, MIN_IMAGES, owed
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.batches import sizes_up_to
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.golden import Golden, save_golden
from qfae_runtime.hashing import sha256_of_engine
from qfae_runtime.manifest import CertificateEntry, FileEntry, Manifest, TensorSpec
from qfae_runtime.preprocess import PreprocessSpec, probe
from qfae_runtime.yardstick import Yardstick, heights_of

SIZE = 32
MAX_BATCH = 32


def model_bytes(size: int = SIZE, blur_centre: float = 1 / 25, scale: float = 2.0) -> bytes:
    """Score = largest |grey - blurred grey| * scale, anomaly_map = the same per pixel, reconstruction = the blur."""
    kernel = np.full((1, 1, 5, 5), 1 / 25, np.float32)
    kernel[0, 0, 2, 2] = blur_centre
    weights = [
        numpy_helper.from_array(kernel, "kernel"),
        numpy_helper.from_array(np.array(1 / 255, np.float32), "to_unit"),
        numpy_helper.from_array(np.array(255, np.float32), "to_levels"),
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        numpy_helper.from_array(np.array([3], np.int64), "channels"),
        numpy_helper.from_array(np.array([1], np.int64), "first"),
        numpy_helper.from_array(np.array([1, 2], np.int64), "plane"),
        numpy_helper.from_array(np.array([0, 0, 2, 2, 0, 0, 2, 2], np.int64), "border"),
        numpy_helper.from_array(np.array([1, 1, 1, 3], np.int64), "thrice"),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "to_unit"], ["unit"]),
        helper.make_node("ReduceMean", ["unit", "channels"], ["grey"], keepdims=0),
        helper.make_node("Unsqueeze", ["grey", "first"], ["grey4"]),
        helper.make_node("Pad", ["grey4", "border"], ["padded"], mode="edge"),
        helper.make_node("Conv", ["padded", "kernel"], ["blur4"]),
        helper.make_node("Squeeze", ["blur4", "first"], ["blur"]),
        helper.make_node("Sub", ["grey", "blur"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("Mul", ["distance", "scale"], ["anomaly_map"]),
        helper.make_node("ReduceMax", ["anomaly_map", "plane"], ["score"], keepdims=0),
        helper.make_node("Mul", ["blur", "to_levels"], ["levels"]),
        helper.make_node("Round", ["levels"], ["whole"]),
        helper.make_node("Unsqueeze", ["whole", "channels"], ["whole4"]),
        helper.make_node("Tile", ["whole4", "thrice"], ["rgb"]),
        helper.make_node("Cast", ["rgb"], ["reconstruction"], to=TensorProto.UINT8),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("images", TensorProto.UINT8, ["batch", size, size, 3])],
        [
            value("score", TensorProto.FLOAT, ["batch"]),
            value("anomaly_map", TensorProto.FLOAT, ["batch", size, size]),
            value("reconstruction", TensorProto.UINT8, ["batch", size, size, 3]),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def golden_images(count: int = 5, size: int = SIZE) -> UInt8:
    return np.random.default_rng(7).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def yardstick_of(scores: Scores) -> Yardstick:
    """As if PyTorch FP32 erred by two millionths of every output, and by a thousandth of a reconstruction's values."""
    errors = 2e-6 * heights_of(scores) + 1e-13
    errors[:, 3] = 1e-3
    return Yardstick(errors, errors)


def export_tiny(
    folder: Path,
    name: str = "tiny",
    *,
    certified: bool = True,
    max_batch: int = MAX_BATCH,
    size: int = SIZE,
    kind: str = "resize",
) -> Path:
    """Write tiny.onnx, tiny.json and tiny.golden.npz as qfae-export would; the engine's path."""
    folder.mkdir(parents=True, exist_ok=True)
    engine_path = folder / f"{name}.onnx"
    engine_path.write_bytes(model_bytes(size))
    golden_path = folder / f"{name}.golden.npz"
    images = golden_images(min(5, max_batch), size)
    certificate: tuple[CertificateEntry, ...] = ()
    with OnnxRuntimeEngine(engine_path, size, max_batch) as engine:
        scores = engine.run(images)
        many = golden_images(MIN_IMAGES, size)
        measured = Scores.joined(engine.run(many[at : at + max_batch]) for at in range(0, MIN_IMAGES, max_batch))
        save_golden(golden_path, Golden(images, scores, yardstick_of(scores), 1))
        if certified:
            entry = CertificateEntry.issue(
                engine_path,
                engine,
                measure_agreement(measured, measured, yardstick=yardstick_of(measured)),
                CONTRACTS["fp32"],
                batches=engine.batches,
                images_from="noise",
            )
            certificate = (entry,)
    square = ("batch", size, size)
    manifest = Manifest(
        name=name,
        preprocess=PreprocessSpec(kind, size),
        batch_sizes=sizes_up_to(max_batch),
        files={
            engine_path.name: FileEntry.of(engine_path, "engine", "onnx", "fp32"),
            golden_path.name: FileEntry.of(golden_path, "golden"),
        },
        inputs=(TensorSpec("images", "uint8", (*square, 3)),),
        outputs=(
            TensorSpec("score", "float32", ("batch",)),
            TensorSpec("anomaly_map", "float32", square),
            TensorSpec("reconstruction", "uint8", (*square, 3)),
        ),
        golden=golden_path.name,
        probe=probe(PreprocessSpec(kind, size)),
        certificate=certificate,
    )
    manifest.save(folder / f"{name}.json")
    return engine_path


def edit_manifest(engine_path: Path, **changes: Any) -> None:
    """Change top-level keys of the manifest beside an engine, unchecked."""
    path = engine_path.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_int8(engine_path: Path) -> None:
    """Make the manifest say that the engine is an INT8 file, and was certified as one."""
    stored = json.loads(engine_path.with_suffix(".json").read_text())
    stored["files"][engine_path.name]["precision"] = "int8"
    bounds = {"name": "int8", "bounds": dict(CONTRACTS["int8"].bounds)}
    edit_manifest(
        engine_path, files=stored["files"], certificate=[{**one, "contract": bounds} for one in stored["certificate"]]
    )


def mend_hashes(engine_path: Path, *, certificate_too: bool) -> None:
    """Make the manifest fit the engine's present bytes, as someone who tampers would."""
    path = engine_path.with_suffix(".json")
    stored = json.loads(path.read_text())
    fresh = FileEntry.of(engine_path, "engine", "onnx", "fp32")
    stored["files"][engine_path.name] |= {"sha256": fresh.sha256, "bytes": fresh.bytes}
    if certificate_too:
        stored["certificate"][0]["engine_sha256"] = sha256_of_engine(engine_path)
    path.write_text(json.dumps(stored))


def certify_too(engine_path: Path, backend: str, device: str = "cpu", **changes: Any) -> None:
    """Copy the engine's first certificate for another backend, as if it had been measured there; `changes` in it."""
    contract = CONTRACTS[owed("fp32", backend)]
    bounds = {"name": contract.name, "bounds": dict(contract.bounds)}
    entries = json.loads(engine_path.with_suffix(".json").read_text())["certificate"]
    entry = {**entries[0], "backend": backend, "device": device, "contract": bounds, **changes}
    edit_manifest(engine_path, certificate=[*entries, entry])
