"""The two libraries: what is said where one is missing, and which versions are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qfae_export import builders
from qfae_export.builders import BUILDERS, KNOWN_BAD, available, refuse_known_bad
from qfae_export.errors import ExportError
from qfae_runtime.engines.cuda import Gpu, driver_version


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"), ", tensorrt_libs is missing"),
        (ImportError("libnvinfer.so.10: cannot open\nmore"), " (libnvinfer.so.10: cannot open)"),
        (FileNotFoundError("Could not find: libnvinfer.so.10"), " (Could not find: libnvinfer.so.10)"),
        (RuntimeError(""), " (RuntimeError)"),
    ],
)
def test_a_library_that_does_not_load(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(builders, "import_module", fail)
    assert available("plan") == f"TensorRT cannot be loaded{said}: pip install tensorrt"


@pytest.mark.parametrize(
    ("version", "precision", "capability", "said"),
    [
        ("10.0.0b6", "fp16", "9.0", "NVIDIA/TensorRT#3777"),
        ("10.0.0b6", "fp32", "9.0", None),
        ("10.0.1", "fp16", "9.0", None),
        ("10.3.0", "fp32", "8.6", "NVIDIA/TensorRT#4723, NVIDIA/TensorRT#4419"),
        ("10.4.0", "fp32", "8.6", "cosine 0.018 with PyTorch in FP32, NaN in FP16 (NVIDIA/TensorRT#4742)"),
        ("10.5.0", "fp32", "8.6", None),
        ("10.7.0.23", "fp32", "8.9", "NVIDIA/TensorRT#4333"),
        ("10.16.1.11", "fp16", "12.0", "on compute capability 12.0: fused FP16 attention"),
        ("10.16.1.11", "fp32", "12.0", None),
        ("10.16.1.11", "fp16", "9.0", None),
        ("11.4.1.9", "fp16", "12.0", None),
        ("10.10.0.31", "fp32", "9.0", None),
        ("10.11.0.33", "fp32", "9.0", "NVIDIA/TensorRT#4853"),
        ("10.13.3.9", "fp16", "9.0", "four identical images in one batch"),
        ("10.13.3+cuda13.0", "fp32", "9.0", "(NVIDIA/TensorRT#4813, NVIDIA/TensorRT#4853); install version 10.15"),
        ("10.14.1.48", "fp32", "8.6", "NVIDIA/TensorRT#4813"),
        ("10.15.1", "fp32", "8.6", None),
        ("11.0.0.114", "fp16", "8.9", None),
        (
            "11.1.0.106",
            "fp32",
            "12.0",
            "in FP32 too (NVIDIA/TensorRT#4813, NVIDIA/TensorRT#4853); install version 11.2",
        ),
        ("11.2.1.2", "fp32", "12.0", None),
        ("10.16.0.72", "fp16", "8.9", "on compute capability 8.9: FP16 attention was reported to give two identical"),
        ("10.16.0.72", "fp32", "8.9", None),
    ],
)
def test_known_bad_versions(version: str, precision: str, capability: str, said: str | None) -> None:
    gpu = Gpu("a card", capability, None, None)
    if said is None:
        refuse_known_bad(BUILDERS["plan"], version, precision, gpu)
    else:
        with pytest.raises(ExportError) as caught:
            refuse_known_bad(BUILDERS["plan"], version, precision, gpu)
        assert said in str(caught.value)
    refuse_known_bad(BUILDERS["rtx-plan"], version, precision, gpu)


def test_the_table_names_reports_and_ranges() -> None:
    for bad in KNOWN_BAD:
        assert "NVIDIA/TensorRT#" in bad.reference
        assert builders._numbers(bad.first) < builders._numbers(bad.before)


def test_driver_and_versions(tmp_path: Path) -> None:
    shown = tmp_path / "version"
    shown.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)\nGCC version:\n"
    )
    assert driver_version(shown) == "580.95.05"
    assert driver_version(tmp_path / "missing") is None
    assert builders._numbers("10.16.1.11+cuda13.0") == (10, 16, 1, 11)
