"""Files whose inputs and outputs are not those of an engine: one too many, one missing, one with a value of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qfae_runtime import open_engine
from qfae_runtime.engines.backends import load_onnx
from qfae_runtime.engines.external import inputs_and_outputs
from qfae_runtime.errors import EngineError

from .tiny import MAX_BATCH, SIZE, certify_too, mend_hashes, model_bytes

value = helper.make_tensor_value_info


def extra_input(graph: onnx.GraphProto) -> None:
    """An input that nothing uses yet: whoever calls the session must set it."""
    graph.input.append(value("gain", TensorProto.FLOAT, [1]))


def used_input(graph: onnx.GraphProto) -> None:
    """An input that scores depend on, with a value of its own, so that the session runs without it."""
    [scale] = [one for one in graph.initializer if one.name == "scale"]
    graph.input.append(value("scale", TensorProto.FLOAT, list(scale.dims)))


def extra_output(graph: onnx.GraphProto) -> None:
    graph.output.append(value("blur", TensorProto.FLOAT, ["batch", SIZE, SIZE]))


def images_twice_over(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Identity", ["more"], ["unused"]))
    graph.input.append(value("more", TensorProto.UINT8, ["batch", SIZE, SIZE, 3]))


def changed(change: Callable[[onnx.GraphProto], None]) -> bytes:
    model = onnx.load_from_string(model_bytes())
    change(model.graph)
    return bytes(model.SerializeToString())


CASES = [
    (extra_input, "input 'gain' is one too many, expected images alone"),
    (used_input, "input 'scale' is one too many, expected images alone"),
    (images_twice_over, "input 'more' is one too many, expected images alone"),
    (extra_output, "output 'blur' is one too many, expected score, anomaly_map, reconstruction alone"),
]


@pytest.mark.parametrize(("change", "says"), CASES)
def test_one_too_many_is_refused_whatever_the_manifest_says(
    change: Callable[[onnx.GraphProto], None], says: str, engine_path: Path
) -> None:
    engine_path.write_bytes(changed(change))
    mend_hashes(engine_path, certificate_too=True)
    certify_too(engine_path, "openvino")
    for backend in ("auto", "onnxruntime", "openvino"):
        with pytest.raises(EngineError) as caught:
            open_engine(engine_path, backend=backend)
        assert str(caught.value) == f"{engine_path}: {says}; this is no engine that qfae-export wrote"


@pytest.mark.parametrize(("change", "says"), CASES)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_backends_refuse_it_without_a_manifest_too(
    change: Callable[[onnx.GraphProto], None], says: str, backend: str
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
        if change in (used_input, extra_input):
            pytest.skip("OpenVINO makes a constant of one, and drops the other: nobody can set them")
    with pytest.raises(EngineError) as caught:
        load_onnx(changed(change), SIZE, MAX_BATCH, backend)
    assert str(caught.value) == f"the engine: {says}; this is no engine that qfae-export wrote"


def test_an_output_in_the_place_of_an_input_is_no_output() -> None:
    def swap(graph: onnx.GraphProto) -> None:
        graph.output.pop(1)
        graph.input.append(value("anomaly_map", TensorProto.FLOAT, ["batch", SIZE, SIZE]))
        [node] = [one for one in graph.node if one.output[0] == "anomaly_map"]
        node.output[0] = "hidden"

    with pytest.raises(EngineError, match="input 'anomaly_map' is one too many"):
        load_onnx(changed(swap), SIZE, MAX_BATCH, "onnxruntime")


def test_the_same_name_twice(engine_path: Path) -> None:
    """No library accepts it: what is told is told before any of them reads the file."""

    def twice(graph: onnx.GraphProto) -> None:
        graph.input.append(graph.input[0])

    engine_path.write_bytes(changed(twice))
    mend_hashes(engine_path, certificate_too=True)
    with pytest.raises(EngineError, match="input 'images' is one too many"):
        open_engine(engine_path)


def test_names_are_those_that_onnx_reads() -> None:
    assert inputs_and_outputs(model_bytes(), "m") == (["images"], ["score", "anomaly_map", "reconstruction"])
    model = onnx.load_from_string(changed(used_input))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "images_of_another"))
    assert inputs_and_outputs(model.SerializeToString(), "m")[0] == ["images", "scale"]
    with pytest.raises(EngineError, match="no ONNX file, or cut short"):
        inputs_and_outputs(model_bytes()[:-9], "m")
