"""Real plans from TensorRT-RTX, built on the CPU: every preset, both halves, and the published model at full size."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest

from qfae_export.builders import available
from qfae_export.export import let_go
from qfae_export.graph import InferenceGraph
from qfae_export.onnx_facts import read_facts
from qfae_export.onnx_file import write_onnx
from qfae_export.precision import FP16
from qfae_export.random_weights import random_scorer
from qfae_export.tensorrt_plan import build_plan
from qfae_train.config import Config, load, presets
from tests.export.small_presets import attentions, small
from tests.export.tiny import config_of, scorer_of

pytestmark = pytest.mark.skipif(available("rtx-plan") is not None, reason=f"{available('rtx-plan')}")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_scoring_half(precision: str, tmp_path: Path) -> None:
    graph = InferenceGraph(scorer_of(config_of()), "scorer")
    write_onnx(graph.cast(FP16) if precision == "fp16" else graph, tmp_path / "half.onnx")
    plan = build_plan(tmp_path / "half.onnx", tmp_path / "half.plan", "rtx-plan", 5)
    assert (plan.precision, plan.buckets) == (precision, (1, 2, 4, 5))
    assert plan.fusion.stages == ({"perceptual": 4} if precision == "fp16" else {})


def _distinct() -> dict[str, list[str]]:
    """The presets by what their graph depends on: some differ in training alone."""
    found: dict[str, list[str]] = {}
    for name in presets():
        config = small(name)
        found.setdefault(repr((config.model, config.perceptual, config.score)), []).append(name)
    return {"-".join(names): names for names in found.values()}


@pytest.mark.parametrize("names", _distinct().values(), ids=_distinct().keys())
def test_every_preset_small(names: list[str], tmp_path: Path) -> None:
    config = small(names[0])
    write_onnx(InferenceGraph(random_scorer(config, 1)).cast(FP16), tmp_path / "small.fp16.onnx")
    largest = 1 if names == ["demo"] else 4  # one image alone is the narrowest profile there is
    plan = build_plan(tmp_path / "small.fp16.onnx", tmp_path / "small.plan", "rtx-plan", largest)
    assert plan.fusion.stages == attentions(config)
    assert plan.fusion.accumulates == {"fp32": sum(attentions(config).values())}


def test_brats_at_full_size(tmp_path: Path) -> None:
    """The published model's own sizes on made-up weights: exported to FP16, parsed, built, all 90 attentions fused."""
    config: Config = load("brats")
    graph = InferenceGraph(random_scorer(config, 0))
    gc.collect()
    # Every buffer becomes one initializer; the FP32 file itself is not written here.
    assert sum(buffer.nbytes for buffer in graph.buffers()) <= 2.5e9
    onnx, out = tmp_path / "brats.fp16.onnx", tmp_path / "brats.plan"
    try:
        assert write_onnx(graph.cast(FP16), onnx) == [onnx]
        del graph
        gc.collect()
        assert onnx.stat().st_size <= 1.26e9
        assert Counter(one.stage for one in read_facts(onnx).attentions) == _BRATS
        plan = build_plan(onnx, out, "rtx-plan", 32)
        assert plan.fusion.stages == _BRATS
        assert (plan.fusion.attentions, plan.fusion.accumulates) == (90, {"fp32": 90})
        assert plan.targets == ("SM80", "SM86", "SM89", "SM120")
        assert 1.2e9 < out.stat().st_size < 1.3e9
    finally:
        onnx.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        let_go()  # or the process keeps gigabytes to its end


_BRATS = {"encoder": 23, "qformer": 1, "decoder": 6, "perceptual": 60}
"""23 of 24 blocks lead to the last tap; one cross-attention; 20 blocks at three patch sizes."""
