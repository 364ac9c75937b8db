"""ONNX Runtime on a GPU, on a double of its GPU build: providers, their options, and the fall back that is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from qfae_runtime import open_engine
from qfae_runtime.engines import onnxruntime as module
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import EngineError

from .doubles.onnxruntime import FakeOnnxRuntime
from .tiny import MAX_BATCH, SIZE, certify_too, export_tiny, golden_images, model_bytes


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    double = FakeOnnxRuntime()
    monkeypatch.setattr(module, "ort", double)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    return double


def test_cuda_computes_fp32_and_not_tf32(ort: FakeOnnxRuntime) -> None:
    with OnnxRuntimeEngine(model_bytes(), SIZE, MAX_BATCH, device="cuda:0") as engine:
        assert (engine.backend, engine.device) == ("onnxruntime", "cuda:0")
    [asked] = ort.asked
    assert list(asked) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert asked["CUDAExecutionProvider"]["use_tf32"] == "0"
    assert asked["CUDAExecutionProvider"]["cudnn_conv_algo_search"] == "DEFAULT"
    assert "device_id" not in asked["CUDAExecutionProvider"]  # naming it makes 1.31 warn; the first GPU is the default
    assert ort.options[0].use_deterministic_compute
    assert ort.preloaded == 1
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ  # it is every library's of the process


def test_tensorrt_keeps_the_files_precision_and_compiles_once(
    ort: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    backend = "onnxruntime-tensorrt"
    with OnnxRuntimeEngine(model_bytes(), SIZE, 8, backend=backend, device="cuda:0") as engine:
        assert (engine.backend, engine.device) == ("onnxruntime-tensorrt", "cuda:0")
    [asked] = ort.asked
    assert list(asked) == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    options = asked["TensorrtExecutionProvider"]
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("0", "0")
    assert not any("device_id" in one for one in asked.values())
    assert options["trt_profile_min_shapes"] == "images:1x32x32x3"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"] == "images:8x32x32x3"


def test_tf32_is_switched_off_in_the_environment_for_tensorrt_alone(
    ort: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeEngine(model_bytes(), SIZE, 8, backend="onnxruntime-tensorrt", device="cuda:0")
    assert str(caught.value) == (
        "the engine: NVIDIA_TF32_OVERRIDE is '1', expected '0': TensorRT would round FP32 to TF32; "
        "unset it or set it to 0"
    )
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    OnnxRuntimeEngine(model_bytes(), SIZE, 8, backend="onnxruntime-tensorrt", device="cuda:0").close()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")


@pytest.mark.parametrize(
    ("backend", "started", "said"),
    [
        (
            "onnxruntime",
            ["CPUExecutionProvider"],
            "CUDAExecutionProvider did not start, ONNX Runtime {} fell back to CPU",
        ),
        (
            "onnxruntime-tensorrt",
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
            "TensorrtExecutionProvider did not start, ONNX Runtime {} fell back to CUDA",
        ),
        ("onnxruntime", [], "CUDAExecutionProvider did not start, ONNX Runtime {} fell back to none"),
    ],
)
def test_a_provider_that_falls_back_is_refused(
    ort: FakeOnnxRuntime, backend: str, started: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    ort.started = started
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeEngine(model_bytes(), SIZE, 8, backend=backend, device="cuda:0")
    assert str(caught.value).startswith(f"the engine: {said.format(module.VERSION)}")
    assert str(caught.value).endswith(
        "; check that nvidia-smi shows a GPU, and that CUDA, cuDNN and TensorRT fit this build of ONNX Runtime"
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt"])
def test_a_build_without_the_provider_is_told_with_the_pip_line(ort: FakeOnnxRuntime, backend: str) -> None:
    ort.available = ["AzureExecutionProvider", "CPUExecutionProvider"]
    provider = "CUDAExecutionProvider" if backend == "onnxruntime" else "TensorrtExecutionProvider"
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeEngine(model_bytes(), SIZE, 8, backend=backend, device="cuda:0")
    assert str(caught.value) == (
        f"the engine: ONNX Runtime {module.VERSION} is installed without {provider}; "
        "install the GPU build with: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    )
    assert not ort.asked


def test_on_a_gpu_batches_are_filled_up_to_sizes_that_were_measured(ort: FakeOnnxRuntime) -> None:
    images = golden_images(6)
    with OnnxRuntimeEngine(model_bytes(), SIZE, 6, device="cuda:0") as engine:
        assert engine.batches == (1, 2, 4, 6)
        got = [engine.run(images[:count]).score for count in (1, 2, 3, 4, 5, 6)]
    assert ort.batches == [1, 2, 4, 4, 6, 6]
    for count, scores in enumerate(got, start=1):
        np.testing.assert_allclose(scores, got[-1][:count], rtol=0, atol=1e-6)


def test_on_a_cpu_batches_are_split_into_sizes_that_were_measured(ort: FakeOnnxRuntime) -> None:
    images = golden_images(6)
    with OnnxRuntimeEngine(model_bytes(), SIZE, 6) as engine:
        assert engine.batches == (1, 2, 4, 6)
        got = [engine.run(images[:count]).score for count in (1, 2, 3, 4, 5, 6)]
    assert ort.batches == [1, 2, 2, 1, 4, 4, 1, 6]
    for count, scores in enumerate(got, start=1):
        np.testing.assert_allclose(scores, got[-1][:count], rtol=0, atol=1e-6)


def test_a_certificate_is_for_one_device(ort: FakeOnnxRuntime, tmp_path: Path) -> None:
    path = export_tiny(tmp_path)
    with pytest.raises(EngineError) as caught:
        open_engine(path, device="cuda:0")
    assert str(caught.value) == (
        f"{path}: certified for onnxruntime on cpu, not for onnxruntime on cuda:0; measure it here: qfae-export verify "
        f"--engine {path} --ckpt NAME.pt --backend onnxruntime --device cuda:0 --record"
    )
    certify_too(path, "onnxruntime", "cuda:0")
    with open_engine(path, device="cuda:0") as opened:
        assert opened.engine.device == "cuda:0"
        assert opened.certificate is not None
        assert opened.certificate.device == "cuda:0"
    with open_engine(path, backend="onnxruntime") as opened:
        assert opened.engine.device == "cpu"
