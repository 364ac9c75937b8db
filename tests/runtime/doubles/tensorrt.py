"""A double of the tensorrt module. A "plan" is JSON that says what it takes and what is wrong with it.

It computes what `expected_scores` says, on the double of CUDA's memory and streams, and refuses what TensorRT leaves
undefined: a context without memory, shape or addresses, or one that is changed after it was captured.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.tensorrt import TensorRtEngine

from .cuda import FakeCuda, Stream

SIZE = 6
WORKING_MEMORY = 64
INPUT = "images"


def plan_bytes(
    *profiles: tuple[int, int, int],
    size: int = SIZE,
    faults: Sequence[str] = (),
    changed: Mapping[str, Any] | None = None,
) -> bytes:
    """Return a plan with these (min, opt, max) batches; `changed` are tensors as (mode, type, shape), or None."""
    square = [size, size]
    tensors: dict[str, Any] = {
        INPUT: ("INPUT", "UINT8", [-1, *square, 3]),
        "score": ("OUTPUT", "FLOAT", [-1]),
        "anomaly_map": ("OUTPUT", "FLOAT", [-1, *square]),
        "reconstruction": ("OUTPUT", "UINT8", [-1, *square, 3]),
    } | dict(changed or {})
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return json.dumps({"profiles": profiles, "tensors": kept, "faults": list(faults)}).encode()


def open_engine(
    trt: FakeTensorRt,
    *profiles: tuple[int, int, int],
    faults: Sequence[str] = (),
    max_batch: int = 8,
    rtx: bool = False,
) -> TensorRtEngine:
    """Open an engine on a plan with these profiles, else one for batches of 1 to 8."""
    trt.rtx = rtx
    plan = plan_bytes(*(profiles or [(1, 8, 8)]), faults=faults)
    return TensorRtEngine(plan, SIZE, max_batch, backend="tensorrt-rtx" if rtx else "tensorrt")


def batch_of(count: int, seed: int = 0) -> UInt8:
    """Return images, other ones for every count and seed."""
    return np.random.default_rng([seed, count]).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def check_scores(scores: Scores, images: UInt8) -> None:
    """Fail if these are not the scores of these images."""
    expected = expected_scores(images)
    for name in scores._fields:
        got, wanted = getattr(scores, name), getattr(expected, name)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def expected_scores(images: UInt8) -> Scores:
    """Return what a plan computes: each number depends on one image alone."""
    maps = images.astype(np.float32).mean(axis=3) / 255
    return Scores(maps.max(axis=(1, 2)), maps, 255 - images)


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.started = True


class Strategy(IntEnum):
    STATIC = 0
    USER_MANAGED = 2


class Specialization(IntEnum):
    LAZY = 0
    EAGER = 1


class FakeTensorRt:
    """Stands for the module; `rtx` makes it TensorRT-RTX.

    `contexts` are those alive, `made` the (batch, profile) that were set up, `seen` the images of every run.
    """

    ILogger: type[Any] = ILogger
    ExecutionContextAllocationStrategy = Strategy
    DynamicShapesKernelSpecializationStrategy = Specialization

    def __init__(self, cuda: FakeCuda, version: str = "11.4.0", *, rtx: bool = False) -> None:
        self.__version__ = version
        self.cuda, self.rtx = cuda, rtx
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.made: list[tuple[int, int]] = []
        self.seen: list[UInt8] = []
        cuda.users.append(self._check_unused)

    def _check_unused(self, address: int) -> None:
        assert not [context for context in self.contexts if context.memory == address], "a context works in it"

    def Runtime(self, logger: Any) -> Runtime:
        assert logger.started
        return Runtime(self, logger)


class Runtime:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def __setattr__(self, name: str, value: Any) -> None:
        assert name != "engine_host_code_allowed", "a plan may not bring code for this machine"
        super().__setattr__(name, value)

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        assert self.trt.cuda.current is not None, "no GPU was chosen"
        self.logger.log(Severity.INFO, "Loaded engine size: 1 MiB")
        try:
            return Engine(self.trt, json.loads(content), self.logger)
        except ValueError:
            self.logger.log(Severity.ERROR, "Serialization assertion failed:\n  version tag does not match")
            self.logger.log(Severity.INTERNAL_ERROR, "Engine deserialization failed.")
            return None


class Engine:
    device_memory_size_v2 = WORKING_MEMORY

    def __init__(self, trt: FakeTensorRt, plan: dict[str, Any], logger: Any) -> None:
        self.trt, self.plan, self.logger = trt, plan, logger
        self.num_io_tensors, self.num_optimization_profiles = len(plan["tensors"]), len(plan["profiles"])
        if "warns" in plan["faults"]:
            logger.log(Severity.WARNING, "This plan was built on another model of GPU.")

    def get_tensor_name(self, number: int) -> str:
        return str(list(self.plan["tensors"])[number])

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self.plan["tensors"][name][0])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.plan["tensors"][name][1])

    def get_tensor_shape(self, name: str) -> Any:
        return self.plan["tensors"][name][2]

    def get_tensor_profile_shape(self, name: str, number: int) -> Any:
        shape = self.get_tensor_shape(name)
        return [(batch, *shape[1:]) for batch in self.plan["profiles"][number]]

    def create_runtime_config(self) -> RuntimeConfig:
        assert self.trt.rtx
        return RuntimeConfig()

    def create_execution_context(self, settings: Strategy | RuntimeConfig) -> Context | None:
        if "no context" in self.plan["faults"]:
            self.logger.log(Severity.ERROR, "out of memory")
            return None
        if self.trt.rtx:
            assert isinstance(settings, RuntimeConfig)
            assert settings.dynamic_shapes_kernel_specialization_strategy is Specialization.EAGER
            assert settings.cache is not None
            settings = settings.strategy
        assert settings is Strategy.USER_MANAGED
        return Context(self)


class RuntimeConfig:
    def __init__(self) -> None:
        self.strategy, self.cache = Strategy.STATIC, None
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return object()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt, self.faults = engine, engine.trt, engine.plan["faults"]
        self.memory: int | None = None
        self.profile: tuple[int, int, int] | None = None
        self.batch = 0
        self.addresses: dict[str, int] = {}
        self.runs, self.frozen = 0, False
        self.done: list[bool] = []
        self.trt.contexts.add(self)

    def set_device_memory(self, address: int, size: int) -> None:
        assert not self.frozen
        assert size >= WORKING_MEMORY
        assert address % 16 == 0
        self.trt.cuda.check(address, size)
        self.memory = address

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert not self.frozen
        assert self.trt.cuda.stream_of(stream)
        self.profile, self.batch = self.engine.plan["profiles"][number], 0
        self.number = number
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.frozen
        assert self.profile is not None
        least, _, most = self.profile
        if name != INPUT or not least <= shape[0] <= most or list(shape[1:]) != self.engine.get_tensor_shape(name)[1:]:
            self.engine.logger.log(Severity.ERROR, f"{name}: {shape} does not fit the profile")
            return False
        self.batch = shape[0]
        self.trt.made.append((self.batch, self.number))
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.frozen
        self.addresses[name] = address
        return name in self.engine.plan["tensors"]

    def infer_shapes(self) -> list[str]:
        return [] if self.batch else [INPUT]

    def get_tensor_shape(self, name: str) -> Any:
        batch = self.batch * 2 if f"doubles {name}" in self.faults else self.batch
        return [batch, *self.engine.get_tensor_shape(name)[1:]]

    def is_stream_capturable(self, stream: int) -> bool:
        return "not capturable" not in self.faults

    def execute_async_v3(self, handle: int) -> bool:
        stream = self.trt.cuda.stream_of(handle)
        assert self.memory is not None
        assert self.batch > 0
        assert set(self.addresses) == set(self.engine.plan["tensors"])
        capturing = stream.captured is not None
        if "raises" in self.faults:
            raise RuntimeError("a C++ exception")
        if "runs once" in self.faults and self.runs:
            self.engine.logger.log(Severity.ERROR, "cannot run again")
            return False
        self.runs += 1
        if self.trt.cuda.last_error:
            self.engine.logger.log(Severity.ERROR, "an earlier CUDA error was left to be found")
            return False
        if capturing:
            assert self.done, "captured before a first run was done"
            self.frozen = True
            if "capture" in self.faults:
                self.trt.cuda.cudaMalloc(1)
                self.engine.logger.log(Severity.ERROR, "cannot allocate during capture")
                return False
            if "capture breaks" in self.faults:
                self.trt.cuda.cudaMalloc(1)
            if "capture is empty" in self.faults:
                return True
        self.trt.cuda.enqueue(stream, self._kernel(stream))
        return True

    def _kernel(self, stream: Stream) -> Callable[[], None]:
        batch, addresses, memory, faults = self.batch, dict(self.addresses), self.memory, self.faults
        size = self.engine.get_tensor_shape(INPUT)[1]
        cuda, seen, done = self.trt.cuda, self.trt.seen, self.done

        def array(name: str, dtype: type, *shape: int) -> Any:
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            cuda.check(addresses[name], count)
            return (
                np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(addresses[name])).view(dtype).reshape(shape)
            )

        def kernel() -> None:
            assert memory is not None
            cuda.check(memory, WORKING_MEMORY)
            images = array(INPUT, np.uint8, batch, size, size, 3)
            seen.append(images.copy())
            computed = expected_scores(images)
            for name, values in computed._asdict().items():
                if f"unwritten {name}" not in faults:
                    array(name, values.dtype.type, *values.shape)[...] = values
            done.append(True)

        return kernel
