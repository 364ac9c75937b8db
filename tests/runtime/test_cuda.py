from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qfae_runtime.engines import cuda as module
from qfae_runtime.engines.cuda import Cuda
from qfae_runtime.engines.tensorrt import TensorRtEngine, address_of
from qfae_runtime.errors import EngineError

from .doubles.cuda import FakeCuda


def said(device: str = "cuda:0") -> str:
    with pytest.raises(EngineError) as caught:
        Cuda(device)
    return str(caught.value)


def test_missing_bindings_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert said() == (
        "cuda-python cannot be imported (import of cuda.bindings.runtime halted; None in sys.modules), a plan needs "
        "it; install it with: pip install cuda-bindings"
    )


def test_no_gpu_no_driver_and_an_old_driver_are_told_apart(fake_cuda: FakeCuda) -> None:
    cure = "install NVIDIA's driver (nvidia-smi must list a GPU), or score with the .onnx engine on the CPU"
    fake_cuda.gpus = 0
    assert said() == f"device 'cuda:0': no GPU can be used here (CUDA counts 0 GPUs); {cure}"
    fake_cuda.fail["cudaGetDeviceCount"] = [100]
    assert said("cuda") == (
        f"device 'cuda': no GPU can be used here (CUDA error 100, no CUDA-capable device is detected); {cure}"
    )
    insufficient = "CUDA error 35, CUDA driver version is insufficient for CUDA runtime version"
    fake_cuda.driver, fake_cuda.fail["cudaGetDeviceCount"] = 0, [35]
    assert said() == f"device 'cuda:0': no GPU can be used here ({insufficient}); {cure}"
    fake_cuda.driver, fake_cuda.fail["cudaGetDeviceCount"] = 12080, [35]
    assert said() == (
        f"device 'cuda:0': no GPU can be used here ({insufficient}); the driver supports CUDA 12.8 and cuda-python is "
        "for CUDA 13: update the driver, or pip install 'cuda-bindings==12.*'"
    )


def test_other_devices_are_refused(fake_cuda: FakeCuda) -> None:
    assert said("cuda:1") == "device 'cuda:1': no such GPU, there is cuda:0; pass one of them with --device"
    fake_cuda.gpus = 3
    assert said("cuda:3") == "device 'cuda:3': no such GPU, there are cuda:0 to cuda:2; pass one of them with --device"
    for device in ("cpu", "cuda:", "cuda:-1", "cuda:0 ", "gpu"):
        assert said(device) == f"device {device!r}: expected cuda or cuda:N, such as cuda:0"


def test_the_chosen_gpu_is_used_and_described(
    fake_cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.gpus = 3
    monkeypatch.setattr(module, "_DRIVER_FILE", tmp_path / "version")
    gpu = Cuda("cuda:2")
    assert (gpu.device, gpu.index, fake_cuda.current) == ("cuda:2", 2, 2)
    assert (gpu.gpu.name, gpu.gpu.compute_capability, gpu.gpu.cuda, gpu.gpu.driver) == (
        "Fake GPU 2",
        "9.0",
        "13.0",
        None,
    )
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:11:59 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)",
    ):
        (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
        assert Cuda("cuda").gpu.driver == "580.65.06"


def test_two_captures_wait_for_each_other(fake_cuda: FakeCuda) -> None:
    cuda = Cuda("cuda")
    first, second = cuda.stream(), cuda.stream()
    address = cuda.device_memory(8)
    began = threading.Event()

    def other() -> None:
        cuda.use()
        began.set()
        cuda.discard(cuda.capture(second, lambda: cuda.fill(address, 2, 8, second)))

    thread = threading.Thread(target=other)

    def work() -> None:
        thread.start()
        began.wait(10)
        thread.join(0.1)
        assert thread.is_alive()
        cuda.fill(address, 1, 8, first)

    cuda.discard(cuda.capture(first, work))
    thread.join(10)
    assert not thread.is_alive()
    cuda.close()
    assert fake_cuda.left == []


def test_a_stream_can_be_used_after_a_capture_that_failed(fake_cuda: FakeCuda) -> None:
    cuda = Cuda("cuda")
    stream, memory = cuda.stream(), cuda.host_memory(4)

    def fails() -> None:
        cuda.fill(address_of(memory), 9, 4, stream)
        raise EngineError("no")

    with pytest.raises(EngineError, match=r"^no$"):
        cuda.capture(stream, fails)
    with pytest.raises(KeyboardInterrupt):
        cuda.capture(stream, _interrupt)
    cuda.fill(address_of(memory), 7, 4, stream)
    cuda.synchronize(stream)
    assert memory.tolist() == [7] * 4
    cuda.close()
    assert fake_cuda.left == []


def _interrupt() -> None:
    raise KeyboardInterrupt


def real_runtime() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")


def gpu_count() -> int:
    code, count = real_runtime().cudaGetDeviceCount()
    return int(count) if int(code) == 0 else 0


def test_the_real_bindings_take_our_calls() -> None:
    """Without a GPU they answer with an error; a wrong number or type of arguments would be a TypeError."""
    runtime = real_runtime()
    if gpu_count():
        pytest.skip("there is a GPU, on which these handles of nothing would do harm")
    cuda = object.__new__(Cuda)
    vars(cuda).update(_runtime=runtime, _kind=runtime.cudaMemcpyKind.cudaMemcpyDefault, device="cuda:0", index=0)
    stream, event, graph = runtime.cudaStream_t(0), runtime.cudaEvent_t(0), runtime.cudaGraphExec_t(0)
    for call in (
        cuda.use,
        cuda.stream,
        cuda.event,
        lambda: cuda.device_memory(8),
        lambda: cuda.host_memory(8),
        lambda: cuda.copy(0, 0, 8, stream),
        lambda: cuda.fill(0, 255, 8, stream),
        lambda: cuda.record(event, stream),
        lambda: cuda.wait(stream, event),
        lambda: cuda.synchronize(stream),
        lambda: cuda.capture(stream, lambda: None),
        lambda: cuda.launch(graph, stream),
        lambda: cuda._call("cudaStreamEndCapture", stream),
        lambda: cuda._call("cudaGraphGetNodes", runtime.cudaGraph_t(0), 0),
        lambda: cuda._call("cudaGraphInstantiate", runtime.cudaGraph_t(0), 0),
        lambda: cuda._call("cudaGetDeviceProperties", 0),
        lambda: cuda._call("cudaFree", 8),
        lambda: cuda._call("cudaFreeHost", 8),
        lambda: cuda._call("cudaStreamDestroy", stream),
        lambda: cuda._call("cudaEventDestroy", event),
        lambda: cuda._call("cudaGraphDestroy", runtime.cudaGraph_t(0)),
        lambda: cuda._call("cudaGraphExecDestroy", graph),
    ):
        with pytest.raises(EngineError, match="failed on cuda:0: CUDA error "):
            call()
    cuda.settle(stream)
    assert int(stream) == 0
    assert runtime.cudaDeviceProp().name == b""


def test_without_a_gpu_the_real_bindings_say_so() -> None:
    real_runtime()
    if gpu_count():
        pytest.skip("there is a GPU")
    assert "no GPU can be used here (CUDA error " in said()


@pytest.mark.gpu
def test_memory_streams_and_graphs_on_a_real_gpu() -> None:
    """What an engine asks of CUDA, without a plan; with a library, that bytes which are no plan are refused."""
    if not gpu_count():
        pytest.skip("needs an NVIDIA GPU; this machine has none that CUDA can use")
    cuda = Cuda("cuda:0")
    assert cuda.gpu.name
    size = 4096
    given, fetched = cuda.host_memory(size), cuda.host_memory(size)
    first, second, third = (cuda.device_memory(size) for _ in range(3))
    copying, computing, uploaded, computed = cuda.stream(), cuda.stream(), cuda.event(), cuda.event()
    given[:] = np.random.default_rng(0).integers(0, 256, size)

    def work() -> None:
        cuda.copy(third, second, size // 2, computing)

    work()
    cuda.synchronize(computing)
    graph = cuda.capture(computing, work)
    with pytest.raises(EngineError, match="empty graph"):
        cuda.capture(computing, lambda: None)
    cuda.copy(first, address_of(given), size, copying)
    cuda.record(uploaded, copying)
    cuda.wait(computing, uploaded)
    cuda.copy(second, first, size, computing)
    cuda.fill(third, 0xFF, size, computing)
    cuda.launch(graph, computing)
    cuda.record(computed, computing)
    cuda.wait(copying, computed)
    cuda.copy(address_of(fetched), third, size, copying)
    cuda.synchronize(copying)
    np.testing.assert_array_equal(fetched[: size // 2], given[: size // 2])
    assert (fetched[size // 2 :] == 0xFF).all()
    cuda.discard(graph)
    cuda.close()
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    with pytest.raises(
        EngineError, match=r"NAME\.plan: TensorRT .* cannot load it on .*: build it here with: qfae-exp"
    ):
        TensorRtEngine(b"no plan" * 100, 32, 4)
