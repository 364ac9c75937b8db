"""What can be measured: every way to run the model, and the libraries whose matrix products show how fast it could be.

Imports nothing heavy: it is read to tell what is missing.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from typing import NamedTuple

from qfae_runtime.engines.backends import GPU_BUILD, GPU_INSTALL, NEEDS_GPU_BUILD, NOT_INSTALLED
from qfae_runtime.engines.backends import lacking as backend_lacks

CPU, CUDA = "cpu", "cuda:0"
BASELINE = "torch-plain"
"""What speed-ups are relative to."""


class Candidate(NamedTuple):
    """One thing to measure.

    name       what --against calls it
    title      what tables call it
    precision  of its matrix products
    model      what it runs: "plain" and "graph" are PyTorch modules, "onnx", "fp16" and "int8" files, "plan" and
               "plan-fp16" plans built from them here, "gemm" the model's matrix products alone
    backend    who runs it
    devices    where it can run
    modules    Python modules it needs
    pip        how to install those; ONNX Runtime for a GPU is another package
    streams    the type of residual streams and LayerNorms where the precision is FP16 and the model a "graph"
    """

    name: str
    title: str
    precision: str
    model: str
    backend: str
    devices: tuple[str, ...]
    modules: tuple[str, ...]
    pip: str
    streams: str = "float32"


_TORCH = (("torch", "timm"), "pip install 'qfae[train]'")
_ORT = (("onnxruntime",), "pip install onnxruntime")
_OPENVINO = (("openvino",), "pip install 'qfae[openvino]'")
_TENSORRT = (("tensorrt", "cuda"), "pip install 'qfae[tensorrt]' cuda-python")
_BOTH = (CPU, CUDA)

CANDIDATES = (
    Candidate(BASELINE, "PyTorch, plain", "fp32", "plain", "eager", _BOTH, *_TORCH),
    Candidate("torch", "PyTorch, trimmed", "fp32", "graph", "eager", _BOTH, *_TORCH),
    Candidate("torch-bf16", "PyTorch, trimmed", "bf16", "graph", "eager", _BOTH, *_TORCH),
    Candidate("torch-fp16", "PyTorch, trimmed", "fp16", "graph", "eager", (CUDA,), *_TORCH),
    Candidate("torch-graph-fp16", "PyTorch, trimmed, CUDA graph", "fp16", "graph", "captured", (CUDA,), *_TORCH),
    Candidate(
        "torch-graph-fp16-streams",
        "PyTorch, trimmed, CUDA graph, FP16 streams",
        "fp16",
        "graph",
        "captured",
        (CUDA,),
        *_TORCH,
        streams="float16",
    ),
    Candidate("torch-compile", "torch.compile", "fp32", "graph", "compile", _BOTH, *_TORCH),
    Candidate("torch-compile-bf16", "torch.compile", "bf16", "graph", "compile", _BOTH, *_TORCH),
    Candidate("torch-compile-fp16", "torch.compile", "fp16", "graph", "compile", (CUDA,), *_TORCH),
    Candidate(
        "torch-compile-fp16-streams",
        "torch.compile, FP16 streams",
        "fp16",
        "graph",
        "compile",
        (CUDA,),
        *_TORCH,
        streams="float16",
    ),
    Candidate("aotinductor", "AOTInductor", "fp32", "graph", "aot", _BOTH, *_TORCH),
    Candidate("aotinductor-fp16", "AOTInductor", "fp16", "graph", "aot", (CUDA,), *_TORCH),
    Candidate("onnxruntime", "ONNX Runtime", "fp32", "onnx", "onnxruntime", _BOTH, *_ORT),
    Candidate("onnxruntime-fp16", "ONNX Runtime", "fp16", "fp16", "onnxruntime", (CUDA,), *_ORT),
    Candidate("onnxruntime-int8", "ONNX Runtime", "int8", "int8", "onnxruntime", (CPU,), *_ORT),
    Candidate("onnxruntime-tensorrt", "ONNX Runtime, TensorRT", "fp32", "onnx", "onnxruntime-tensorrt", (CUDA,), *_ORT),
    Candidate("openvino", "OpenVINO", "fp32", "onnx", "openvino", (CPU,), *_OPENVINO),
    Candidate("openvino-bf16", "OpenVINO", "bf16", "onnx", "openvino-bf16", (CPU,), *_OPENVINO),
    Candidate("openvino-int8", "OpenVINO", "int8", "int8", "openvino", (CPU,), *_OPENVINO),
    Candidate("tensorrt", "TensorRT plan", "fp32", "plan", "tensorrt", (CUDA,), *_TENSORRT),
    Candidate("tensorrt-fp16", "TensorRT plan", "fp16", "plan-fp16", "tensorrt", (CUDA,), *_TENSORRT),
)

GEMMS = (
    Candidate("gemm-torch", "torch.matmul", "fp32", "gemm", "torch", _BOTH, *_TORCH),
    Candidate("gemm-torch-bf16", "torch.matmul", "bf16", "gemm", "torch", _BOTH, *_TORCH),
    Candidate("gemm-torch-fp16", "torch.matmul", "fp16", "gemm", "torch", (CUDA,), *_TORCH),
    Candidate("gemm-numpy", "numpy", "fp32", "gemm", "numpy", (CPU,), ("numpy",), "pip install numpy"),
    Candidate("gemm-onnxruntime", "ONNX Runtime", "fp32", "gemm", "onnxruntime", (CPU,), *_ORT),
    Candidate("gemm-openvino", "OpenVINO", "fp32", "gemm", "openvino", (CPU,), *_OPENVINO),
    Candidate("gemm-openvino-bf16", "OpenVINO", "bf16", "gemm", "openvino-bf16", (CPU,), *_OPENVINO),
    Candidate("gemm-openvino-int8", "OpenVINO", "int8", "gemm", "openvino-int8", (CPU,), *_OPENVINO),
)
"""The model's own matrix products through the libraries at hand: what a faster engine could reach."""

KNOWN = {one.name: one for one in (*CANDIDATES, *GEMMS)}
"""All of them by name."""


_ELSEWHERE = {
    CPU: f"runs on {CPU} alone: pass --device {CPU}",
    CUDA: f"runs on {CUDA} alone: pass --device {CUDA} on a machine with an NVIDIA GPU",
}


def candidates_on(device: str) -> tuple[Candidate, ...]:
    """Return every candidate that can run on a device, installed or not, in the order of tables."""
    return tuple(one for one in CANDIDATES if device in one.devices)


def lacking(candidate: Candidate, device: str) -> str | None:
    """Say why a candidate cannot run here, and what would help; None where nothing seems to be lacking."""
    if device not in candidate.devices:
        return _ELSEWHERE[candidate.devices[0]]
    missing = [name for name in candidate.modules if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} {NOT_INSTALLED}: {_pip(candidate, device)}"
    if candidate.backend in ("compile", "aot") and device == CPU and not any(map(shutil.which, ("c++", "g++"))):
        return "no C++ compiler found, which torch needs for this: install g++"
    if candidate.backend == "openvino-bf16" or (candidate.model != "gemm" and candidate.backend.startswith("onnx")):
        reason = backend_lacks(candidate.backend, device)
        # What else is lacking, no package would bring.
        cure = {NOT_INSTALLED: _pip(candidate, device), NEEDS_GPU_BUILD: GPU_BUILD}.get(reason or "")
        return f"{reason}: {cure}" if cure is not None else reason
    return None


def _pip(candidate: Candidate, device: str) -> str:
    return GPU_INSTALL if device == CUDA and "onnxruntime" in candidate.modules else candidate.pip
