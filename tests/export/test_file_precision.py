"""What an ONNX file computes in: wherever in it the type stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qfae_export.errors import ExportError
from qfae_export.file_precision import read_types

HALF, BRAIN, SINGLE = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT


def cast(to: int, name: str = "a.fc1/Cast") -> list[onnx.NodeProto]:
    return [helper.make_node("Cast", ["x"], ["narrow"], to=to, name=name), again("narrow")]


def again(of: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [of], ["y"], to=SINGLE)


def inside(nodes: list[onnx.NodeProto]) -> onnx.NodeProto:
    """An If both of whose branches are these nodes."""
    branch = helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("y", SINGLE, ["batch"])])
    return helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch)


def constant(kind: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", kind, [1], [1.0]))


def written(path: Path, nodes: list[onnx.NodeProto], functions: tuple[onnx.FunctionProto, ...] = ()) -> Path:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", SINGLE, ["batch"])],
        [helper.make_tensor_value_info("y", SINGLE, ["batch"])],
        [numpy_helper.from_array(np.array(1, np.float32), "one"), numpy_helper.from_array(np.array(True), "yes")],
        value_info=[helper.make_tensor_value_info("narrow", SINGLE, ["batch"])],
    )
    onnx.save(helper.make_model(graph, functions=functions), path)
    return path


def function(nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    return helper.make_function("own", "Own", ["x"], ["y"], nodes, [helper.make_opsetid("", 18)])


QUANTIZED = [helper.make_node("QuantizeLinear", ["x", "one"], ["q"]), again("q")]
INTEGER = [helper.make_node("MatMulInteger", ["x", "x"], ["q"]), again("q")]
PLAIN = [helper.make_node("Relu", ["x"], ["y"])]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (PLAIN, "fp32"),
        (cast(TensorProto.INT64), "fp32"),
        ([constant(SINGLE), *PLAIN], "fp32"),
        (cast(HALF), "fp16"),
        ([constant(HALF), *PLAIN], "fp16"),
        ([*PLAIN, inside(cast(HALF))], "fp16"),
        ([*PLAIN, inside([*PLAIN, inside(cast(HALF))])], "fp16"),
        (cast(BRAIN), "bf16"),
        ([constant(BRAIN), *PLAIN], "bf16"),
        (QUANTIZED, "int8"),
        (INTEGER, "int8"),
        ([*cast(HALF), *QUANTIZED], "int8"),
        ([*PLAIN, inside(QUANTIZED)], "int8"),
    ],
)
def test_the_narrowest_type_counts_wherever_it_is(tmp_path: Path, nodes: list[onnx.NodeProto], expected: str) -> None:
    assert read_types(written(tmp_path / "a.onnx", nodes)).precision == expected
    hidden = written(tmp_path / "b.onnx", [helper.make_node("Own", ["x"], ["y"], domain="own")], (function(nodes),))
    assert read_types(hidden).precision == expected


@pytest.mark.parametrize(("kind", "expected"), [(HALF, "fp16"), (BRAIN, "bf16"), (TensorProto.INT64, "fp32")])
def test_stored_weights_and_values_between_count_too(tmp_path: Path, kind: int, expected: str) -> None:
    path = written(tmp_path / "a.onnx", PLAIN)
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("w", kind, [1], [1]))
    onnx.save(model, path)
    assert read_types(path).precision == expected
    model = onnx.load(written(path, PLAIN))
    model.graph.value_info.append(helper.make_tensor_value_info("v", kind, ["batch"]))
    onnx.save(model, path)
    assert read_types(path).precision == expected


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"a\.onnx: cannot be read \(No such file"):
        read_types(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff nonsense")
    with pytest.raises(ExportError, match=r"a\.onnx: is no ONNX file"):
        read_types(tmp_path / "a.onnx")
