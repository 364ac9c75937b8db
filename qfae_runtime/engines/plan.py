"""A plan: opened by TensorRT or TensorRT-RTX, held against what a QFAE engine is, and made ready batch size by size.

Letters: B images in a batch, S the engine's `image_size`. Needs the GPU to be the calling thread's (`Cuda.use`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from qfae_runtime.engines.base import INPUT_NAME, one_line, tensors_of
from qfae_runtime.engines.batches import powers_of_two
from qfae_runtime.errors import EngineError

LIBRARIES = {
    "tensorrt": ("TensorRT", "tensorrt", "tensorrt"),
    "tensorrt-rtx": ("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx-cu13"),
}
"""By backend: the library's name in sentences, its module, the package that installs it."""

_TYPES = {"uint8": "UINT8", "float32": "FLOAT"}  # of numpy: of TensorRT
_KEPT_MESSAGES = 100


class Profile(NamedTuple):
    """Batch sizes of an optimization profile: it takes least..most, and its kernels were tuned for `best`."""

    least: int
    best: int
    most: int


class Bucket(NamedTuple):
    """A batch size that the plan is run with, and the number of the optimization profile that serves it."""

    batch: int
    profile: int


def buckets_of(profiles: Sequence[Profile], max_batch: int) -> tuple[Bucket, ...]:
    """Return the batch sizes to run, ascending; the last holds `max_batch` images, or as many as the plan takes.

    They are the powers of two, the largest batch of every profile and `max_batch`, as far as a profile takes them;
    each is served by the profile that was tuned nearest to it.
    """
    limit = min(max_batch, max(profile.most for profile in profiles))
    buckets: list[Bucket] = []
    for batch in sorted({*powers_of_two(limit)} | {limit} | {profile.most for profile in profiles}):
        fitting = [number for number, one in enumerate(profiles) if one.least <= batch <= one.most]
        if fitting:
            nearest = min(fitting, key=lambda number: (abs(profiles[number].best - batch), profiles[number].most))
            buckets.append(Bucket(batch, nearest))
            if batch >= limit:
                break
    return tuple(buckets)


def import_library(backend: str) -> Any:
    """Return the module that runs plans of this backend, "tensorrt" or "tensorrt-rtx".

    Raises:
        EngineError: it is not installed, or cannot be loaded.

    """
    title, module, package = LIBRARIES[backend]
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library it loads is damaged
        raise EngineError(
            f"{title} cannot be imported ({one_line(str(error))}), this plan needs it; "
            f"install it with: pip install {package}"
        ) from None


@cache
def logger_of(trt: Any) -> Any:
    """Return the one logger for this module: TensorRT keeps the first it is given, so all of a process share it.

    It prints nothing. `errors` and `warnings` hold what was said, `forget()` empties the errors, `reason()` returns
    the first and the last of them as a phrase: what went wrong first, and what came of it.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # TensorRT takes nothing but a subclass
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT_MESSAGES)
            self.warnings: deque[str] = deque(maxlen=_KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                self.errors.append(one_line(message))
            elif severity == levels.WARNING:
                self.warnings.append(one_line(message))

        def forget(self) -> None:
            self.errors.clear()

        def reason(self) -> str:
            if not self.errors:
                return "it gave no reason"
            return "; ".join(dict.fromkeys((self.errors[0], self.errors[-1])))

    return Log()


class Execution:
    """An execution context, set up once for one batch size and never changed: a captured graph depends on that.

    No other name refers to the context, so that `close` frees it though a traceback may still hold who used it.
    """

    def __init__(self, plan: Plan, context: Any, bucket: Bucket) -> None:
        self._plan = plan
        self._context = context
        self._bucket = bucket
        self.batch = bucket.batch

    def set_up(self, addresses: Mapping[str, int], memory: int, stream: Any) -> None:
        """Give the context its memory, profile, shape and addresses; see Plan.execution."""
        plan, (batch, profile) = self._plan, self._bucket
        if plan.memory_size:
            plan.ask("take its memory", lambda: self._context.set_device_memory(memory, plan.memory_size) or True)
        image = (batch, *plan.tensors[0].shape)
        plan.ask(
            f"be set up for batches of {batch}",
            lambda: (
                self._context.set_optimization_profile_async(profile, int(stream))
                and self._context.set_input_shape(INPUT_NAME, image)
                and all(self._context.set_tensor_address(name, address) for name, address in addresses.items())
                and not self._context.infer_shapes()
            ),
        )
        for tensor in plan.tensors:
            got, expected = tuple(self._context.get_tensor_shape(tensor.name)), (batch, *tensor.shape)
            if got != expected:  # it would write past the end of the buffer
                raise EngineError(
                    f"{plan.name}: tensor {tensor.name!r}: expected shape {expected} in a batch of {batch}, got {got}; "
                    f"this is no plan that qfae-export built, build it with: {plan.rebuild}"
                )

    def enqueue(self, stream: Any) -> None:
        """Enqueue one run of the plan; it reads and writes the addresses that `Plan.execution` was given.

        Raises:
            EngineError: TensorRT refuses.

        """
        self._plan.ask(f"run a batch of {self.batch}", lambda: self._context.execute_async_v3(int(stream)))

    def check_capturable(self, stream: Any) -> None:
        """Refuse what TensorRT itself says cannot be captured in a CUDA graph.

        Raises:
            EngineError: it cannot be captured.

        """
        # TensorRT-RTX may need memory at run time, unless its plan was built to go without.
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(stream)):
            raise EngineError(f"{self._plan.title} says that this plan cannot be captured")

    def close(self) -> None:
        """Free the context, whoever still holds this object."""
        self._context = None


class Plan:
    """A plan's bytes, opened on the thread's GPU. The bytes are copied there; they may be freed afterwards.

    Only bytes that were held against their manifest may come here: a plan is native code. It may bring no code for
    this machine's processor, for `engine_host_code_allowed` stays off.

    `name` is the plan's file in messages, `gpu` the card's name in them.

    Raises:
        EngineError: TensorRT does not open it, or its inputs and outputs are not those of a QFAE engine.

    """

    def __init__(self, trt: Any, backend: str, content: bytes, image_size: int, name: str, gpu: str) -> None:
        self._trt = trt
        self._log = logger_of(trt)
        self._rtx = backend == "tensorrt-rtx"
        self.name = name
        self.version: str = trt.__version__
        self.title = f"{LIBRARIES[backend][0]} {self.version}"
        self.tensors = tensors_of(image_size)
        self._log.warnings.clear()
        self._cache: Any = None
        # Kept, as the engine is, until the engine is gone.
        self._runtime = self.ask("start", lambda: trt.Runtime(self._log))
        self._engine: Any = self.ask(
            f"load it on {gpu}",
            lambda: self._runtime.deserialize_cuda_engine(content),
            "a plan fits one version and GPU: build it here with",
        )
        self._check_signature()
        self._settings = self.ask("be configured", self._context_settings)
        self.warnings: tuple[str, ...] = tuple(self._log.warnings)
        self.memory_size = int(self._engine.device_memory_size_v2)
        self.profiles: tuple[Profile, ...] = tuple(
            Profile(*(int(shape[0]) for shape in self._engine.get_tensor_profile_shape(INPUT_NAME, number)))
            for number in range(self._engine.num_optimization_profiles)
        )

    def execution(self, bucket: Bucket, addresses: Mapping[str, int], memory: int, stream: Any) -> Execution:
        """Make the plan ready for one batch size.

        `addresses` of the tensors on the GPU, each with room for the bucket's batch, and `memory`, the address of
        `memory_size` bytes to work in, are the caller's, who keeps them as long as the Execution. Executions that
        share `memory` must not run at the same time.

        Raises:
            EngineError: TensorRT refuses, or its outputs are not as large as they should be.

        """
        execution = Execution(
            self, self.ask("create a context", lambda: self._engine.create_execution_context(self._settings)), bucket
        )
        try:
            execution.set_up(addresses, memory, stream)
        except BaseException:
            execution.close()
            raise
        return execution

    def ask(self, what: str, call: Callable[[], Any], cure: str = "build it again with") -> Any:
        """Call TensorRT; return its answer, or turn False, None and exceptions into a sentence with its own reason.

        Raises:
            EngineError: what could not be done, what TensorRT said, and the command that builds the plan.

        """
        self._log.forget()
        raised = ""
        try:
            answer = call()
        except Exception as error:  # its bindings raise TypeError, RuntimeError and others
            answer, raised = None, one_line(str(error))
        if answer is None or answer is False:
            reason = self._log.reason() if self._log.errors or not raised else raised
            raise EngineError(f"{self.name}: {self.title} cannot {what}: {reason}; {cure}: {self.rebuild}")
        return answer

    @property
    def rebuild(self) -> str:
        """The command that builds this plan on the machine it is to run on."""
        path = Path(self.name)
        stem = path.name.removesuffix(".plan").removesuffix(".rtx").removesuffix(".fp16")
        kind = " --format rtx-plan" if self._rtx else ""
        return f"qfae-export --onnx {quote(str(path.with_name(stem + '.fp16.onnx')))}{kind}"

    def close(self) -> None:
        """Free the plan, whose Executions must be closed before."""
        self._settings = self._cache = self._engine = self._runtime = None

    def _context_settings(self) -> Any:
        """Return what execution contexts are created with: their working memory is given to them, and shared."""
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._rtx:
            return managed
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(managed)
        # The default compiles kernels for a batch size in the background and changes to them in the middle of a run:
        # scores would depend on when they were computed, and a graph would keep the slow kernels of the first run.
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.dynamic_shapes_kernel_specialization_strategy = eager
        # One cache for all contexts: else each of them compiles the same kernels.
        self._cache = settings.create_runtime_cache()
        settings.set_runtime_cache(self._cache)
        return settings

    def _check_signature(self) -> None:
        engine, wanted = self._engine, {tensor.name: tensor for tensor in self.tensors}
        found = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        surplus = [name for name in found if name not in wanted]
        if surplus:
            raise self._foreign(surplus[0], "nothing of that name", "it")
        numpy_types = {theirs: ours for ours, theirs in _TYPES.items()}
        for name, tensor in wanted.items():
            mode = "input" if name == INPUT_NAME else "output"
            expected = f"{mode} {tensor.dtype} {_shape(tensor.shape)}"
            if name not in found:
                raise self._foreign(name, expected, f"none, only {', '.join(sorted(found))}")
            dtype, shape = engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name))
            got = f"{engine.get_tensor_mode(name).name.lower()} {numpy_types.get(dtype, dtype)} {_shape(shape[1:])}"
            if got != expected:
                raise self._foreign(name, expected, got)

    def _foreign(self, name: str, expected: str, got: str) -> EngineError:
        return EngineError(
            f"{self.name}: tensor {name!r}: expected {expected}, got {got}; "
            f"this is no plan that qfae-export built for this image size, build it with: {self.rebuild}"
        )


def _shape(image: Sequence[int]) -> str:
    return f"({', '.join(map(str, ('batch', *image)))}{'' if image else ','})"
