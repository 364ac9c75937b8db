"""PyTorch as an engine: whose memory the results are in, what is settled before, and packages that are whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import torch_engine
from qfae_export.graph import InferenceGraph
from qfae_export.layers import Linear
from tests.export.tiny import config_of, pictures, scorer_of


def test_what_is_on_the_processor_is_copied() -> None:
    output = torch.arange(6.0)
    (callers,) = torch_engine._callers((output,))
    output.zero_()  # as the next run of a captured graph does
    np.testing.assert_array_equal(callers, np.arange(6))


def test_a_bias_is_added_by_the_product() -> None:
    """One pass over memory less, and the same scores."""
    images = torch.from_numpy(pictures(4))
    graph = InferenceGraph(scorer_of(config_of()))
    with torch.no_grad(), Operations() as apart:
        want = graph(images)
    with torch.no_grad(), Operations() as fused:
        got = torch_engine.for_torch(graph, "fp32")(images)
    biases = sum(isinstance(one, Linear) and one.bias is not None for one in graph.modules())
    assert fused.found["aten.addmm.default"] - apart.found["aten.addmm.default"] == biases > 10
    assert apart.found["aten.add.Tensor"] - fused.found["aten.add.Tensor"] == biases
    torch.testing.assert_close(got.score, want.score, atol=1e-5, rtol=1e-5)


class Operations(TorchDispatchMode):
    """Counts what PyTorch runs, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_compiled_graph_has_recorded_a_size_when_its_first_call_ends() -> None:
    calls: list[int] = []
    run = torch_engine._recorded(lambda images: calls.append(len(images)))
    for size in (4, 4, 1, 4):
        run(torch.zeros(size))
    assert calls == [4, 4, 4, 4, 1, 1, 1, 4], "warming up, recording, and the call itself"


@pytest.fixture
def settings() -> Iterator[Any]:
    """PyTorch's own settings of products, given back as they were."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    yield matmul
    matmul.allow_tf32, cudnn.allow_tf32 = before


def test_fp32_is_fp32_and_half_precision_as_users_run_it(settings: Any) -> None:
    settings.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(settings, name) for name in names]
    torch_engine._settle("cuda:0")
    assert not settings.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert [getattr(settings, name) for name in names] == before
