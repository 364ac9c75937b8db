"""The little of CUDA that an engine needs, through cuda-python. Every return code is checked.

Addresses are plain integers; streams, events and graphs are cuda-python's own objects. What is enqueued runs later,
in the order of its stream: memory that is handed over must stay as it is until that stream has been synchronised.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import EngineError

_BINDINGS = "cuda.bindings.runtime"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for what others put on the default stream
_NO_TIMING = 2  # cudaEventDisableTiming
_PAGE_LOCKED = 0  # cudaHostAllocDefault
_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class Gpu:
    """The card that an engine runs on or that a plan is built on, for the record.

    compute_capability  e.g. "9.0"
    driver              version of NVIDIA's driver; None where it does not show itself
    cuda                the latest CUDA that the driver supports, e.g. "13.0"; of a builder torch's, None if it has none
    """

    name: str
    compute_capability: str
    driver: str | None
    cuda: str | None

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


class Cuda:
    """One GPU. Owns all memory, streams and events that come from it, until `close`.

    `device` is "cuda" (the first GPU) or "cuda:N". Not for use from two threads at once; another thread that takes
    over calls `use` first.

    Raises:
        EngineError: cuda-python or the GPU is missing, or CUDA failed. So does every method but `close` and `discard`.

    """

    def __init__(self, device: str) -> None:
        self._runtime: Any = _import_bindings()
        self._kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault  # the addresses say where they are
        self._frees = ExitStack()
        self.device = device
        self.index = self._find(device)
        self.device = f"cuda:{self.index}"
        self.use()
        self.gpu = self._describe()

    def use(self) -> None:
        """Make this GPU the calling thread's; what a thread allocates or opens goes to its own GPU."""
        self._call("cudaSetDevice", self.index)

    def stream(self) -> Any:
        """Return a new stream."""
        stream = self._call("cudaStreamCreateWithFlags", _NON_BLOCKING)
        self._frees.callback(self._runtime.cudaStreamDestroy, stream)
        return stream

    def event(self) -> Any:
        """Return a new event."""
        event = self._call("cudaEventCreateWithFlags", _NO_TIMING)
        self._frees.callback(self._runtime.cudaEventDestroy, event)
        return event

    def device_memory(self, size: int) -> int:
        """Return the address of `size` fresh bytes on the GPU, aligned to at least 256; their content is undefined."""
        address = int(self._call("cudaMalloc", size))
        self._frees.callback(self._runtime.cudaFree, address)
        return address

    def host_memory(self, size: int) -> UInt8:
        """Return `size` page-locked bytes of this machine, undefined as yet. The array dangles after `close`."""
        address = int(self._call("cudaHostAlloc", size, _PAGE_LOCKED))
        self._frees.callback(self._runtime.cudaFreeHost, address)
        array: UInt8 = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return array

    def copy(self, to: int, source: int, size: int, stream: Any) -> None:
        """Enqueue a copy of `size` bytes between any two addresses, of the GPU or page-locked."""
        self._call("cudaMemcpyAsync", to, source, size, self._kind, stream)

    def fill(self, address: int, byte: int, size: int, stream: Any) -> None:
        """Enqueue filling `size` bytes of the GPU with `byte`, 0..255."""
        self._call("cudaMemsetAsync", address, byte, size, stream)

    def record(self, event: Any, stream: Any) -> None:
        """Enqueue the event: it happens when all that was enqueued before it is done."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is enqueued from now on wait for the event as it was recorded last."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize(self, stream: Any) -> None:
        """Wait until all that was enqueued is done."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """Return what `enqueue` puts on the stream as a graph that can be launched; nothing of it is run now.

        The caller owns the graph: hand it to `discard` before `close`.

        Raises:
            EngineError: it cannot be captured; the stream can be used as before.

        """
        # A capture forbids this thread what is unsafe in it; two at once would fail one another.
        with _CAPTURING, ExitStack() as undo:
            mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self._call("cudaStreamBeginCapture", stream, mode)
            try:
                enqueue()
            except BaseException:
                # Ends the capture, which is broken by now; a graph that comes out all the same is of no use.
                _, graph = self._runtime.cudaStreamEndCapture(stream)
                if graph is not None and int(graph):
                    self._runtime.cudaGraphDestroy(graph)
                self._runtime.cudaGetLastError()
                raise
            graph = self._call("cudaStreamEndCapture", stream)
            undo.callback(self._runtime.cudaGraphDestroy, graph)
            # Work that went to another GPU or stream leaves an empty graph and no error: launching it does nothing.
            if not self._call("cudaGraphGetNodes", graph, 0, take=1):
                raise EngineError("CUDA captured an empty graph: the work went to another stream or GPU")
            return self._call("cudaGraphInstantiate", graph, 0)

    def launch(self, graph: Any, stream: Any) -> None:
        """Enqueue a captured graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def discard(self, graph: Any) -> None:
        """Free a captured graph; errors are not told."""
        self._runtime.cudaGraphExecDestroy(graph)

    def settle(self, *streams: Any) -> None:
        """Wait for the streams whatever they come to, so that nothing uses memory that is given back or reused."""
        self._runtime.cudaSetDevice(self.index)
        for stream in streams:
            self._runtime.cudaStreamSynchronize(stream)
        self._runtime.cudaGetLastError()

    def close(self) -> None:
        """Free everything, in reverse order. Calling it twice does no harm.

        Errors are not told: after a failure every call fails, and the first error is the one worth reading.
        """
        self._runtime.cudaSetDevice(self.index)
        self._frees.close()

    def _call(self, name: str, *arguments: Any, take: int = 0) -> Any:
        """Call the binding, check its code, return the value at place `take` behind it (None where there is none)."""
        code, *values = getattr(self._runtime, name)(*arguments)
        if int(code) != 0:
            self._runtime.cudaGetLastError()  # else the next call of anyone would be told this error again
            cure = "start again; if it comes back, look at the GPU with nvidia-smi and rebuild the plan"
            if int(code) == _OUT_OF_MEMORY:
                cure = "free GPU memory (nvidia-smi shows who holds it) or build the plan for a smaller batch"
                name = f"{name} of {arguments[0] / 2**20:.1f} MiB" if "lloc" in name else name
            raise EngineError(f"{name} failed on {self.device}: {self._text(code)}; {cure}")
        return values[take] if values else None

    def _text(self, code: Any) -> str:
        _, text = self._runtime.cudaGetErrorString(code)
        return f"CUDA error {int(code)}, {text.decode(errors='replace')}"

    def _find(self, device: str) -> int:
        """Return the index of the GPU, which must be there."""
        found = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
        if found is None:
            raise EngineError(f"device {device!r}: expected cuda or cuda:N, such as cuda:0")
        index = int(found[1] or 0)
        code, count = self._runtime.cudaGetDeviceCount()
        if int(code) != 0 or count == 0:
            reason = self._text(code) if int(code) != 0 else "CUDA counts 0 GPUs"
            raise EngineError(f"device {device!r}: no GPU can be used here ({reason}); {self._cure()}")
        if index >= count:
            there = "is cuda:0" if count == 1 else f"are cuda:0 to cuda:{count - 1}"
            raise EngineError(f"device {device!r}: no such GPU, there {there}; pass one of them with --device")
        return index

    def _cure(self) -> str:
        supported = self._supported()
        built = int(self._call("cudaRuntimeGetVersion")) // 1000
        if 0 < supported < built * 1000:
            return (
                f"the driver supports CUDA {_dotted(supported)} and cuda-python is for CUDA {built}: "
                f"update the driver, or pip install 'cuda-bindings=={supported // 1000}.*'"
            )
        return "install NVIDIA's driver (nvidia-smi must list a GPU), or score with the .onnx engine on the CPU"

    def _supported(self) -> int:
        """Return the latest CUDA that the driver supports, 13000 for 13.0, or 0 without a driver."""
        return int(self._call("cudaDriverGetVersion"))

    def _describe(self) -> Gpu:
        facts = self._call("cudaGetDeviceProperties", self.index)
        name = facts.name.partition(b"\0")[0].decode(errors="replace").strip()
        return Gpu(name, f"{facts.major}.{facts.minor}", driver_version(), _dotted(self._supported()))


def _import_bindings() -> Any:
    try:
        return import_module(_BINDINGS)
    except (ImportError, OSError) as error:  # OSError: a library it loads is damaged
        raise EngineError(
            f"cuda-python cannot be imported ({' '.join(str(error).split())[:200]}), a plan needs it; "
            "install it with: pip install cuda-bindings"
        ) from None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def driver_version(file: Path | None = None) -> str | None:
    """Return the version of NVIDIA's driver from the `file` where it shows itself on Linux; None where it does not."""
    with suppress(OSError):  # not Linux, or a container that hides it
        found = re.search(r"Kernel Module[^\n]*?\s(\d+(?:\.\d+)+)", (file or _DRIVER_FILE).read_text(errors="replace"))
        return found[1] if found else None
    return None
