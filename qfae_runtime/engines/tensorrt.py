"""The TensorRT backend: a raw plan, of TensorRT or TensorRT-RTX, on one NVIDIA GPU.

Letters: B images in a batch, S the engine's `image_size`.

A batch is filled up to the next size that the plan runs with, and goes through one of two slots, so that a second
batch can be on its way while the first is computed:

    submit   images -> slot's page-locked memory -> slot's GPU memory                            (copy stream)
                       slot's GPU memory -> plan's input, plan, its outputs -> slot's GPU memory (compute stream)
    collect  slot's GPU memory -> slot's page-locked memory -> arrays of the caller              (copy stream)

A captured CUDA graph reads and writes the addresses it was captured with. That is why the plan has buffers of its own,
and the slots copy on the GPU, which takes microseconds: one graph for each size serves both slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import INPUT_NAME, OUTPUT_NAMES, UNWRITTEN, Scores, Tensor, check_images
from qfae_runtime.engines.batches import fill_up, next_size
from qfae_runtime.engines.cuda import Cuda, Gpu
from qfae_runtime.engines.plan import Bucket, Execution, Plan, buckets_of, import_library
from qfae_runtime.errors import EngineError

SLOTS = 2


class _Slot(NamedTuple):
    """Buffers of one batch on its way, by tensor name, with room for the largest batch."""

    host: Mapping[str, UInt8]
    device: Mapping[str, int]
    uploaded: Any
    computed: Any


class _Submitted(NamedTuple):
    slot: _Slot
    images: int
    poison: int | None


class _Ready(NamedTuple):
    """The plan made ready for one batch size; `graph` is None where it could not be captured."""

    execution: Execution
    graph: Any


class TensorRtEngine:
    """A raw plan on one GPU. Needs no manifest; keeps to Engine, Overlapping and Poisonable.

    `plan` are bytes that the caller has held against the manifest's hash, for a plan is native code; they are not kept.
    `backend` is "tensorrt" or "tensorrt-rtx", `device` "cuda" or "cuda:N", `name` the plan's file in messages. The
    engine takes `max_batch` images, or fewer where the plan's profiles do.

    GPU memory: the plan's weights and working memory, and three times what its inputs and outputs take at the largest
    batch; all is allocated here. The first run of each batch size takes longer: the plan is made ready for it.

    For the record of a run: `version` of the library, `gpu`, `batches`, `warnings` that the library gave while the
    plan was opened, and `uncaptured`, the batch sizes that run without a CUDA graph and why.

    Raises:
        EngineError: TensorRT, cuda-python or the GPU is missing; the plan cannot be loaded, or is none of QFAE's.

    """

    slots = SLOTS

    def __init__(
        self,
        plan: bytes,
        image_size: int,
        max_batch: int,
        *,
        backend: str = "tensorrt",
        device: str = "cuda:0",
        name: str = "NAME.plan",
    ) -> None:
        library = import_library(backend)
        self.backend = backend
        self.image_size = image_size
        self.uncaptured: dict[int, str] = {}
        self._closed = False
        self._poison: int | None = UNWRITTEN
        self._plan: Plan | None = None
        self._ready: dict[Bucket, _Ready] = {}
        self._submitted: deque[_Submitted] = deque()
        self._cuda = Cuda(device)
        self._streams: tuple[Any, ...] = ()
        try:
            self._copying, self._computing = self._streams = (self._cuda.stream(), self._cuda.stream())
            # After `use`: weights and contexts go to the GPU that is the thread's at this moment.
            self._plan = Plan(library, backend, plan, image_size, name, str(self._cuda.gpu))
            self.version = self._plan.version
            self.warnings = self._plan.warnings
            self._buckets = buckets_of(self._plan.profiles, max_batch)
            self.max_batch = min(max_batch, self._buckets[-1].batch)
            self._tensors = {tensor.name: tensor for tensor in self._plan.tensors}
            self._memory = self._cuda.device_memory(max(1, self._plan.memory_size))
            self._addresses = self._device_buffers()
            for name, address in self._addresses.items():
                self._cuda.fill(address, 0, self._room(name), self._computing)
            self._free = deque(self._new_slot() for _ in range(SLOTS))
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> str:
        """Where it runs, e.g. "cuda:0"."""
        return self._cuda.device

    @property
    def gpu(self) -> Gpu:
        """The card, its compute capability and its driver."""
        return self._cuda.gpu

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that the plan is run with, ascending; a batch is filled up to the next of them."""
        return tuple(bucket.batch for bucket in self._buckets)

    def poison(self, byte: int | None = UNWRITTEN) -> None:
        """Fill the plan's outputs with `byte` before every run from now on; None leaves what the run before wrote.

        An engine starts with UNWRITTEN, so that an output which the plan does not write is an error, and a part of one
        is NaN. Of a uint8 output, runs with two different bytes tell what is written.
        """
        self._poison = byte

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run.

        Raises:
            EngineError: also if batches are submitted that were not collected.

        """
        self._opened()
        if self._submitted:
            raise EngineError(f"run: {len(self._submitted)} submitted batches wait; collect them first")
        self.submit(images)
        return self.collect(maps)

    def submit(self, images: UInt8) -> None:
        """Start on uint8 (B, S, S, 3) and return without waiting for the result; at most two batches are on their way.

        The images are copied before it returns: the caller may change them at once.

        Raises:
            EngineError: the images are not what the engine takes, two batches wait to be collected, or the backend
                failed; then every batch that was on its way is lost.

        """
        plan = self._opened()
        check_images(images, self.image_size, self.max_batch)
        if not self._free:
            raise EngineError(f"submit: {SLOTS} batches are on their way, expected fewer; collect one first")
        try:
            self._cuda.use()
            size = next_size(self.batches, len(images))
            bucket = next(one for one in self._buckets if one.batch == size)
            ready = self._made_ready(plan, bucket)
            self._submit(ready, images)
        except BaseException:
            self._drop()
            raise

    def collect(self, maps: bool = True) -> Scores:
        """Wait for the batch that was submitted first and return its scores; see Engine.run.

        The caller owns the returned arrays: they are copies, and no later run touches them.

        Raises:
            EngineError: no batch was submitted, the plan left an output unwritten, or the backend failed; then every
                batch that was on its way is lost.

        """
        self._opened()
        if not self._submitted:
            raise EngineError("collect: no batch is on its way; submit one first")
        try:
            self._cuda.use()
            scores = self._collect(self._submitted[0], maps)
        except BaseException:
            self._drop()
            raise
        self._free.append(self._submitted.popleft().slot)
        return scores

    def close(self) -> None:
        """Free the plan and all memory; batches on their way are lost. Calling it twice does no harm."""
        if self._closed:
            return
        self._closed = True
        self._submitted.clear()
        self._cuda.settle(*self._streams)
        for ready in self._ready.values():
            if ready.graph is not None:
                self._cuda.discard(ready.graph)
            ready.execution.close()  # graphs before contexts, these before their plan, it before the memory it works in
        if self._plan is not None:
            self._plan.close()
        self._cuda.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> Plan:
        if self._closed or self._plan is None:
            raise EngineError("the engine is closed; open it again to score with it")
        return self._plan

    def _room(self, name: str, images: int | None = None) -> int:
        """Return the bytes of a tensor for that many images (None: the largest batch)."""
        return self._tensors[name].bytes_per_image * (self._buckets[-1].batch if images is None else images)

    def _device_buffers(self) -> dict[str, int]:
        return {name: self._cuda.device_memory(self._room(name)) for name in self._tensors}

    def _new_slot(self) -> _Slot:
        host = {name: self._cuda.host_memory(self._room(name)) for name in self._tensors}
        return _Slot(host, self._device_buffers(), self._cuda.event(), self._cuda.event())

    def _made_ready(self, plan: Plan, bucket: Bucket) -> _Ready:
        """Return the plan ready for one batch size, at first use set up, run once and captured."""
        if bucket in self._ready:
            return self._ready[bucket]
        execution = plan.execution(bucket, self._addresses, self._memory, self._computing)
        # The first run loads or compiles kernels and allocates, which cannot be captured. What it computes is not
        # used: results come from the graph from the first batch on, so that what is measured is what runs.
        execution.enqueue(self._computing)
        self._cuda.synchronize(self._computing)
        graph = None
        try:
            execution.check_capturable(self._computing)
            graph = self._cuda.capture(self._computing, lambda: execution.enqueue(self._computing))
        except EngineError as error:
            self.uncaptured[bucket.batch] = str(error)  # slower by its launches, and as right
        self._ready[bucket] = _Ready(execution, graph)
        return self._ready[bucket]

    def _submit(self, ready: _Ready, images: UInt8) -> None:
        cuda, slot, count = self._cuda, self._free[0], len(images)
        size = self._room(INPUT_NAME, ready.execution.batch)
        fill_up(slot.host[INPUT_NAME], images, ready.execution.batch)
        cuda.copy(slot.device[INPUT_NAME], address_of(slot.host[INPUT_NAME]), size, self._copying)
        cuda.record(slot.uploaded, self._copying)
        cuda.wait(self._computing, slot.uploaded)
        cuda.copy(self._addresses[INPUT_NAME], slot.device[INPUT_NAME], size, self._computing)
        if self._poison is not None:
            for name in OUTPUT_NAMES:
                cuda.fill(self._addresses[name], self._poison, self._room(name), self._computing)
        if ready.graph is not None:
            cuda.launch(ready.graph, self._computing)
        else:
            ready.execution.enqueue(self._computing)
        for name in OUTPUT_NAMES:
            cuda.copy(slot.device[name], self._addresses[name], self._room(name, count), self._computing)
        cuda.record(slot.computed, self._computing)
        self._submitted.append(_Submitted(self._free.popleft(), count, self._poison))

    def _collect(self, submitted: _Submitted, maps: bool) -> Scores:
        # Only now: in `submit` these copies would keep the next batch's images waiting, behind them in the stream.
        slot, count = submitted.slot, submitted.images
        wanted = {name: count if maps or name == OUTPUT_NAMES[0] else 0 for name in OUTPUT_NAMES}
        self._cuda.wait(self._copying, slot.computed)
        for name, images in wanted.items():
            if images:
                size = self._room(name, images)
                self._cuda.copy(address_of(slot.host[name]), slot.device[name], size, self._copying)
        self._cuda.synchronize(self._copying)
        scores = Scores(*(taken_out(slot.host[name], self._tensors[name], wanted[name]) for name in OUTPUT_NAMES))
        if submitted.poison == UNWRITTEN:
            refuse_unwritten(scores)
        return scores

    def _drop(self) -> None:
        """Forget all batches on their way, after waiting until nothing uses their buffers any more."""
        self._cuda.settle(*self._streams)
        self._free.extend(submitted.slot for submitted in self._submitted)
        self._submitted.clear()


def taken_out(buffer: UInt8, tensor: Tensor, images: int) -> Any:
    """Return a copy of a tensor's first `images` rows in a flat buffer."""
    flat = buffer[: images * tensor.bytes_per_image].view(tensor.dtype)
    return flat.reshape(images, *tensor.shape).copy()


def refuse_unwritten(scores: Scores) -> None:
    """Refuse scores and maps that begin as they were filled before the run.

    Raises:
        EngineError: the plan did not write an output.

    """
    begins = {"score": scores.score, "anomaly_map": scores.anomaly_map[:, 0, 0]}  # (B,) each
    for name, values in begins.items():
        unwritten = int(np.count_nonzero(values.view(np.uint32) == 0xFFFFFFFF))
        if unwritten:
            raise EngineError(
                f"output {name!r}: the plan wrote no number for {unwritten} of {len(values)} images; "
                "do not use it, build it again with qfae-export"
            )


def address_of(buffer: UInt8) -> int:
    """Return where an array's memory begins."""
    return int(buffer.ctypes.data)
