"""What decides which kernels a backend computes with, besides its own version: CPU, environment, libraries.

A model name covers processors with and without AVX-512 or VNNI, and one variable, ONEDNN_MAX_CPU_ISA say, makes the
same backend on the same machine compute with others, whose last digits, or whole bytes in INT8, differ.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np

from qfae_runtime import __version__

_CPUINFO = Path("/proc/cpuinfo")

# Lines of /proc/cpuinfo that kernels are chosen by, x86's and ARM's; others change by the second (MHz), or with
# nothing that computes (microcode, bugs).
_CPU_LINES = frozenset(
    {
        *("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags"),
        *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
    }
)

# Which variables the libraries read is known from the names in them: oneDNN (inside OpenVINO, each with both prefixes),
# OpenVINO, TBB, OpenMP's three implementations, MKL, ONNX Runtime and MLAS, OpenBLAS and NumPy, OpenCV. Whole prefixes,
# since the next version of a library reads others: a variable that only asks for a log costs one more self-test.
_PREFIXES = (
    *("ONEDNN_", "DNNL_", "OV_", "OPENVINO_", "TBB_"),
    *("OMP_", "KMP_", "GOMP_", "MKL_", "ORT_", "ONNXRUNTIME_", "MLAS_"),
    *("OPENBLAS_", "GOTO_", "BLIS_", "VECLIB_", "NPY_", "OPENCV_"),
)
_GPU_PREFIXES = ("CUDA_", "CUDNN_", "CUBLAS_", "CUBLASLT_", "NVIDIA_", "TRT_", "TENSORRT_", "NVRTC_")
# glibc chooses its mathematical functions by the first; the other puts other libraries in the place of ours. So may
# LD_LIBRARY_PATH, but OpenCV changes it when it is imported, and hands it on to child processes: it tells nothing.
_NAMES = ("GLIBC_TUNABLES", "LD_PRELOAD")
# What libraries set themselves when they are imported, some of them late in a run, and nothing computes by: the first
# two threadpoolctl (of scikit-learn), the third this package.
_NOT_OBEYED = frozenset({"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "ORT_DISABLE_TELEMETRY"})

_TF32 = "NVIDIA_TF32_OVERRIDE"

_GPU_LIBRARIES = ("nvidia", "cuda", "tensorrt")
_LIBRARIES = ("onnxruntime", "openvino", "mkl", "onednn", "tbb", "intel_openmp", *_GPU_LIBRARIES)


def cpu() -> list[str]:
    """Return what distinguishes the processors that this process may use, as 16 hex digits for each kind of them.

    Where there is no /proc/cpuinfo, what Python's `platform` tells stands for it.
    """
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    kinds = _kinds(text, _affinity())
    named = (platform.machine(), platform.processor(), os.environ.get("PROCESSOR_IDENTIFIER", ""))
    return sorted(hashlib.sha256(kind.encode()).hexdigest()[:16] for kind in kinds or {"\n".join(named)})


def variables(backend: str, device: str) -> dict[str, str]:
    """Return the environment variables that a backend obeys on a device, with their values.

    What concerns GPUs alone is left out on a CPU: batch systems set it differently for every job.
    """
    prefixes = _PREFIXES if device == "cpu" else (*_PREFIXES, *_GPU_PREFIXES)
    found = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(prefixes) or name in _NAMES) and name not in _NOT_OBEYED
    }
    if backend == "onnxruntime-tensorrt":  # its engine sets this when it is loaded: before and after are the same
        found.setdefault(_TF32, "0")
    return dict(sorted(found.items()))


def libraries(device: str) -> dict[str, str]:
    """Return the versions of what is installed and computes on a device, and of this package and NumPy, which compare.

    What prepares images is not among them: its results are compared on every run (preprocess.probe).
    """
    gpu_too = device != "cpu"
    return {name: version for name, version in _installed().items() if gpu_too or not name.startswith(_GPU_LIBRARIES)}


@cache
def _installed() -> Mapping[str, str]:
    """Return names and versions, read from the names of the folders: opening each costs as much as a run's start."""
    found = {"qfae": __version__, "numpy": np.__version__}
    for one in metadata.distributions():
        name, _, version = str(getattr(one, "_path", "")).rpartition("/")[2].removesuffix(".dist-info").partition("-")
        name = re.sub(r"[-_.]+", "_", name).lower()
        if name.startswith(_LIBRARIES) and version:
            found[name] = version
    return dict(sorted(found.items()))


def _affinity() -> set[int] | None:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return None


def _kinds(cpuinfo: str, allowed: set[int] | None) -> set[str]:
    """Return the different descriptions of the processors allowed: efficient cores may have less than fast ones."""
    kinds = set()
    for block in re.split(r"\n\s*\n", cpuinfo):
        parts = [line.partition(":") for line in block.splitlines()]
        told = {name.strip(): value.split() for name, _, value in parts}
        number = "".join(told.get("processor", []))
        if number.isdigit() and allowed is not None and int(number) not in allowed:
            continue
        said = [f"{name}: {' '.join(sorted(words))}" for name, words in told.items() if name in _CPU_LINES]
        if said:
            kinds.add("\n".join(said))
    return kinds
