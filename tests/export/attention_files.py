"""ONNX files of a few nodes with one attention each, made by hand, as this project names and marks its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

PLACE = "perceptual.1.attention"
HEADS, TOKENS = 2, 17


def attention_file(path: Path, *, width: int = 64, form: str = "one", producer: str = "qfae-export") -> Path:
    """Write a file with the attention `PLACE`, heads of `width`.

    form   "one": a single operation, its operands widened; "written out": products and a softmax in FP16;
           "opset 18": the same in FP32
    """
    sizes = HEADS * width
    half = form != "opset 18"
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], name="graph/Cast", to=TensorProto.FLOAT16 if half else 1),
        helper.make_node("Split", ["x", "thirds"], ["q", "k", "v"], name="graph/Split", axis=2),
    ]
    for name in "qkv":
        nodes += [
            helper.make_node("Reshape", [name, "heads"], [f"{name}_cut"], name=f"graph/Reshape_{name}"),
            helper.make_node(
                "Transpose", [f"{name}_cut"], [f"{name}_heads"], name=f"graph/Transpose_{name}", perm=[0, 2, 1, 3]
            ),
        ]
    nodes += _one_operation() if form == "one" else _written_out()
    nodes += [
        helper.make_node("Transpose", ["attended"], ["back"], name="graph/Transpose_out", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "whole"], ["joined"], name="graph/Reshape_out"),
        helper.make_node("Cast", ["joined"], ["score"], name="graph/Cast_out", to=TensorProto.FLOAT),
    ]
    constants = {"thirds": [sizes] * 3, "heads": [0, 0, HEADS, width], "whole": [0, 0, sizes]}
    widths = ["q_heads", "k_heads", "v_heads", "q_wide", "k_wide", "v_wide"]
    return _save(
        path,
        nodes,
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", TOKENS, 3 * sizes]),
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", TOKENS, sizes]),
        {name: np.array(value, np.int64) for name, value in constants.items()},
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", HEADS, TOKENS, width]) for name in widths],
        23 if half else 18,
        producer,
    )


def custom_operation_file(path: Path) -> Path:
    """A file with an operation that no library knows."""
    nodes = [helper.make_node("Telepathy", ["images"], ["score"], name="decoder.head/Telepathy", domain="elsewhere")]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 4])
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", 4])
    return _save(path, nodes, images, score, {}, [], 23, "qfae-export")


def fixed_batch_file(path: Path) -> Path:
    nodes = [helper.make_node("Cast", ["images"], ["score"], name="graph/Cast", to=TensorProto.FLOAT)]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [2, 4])
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, [2, 4])
    return _save(path, nodes, images, score, {}, [], 23, "qfae-export")


def _one_operation() -> list[onnx.NodeProto]:
    casts = [
        helper.make_node("Cast", [f"{name}_heads"], [f"{name}_wide"], name=f"{PLACE}/Cast_{name}", to=TensorProto.FLOAT)
        for name in "qkv"
    ]
    return [
        *casts,
        helper.make_node(
            "Attention", ["q_wide", "k_wide", "v_wide"], ["wide"], name=f"{PLACE}/Attention", scale=1.0
        ),
        helper.make_node("Cast", ["wide"], ["attended"], name=f"{PLACE}/Cast_out", to=TensorProto.FLOAT16),
    ]  # fmt: skip


def _written_out() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Transpose", ["k_heads"], ["k_turned"], name=f"{PLACE}/Transpose", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q_heads", "k_turned"], ["logits"], name=f"{PLACE}/MatMul"),
        helper.make_node("Softmax", ["logits"], ["weights"], name=f"{PLACE}/Softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "v_heads"], ["attended"], name=f"{PLACE}/MatMul_1"),
    ]


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    images: onnx.ValueInfoProto,
    score: onnx.ValueInfoProto,
    constants: dict[str, NDArray[np.int64]],
    values: list[onnx.ValueInfoProto],
    opset: int,
    producer: str,
) -> Path:
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "main", [images], [score], initializers, value_info=values)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("elsewhere", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name=producer)
    onnx.save(model, str(path))
    return path
