"""A double of cuda.bindings.runtime whose GPU is this process's memory.

Work that is enqueued is run as late as CUDA may run it, or some streams' as early as it may: a missing wait or
synchronisation then shows as a wrong number. Use after free, double frees, and calls that a capture forbids are found.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

SUCCESS, OUT_OF_MEMORY, NO_DRIVER, NO_GPU, UNSUPPORTED_IN_CAPTURE, INVALID_CAPTURE = 0, 2, 35, 100, 900, 901
TEXTS = {
    OUT_OF_MEMORY: b"out of memory",
    NO_DRIVER: b"CUDA driver version is insufficient for CUDA runtime version",
    NO_GPU: b"no CUDA-capable device is detected",
    UNSUPPORTED_IN_CAPTURE: b"operation not permitted when stream is capturing",
    INVALID_CAPTURE: b"operation failed due to a previous error during capture",
    700: b"an illegal memory access was encountered",
}


class CopyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDefault = 4


class CaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class Event:
    def __init__(self) -> None:
        self.recorded = self.happened = 0
        self.stream: Stream | None = None


class Graph:
    """What a capture recorded, or an instance of it."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work = work

    def __int__(self) -> int:
        return id(self)


class Stream:
    def __init__(self) -> None:
        self.work: deque[tuple[Event | None, int, Callable[[], None] | None]] = deque()
        self.captured: list[Callable[[], None]] | None = None
        self.broken = False

    def __int__(self) -> int:
        return id(self)


class FakeCuda:
    """Stands for the module. `hurry` are the numbers of the streams, as they were made, that run as early as they may.

    `fail[name]` are the codes that the next calls of a function return, 0 for one that works; `calls` counts calls;
    `users` are asked whether they still need memory that is being freed; `last_error` is what cudaGetLastError clears.
    """

    cudaMemcpyKind = CopyKind
    cudaStreamCaptureMode = CaptureMode

    def __init__(self, *hurry: int, gpus: int = 1) -> None:
        self.hurry, self.gpus = hurry, gpus
        self.fail: dict[str, list[int]] = {}
        self.calls: Counter[str] = Counter()
        self.memory: dict[int, tuple[str, Any]] = {}
        self.streams: list[Stream] = []
        self.things: list[Any] = []
        self.users: list[Callable[[int], None]] = []
        self.driver = 13000
        self.last_error = SUCCESS
        self.thread = threading.local()

    @property
    def current(self) -> int | None:
        """The GPU that the calling thread has chosen."""
        return getattr(self.thread, "gpu", None)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            code = self.fail[name].pop(0) if self.fail.get(name) else 0
            answer = (code, None) if code != SUCCESS else found(*arguments)
            if answer[0] != SUCCESS:
                self.last_error = answer[0]
            return answer

        return call

    # --- the GPU ---

    def cudaGetDeviceCount(self) -> Any:
        return SUCCESS, self.gpus

    def cudaSetDevice(self, index: int) -> Any:
        assert index < self.gpus
        self.thread.gpu = index
        return (SUCCESS,)

    def cudaDriverGetVersion(self) -> Any:
        return SUCCESS, self.driver

    def cudaRuntimeGetVersion(self) -> Any:
        return SUCCESS, 13050

    def cudaGetDeviceProperties(self, index: int) -> Any:
        return SUCCESS, SimpleNamespace(name=f"Fake GPU {index}\0\0".encode(), major=9, minor=0)

    def cudaGetErrorString(self, code: int) -> Any:
        return SUCCESS, TEXTS.get(code, b"unknown")

    def cudaGetLastError(self) -> Any:
        self.last_error = SUCCESS
        return (SUCCESS,)

    # --- memory ---

    def cudaMalloc(self, size: int) -> Any:
        if self._capturing_unsafely():
            return UNSUPPORTED_IN_CAPTURE, None
        return self._allocate("cudaFree", size)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        assert flags == 0
        return self._allocate("cudaFreeHost", size)

    def cudaFree(self, address: int) -> Any:
        return self._release("cudaFree", address)

    def cudaFreeHost(self, address: int) -> Any:
        return self._release("cudaFreeHost", address)

    def _allocate(self, free: str, size: int) -> Any:
        buffer = (ctypes.c_uint8 * size)()
        ctypes.memset(buffer, 0xA5, size)  # undefined
        address = ctypes.addressof(buffer)
        self.memory[address] = (free, buffer)
        return SUCCESS, address

    def _release(self, free: str, address: int) -> Any:
        assert not any(stream.work for stream in self.streams), "freed while work is pending"
        for user in self.users:
            user(address)
        kind, _ = self.memory.pop(address)  # KeyError: freed twice, or never allocated
        assert kind == free
        return (SUCCESS,)

    def check(self, address: int, size: int) -> None:
        """Fail if these bytes do not lie in one live allocation."""
        for start, (_, buffer) in self.memory.items():
            if start <= address and address + size <= start + ctypes.sizeof(buffer):
                return
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    # --- streams and events ---

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == 1
        self.streams.append(Stream())
        self.things.append(self.streams[-1])
        return SUCCESS, self.streams[-1]

    def cudaStreamDestroy(self, stream: Stream) -> Any:
        self.things.remove(stream)
        return (SUCCESS,)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        assert flags == 2
        self.things.append(Event())
        return SUCCESS, self.things[-1]

    def cudaEventDestroy(self, event: Event) -> Any:
        self.things.remove(event)
        return (SUCCESS,)

    def cudaEventRecord(self, event: Event, stream: Stream) -> Any:
        assert event in self.things
        event.recorded += 1
        event.stream = stream
        number = event.recorded

        def happen() -> None:
            event.happened = number

        return self.enqueue(stream, happen)

    def cudaStreamWaitEvent(self, stream: Stream, event: Event, flags: int) -> Any:
        assert flags == 0
        assert event in self.things
        return self.enqueue(stream, None, event)

    def cudaStreamSynchronize(self, stream: Stream) -> Any:
        assert stream in self.things
        if self._capturing_unsafely():
            return (UNSUPPORTED_IN_CAPTURE,)
        while stream.work:
            self._run_first(stream)
        return (SUCCESS,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: CopyKind, stream: Stream) -> Any:
        assert kind is CopyKind.cudaMemcpyDefault

        def copy() -> None:
            self.check(to, size)
            self.check(source, size)
            ctypes.memmove(to, source, size)

        return self.enqueue(stream, copy)

    def cudaMemsetAsync(self, address: int, byte: int, size: int, stream: Stream) -> Any:
        def fill() -> None:
            self.check(address, size)
            ctypes.memset(address, byte, size)

        return self.enqueue(stream, fill)

    def enqueue(self, stream: Stream, work: Callable[[], None] | None, event: Event | None = None) -> Any:
        """Put work on a stream, or a wait for an event; it is recorded if the stream is capturing."""
        assert stream in self.things, "the stream is gone"
        assert self.current is not None, "no GPU was chosen"
        if stream.captured is not None:
            assert work is not None
            stream.captured.append(work)
            return (SUCCESS,)
        stream.work.append((event, event.recorded if event else 0, work))
        for _ in self.hurry:  # one may let another go on
            for number in self.hurry:
                self._run_ahead(self.streams[number])
        return (SUCCESS,)

    def _run_ahead(self, stream: Stream) -> None:
        while stream.work:
            event, number, _ = stream.work[0]
            if event is not None and event.happened < number:
                return
            self._run_first(stream)

    def _run_first(self, stream: Stream) -> None:
        event, number, work = stream.work.popleft()
        while event is not None and event.happened < number:
            assert event.stream is not None
            self._run_first(event.stream)
        if work is not None:
            work()

    # --- graphs ---

    def cudaStreamBeginCapture(self, stream: Stream, mode: CaptureMode) -> Any:
        assert mode is CaptureMode.cudaStreamCaptureModeThreadLocal
        assert not any(one.captured is not None for one in self.streams), "two captures at once"
        stream.captured, stream.broken = [], False
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: Stream) -> Any:
        work, stream.captured = stream.captured, None
        assert work is not None
        if stream.broken:
            return INVALID_CAPTURE, None
        self.things.append(Graph(work))
        return SUCCESS, self.things[-1]

    def cudaGraphGetNodes(self, graph: Graph, count: int) -> Any:
        assert count == 0
        return SUCCESS, [], len(graph.work)

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Any:
        assert flags == 0
        self.things.append(Graph(list(graph.work)))
        return SUCCESS, self.things[-1]

    def cudaGraphLaunch(self, graph: Graph, stream: Stream) -> Any:
        assert graph in self.things
        for work in graph.work:
            self.enqueue(stream, work)
        return (SUCCESS,)

    def cudaGraphDestroy(self, graph: Graph) -> Any:
        self.things.remove(graph)
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, graph: Graph) -> Any:
        self.things.remove(graph)
        return (SUCCESS,)

    def _capturing_unsafely(self) -> bool:
        capturing = [stream for stream in self.streams if stream.captured is not None]
        for stream in capturing:
            stream.broken = True
        return bool(capturing)

    def stream_of(self, handle: int) -> Stream:
        return next(stream for stream in self.streams if int(stream) == handle)

    @property
    def left(self) -> list[Any]:
        """What was not given back."""
        return [*self.memory, *self.things]
