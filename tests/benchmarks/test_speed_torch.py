"""PyTorch as an engine: whose memory the results are in, what is settled before, and packages that are whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import torch_engine


def test_what_is_on_the_processor_is_copied() -> None:
    output = torch.arange(6.0)
    (callers,) = torch_engine._callers((output,))
    output.zero_()  # as the next run of a captured graph does
    np.testing.assert_array_equal(callers, np.arange(6))


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
