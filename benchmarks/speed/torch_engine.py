"""PyTorch as an engine, eager, compiled, or as an AOTInductor package: timed and measured like all the others.

Letters: B images, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qfae_export.graph import InferenceGraph
from qfae_export.layers import Attend, CausalAttend, Unit
from qfae_export.precision import FP16
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores, check_images
from qfae_runtime.manifest import MAX_BATCH
from qfae_runtime.writers.whole import whole_file

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEngine:
    """A module from uint8 (B, S, S, 3) to score, map and reconstruction. Keeps to Engine.

    `run` ends when the results are in the caller's memory, so that a GPU's work is timed whole.
    """

    backend, version = "torch", torch.__version__

    def __init__(self, module: Callable[[Tensor], Any], image_size: int, device: str) -> None:
        self.image_size, self.max_batch, self.device = image_size, MAX_BATCH, device
        self._module: Callable[[Tensor], Any] | None = module

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        """Score uint8 (B, S, S, 3); see Engine.run. The maps are always computed."""
        check_images(images, self.image_size, self.max_batch)
        assert self._module is not None
        with torch.inference_mode():
            outputs = self._module(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
            return Scores(*(_callers(output) for output in outputs))

    def close(self) -> None:
        """Free the model."""
        self._module = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _callers(output: Tensor) -> NDArray[Any]:
    """Return an output in memory of the caller's own, copied once.

    From a GPU it comes into fresh memory. On the processor it is where the model left it: a later run may write there.
    """
    here = output.cpu()
    return (here.clone() if here is output else here).numpy()


def eager(module: nn.Module, image_size: int, device: str) -> TorchEngine:
    """Return a module as it is."""
    _settle(device)
    return TorchEngine(module.to(device), image_size, device)


def compiled(module: nn.Module, image_size: int, device: str) -> TorchEngine:
    """Return a module compiled by torch.compile, anew for every batch size, which its first run pays for."""
    _settle(device)
    torch._dynamo.config.recompile_limit = MAX_BATCH  # beyond it, torch falls back to eager without a word
    mode = "default" if device == "cpu" else "reduce-overhead"  # on a GPU: captured CUDA graphs
    return TorchEngine(torch.compile(module.to(device), dynamic=False, mode=mode), image_size, device)


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
    return TorchEngine(torch._inductor.aoti_load_package(str(path)), image_size, device)


def in_precision(graph: InferenceGraph, precision: str) -> InferenceGraph:
    """Give an FP32 graph the types of a precision for PyTorch's own kernels, in place; the tail stays FP32.

    What stays FP32 is what the FP16 policy says. Attention takes its operands as they are: PyTorch's kernels
    accumulate in FP32 whatever their type.
    """
    if precision == "fp32":
        return graph
    for name, module in graph.named_modules():
        if isinstance(module, Unit) and FP16.dtype(name) == torch.float16:
            module.set_dtype(DTYPES[precision])
        if isinstance(module, Attend | CausalAttend):
            module.widen = False
    return graph


def _settle(device: str) -> None:
    """FP32 means FP32: no TF32. FP16 and BF16 products are summed as PyTorch does unless told otherwise.

    Where a library splits such a product, its parts may then be added up in the short type: what users of PyTorch run.
    """
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
