"""The ONNX file: what is in it, what is not, and that it runs at any batch."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from qfae_export.errors import ExportError
from qfae_export.export import Exported
from qfae_export.graph import InferenceGraph
from qfae_export.images import ParityImages
from qfae_export.onnx_file import OPSETS, save, trace, write_onnx
from qfae_export.precision import FP16, FP16_RULES, FP32, Precision
from qfae_export.reference import pytorch_scores, reference_of
from qfae_runtime.contract import CONTRACTS, Contract
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_train.autoencoder import AnomalyScorer, Result
from tests.export.tiny import SIZE, config_of, pictures, scorer_of, vit


def attentions(model: ir.Model) -> list[str]:
    return [node.name or "" for node in model.graph if node.op_type == "Attention"]


TYPES = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}


@pytest.fixture(scope="module")
def rich_scorer() -> AnomalyScorer:
    """Whatever the configuration can ask for and the default does not."""
    return scorer_of(
        config_of(
            encoders=[vit(reg_tokens=4, no_embed_class=True, init_values=0.3), vit(width=48, depth=2)],
            qformer_blocks=3,
            register_tokens=0,
            fusion="separate",
            spatial="mean",
            across="max",
            pixel_map="max",
        )
    )


@pytest.fixture(scope="module")
def rich_fp16(rich_scorer: AnomalyScorer) -> ir.Model:
    return trace(InferenceGraph(rich_scorer).cast(FP16))


@pytest.fixture(scope="module")
def rich_model(rich_scorer: AnomalyScorer) -> ir.Model:
    return trace(InferenceGraph(rich_scorer))


def test_signature_and_opset(exported: Exported) -> None:
    model = onnx.load(exported.engine)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim]
        for one in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", SIZE, SIZE, 3],
        "score": ["batch"],
        "anomaly_map": ["batch", SIZE, SIZE],
        "reconstruction": ["batch", SIZE, SIZE, 3],
    }
    assert [(one.domain, one.version) for one in model.opset_import] == [("", OPSETS["fp32"])]


def test_attention_is_decomposed_and_layer_norm_is_not(exported: Exported) -> None:
    count = Counter(node.op_type for node in onnx.load(exported.engine).graph.node)
    assert count["Attention"] == 0
    # 3 encoder + 1 cross + 1 decoder + 2 perceptual blocks of 2 patch sizes; the queries' own attention is folded.
    assert count["Softmax"] == 3 + 1 + 1 + 2 * 2
    # Two per ViT block; norm, out_norm and the MLP's in the Q-Former (the queries' is folded); the decoder's last.
    assert count["LayerNormalization"] == 2 * (3 + 1 + 2) + 2 + 1


def test_fp16_file_is_what_tensorrt_fuses(rich_fp16: ir.Model) -> None:
    assert rich_fp16.opset_imports == {"": OPSETS["fp16"]}
    count = Counter(node.op_type for node in rich_fp16.graph.all_nodes())
    # Two encoders of 3 and 2 blocks (the last taps), three Q-Former blocks of which the first's queries are folded and
    # two read the context, one decoder block, two perceptual blocks of two patch sizes.
    assert attentions(rich_fp16) == [
        *(f"encoder.{n}.attention/Attention" for n in (1, 2, 3)),
        *(f"encoder2.{n}.attention/Attention" for n in (1, 2)),
        "qformer.1.cross.attention/Attention",
        "qformer.2.attention/Attention",
        "qformer.3.attention/Attention",
        "qformer.3.cross.attention/Attention",
        "decoder.1.attention/Attention",
        *(f"perceptual.{n}.attention/Attention{size}" for n in (1, 2) for size in ("", "_1")),
    ]
    assert count["Gelu"] == 3 + 2 + 3 + 1 + 2
    assert (count["Softmax"], count["Erf"]) == (0, 0)


def test_types_of_the_fp16_file(rich_fp16: ir.Model) -> None:
    values = {node.op_type: set() for node in rich_fp16.graph.all_nodes()}  # type: ignore[var-annotated]
    for node in rich_fp16.graph.all_nodes():
        values[node.op_type] |= {one.dtype for one in node.outputs if one.dtype is not None}
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    assert values["MatMul"] == {half}
    assert values["Gelu"] == {half}
    assert values["LayerNormalization"] == {single}
    assert {
        node.attributes["stash_type"].value for node in rich_fp16.graph if node.op_type == "LayerNormalization"
    } <= {1}, "statistics in FP32"
    assert values["Attention"] == {single}  # FP16 numbers, widened, so that kernels accumulate in FP32
    for tail in ("ReduceL2", "Resize", "ReduceProd", "ReduceMean", "ReduceMax"):
        assert values.get(tail, {single}) == {single}
    assert all(one.dtype != ir.DataType.DOUBLE for node in rich_fp16.graph for one in node.outputs)
    assert [one.dtype for one in rich_fp16.graph.outputs] == [single, single, ir.DataType.UINT8]
    products = [node for node in rich_fp16.graph if node.op_type == "MatMul"]
    multiplied = {one for node in products for one in node.inputs if one is not None and one.is_initializer()}
    assert len(multiplied) > 40
    assert {one.dtype for one in multiplied} == {half}
    weights = [one for one in rich_fp16.graph.initializers.values() if one.dtype == single]
    # LayerNorms have 32 numbers (48 in the other encoder); the tables of positions are 16 tokens of a width.
    assert {one.const_value.size for one in weights if one.const_value is not None} >= {32, 48, 16 * 32, 16 * 48}


def test_the_file_is_what_the_policy_says(rich_fp16: ir.Model) -> None:
    """Every rule that the manifest repeats, read from the file."""
    nodes = list(rich_fp16.graph.all_nodes())

    def types(*operations: str, within: str = "") -> set[Any]:
        chosen = [node for node in nodes if node.op_type in operations and within in (node.name or "")]
        assert chosen, operations
        return {one.dtype for node in chosen for one in node.outputs}

    embeds = [node for node in nodes if node.op_type == "MatMul" and "embed" in (node.name or "")]
    assert embeds
    found = {
        "matrix products": types("MatMul"),
        "residual streams": types("Add", within="residual"),
        "pixels": {node.inputs[0].dtype for node in embeds if node.inputs[0] is not None},
        "LayerNorms": types("LayerNormalization"),
        "softmax and its sums": types("Attention"),
        "features to score": types("ReduceL2", "Resize", "ReduceMax"),
        "outputs": {one.dtype for one in rich_fp16.graph.outputs[:2]},
    }
    assert found == {name: {TYPES[rule["type"]]} for name, rule in FP16_RULES.items()}


def test_fp16_file_runs_on_onnx_runtime(rich_scorer: AnomalyScorer, rich_fp16: ir.Model, tmp_path: Path) -> None:
    [path] = save(rich_fp16, tmp_path / "rich.fp16.onnx")
    images = pictures(6)
    want = pytorch_scores(rich_scorer, images)
    with OnnxRuntimeEngine(path, SIZE, 8, threads=2) as engine:
        got = engine.run(images)
    np.testing.assert_allclose(got.score, want.score, rtol=0, atol=0.02 * want.score.std())
    assert not np.array_equal(got.score, want.score)


def test_kept_fp32_is_fp32_in_the_file() -> None:
    graph = InferenceGraph(scorer_of(config_of())).cast(Precision("fp16", ("decoder.1", "perceptual.2.fc1")))
    model = trace(graph)
    single = {
        (node.name or "").rpartition("/")[0]
        for node in model.graph
        if node.op_type == "MatMul" and node.outputs[0].dtype == ir.DataType.FLOAT
    }
    assert single == {*(f"decoder.1.{name}" for name in ("qkv", "attention", "proj", "fc1", "fc2")), "perceptual.2.fc1"}
    assert "decoder.1.attention/Attention" not in attentions(model)


@pytest.mark.parametrize("part", ["reconstruction", "scorer"])
def test_a_half_as_a_file(part: str, tmp_path: Path) -> None:
    [path] = write_onnx(InferenceGraph(scorer_of(config_of()), part), tmp_path / "half.onnx")
    model = onnx.load(path)
    names = [[one.name for one in tensors] for tensors in (model.graph.input, model.graph.output)]
    assert (
        names
        == {
            "reconstruction": [["images"], ["reconstruction", "pixels"]],
            "scorer": [["images", "pixels"], ["score", "anomaly_map"]],
        }[part]
    )


def test_weights_that_nothing_reads_are_not_in_the_file(exported: Exported) -> None:
    graph = onnx.load(exported.engine).graph
    elements = sum(numpy_helper.to_array(one).size for one in graph.initializer)
    scorer = scorer_of(config_of())
    parts = [*scorer.named_parameters(), *scorer.named_buffers()]
    unread = (
        "qformer.queries",
        "qformer.blocks.0.attention",
        "cross.to_q",
        "projection",
        "decoder.embed",
        "perceptual.blocks.2.",
        "_32",
    )
    read = sum(tensor.numel() for name, tensor in parts if not any(part in name for part in unread))
    folded = scorer.autoencoder.qformer.queries.numel()
    constants = 2200  # shapes, scales, prefix tokens joined beforehand, biases that were none
    assert read + folded - constants < elements < read + folded + constants


def test_nothing_of_this_machine_is_in_the_file(exported: Exported) -> None:
    content = exported.engine.read_bytes()
    here = [str(Path.cwd()), str(Path.home()), sys.prefix, "site-packages", ".py", "qfae_train", "aten"]
    assert [text for text in here if text.encode() in content] == []
    manifest = exported.engine.with_suffix(".json").read_text()
    assert [text for text in (str(Path.cwd()), str(exported.engine.parent), sys.prefix) if text in manifest] == []


def test_large_weights_lie_beside_the_file(rich_scorer: AnomalyScorer, rich_model: ir.Model, tmp_path: Path) -> None:
    [whole] = save(rich_model, tmp_path / "whole.onnx")
    engine, weights = save(rich_model, tmp_path / "apart.onnx", external_above_bytes=1000)
    assert (engine.name, weights.name) == ("apart.onnx", "apart.onnx.data")
    assert weights.stat().st_size > 0.8 * whole.stat().st_size
    images = pictures(3)
    with OnnxRuntimeEngine(engine, SIZE, 8, threads=2) as apart, OnnxRuntimeEngine(whole, SIZE, 8, threads=2) as one:
        np.testing.assert_array_equal(apart.run(images).score, one.run(images).score)


@pytest.mark.parametrize("batch", [1, 2, 5, 40])
def test_every_option_runs_at_every_batch(
    batch: int, rich_scorer: AnomalyScorer, rich_model: ir.Model, tmp_path: Path
) -> None:
    [path] = save(rich_model, tmp_path / "rich.onnx")
    images = pictures(batch)
    with OnnxRuntimeEngine(path, SIZE, 64, threads=2) as engine:
        got = engine.run(images)
    given = ParityImages(images, tuple(map(str, range(batch))), "pictures", (None,) * batch)
    measured = reference_of(rich_scorer, InferenceGraph(rich_scorer), given)
    bounds = {name: bound for name, bound in CONTRACTS["fp32"].bounds.items() if name != "spearman" or batch > 1}
    assert Contract("fp32", bounds).failures(measured.reference.compare(got)) == []


def test_reconstruction_is_clipped_and_rounded_as_torch_does_it(tmp_path: Path) -> None:
    class Greys(torch.nn.Module):
        """Every half grey level from -3 to 258, where rounding rules differ."""

        image_size, part, precision = 16, "full", FP32

        def forward(self, *inputs: torch.Tensor) -> Result:
            from qfae_train.autoencoder import MEAN, STD, denormalise

            images = inputs[0]
            batch = images.shape[0]
            ramp = (torch.arange(16 * 16 * 3).reshape(1, 3, 16, 16) - 6) / 2  # -3.0, -2.5, ...
            exact = (ramp / 255 - MEAN) / STD + 0 * images.permute(0, 3, 1, 2)
            score = images.float().mean(dim=(1, 2, 3))
            return Result(score, score[:, None, None].expand(batch, 16, 16), denormalise(exact))

    module = Greys()
    [path] = save(trace(module), tmp_path / "greys.onnx")  # type: ignore[arg-type]
    images = np.zeros((2, 16, 16, 3), np.uint8)
    want = module(torch.from_numpy(images)).reconstruction.numpy()
    with OnnxRuntimeEngine(path, 16, 4, threads=1) as engine:
        got = engine.run(images).reconstruction
    assert len(np.unique(want)) == 256
    np.testing.assert_array_equal(got, want)


def test_a_model_torch_cannot_express_is_one_sentence() -> None:
    class Branches(torch.nn.Module):
        image_size, part, precision = 16, "full", FP32

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            images = inputs[0]
            return images.float() if images.sum() > 0 else -images.float()

    with pytest.raises(ExportError, match=r"^torch \S+ cannot express the model in ONNX: .*report the configuration$"):
        trace(Branches())  # type: ignore[arg-type]
