"""What a candidate lacks here, and the line that helps: only where a package would."""

from __future__ import annotations

import pytest

from benchmarks.speed import candidates
from benchmarks.speed.candidates import CPU, CUDA, KNOWN
from qfae_runtime.engines import onnxruntime, openvino
from qfae_runtime.errors import EngineError


def test_no_package_helps_a_processor_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_bf16", lambda: False)
    for name in ("openvino-bf16", "gemm-openvino-bf16"):
        assert candidates.lacking(KNOWN[name], CPU) == "this processor does not compute in BF16"


def test_without_its_gpu_build_onnx_runtime_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "has_provider", lambda backend, device: device == CPU)
    for name in ("onnxruntime", "onnxruntime-fp16", "onnxruntime-tensorrt"):
        assert candidates.lacking(KNOWN[name], CUDA) == (
            "not installed, needs onnxruntime-gpu: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
    assert candidates.lacking(KNOWN["onnxruntime"], CPU) is None


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("onnxruntime", CPU, "onnxruntime not installed: pip install onnxruntime"),
        ("onnxruntime", CUDA, "onnxruntime not installed: pip install onnxruntime-gpu"),
        ("gemm-onnxruntime", CPU, "onnxruntime not installed: pip install onnxruntime"),
        ("openvino-bf16", CPU, "openvino not installed: pip install 'qfae[openvino]'"),
        ("gemm-openvino-bf16", CPU, "openvino not installed: pip install 'qfae[openvino]'"),
    ],
)
def test_a_missing_package_comes_with_its_line(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, reason: str
) -> None:
    monkeypatch.setattr(candidates, "find_spec", lambda name: None)
    assert candidates.lacking(KNOWN[name], device) == reason


def test_a_library_that_is_refused_says_why_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> bool:
        raise EngineError("OpenVINO is too old")

    monkeypatch.setattr(openvino, "has_bf16", refused)
    assert candidates.lacking(KNOWN["openvino-bf16"], CPU) == "OpenVINO is too old"
