"""PyTorch as an engine, eager, captured, compiled, or an AOTInductor package: timed and measured like all others.

Letters: B images, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qfae_export.graph import InferenceGraph
from qfae_export.layers import Attend, CausalAttend, Linear, Unit
from qfae_export.precision import Precision
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores, check_images
from qfae_runtime.manifest import MAX_BATCH
from qfae_runtime.writers.whole import whole_file
from qfae_train.float32 import forbid_tf32

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEngine:
    """A module from uint8 (B, S, S, 3) to score, map and reconstruction. Keeps to Engine.

    `run` ends when the results are in the caller's memory, so that a GPU's work is timed whole.
    """

    backend, version = "torch", torch.__version__

    def __init__(
        self,
        module: Callable[[Tensor], Any],
        image_size: int,
        device: str,
        *,
        allocates: bool = True,
        batches: Sequence[int] = range(1, MAX_BATCH + 1),  # PyTorch takes a batch as it comes
    ) -> None:
        """Take a module that is on the device; `allocates`: through PyTorch's allocator alone."""
        self.image_size, self.max_batch, self.device = image_size, max(batches), device
        self.batches = tuple(batches)
        self._counted = allocates and device != "cpu"
        self._module: Callable[[Tensor], Any] | None = module

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run. The maps are always computed."""
        check_images(images, self.image_size, self.max_batch)
        assert self._module is not None
        with torch.inference_mode():
            outputs = self._module(_given(images, self.device))
            return Scores(*_callers(tuple(outputs)))

    def device_peak(self) -> int | None:
        """Return the most bytes that PyTorch's allocator had of the GPU, all of this process; None: it cannot tell."""
        return torch.cuda.max_memory_reserved(self.device) if self._counted else None

    def close(self) -> None:
        """Free the model."""
        self._module = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _given(images: UInt8, device: str) -> Tensor:
    """Return the images on the device. On the way to a GPU they are page-locked, which is several times faster."""
    here = torch.from_numpy(np.ascontiguousarray(images))
    return here if device == "cpu" else here.pin_memory().to(device, non_blocking=True)


def _callers(outputs: tuple[Tensor, ...]) -> list[NDArray[Any]]:
    """Return outputs in memory of the caller's own, copied once: a later run may write where the model left them.

    From a GPU they come into fresh page-locked memory, which torch reuses once the caller has dropped them.
    """
    pinned = outputs[0].device.type != "cpu"
    here = [torch.empty(one.shape, dtype=one.dtype, pin_memory=pinned) for one in outputs]
    for to, output in zip(here, outputs, strict=True):
        to.copy_(output, non_blocking=True)
    if pinned:
        torch.cuda.current_stream(outputs[0].device).synchronize()
    return [one.numpy() for one in here]


def eager(module: nn.Module, image_size: int, device: str) -> TorchEngine:
    """Return a module as it is."""
    _settle(device)
    return TorchEngine(module.to(device), image_size, device)


class _Captured:
    """A module whose kernels are launched all at once: a CUDA graph for every batch size, captured at its first run.

    Starting a thousand kernels one by one takes longer than a GPU needs for a single image. Outputs stay where the
    graph writes them until the next run.
    """

    def __init__(self, module: Callable[[Tensor], Any]) -> None:
        self._module = module
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        if len(images) not in self._graphs:
            self._graphs[len(images)] = self._capture(images)
        graph, given, outputs = self._graphs[len(images)]
        given.copy_(images)
        graph.replay()
        return outputs

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]:
        given, graph, aside = images.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries make their handles and choose kernels, which no capture allows
            for _ in range(2):
                self._module(given)
        torch.cuda.current_stream().wait_stream(aside)
        # All sizes work in the same memory: only one of them runs at a time, and outputs are held.
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            outputs = tuple(self._module(given))
        return graph, given, outputs


def captured(module: nn.Module, image_size: int, device: str) -> TorchEngine:
    """Return a module on a GPU as captured CUDA graphs of PyTorch's own kernels."""
    _settle(device)
    return TorchEngine(_Captured(module.to(device)), image_size, device)


def compiled(module: nn.Module, image_size: int, device: str) -> TorchEngine:
    """Return a module compiled by torch.compile, anew for every batch size, which its first run pays for."""
    _settle(device)
    torch._dynamo.config.recompile_limit = MAX_BATCH  # beyond it, torch falls back to eager without a word
    if device == "cpu":
        return TorchEngine(torch.compile(module, dynamic=False), image_size, device)
    recording = torch.compile(module.to(device), dynamic=False, mode="reduce-overhead")
    return TorchEngine(_recorded(recording), image_size, device)


def _recorded(module: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Return a module compiled into CUDA graphs that has recorded the graph of a batch size when its first call ends.

    The first call warms up and the second records, which takes as long as a whole batch: neither is what a call takes.
    """
    sizes = set()

    def run(images: Tensor) -> Any:
        if len(images) not in sizes:
            sizes.add(len(images))
            for _ in range(2):
                module(images)
        return module(images)

    return run


class _Tuple(nn.Module):
    """A graph that returns a bare tuple: a package cannot name its outputs."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.whole = graph

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.whole(images))


def package(module: InferenceGraph, device: str, path: Path) -> None:
    """Compile a graph ahead of time, for any batch, into one AOTInductor package, there whole or not at all."""
    size = module.image_size
    example = (torch.zeros(3, size, size, 3, dtype=torch.uint8, device=device),)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        program = torch.export.export(_Tuple(module.to(device)), example, dynamic_shapes=({0: batch},), strict=False)
        # An open file: a path would have to end in .pt2.
        with whole_file(path) as part, part.open("w+b") as file:
            torch._inductor.aoti_compile_and_package(program, package_path=file)


def packaged(path: Path, image_size: int, device: str) -> TorchEngine:
    """Return a package of `package` as an engine."""
    _settle(device)
    package = torch._inductor.aoti_load_package(str(path))
    return TorchEngine(package, image_size, device, allocates=False)  # it takes memory for its weights by itself


def for_torch(graph: InferenceGraph, precision: str, streams: str = "float32") -> InferenceGraph:
    """Fit an FP32 graph to PyTorch's own kernels and give it the types of a precision, in place; the tail stays FP32.

    What stays FP32 is what the FP16 policy says, of BF16 too, with residual streams in `streams`. A product adds its
    bias itself, and attention takes its operands as they are: PyTorch's kernels accumulate in FP32 whatever their type.
    """
    policy = Precision("fp16", streams=streams)
    for name, module in graph.named_modules():
        if precision != "fp32" and isinstance(module, Unit) and policy.dtype(name) == torch.float16:
            module.set_dtype(DTYPES[precision])
        if isinstance(module, Attend | CausalAttend):
            module.widen = False
        if isinstance(module, Linear):
            module.adds_bias = True
    return graph


def _settle(device: str) -> None:
    """FP32 means FP32: no TF32. FP16 and BF16 products are summed as PyTorch does unless told otherwise.

    Where a library splits such a product, its parts may then be added up in the short type: what users of PyTorch run.
    """
    if device != "cpu":
        forbid_tf32()
