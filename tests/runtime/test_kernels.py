"""What a remembered self-test depends on besides the engine: the CPU, the environment, and what is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qfae_runtime import kernels, open_engine, self_test
from qfae_runtime.children import importing_alike

from .tiny import certify_too

X86 = """\
processor\t: {number}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
microcode\t: {microcode}
cpu MHz\t\t: {mhz}
cache size\t: 1024 KB
flags\t\t: {flags}
bugs\t\t: {bugs}
"""
ARM = "processor\t: {number}\nBogoMIPS\t: 50.00\nFeatures\t: {flags}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"


def described(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *blocks: str, allowed: set[int] | None = None
) -> list[str]:
    (folder / "cpuinfo").write_text("\n".join(blocks))
    monkeypatch.setattr(kernels, "_CPUINFO", folder / "cpuinfo")
    monkeypatch.setattr(kernels, "_affinity", lambda: allowed)
    return kernels.cpu()


def x86(number: int = 0, flags: str = "sse2 avx2", microcode: str = "0x1", mhz: str = "2596.1", bugs: str = "x") -> str:
    return X86.format(number=number, flags=flags, microcode=microcode, mhz=mhz, bugs=bugs)


def test_a_cpu_is_known_by_its_flags_and_not_by_what_changes_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    this = described(monkeypatch, tmp_path, x86(0), x86(1))
    assert len(this) == 1
    same = [
        (x86(0, mhz="3000.0"), x86(1, microcode="0x2", bugs="y z")),
        (x86(0, flags="avx2 sse2"), x86(1), x86(2)),
    ]
    for blocks in same:
        assert described(monkeypatch, tmp_path, *blocks) == this
    others = [
        x86(flags="sse2 avx2 avx512f"),
        x86(flags="sse2"),
        x86().replace("1024 KB", "512 KB"),
        x86().replace("stepping\t: 1", "stepping\t: 2"),
    ]
    found = [described(monkeypatch, tmp_path, block) for block in others]
    assert len({tuple(one) for one in [this, *found]}) == 5


def test_only_the_processors_that_may_be_used_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fast, slow = x86(0, flags="sse2 avx2 avx512f"), x86(1)
    both = described(monkeypatch, tmp_path, fast, slow, allowed={0, 1})
    assert len(both) == 2
    assert [described(monkeypatch, tmp_path, fast, slow, allowed={one})[0] in both for one in (0, 1)] == [True, True]
    assert described(monkeypatch, tmp_path, fast, slow, allowed={0}) != described(
        monkeypatch, tmp_path, fast, slow, allowed={1}
    )


def test_arm_is_known_by_its_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {
        tuple(described(monkeypatch, tmp_path, ARM.format(number=0, flags=flags, part=part)))
        for flags, part in (("fp asimd", "0xd0c"), ("fp asimd sve", "0xd0c"), ("fp asimd", "0xd40"))
    }
    assert len(found) == 3


@pytest.mark.parametrize("content", [None, "", "nothing of use\n\nhere"])
def test_without_cpuinfo_it_is_what_python_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(kernels, "_CPUINFO", path)
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 140")
    one = kernels.cpu()
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 151")
    assert kernels.cpu() != one
    assert [len(text) for text in one] == [16]


OBEYED = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "OV_CPU_MAX_ISA",
    "OPENVINO_SOMETHING_NEW",
    "OMP_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "MKL_CBWR",
    "TBB_MALLOC_USE_HUGE_PAGES",
    "ORT_MLAS_QKGEMM_S8_APPROX_VNNI",
    "MLAS_NCHWC_FSS_TARGET",
    "OPENBLAS_CORETYPE",
    "NPY_DISABLE_CPU_FEATURES",
    "OPENCV_CPU_DISABLE",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


@pytest.mark.parametrize("name", OBEYED)
def test_a_variable_that_backends_obey_means_testing_again(
    engine_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    with open_engine(engine_path) as opened:
        assert [self_test(opened).status for _ in range(2)] == ["passed", "passed before"]
        monkeypatch.setenv(name, "1")
        assert [self_test(opened).status for _ in range(2)] == ["passed", "passed before"]
        monkeypatch.setenv(name, "2")
        assert self_test(opened).status == "passed"
        monkeypatch.delenv(name)
        assert self_test(opened).status == "passed before"


def test_variables_of_gpus_count_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "TRT_SOMETHING", "HOME_OF_NOTHING"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    on_cpu, on_gpu = kernels.variables("onnxruntime", "cpu"), kernels.variables("onnxruntime", "cuda:0")
    assert set(on_gpu) - set(on_cpu) >= {"CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "TRT_SOMETHING"}
    assert "HOME_OF_NOTHING" not in on_gpu
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu
    # Set by the engine itself when it is loaded.
    before = kernels.variables("onnxruntime-tensorrt", "cuda:0")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert kernels.variables("onnxruntime-tensorrt", "cuda:0") == before
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert kernels.variables("onnxruntime-tensorrt", "cuda:0") != before


def test_the_choice_of_a_backend_is_made_again_under_other_variables(
    engine_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    certify_too(engine_path, "openvino")

    def tested() -> bool:
        with open_engine(engine_path) as opened:
            assert opened.choice is not None
            return opened.choice.verdict is not None

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert [tested(), tested()] == [True, False]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert [tested(), tested()] == [True, False]
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert not tested()


def test_no_threads_named_is_not_as_many_as_there_are(engine_path: Path) -> None:
    """How many that is, each backend decides: physical cores, say."""
    for threads in (None, len(os.sched_getaffinity(0))):
        with open_engine(engine_path, threads=threads) as opened:
            assert self_test(opened).status == "passed"


def test_no_library_changes_what_counts_when_it_is_imported() -> None:
    """Else what one process remembers, the next would not find; scikit-learn, for one, is imported late in a run."""
    script = """
from qfae_runtime import kernels
before = kernels.variables("openvino", "cuda:0")
for name in ("onnxruntime", "openvino", "sklearn.metrics", "cv2", "pydicom", "nibabel", "PIL", "torch"):
    try:
        __import__(name)
    except ImportError:
        pass
import qfae_runtime.run, qfae_runtime.engines.onnxruntime
assert kernels.variables("openvino", "cuda:0") == before, kernels.variables("openvino", "cuda:0")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=importing_alike())


def test_versions_of_what_computes_and_compares() -> None:
    on_cpu, on_gpu = kernels.libraries("cpu"), kernels.libraries("cuda:0")
    assert {"numpy", "qfae", "onnxruntime"} <= {name.removesuffix("_gpu") for name in on_cpu}
    assert on_cpu.items() <= on_gpu.items()
    assert not [name for name in on_cpu if name.startswith(("nvidia", "cuda", "tensorrt"))]
