"""The parts that openvino-bf16 computes a model in: where it is cut, and what is computed in which type.

The model is a small one with two residual streams, written by hand; what it computes is told by NumPy in FP64.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines import openvino as module
from qfae_runtime.engines.openvino import OpenVinoEngine
from qfae_runtime.engines.openvino_parts import Part, parts_of, whole
from qfae_runtime.errors import EngineError

from .tiny import golden_images
from .tiny import model_bytes as toy

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
needs_bf16 = pytest.mark.skipif(not module.has_bf16(), reason="this processor does not compute in BF16")

Float64 = npt.NDArray[np.float64]
SIZE, TOKENS, PATCH, WIDTH = 16, 16, 48, 32
BF16_STEP = 2.0**-8
"""The distance of neighbouring BF16 numbers, as a share, at the least."""


@cache
def weights() -> dict[str, npt.NDArray[np.float32]]:
    """The weights by name; b and d are the second products of the blocks, which write to the streams."""
    rng = np.random.default_rng(5)
    blocks = {name: (WIDTH, 64) if name[0] in "ac" else (64, WIDTH) for name in ("a1", "b1", "a2", "b2", "c1", "d1")}
    embeddings = {"embed": (PATCH, WIDTH), "decode": (2 * WIDTH, PATCH), "look": (PATCH, WIDTH)}
    shapes = {**blocks, **embeddings, "table": (TOKENS, WIDTH), "seen": (TOKENS, WIDTH)}
    return {name: (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()}


def streams_bytes(**changed: npt.NDArray[np.float32]) -> bytes:
    """A stream of two blocks, both read; a product makes pixels of them; a stream of one block sees both images."""
    node = helper.make_node
    integers = {"tokens": [-1, TOKENS, PATCH], "square": [-1, SIZE, SIZE, 3], "grid": [-1, 1, 4, 4], "first": [1]}
    constants: list[Any] = [numpy_helper.from_array(value, name) for name, value in (weights() | changed).items()]
    constants += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in integers.items()]
    constants += [numpy_helper.from_array(np.array([1, 2], np.int64), "plane")]
    scalars = {"centre": 114.0, "unit": 64.0, "one": 1.0, "low": 0.0, "high": 255.0}
    constants += [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in scalars.items()]
    constants += [numpy_helper.from_array(np.array([1, 1, 4, 4], np.float32), "fourfold")]

    def block(x: str, a: str, b: str, out: str) -> list[Any]:
        return [
            node("MatMul", [x, a], [f"{out}_wide"]),
            node("Tanh", [f"{out}_wide"], [f"{out}_bent"]),
            node("MatMul", [f"{out}_bent", b], [f"{out}_update"]),
            node("Add", [x, f"{out}_update"], [out]),
        ]

    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("Sub", ["floats", "centre"], ["centred"]),
        node("Div", ["centred", "unit"], ["entering"]),
        node("Reshape", ["entering", "tokens"], ["cut"]),
        node("MatMul", ["cut", "embed"], ["embedded"]),
        node("Add", ["embedded", "table"], ["x0"]),
        *block("x0", "a1", "b1", "x1"),
        *block("x1", "a2", "b2", "x2"),
        node("Concat", ["x1", "x2"], ["hidden"], axis=2),
        node("MatMul", ["hidden", "decode"], ["pixels"]),
        node("Mul", ["pixels", "unit"], ["spread"]),
        node("Add", ["spread", "centre"], ["levels"]),
        node("Clip", ["levels", "low", "high"], ["clipped"]),
        node("Round", ["clipped"], ["rounded"]),
        node("Reshape", ["rounded", "square"], ["whole"]),
        node("Cast", ["whole"], ["reconstruction"], to=TensorProto.UINT8),
        node("Concat", ["cut", "pixels"], ["both"], axis=0),
        node("MatMul", ["both", "look"], ["looked"]),
        node("Add", ["looked", "seen"], ["y0"]),
        *block("y0", "c1", "d1", "y1"),
        node("Split", ["y1"], ["of_image", "of_pixels"], axis=0, num_outputs=2),
        node("ReduceL2", ["of_image", "last"], ["long"], keepdims=0),
        node("ReduceL2", ["of_pixels", "last"], ["longer"], keepdims=0),
        node("Mul", ["of_image", "of_pixels"], ["products"]),
        node("ReduceSum", ["products", "last"], ["inner"], keepdims=0),
        node("Mul", ["long", "longer"], ["lengths"]),
        node("Div", ["inner", "lengths"], ["cosine"]),
        node("Sub", ["one", "cosine"], ["distance"]),
        node("Reshape", ["distance", "grid"], ["coarse"]),
        node("Resize", ["coarse", "", "fourfold"], ["fine"], mode="linear"),
        node("Squeeze", ["fine", "first"], ["anomaly_map"]),
        node("ReduceMax", ["anomaly_map", "plane"], ["score"], keepdims=0),
    ]
    constants += [numpy_helper.from_array(np.array([2], np.int64), "last")]
    value = helper.make_tensor_value_info
    outputs = [
        value("score", TensorProto.FLOAT, ["batch"]),
        value("anomaly_map", TensorProto.FLOAT, ["batch", SIZE, SIZE]),
        value("reconstruction", TensorProto.UINT8, ["batch", SIZE, SIZE, 3]),
    ]
    images = value("images", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])
    graph = helper.make_graph(nodes, "streams", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def renamed(model: bytes, names: dict[str, str]) -> bytes:
    """Return the model with other names for some of its tensors."""
    read = onnx.load_from_string(model)
    for one in read.graph.node:
        one.input[:] = [names.get(name, name) for name in one.input]
        one.output[:] = [names.get(name, name) for name in one.output]
    for output in read.graph.output:
        output.name = names.get(output.name, output.name)
    return bytes(read.SerializeToString())


def in_numpy(images: UInt8, **changed: npt.NDArray[np.float32]) -> tuple[Float64, Float64]:
    """Return the model's maps (B, S, S) and pixels (B, S, S, 3) in grey levels, in FP64."""
    w = {name: value.astype(np.float64) for name, value in (weights() | changed).items()}
    cut = ((images.astype(np.float64) - 114) / 64).reshape(-1, TOKENS, PATCH)
    x0 = cut @ w["embed"] + w["table"]
    x1 = x0 + np.tanh(x0 @ w["a1"]) @ w["b1"]
    x2 = x1 + np.tanh(x1 @ w["a2"]) @ w["b2"]
    pixels = np.concatenate([x1, x2], axis=2) @ w["decode"]
    y0 = np.concatenate([cut, pixels]) @ w["look"] + w["seen"]
    one, other = np.split(y0 + np.tanh(y0 @ w["c1"]) @ w["d1"], 2)
    lengths = np.linalg.norm(one, axis=2) * np.linalg.norm(other, axis=2)
    coarse = (1 - (one * other).sum(axis=2) / lengths).reshape(-1, 4, 4)
    places = np.clip((np.arange(SIZE) + 0.5) / 4 - 0.5, 0, 3)
    low = np.minimum(places.astype(int), 2)
    rows = np.zeros((SIZE, 4))
    rows[np.arange(SIZE), low] = 1 - (places - low)
    rows[np.arange(SIZE), low + 1] = places - low
    return rows @ coarse @ rows.T, (pixels * 64 + 114).reshape(-1, SIZE, SIZE, 3)


def read(model: bytes) -> Any:
    return module.import_library().Core().read_model(model)


def parts(model: bytes) -> list[Part]:
    return parts_of(module.import_library(), read(model))


def still() -> dict[str, npt.NDArray[np.float32]]:
    """Weights with which no block writes anything to its stream."""
    return {name: np.zeros_like(weights()[name]) for name in ("b1", "b2", "d1")}


def test_blocks_stand_apart_from_what_lies_between_their_streams() -> None:
    found = parts(streams_bytes())
    assert [part.precision for part in found] == ["f32", "bf16", "f32"]
    # By what ONNX calls the operations' outputs, behind a number.
    assert found[0].gives[0].partition(" ")[2] == "y0:0"
    assert found[0].gives[1:] == ("reconstruction",)  # not computed once more behind the stream
    assert found[1].gives[0].partition(" ")[2] == "y1:0"
    assert found[2].gives == ("score", "anomaly_map")
    products = [sum(op.get_type_name() == "MatMul" for op in part.model.get_ops()) for part in found]
    assert products == [7, 2, 0]  # each of the model's, once


def test_every_read_state_of_a_stream_leaves_its_part() -> None:
    """Where nothing is called a reconstruction, both streams are cut out; two states of the first one are read."""
    found = parts(renamed(streams_bytes(), {"reconstruction": "picture"}))
    assert [part.precision for part in found] == ["f32", "bf16", "f32", "bf16", "f32"]
    cuts = [[name.partition(" ")[2] for name in part.gives] for part in found]
    assert cuts[0] == ["x0:0"]
    assert cuts[1] == ["x1:0", "x2:0"]
    assert cuts[3] == ["y1:0"]


def test_a_model_that_rebuilds_with_all_its_streams_is_one_part_in_fp32() -> None:
    names = {"reconstruction": "picture", "anomaly_map": "reconstruction"}
    found = parts(renamed(streams_bytes(), names))
    assert [part.precision for part in found] == ["f32"]


def test_the_parts_in_fp32_are_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    images = golden_images(5, SIZE)
    monkeypatch.setattr(module, "has_bf16", lambda: True)
    monkeypatch.setattr(
        module, "parts_of", lambda *given: [part._replace(precision="f32") for part in parts_of(*given)]
    )
    with OpenVinoEngine(streams_bytes(), SIZE, 4) as one:
        want = one.run(images[:4])
    with OpenVinoEngine(streams_bytes(), SIZE, 4, backend="openvino-bf16") as cut:
        assert len(cut._steps) == 3
        for count in (4, 1, 3):
            got = cut.run(images[:count])
            np.testing.assert_allclose(got.score, want.score[:count], rtol=0, atol=1e-6)
            np.testing.assert_allclose(got.anomaly_map, want.anomaly_map[:count], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(got.reconstruction, want.reconstruction[:count])
    maps, _ = in_numpy(images[:4])
    np.testing.assert_allclose(want.anomaly_map, maps, rtol=0, atol=1e-6)


@needs_bf16
def test_all_but_the_blocks_is_computed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no block writes to its stream, nothing is rounded to BF16; in a model that is one part, everything is."""
    images = golden_images(4, SIZE)
    maps, levels = in_numpy(images, **still())
    with OpenVinoEngine(streams_bytes(**still()), SIZE, 4, backend="openvino-bf16") as cut:
        got = cut.run(images)
    np.testing.assert_allclose(got.anomaly_map, maps, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.score, maps.max(axis=(1, 2)), rtol=0, atol=1e-6)
    assert np.abs(got.reconstruction - np.clip(levels, 0, 255)).max() < 0.501

    monkeypatch.setattr(module, "parts_of", lambda library, model: [whole(model, "bf16")])
    with OpenVinoEngine(streams_bytes(**still()), SIZE, 4, backend="openvino-bf16") as uncut:
        rounded = uncut.run(images)
    assert np.abs(rounded.anomaly_map - maps).max() > BF16_STEP / 4
    assert np.abs(rounded.reconstruction - np.clip(levels, 0, 255)).max() > 0.6


@needs_bf16
def test_the_blocks_are_computed_in_bf16() -> None:
    images = golden_images(4, SIZE)
    maps, _ = in_numpy(images)
    with OpenVinoEngine(streams_bytes(), SIZE, 4, backend="openvino-bf16") as engine:
        error = np.abs(engine.run(images).anomaly_map - maps).max()
    assert 1e-4 < error < 3e-2


def test_a_sum_without_a_product_in_it_is_no_stream() -> None:
    """As in GELU's approximation, x + 0.045 x^3, or where a table is added."""
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Mul", ["x", "x"], ["square"]),
        node("Add", ["x", "square"], ["sum"]),
        node("MatMul", ["sum", "weight"], ["product"]),
        node("Add", ["product", "table"], ["out"]),
    ]
    tensors = [numpy_helper.from_array(np.ones((4, 4), np.float32), name) for name in ("weight", "table")]
    ends = [value(name, TensorProto.FLOAT, [4, 4]) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "none", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    assert [part[1:] for part in parts(model.SerializeToString())] == [("bf16", ("x",), ("out",))]


def test_a_model_without_streams_is_one_part() -> None:
    assert [part[1:] for part in parts(toy())] == [
        ("bf16", ("images",), ("score", "anomaly_map", "reconstruction")),
    ]


@needs_bf16
def test_a_part_that_computes_in_another_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = module._settings
    monkeypatch.setattr(module, "_settings", lambda precision, threads: settings("f32", threads))
    with pytest.raises(EngineError) as caught:
        OpenVinoEngine(streams_bytes(), SIZE, 4, backend="openvino-bf16")
    assert str(caught.value) == (
        f"the engine: OpenVINO {module.version()} computes products in f32, expected bf16; name another backend"
    )
