"""The builders of plans, TensorRT and TensorRT-RTX: where they can build, and which versions are known to be wrong.

Both have the same Python interface under two module names. TensorRT times kernels on the card it builds for, so it
needs one; TensorRT-RTX writes kernels that are compiled on the card they are loaded on, so it builds anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from qfae_export.errors import ExportError
from qfae_runtime.engines.cuda import Gpu, driver_version


@dataclass(frozen=True)
class Builder:
    """One library: the format it writes, its module, its name in sentences, what installs it."""

    kind: str
    module: str
    title: str
    pip: str
    needs_gpu: bool


BUILDERS = {
    "plan": Builder("plan", "tensorrt", "TensorRT", "pip install tensorrt", needs_gpu=True),
    "rtx-plan": Builder("rtx-plan", "tensorrt_rtx", "TensorRT-RTX", "pip install tensorrt-rtx-cu13", needs_gpu=False),
}
"""By format, as the manifest calls it."""


@dataclass(frozen=True)
class KnownBad:
    """Versions that were seen to compute wrong, `first` included, `before` excluded.

    precisions      of the files concerned
    capability      of the cards concerned; None: all
    """

    module: str
    first: str
    before: str
    wrong: str
    reference: str
    precisions: tuple[str, ...] = ("fp32", "fp16")
    capability: str | None = None


KNOWN_BAD = (
    KnownBad(
        "tensorrt",
        "10.0.0",
        "10.0.1",
        "its fused attention does not give PyTorch's outputs, by NVIDIA's own release notes",
        "NVIDIA/TensorRT#3777",
        ("fp16",),
    ),
    KnownBad(
        "tensorrt",
        "10.3",
        "10.4",
        "a DINOv3 vision transformer in FP16 and a transformer with free dimensions were reported to come out wrong",
        "NVIDIA/TensorRT#4723, NVIDIA/TensorRT#4419",
    ),
    KnownBad(
        "tensorrt",
        "10.4",
        "10.5",
        "a DINOv3 ViT-B/16 was reported to come out wrong: cosine 0.018 with PyTorch in FP32, NaN in FP16",
        "NVIDIA/TensorRT#4742",
    ),
    KnownBad(
        "tensorrt",
        "10.7",
        "10.8",
        "scaled dot-product attention was reported to come out wrong, in FP32 too",
        "NVIDIA/TensorRT#4333, NVIDIA/TensorRT#4328",
    ),
    # Open; seen in 10.11, 10.13.3.9, 10.14.1.48 and 11.1.0.106, on capabilities 8.6, 8.9 and 12.0. The model of #4813
    # samples a grid, which ours does not, but the reason is not known, and #4853 is of a transformer encoder alone. Of
    # 10.15, 10.16, 11.0 and what came after 11.1 there is no report.
    *(
        KnownBad(
            "tensorrt",
            first,
            before,
            "four identical images in one batch were reported to get four different answers, and batches of two wrong "
            "ones, in FP32 too",
            "NVIDIA/TensorRT#4813, NVIDIA/TensorRT#4853",
        )
        for first, before in (("10.11", "10.15"), ("11.1", "11.2"))
    ),
    # Seen in 10.6 and 10.16.0; 11.0 gave identical answers.
    KnownBad(
        "tensorrt",
        "10.6",
        "11.0",
        "FP16 attention was reported to give two identical images in one batch different answers",
        "NVIDIA/TensorRT#4796",
        ("fp16",),
        "8.9",
    ),
    # Open; seen up to 10.16.1, the latest of version 10. Of version 11 nothing is known.
    KnownBad(
        "tensorrt",
        "10.0",
        "11.0",
        "fused FP16 attention of a vision transformer (SAM 3) was reported to come out wrong, without any error",
        "NVIDIA/TensorRT#4837",
        ("fp16",),
        "12.0",
    ),
)
"""Reported for vision transformers and their attention. Plans are measured against PyTorch whatever stands here; a
refusal only saves the time to find out."""


def available(kind: str, onnx: str = "NAME.fp16.onnx") -> str | None:
    """Return why a plan of that kind cannot be built here, in one line that says what to do, or None if it can."""
    builder = BUILDERS[kind]
    reason = _why_missing(builder)
    if reason is not None:
        return reason
    if builder.needs_gpu and current_gpu() is None:
        return (
            f"{builder.title} builds a plan on the card it will run on, and torch sees no CUDA GPU on this machine; "
            f"copy {onnx} and its .json there and run: qfae-export --onnx {onnx}"
        )
    return None


def _why_missing(builder: Builder) -> str | None:
    try:
        import_module(builder.module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == builder.module:
            return f"{builder.title} is not installed: {builder.pip}"
        return f"{builder.title} cannot be loaded, {error.name} is missing: {builder.pip}"
    except (ImportError, OSError, RuntimeError) as error:  # its libraries are missing, or not for this machine
        return f"{builder.title} cannot be loaded ({_first_line(error)}): {builder.pip}"
    return None


def load(kind: str, onnx: str) -> Any:
    """Return the builder's module.

    Raises:
        ExportError: a plan of that kind cannot be built here.

    """
    reason = available(kind, onnx)
    if reason is not None:
        raise ExportError(f"{onnx}: no {kind} can be built from it here: {reason}")
    return import_module(BUILDERS[kind].module)


def refuse_known_bad(builder: Builder, version: str, precision: str, gpu: Gpu | None) -> None:
    """Refuse a version that was seen to compute models like this one wrong.

    Raises:
        ExportError: what is wrong with it, and where that was reported.

    """
    capability = gpu.compute_capability if gpu is not None else None
    for bad in KNOWN_BAD:
        concerns = bad.module == builder.module and precision in bad.precisions
        here = bad.capability is None or bad.capability == capability
        if concerns and here and _numbers(bad.first) <= _numbers(version) < _numbers(bad.before):
            cards = "" if bad.capability is None else f" on compute capability {bad.capability}"
            raise ExportError(
                f"{builder.title} {version} is not used{cards}: {bad.wrong} ({bad.reference}); install version "
                f"{bad.before} or a later one: {builder.pip} --upgrade"
            )


def current_gpu() -> Gpu | None:
    """Return the card that a plan would be built on, or None where there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}", driver_version(), torch.version.cuda)


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers: "10.16.1.11+cuda13" is (10, 16, 1, 11)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
