from __future__ import annotations

import numpy as np
import pytest

from qfae_runtime.errors import EngineError

from .doubles.tensorrt import FakeTensorRt, batch_of, check_scores, open_engine

REBUILD = "qfae-export --onnx NAME.fp16.onnx"


# --- every output written ---


@pytest.mark.parametrize("graph", [(), ("capture",)])
@pytest.mark.parametrize("name", ["score", "anomaly_map"])
def test_an_output_that_is_never_written_is_an_error(trt: FakeTensorRt, name: str, graph: tuple[str, ...]) -> None:
    with open_engine(trt, faults=(f"unwritten {name}", *graph)) as engine, pytest.raises(EngineError) as caught:
        engine.run(batch_of(3))
    assert str(caught.value) == (
        f"output {name!r}: the plan wrote no number for 3 of 3 images; do not use it, build it again with qfae-export"
    )


def test_bytes_tell_whether_a_reconstruction_is_written(trt: FakeTensorRt) -> None:
    images = batch_of(3)
    for faults, written in (((), True), (("unwritten reconstruction",), False)):
        with open_engine(trt, faults=faults) as engine:
            found = []
            for byte in (0xFF, 0x00):
                engine.poison(byte)
                found.append(engine.run(images).reconstruction)
            assert np.array_equal(found[0], found[1]) is written


def test_without_poison_stale_outputs_pass_for_new_ones(trt: FakeTensorRt) -> None:
    """What the poison is for: the fault that it finds stays hidden without it."""
    with open_engine(trt, faults=("unwritten score",)) as engine:
        engine.poison(None)
        first = engine.run(batch_of(2)).score
        np.testing.assert_array_equal(engine.run(batch_of(2, seed=1)).score, first)
        engine.poison()
        with pytest.raises(EngineError, match="the plan wrote no number for 2 of 2 images"):
            engine.run(batch_of(2))


# --- failures ---


def test_what_tensorrt_refuses_is_told_with_its_reason(trt: FakeTensorRt) -> None:
    with open_engine(trt, faults=("runs once",)) as engine, pytest.raises(EngineError) as caught:
        engine.run(batch_of(2))
    assert str(caught.value) == (
        f"NAME.plan: TensorRT 11.4.0 cannot run a batch of 2: cannot run again; build it again with: {REBUILD}"
    )
    with (
        open_engine(trt, faults=("raises",)) as engine,
        pytest.raises(EngineError, match=r"of 2: a C\+\+ exception; build it"),
    ):
        engine.run(batch_of(2))
    with (
        open_engine(trt, faults=("no context",)) as engine,
        pytest.raises(EngineError, match=r"TensorRT 11\.4\.0 cannot create a context: out of memory; build it again"),
    ):
        engine.run(batch_of(2))
    assert trt.cuda.left == []


def test_outputs_larger_than_their_buffers_are_refused_before_they_are_computed(trt: FakeTensorRt) -> None:
    with open_engine(trt, faults=("doubles anomaly_map",)) as engine, pytest.raises(EngineError) as caught:
        engine.run(batch_of(3))
    assert str(caught.value) == (
        "NAME.plan: tensor 'anomaly_map': expected shape (4, 6, 6) in a batch of 4, got (8, 6, 6); "
        f"this is no plan that qfae-export built, build it with: {REBUILD}"
    )
    assert trt.cuda.left == []


@pytest.mark.parametrize(
    "name",
    [
        "cudaSetDevice",
        "cudaMemcpyAsync",
        "cudaMemsetAsync",
        "cudaEventRecord",
        "cudaStreamWaitEvent",
        "cudaStreamSynchronize",
        "cudaGraphLaunch",
    ],
)
def test_wherever_cuda_fails_it_is_told_and_nothing_is_mixed_up(trt: FakeTensorRt, name: str) -> None:
    for works in range(20):
        with open_engine(trt) as engine:
            engine.run(batch_of(2))
            trt.cuda.fail[name], said = [0] * works + [700], ""
            try:
                engine.submit(batch_of(2, seed=1))
                engine.submit(batch_of(1, seed=2))
                engine.collect()
                engine.collect()
            except EngineError as error:
                said = str(error)
            assert said == (
                ""
                if trt.cuda.fail[name]
                else f"{name} failed on cuda:0: CUDA error 700, an illegal memory access was encountered; "
                "start again; if it comes back, look at the GPU with nvidia-smi and rebuild the plan"
            )
            trt.cuda.fail.clear()
            for seed in range(3):  # what was on its way is lost, what comes now is right
                check_scores(engine.run(batch_of(4, seed)), batch_of(4, seed))
        assert trt.cuda.left == []
        if not said:
            break
    assert 0 < works < 19


@pytest.mark.parametrize(
    "name", ["cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"]
)
def test_an_engine_that_does_not_open_leaves_nothing_behind(trt: FakeTensorRt, name: str) -> None:
    for works in range(30):
        trt.cuda.fail[name] = [0] * works + [2]
        try:
            open_engine(trt).close()
        except EngineError as error:
            said = str(error)
        assert trt.cuda.left == []
        if trt.cuda.fail[name]:
            break
    assert 1 < works < 29
    size = " of 0.0 MiB" if "lloc" in name else ""
    assert said == (
        f"{name}{size} failed on cuda:0: CUDA error 2, out of memory; "
        "free GPU memory (nvidia-smi shows who holds it) or build the plan for a smaller batch"
    )


# --- the end ---


def test_a_closed_engine_says_so_and_closes_again(trt: FakeTensorRt) -> None:
    engine = open_engine(trt)
    engine.submit(batch_of(2))  # still on its way
    engine.close()
    engine.close()
    assert trt.cuda.left == []
    assert not trt.contexts
    for call in (lambda: engine.run(batch_of(1)), lambda: engine.submit(batch_of(1)), engine.collect):
        with pytest.raises(EngineError, match="the engine is closed; open it again to score with it"):
            call()


def test_an_error_in_a_with_block_does_not_keep_a_context_alive(trt: FakeTensorRt) -> None:
    with pytest.raises(EngineError), open_engine(trt, faults=("runs once",)) as engine:
        engine.run(batch_of(1))
    assert trt.cuda.left == []  # the double asks whether a context still works in memory that is freed


def test_what_tensorrt_warns_of_is_kept_and_not_printed(trt: FakeTensorRt, capfd: pytest.CaptureFixture[str]) -> None:
    with open_engine(trt, faults=("warns",)) as engine:
        assert engine.warnings == ("This plan was built on another model of GPU.",)
        engine.run(batch_of(1))
    with open_engine(trt) as engine:
        assert engine.warnings == ()
    assert capfd.readouterr() == ("", "")


def test_the_card_is_described(trt: FakeTensorRt) -> None:
    with open_engine(trt) as engine:
        assert (engine.gpu.name, engine.gpu.compute_capability, engine.gpu.cuda) == ("Fake GPU 0", "9.0", "13.0")
        assert str(engine.gpu) == "Fake GPU 0 (compute capability 9.0)"
