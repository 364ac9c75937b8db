"""The model's own matrix products, and nothing else, through the libraries that are installed.

Their rate is what an engine of the same precision could reach at most with this library: the time of a whole image can
be held against it. Products with a stored weight are timed, each size once, counted as often as the model has it; the
small products within attentions are not.

Every library computes from the same memory into the same memory at every call, for fresh memory would be timed with the
product: numpy and torch into `out`, ONNX Runtime into an array bound to the output, OpenVINO into the output tensor
that an infer request keeps. Inputs are bound or shared, never copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Run = Callable[[], object]


class Product(NamedTuple):
    """Matrix products of one size: `times` of them, each [rows, inner] @ [inner, columns]; `stored`: by a weight."""

    rows: int
    inner: int
    columns: int
    times: int
    stored: bool

    @property
    def flop(self) -> int:
        """What they cost together."""
        return 2 * self.rows * self.inner * self.columns * self.times


class Gemm:
    """Every product of one batch, ready to run. `flop` is what `seconds` counts."""

    def __init__(self, products: Sequence[Product], make: Callable[[Product], Run]) -> None:
        self._products = [one for one in products if one.stored]
        self._runs = [make(one) for one in self._products]
        self.flop = sum(one.flop for one in self._products)

    def seconds(self) -> float:
        """Run each size once and return the seconds that all products of the batch would take."""
        total = 0.0
        for product, run in zip(self._products, self._runs, strict=True):
            start = time.perf_counter()
            run()
            total += (time.perf_counter() - start) * product.times
        return total


def maker(library: str, precision: str, device: str, threads: int | None) -> Callable[[Product], Run]:
    """Return what makes a product ready in a library."""
    if library == "numpy":
        return _numpy
    if library == "torch":
        return lambda product: _torch(product, precision, device)
    if library == "onnxruntime":
        return lambda product: _onnxruntime(product, threads)
    return lambda product: _openvino(product, precision, threads)


def _operands(product: Product) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    left = rng.standard_normal((product.rows, product.inner), dtype=np.float32)
    right = rng.standard_normal((product.inner, product.columns), dtype=np.float32)
    return left, right * np.float32(product.inner**-0.5)


def _numpy(product: Product) -> Run:
    left, right = _operands(product)
    out = np.empty((product.rows, product.columns), np.float32)
    return lambda: np.matmul(left, right, out=out)


def _torch(product: Product, precision: str, device: str) -> Run:
    import torch

    from benchmarks.speed.torch_engine import DTYPES
    from qfae_train.float32 import forbid_tf32

    forbid_tf32()
    if device == "cpu":
        left, right = (torch.from_numpy(one).to(DTYPES[precision]) for one in _operands(product))
    else:  # as large as batches are there, a processor takes long to draw them
        left = torch.randn(product.rows, product.inner, device=device).to(DTYPES[precision])
        right = (torch.randn(product.inner, product.columns, device=device) * product.inner**-0.5).to(left.dtype)
    out = torch.empty((product.rows, product.columns), dtype=left.dtype, device=device)
    if device == "cpu":
        return lambda: torch.matmul(left, right, out=out)

    def run() -> torch.Tensor:
        torch.matmul(left, right, out=out)
        torch.cuda.synchronize()
        return out

    return run


def _onnxruntime(product: Product, threads: int | None) -> Run:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    left, right = _operands(product)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", product.inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", product.columns])],
        [numpy_helper.from_array(right, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Each product is a session with threads of its own, which would go on spinning while the next one computes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    out = np.empty((product.rows, product.columns), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("x", left)
    binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def run() -> list[Any]:
        session.run_with_iobinding(binding)
        return [out]

    return run


def _openvino(product: Product, precision: str, threads: int | None) -> Run:
    from qfae_runtime.engines.openvino import import_library

    library = import_library()
    from openvino import opset13 as op

    left, right = _operands(product)
    x = op.parameter([-1, product.inner], np.float32)
    if precision == "int8":
        # As a quantised engine has it: activations of one range, weights of one range per column.
        low, high = np.float32(-4), np.float32(4 * 127 / 128)
        columns = np.abs(right).max(axis=0, keepdims=True) / 127
        whole = op.convert(op.constant(np.round(right / columns).astype(np.int8)), np.float32)
        y = op.matmul(op.fake_quantize(x, low, high, low, high, 256), op.multiply(whole, columns), False, False)
    else:
        y = op.matmul(x, op.constant(right), False, False)
    settings = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "NUM_STREAMS": "1"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    request = library.Core().compile_model(library.Model([y], [x]), "CPU", settings).create_infer_request()
    return lambda: request.infer({0: left}, share_inputs=True, share_outputs=True)
