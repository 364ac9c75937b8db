from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfae_runtime.engines.base import tensors_of
from qfae_runtime.engines.plan import Bucket, Profile, buckets_of, logger_of
from qfae_runtime.engines.tensorrt import TensorRtEngine
from qfae_runtime.errors import EngineError

from .doubles.tensorrt import SIZE, FakeTensorRt, plan_bytes

REBUILD = "qfae-export --onnx engines/brats.fp16.onnx"


def open_plan(content: bytes, backend: str = "tensorrt", name: str = "engines/brats.plan") -> TensorRtEngine:
    return TensorRtEngine(content, SIZE, 8, backend=backend, name=name)


# --- buckets ---


@pytest.mark.parametrize(
    ("profiles", "max_batch", "expected"),
    [
        ([(1, 8, 8)], 8, [(1, 0), (2, 0), (4, 0), (8, 0)]),
        ([(1, 8, 12)], 12, [(1, 0), (2, 0), (4, 0), (8, 0), (12, 0)]),
        ([(1, 1, 2)], 1, [(1, 0)]),
        # one profile for each size: what TensorRT's builder is given for max_batch 6, then exact ones, then wide ones
        ([(1, 1, 2), (1, 2, 2), (2, 4, 4), (3, 6, 6)], 6, [(1, 0), (2, 1), (4, 2), (6, 3)]),
        ([(1, 1, 1), (2, 2, 2), (4, 4, 4)], 4, [(1, 0), (2, 1), (4, 2)]),
        ([(1, 1, 1), (1, 8, 8), (1, 32, 32)], 32, [(1, 0), (2, 1), (4, 1), (8, 1), (16, 1 + 1), (32, 2)]),
        # the order of the profiles does not matter
        ([(4, 4, 4), (1, 1, 3)], 4, [(1, 1), (2, 1), (3, 1), (4, 0)]),
        # the manifest says less than the plan takes, more, or what falls between two profiles
        ([(1, 8, 8)], 5, [(1, 0), (2, 0), (4, 0), (5, 0)]),
        ([(1, 8, 8)], 100, [(1, 0), (2, 0), (4, 0), (8, 0)]),
        ([(16, 16, 16), (32, 32, 32)], 20, [(16, 0), (32, 1)]),
        # a plan that takes no small batches is filled up
        ([(3, 8, 8)], 8, [(4, 0), (8, 0)]),
        ([(5, 5, 5)], 2, [(5, 0)]),
    ],
)
def test_buckets(profiles: list[tuple[int, int, int]], max_batch: int, expected: list[tuple[int, int]]) -> None:
    assert buckets_of([Profile(*one) for one in profiles], max_batch) == tuple(Bucket(*one) for one in expected)


sizes = st.lists(st.integers(1, 64), min_size=3, max_size=3).map(sorted)


@given(st.lists(sizes, min_size=1, max_size=5), st.integers(1, 80))
def test_there_is_a_bucket_for_every_batch(profiles: list[list[int]], max_batch: int) -> None:
    known = [Profile(*one) for one in profiles]
    buckets = buckets_of(known, max_batch)
    batches = [bucket.batch for bucket in buckets]
    assert batches == sorted(set(batches))
    assert all(known[one.profile].least <= one.batch <= known[one.profile].most for one in buckets)
    assert batches[-1] >= min(max_batch, max(one.most for one in known))
    assert not batches[:-1] or batches[-2] < max_batch  # none is larger than it need be


def test_bytes_of_the_tensors() -> None:
    found = {tensor.name: tensor.bytes_per_image for tensor in tensors_of(224)}
    assert found == {"images": 150528, "score": 4, "anomaly_map": 200704, "reconstruction": 150528}


# --- opening ---


def test_a_plan_that_does_not_load_says_how_to_build_it(trt: FakeTensorRt) -> None:
    with pytest.raises(EngineError) as caught:
        open_plan(b"no plan")
    assert str(caught.value) == (
        "engines/brats.plan: TensorRT 11.4.0 cannot load it on Fake GPU 0 (compute capability 9.0): "
        "Serialization assertion failed: version tag does not match; Engine deserialization failed.; "
        f"a plan fits one version and GPU: build it here with: {REBUILD}"
    )
    with pytest.raises(EngineError, match=r"TensorRT-RTX 11\.4\.0 cannot load it .* --format rtx-plan$"):
        open_plan(b"no plan", "tensorrt-rtx", "engines/brats.rtx.plan")
    assert trt.cuda.left == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"score": None}, "'score': expected output float32 (batch,), got none, only anomaly_map, images, recon"),
        ({"score": ("OUTPUT", "HALF", [-1])}, "'score': expected output float32 (batch,), got output HALF (batch,);"),
        ({"score": ("OUTPUT", "FLOAT", [-1, 1])}, "expected output float32 (batch,), got output float32 (batch, 1);"),
        ({"images": ("INPUT", "FLOAT", [-1, 6, 6, 3])}, "uint8 (batch, 6, 6, 3), got input float32 (batch, 6, 6, 3);"),
        ({"score": ("INPUT", "FLOAT", [-1])}, "'score': expected output float32 (batch,), got input float32 (batch,);"),
        ({"mask": ("INPUT", "FLOAT", [-1])}, "tensor 'mask': expected nothing of that name, got it"),
    ],
)
def test_other_plans_are_refused(trt: FakeTensorRt, changed: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError) as caught:
        open_plan(plan_bytes((1, 8, 8), changed=changed))
    assert said in str(caught.value)
    assert str(caught.value).endswith(
        f"this is no plan that qfae-export built for this image size, build it with: {REBUILD}"
    )
    assert trt.cuda.left == []


def test_a_plan_of_another_image_size_is_refused(trt: FakeTensorRt) -> None:
    with pytest.raises(EngineError) as caught:
        TensorRtEngine(plan_bytes((1, 8, 8), size=4), SIZE, 8)
    assert str(caught.value) == (
        "NAME.plan: tensor 'images': expected input uint8 (batch, 6, 6, 3), got input uint8 (batch, 4, 4, 3); "
        "this is no plan that qfae-export built for this image size, "
        "build it with: qfae-export --onnx NAME.fp16.onnx"
    )


# --- what is missing ---


@pytest.mark.parametrize(
    ("backend", "module", "title", "package"),
    [
        ("tensorrt", "tensorrt", "TensorRT", "tensorrt"),
        ("tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX", "tensorrt-rtx-cu13"),
    ],
)
def test_a_missing_library_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, backend: str, module: str, title: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError) as caught:
        open_plan(b"", backend)
    assert str(caught.value) == (
        f"{title} cannot be imported (import of {module} halted; None in sys.modules), this plan needs it; "
        f"install it with: pip install {package}"
    )


def test_the_modules_import_where_neither_is_installed() -> None:
    script = (
        "import sys\n"
        "class Wall:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('tensorrt', 'tensorrt_rtx', 'cuda'):\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Wall())\n"
        "from qfae_runtime.engines.tensorrt import TensorRtEngine\n"
        "try: TensorRtEngine(b'', 224, 8)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.stdout == (
        "EngineError TensorRT cannot be imported (blocked: tensorrt), this plan needs it; "
        "install it with: pip install tensorrt\n"
    ), done.stderr


def test_the_real_library_speaks_to_our_logger(capfd: pytest.CaptureFixture[str]) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    log = logger_of(trt)
    assert logger_of(trt) is log
    runtime = trt.Runtime(log)
    assert runtime.engine_host_code_allowed is False
    log.forget()
    assert log.reason() == "it gave no reason"
    assert runtime.deserialize_cuda_engine(b"no plan at all, but long enough to have a header" * 4) is None
    assert "Serialization" in log.reason()
    assert "\n" not in log.reason()
    assert capfd.readouterr() == ("", "")


def test_the_real_library_has_what_is_asked_of_it() -> None:
    """Without a GPU no plan can be opened, but what the bindings offer can be looked up."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    offered = {
        trt.ICudaEngine: "create_execution_context create_runtime_config device_memory_size_v2 get_tensor_dtype "
        "get_tensor_mode get_tensor_name get_tensor_profile_shape get_tensor_shape num_io_tensors "
        "num_optimization_profiles",
        trt.IExecutionContext: "execute_async_v3 get_tensor_shape infer_shapes is_stream_capturable set_device_memory "
        "set_input_shape set_optimization_profile_async set_tensor_address",
        trt.IRuntimeConfig: "create_runtime_cache dynamic_shapes_kernel_specialization_strategy "
        "set_execution_context_allocation_strategy set_runtime_cache",
    }
    missing = [name for kind, names in offered.items() for name in names.split() if not hasattr(kind, name)]
    assert missing == []
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert (trt.DataType.UINT8.name, trt.DataType.FLOAT.name) == ("UINT8", "FLOAT")
    assert (trt.TensorIOMode.INPUT.name, trt.TensorIOMode.OUTPUT.name) == ("INPUT", "OUTPUT")
    assert tuple(trt.Dims([2, 3])) == (2, 3)
