"""INT8: what is rounded and how, that the file says so, and what the gate makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

import qfae_export.int8
from qfae_export.describe import bytes_in_int8, bytes_of
from qfae_export.errors import ExportError
from qfae_export.graph import InferenceGraph
from qfae_export.images import calibration
from qfae_export.int8 import calibrated_on, int8_graph
from qfae_export.layers import Linear
from qfae_export.onnx_file import write_onnx
from qfae_export.precision import INT8
from qfae_export.qdq import activation_scale, add_qdq, misfits, weight_scales
from qfae_export.reference import pytorch_scores
from qfae_runtime.engines import onnxruntime, openvino
from tests.export.tiny import SIZE, config_of, pictures, scorer_of, vit

EVERYWHERE = replace(INT8, kept=())

# Encoder blocks 2 and 3 of which the last is a tap, one decoder block, two perceptual ones: four products each.
BLOCKS = ["encoder.2", "encoder.3", "decoder.1", "perceptual.1", "perceptual.2"]
PRODUCTS = [f"{block}.{name}" for block in BLOCKS for name in ("qkv", "proj", "fc1", "fc2")]


@pytest.fixture(scope="module")
def graph() -> InferenceGraph:
    """A tiny model with channels that are far larger than others, as trained transformers have."""
    graph = InferenceGraph(scorer_of(config_of()))
    for name, module in graph.named_modules():
        if name.endswith(("norm1", "norm2")):
            module.weight[3] *= 30
    return graph


@pytest.fixture(scope="module")
def rounded(graph: InferenceGraph) -> InferenceGraph:
    return int8_graph(graph, pictures(32), EVERYWHERE)


@pytest.fixture(scope="module")
def file(rounded: InferenceGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(rounded, tmp_path_factory.mktemp("int8") / "tiny.int8.onnx")[0]


def products(graph: InferenceGraph) -> dict[str, Linear]:
    return {name: one for name, one in graph.named_modules() if isinstance(one, Linear) and one.input_range}


def test_smoothing_changes_nothing_but_how_large_channels_are(graph: InferenceGraph, rounded: InferenceGraph) -> None:
    images = pictures(6)
    before, after = pytorch_scores(graph, images), pytorch_scores(rounded, images)
    np.testing.assert_allclose(after.score, before.score, rtol=1e-4)
    np.testing.assert_allclose(after.anomaly_map, before.anomaly_map, atol=1e-5)
    # One channel was thirty times the others; its share of the range is what eight bits have for all.
    was, now = (cast(Any, one.get_submodule("encoder.2.norm1")).weight for one in (graph, rounded))
    assert float(was.abs().max() / was.abs().median()) > 20
    assert float(now.abs().max() / now.abs().median()) < 10
    assert graph.precision.name == "fp32"
    assert not products(graph), "the graph itself is left as it is"


def test_what_is_computed_in_eight_bits(rounded: InferenceGraph, file: Path) -> None:
    """The policy, the file and this list agree; the first block, the head, the Q-Former and the embeddings are not."""
    assert sorted(products(rounded)) == sorted(PRODUCTS)
    model = onnx.load(str(file))
    quantised = [node.name.rpartition("/")[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(quantised) == sorted(PRODUCTS)
    weights = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    assert {name for name, array in weights.items() if array.dtype == np.int8 and array.ndim == 2} == {
        f"{name}.weight_int8" for name in PRODUCTS
    }
    # What a GELU gives takes unsigned bytes; attention outputs never do, whatever their range.
    assert {name for name in PRODUCTS if weights[f"{name}.input_offset"].dtype == np.uint8} == {
        name for name in PRODUCTS if name.endswith("fc2")
    }


def test_a_weight_is_there_once(file: Path, graph: InferenceGraph, tmp_path: Path) -> None:
    [whole] = write_onnx(graph, tmp_path / "tiny.onnx")
    saved = sum(cast(Linear, graph.get_submodule(name)).weight.numel() for name in PRODUCTS) * 3
    assert whole.stat().st_size - file.stat().st_size > 0.8 * saved


@pytest.mark.parametrize("kept", [(), ("decoder", "encoder.3.fc2")])
def test_how_large_the_file_will_be(graph: InferenceGraph, kept: tuple[str, ...], tmp_path: Path) -> None:
    """Beforehand, where a full disk must be told; a file has its nodes and scales too."""
    policy = replace(INT8, kept=kept)
    [written] = write_onnx(int8_graph(graph, pictures(4), policy), tmp_path / "tiny.int8.onnx")
    stored = [numpy_helper.to_array(one) for one in onnx.load(str(written)).graph.initializer]
    assert sum(one.nbytes for one in stored) == pytest.approx(bytes_in_int8(graph, policy), rel=0.05)
    assert bytes_in_int8(graph, policy) < 0.8 * bytes_of(graph)


def emulated(graph: InferenceGraph) -> InferenceGraph:
    """The same in PyTorch, written from the definition: round, clip to the type's range, and back."""
    with torch.no_grad():
        for name, product in products(graph).items():
            low, high = product.input_range or (0, 0)
            if name.endswith("fc2"):
                scale, least, most = (high - low) / 255, 0, 255
                offset = round(-low / scale)
            else:
                scale, least, most, offset = max(-low, high) / 127, -128, 127, 0
            columns = product.weight.abs().amax(0) / 127
            product.weight = torch.clamp(torch.round(product.weight / columns), -127, 127) * columns

            def rounding(
                _: object, inputs: Any, scale: float = scale, least: int = least, most: int = most, offset: int = offset
            ) -> Any:
                return ((torch.clamp(torch.round(inputs[0] / scale) + offset, least, most) - offset) * scale,)

            product.register_forward_pre_hook(rounding)
    return graph


def test_the_file_computes_the_rounding_and_nothing_else(graph: InferenceGraph, file: Path) -> None:
    images = pictures(12)
    want = pytorch_scores(emulated(int8_graph(graph, pictures(32), EVERYWHERE)), images)
    exact = pytorch_scores(graph, images)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    score, anomaly_map, _ = session.run(None, {"images": images})
    change = np.abs(want.score - exact.score).max()
    assert change > 1e-5, "eight bits must show"
    assert np.abs(score - want.score).max() < 0.2 * change
    assert np.abs(anomaly_map - want.anomaly_map).max() < 0.3 * np.abs(want.anomaly_map - exact.anomaly_map).max()


def test_smoothing_is_worth_it(graph: InferenceGraph, rounded: InferenceGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(12)
    exact = pytorch_scores(graph, images)
    smooth = pytorch_scores(emulated(int8_graph(graph, pictures(32), EVERYWHERE)), images)
    monkeypatch.setattr(qfae_export.int8, "_smooth", lambda *_: None)
    rough = pytorch_scores(emulated(int8_graph(graph, pictures(32), EVERYWHERE)), images)
    error = [np.abs(one.anomaly_map - exact.anomaly_map).mean() for one in (smooth, rough)]
    assert error[0] < 0.7 * error[1]


def test_scales() -> None:
    weight = np.array([[1.0, 0.0, -2.54], [-1.27, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(weight_scales(weight), [0.01, 1.0, 0.02], rtol=1e-6)
    assert activation_scale(-1.27, 1.0) == (np.float32(0.01), np.int8(0))
    scale, offset = activation_scale(-0.17, 5.0)
    assert float(scale) == pytest.approx(5.17 / 255)
    assert (int(offset), offset.dtype) == (8, np.dtype(np.uint8))
    assert activation_scale(0.0, 5.0, signed=True) == (np.float32(5 / 127), np.int8(0))
    assert activation_scale(0.0, 0.0) == (np.float32(1), np.int8(0)), "an input that is always 0"


@pytest.mark.parametrize(("unit", "dtype"), [("encoder.2.proj", np.int8), ("encoder.2.fc2", np.uint8)])
def test_what_attentions_give_has_no_offset_even_where_it_is_never_negative(unit: str, dtype: type) -> None:
    """OpenVINO could not load it."""
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], name=f"{unit}/MatMul")
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "one", tensors[:1], tensors[1:], [weight]))
    model = ir.from_proto(proto)
    assert add_qdq(model, {unit: (0.0, 5.0)}) == 1
    offset = model.graph.initializers[f"{unit}.input_offset"].const_value
    assert offset is not None
    assert offset.numpy().dtype == dtype


def halve_a_column(arrays: dict[str, Any]) -> None:
    arrays["encoder.2.qkv.weight_scale"][7] /= 2


def double_a_column(arrays: dict[str, Any]) -> None:
    """As exact as the coarser step allows, but coarser than it need be."""
    unit = "encoder.2.qkv"
    arrays[f"{unit}.weight_scale"][7] *= 2
    arrays[f"{unit}.weight_int8"][:, 7] = np.rint(arrays[f"{unit}.weight_int8"][:, 7] / 2)


def change_a_byte(arrays: dict[str, Any]) -> None:
    arrays["perceptual.1.fc2.weight_int8"][5, 3] ^= 2


def swap_columns(arrays: dict[str, Any]) -> None:
    levels = arrays["encoder.3.proj.weight_int8"]
    levels[:, [0, 1]] = levels[:, [1, 0]]


def halve_an_input(arrays: dict[str, Any]) -> None:
    arrays["encoder.2.fc1.input_scale"] /= 2


def treble_an_input(arrays: dict[str, Any]) -> None:
    arrays["encoder.2.fc1.input_scale"] *= 3


def move_an_offset(arrays: dict[str, Any]) -> None:
    arrays["perceptual.2.fc2.input_offset"] += 40


@pytest.mark.parametrize(
    ("fault", "unit"),
    [
        (halve_a_column, "encoder.2.qkv"),
        (double_a_column, "encoder.2.qkv"),
        (change_a_byte, "perceptual.1.fc2"),
        (swap_columns, "encoder.3.proj"),
        (halve_an_input, "encoder.2.fc1"),
        (treble_an_input, "encoder.2.fc1"),
        (move_an_offset, "perceptual.2.fc2"),
    ],
)
def test_bytes_that_are_not_what_they_stand_for(
    rounded: InferenceGraph, file: Path, tmp_path: Path, fault: Callable[[dict[str, Any]], None], unit: str
) -> None:
    """Most of these hardly move a score of such a model, so that the measurement alone would let them through."""
    quantised = {name: (one.weight.numpy(), one.input_range or (0.0, 0.0)) for name, one in products(rounded).items()}
    assert misfits(file, quantised) == []
    model = onnx.load(str(file))
    arrays = {one.name: numpy_helper.to_array(one).copy() for one in model.graph.initializer}
    fault(arrays)
    for one in model.graph.initializer:
        one.CopyFrom(numpy_helper.from_array(arrays[one.name], one.name))
    onnx.save(model, str(tmp_path / "x.int8.onnx"))
    assert misfits(tmp_path / "x.int8.onnx", quantised) == [unit]


def test_a_file_of_wrong_bytes_is_not_written(
    rounded: InferenceGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfae_export.qdq.weight_scales", lambda weight: 1.1 * weight_scales(weight))
    with pytest.raises(ExportError) as refused:
        write_onnx(rounded, tmp_path / "x.int8.onnx")
    assert str(refused.value).startswith("x.int8.onnx: the bytes of encoder.2.qkv, encoder.2.proj, encoder.2.fc1 and o")
    assert str(refused.value).endswith(
        "are not what the weights and calibration images give; report this, or leave out --int8"
    )


def test_every_range_has_zero_within(graph: InferenceGraph) -> None:
    """An offset is the place of zero: where all values are far above it, it must be a byte nevertheless."""
    shifted = copy.deepcopy(graph)
    norm: Any = shifted.get_submodule("encoder.2.norm1")
    norm.weight, norm.bias = norm.weight * 0.1, norm.bias + 100
    low, high = products(int8_graph(shifted, pictures(4)))["encoder.2.qkv"].input_range or (1, 0)
    assert (low, high > 0) == (0, True)


def test_places_that_are_kept(graph: InferenceGraph) -> None:
    usual = [name for name in PRODUCTS if not name.startswith("decoder")]
    assert sorted(products(int8_graph(graph, pictures(4)))) == sorted(usual)
    kept = int8_graph(graph, pictures(4), replace(INT8, kept=("decoder", "encoder.2.fc1")))
    assert sorted(products(kept)) == sorted(
        name for name in PRODUCTS if not name.startswith("decoder") and name != "encoder.2.fc1"
    )
    before, after = pytorch_scores(graph, pictures(4)), pytorch_scores(kept, pictures(4))
    np.testing.assert_allclose(after.score, before.score, rtol=1e-4)
    with pytest.raises(ExportError, match=r"precision: decoder\.9: no such place in this model; expected, for"):
        int8_graph(graph, pictures(4), replace(INT8, kept=("decoder.9",)))


def test_the_second_encoders_first_block_is_kept_too() -> None:
    graph = InferenceGraph(scorer_of(config_of(encoders=[vit(), vit(48, 4)])))
    assert not [
        name for name in products(int8_graph(graph, pictures(4))) if name.startswith(("encoder.1.", "encoder2.1."))
    ]


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_computes_in_integers(file: Path, graph: InferenceGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[set[str]] = []
    computed: Callable[[Any], set[str]] = openvino._computed_in

    def noted(compiled: Any) -> set[str]:
        found.append(computed(compiled))
        return found[-1]

    monkeypatch.setattr(openvino, "_computed_in", noted)
    with openvino.OpenVinoEngine(file, SIZE, 8) as engine:
        got = engine.run(pictures(8))
    assert "i8" in found[0]
    np.testing.assert_allclose(got.score, pytorch_scores(graph, pictures(8)).score, rtol=0.1)


def test_processors_without_vnni_do_not_overflow() -> None:
    """ONNX Runtime's switch for it, which has no effect where there is VNNI."""
    assert onnxruntime._session_options(None).get_session_config_entry("session.x64quantprecision") == "1"


def test_images_that_prove_little_are_told() -> None:
    """Calibrated on what is measured on, and on images of another kind."""
    spec = config_of().preprocess_spec()
    slices = calibration(None, spec)
    others = replace(slices, pixels=pictures(36), stands_in=False)
    assert calibrated_on(others, slices) == ({"images": 36, "from": slices.origin, "measured_on_too": 0}, None)
    entry, told = calibrated_on(slices, replace(others, pixels=np.concatenate([pictures(30), slices.pixels[:6]])))
    assert entry["measured_on_too"] == 6
    assert told is not None
    assert told.startswith("warning: 6 of INT8's 36 calibration images were measured on as well; pass --calibration-")
    _, told = calibrated_on(slices, others)
    assert told == (
        "warning: INT8's scales come from 32 brain slices that come with qfae; pass --calibration-images DIR with "
        "normal images of your kind, others than those measured on"
    )
