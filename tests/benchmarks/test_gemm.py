"""Matrix products alone: every library writes where it wrote before, so that no fresh memory is timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import gemm
from benchmarks.speed.candidates import GEMMS, Candidate
from benchmarks.speed.gemm import Product

PRODUCT = Product(40, 256, 24, 1, True)


@pytest.mark.parametrize("candidate", [one for one in GEMMS if "cpu" in one.devices], ids=lambda one: one.name)
def test_every_library_keeps_the_memory_of_its_results(candidate: Candidate) -> None:
    if candidate.precision == "bf16" and candidate.backend.startswith("openvino"):
        from qfae_runtime.engines.openvino import has_bf16

        if not has_bf16():
            pytest.skip("this processor has no BF16")

    def place(answer: Any) -> int:
        if isinstance(answer, torch.Tensor):
            return answer.data_ptr()
        return int((answer if isinstance(answer, np.ndarray) else answer[0]).ctypes.data)

    run = gemm.maker(candidate.backend.partition("-")[0], candidate.precision, "cpu", 1)(PRODUCT)
    first = run()  # kept: freed memory may be handed out again
    assert place(run()) == place(first)


def test_on_a_gpu_too_and_the_card_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the card: what is sent there stays on the processor."""
    waited: list[bool] = []
    empty, randn = torch.empty, torch.randn
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **how: empty(*shape, **how))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr("qfae_train.float32.forbid_tf32", lambda: None)  # of this whole process
    run: Any = gemm.maker("torch", "fp16", "cuda:0", None)(PRODUCT)
    first = run()
    assert first.dtype == torch.float16
    assert run().data_ptr() == first.data_ptr()
    assert len(waited) == 2
