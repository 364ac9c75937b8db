"""Work in threads: what is waited for when it ends early, and that each second is counted for one stage."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime import pipeline, workers
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import RunInterruptedError
from qfae_runtime.preprocess import preprocess
from qfae_runtime.run import Options, execute
from qfae_runtime.workers import Seconds, TimedPool, in_order, in_pieces

from .conftest import write_png
from .dicom_files import write_dicom
from .test_frames import FRAMES


class TellingPool:
    """A pool whose futures tell when somebody asks to cancel them."""

    def __init__(self, pool: ThreadPoolExecutor, told: threading.Event) -> None:
        self._pool, self._told = pool, told

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future = self._pool.submit(function, *arguments)
        cancel = future.cancel

        def telling() -> bool:
            self._told.set()
            return cancel()

        future.cancel = telling  # type: ignore[method-assign]
        return future


@pytest.mark.parametrize("size", [4, 16])
def test_whoever_ends_early_waits_for_one_item(size: int) -> None:
    made, closed = 0, False
    busy, asked = threading.Event(), threading.Event()

    def items() -> Generator[int, None, None]:
        nonlocal made, closed
        try:
            for number in range(10 * size):
                if number == size + 1:  # the second item of the second list
                    busy.set()
                    assert asked.wait(60)
                made += 1
                yield number
        finally:
            closed = True

    with ThreadPoolExecutor(1) as pool:
        pieces = in_pieces(TellingPool(pool, asked), items(), size)
        assert next(pieces) == list(range(size))
        assert busy.wait(60)
        pieces.close()
    assert made == size + 2
    assert closed


def test_pieces_are_all_items_in_order() -> None:
    with ThreadPoolExecutor(2) as pool:
        for count in (0, 1, 3, 4, 5, 8):
            items = (number for number in range(count))
            assert [one for piece in in_pieces(pool, items, 4) for one in piece] == list(range(count))


class PoolAtOnce:
    """A pool whose work is done when it is handed over, but for the items that are `slow`."""

    def __init__(self, slow: set[int]) -> None:
        self.slow, self.waiting = slow, list[tuple[Future[Any], Any]]()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if arguments[0] in self.slow:
            self.waiting.append((future, function(*arguments)))
        else:
            future.set_result(function(*arguments))
        return future

    def finish(self) -> None:
        for future, result in self.waiting:
            future.set_result(result)


@pytest.mark.parametrize("at_once", [True, False])
def test_results_are_held_back_for_work_ahead_or_not_at_all(at_once: bool) -> None:
    pool, taken = PoolAtOnce({3}), list[int]()

    def items() -> Generator[int, None, None]:
        for number in range(8):
            if number == 6:
                pool.finish()
            taken.append(number)
            yield number

    results = in_order(pool, lambda number: 10 * number, items(), 4, at_once=at_once)
    ahead = []
    for number, result in enumerate(results):
        assert result == 10 * number
        ahead.append(len(taken) - number)
    assert ahead == ([1, 1, 1, 4, 3, 2, 1, 1] if at_once else [4, 4, 4, 4, 4, 3, 2, 1])


def test_rows_of_a_batch_are_on_disk_when_the_next_is_scored(
    engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        write_png(tmp_path / "in" / f"{number:02}.png", FRAMES[number % len(FRAMES)])
    genuine, rows, out = OnnxRuntimeEngine.run, list[int](), tmp_path / "out"

    def counting(engine: OnnxRuntimeEngine, images: Any, maps: bool = True) -> Any:
        if (out / "scores.jsonl").exists():  # the self-test comes before
            rows.append((out / "scores.jsonl").read_bytes().count(b"\n"))
        return genuine(engine, images, maps)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", counting)
    execute(Options((tmp_path / "in",), engine_path, out, batch_size=4, maps=False, backend="onnxruntime"))
    assert rows[:3] == [0, 4, 8]
    assert len(rows) == 4  # the canary's, while rows are still being written


def test_an_interrupted_run_decodes_no_list_to_its_end(
    engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second list of a film is decoded: the frame that is being decoded is the last."""
    write_dicom(tmp_path / "in" / "film", FRAMES.repeat(20, axis=0))
    genuine, shutting, busy, asked = (
        pipeline._prepared,
        ThreadPoolExecutor.shutdown,
        threading.Event(),
        threading.Event(),
    )
    decoded = 0
    last = pipeline.FRAMES_AT_ONCE + 4  # of the second list, whichever frames were decoded to look into the file

    def counting(*arguments: Any) -> Any:
        nonlocal decoded
        decoded += 1
        if decoded == last:
            busy.set()
            assert asked.wait(60)
        return genuine(*arguments)

    def wait(futures: Any) -> Any:
        asked.set()
        return wait_for(futures)

    def shutdown(*arguments: Any, **options: Any) -> None:  # where nobody waits for the list itself
        asked.set()
        shutting(*arguments, **options)

    def stop(counts: Any) -> None:
        assert busy.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_prepared", counting)
    monkeypatch.setattr(workers, "wait", wait)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    with pytest.raises(RunInterruptedError):
        execute(Options((tmp_path / "in",), engine_path, tmp_path / "out", batch_size=4, maps=False), stop)
    assert decoded == last


def test_a_stage_within_another_is_counted_once() -> None:
    seconds = Seconds()

    def work() -> None:
        time.sleep(0.02)
        for _ in range(2):
            with seconds.measured("preprocessing"):
                time.sleep(0.02)
                with seconds.measured("drawing"):
                    time.sleep(0.02)

    with ThreadPoolExecutor(2) as pool:
        timed = TimedPool(pool, seconds, "decoding")
        begin = time.perf_counter()
        for future in [timed.submit(work), timed.submit(work)]:
            future.result()
        took = time.perf_counter() - begin
    spent = seconds.to_dict()
    assert spent["preprocessing"] >= 0.08
    assert spent["drawing"] >= 0.08
    assert spent["decoding"] >= 0.04
    assert sum(spent.values()) <= 2 * took
    assert (spent["engine"], spent["writing"]) == (0, 0)


def test_the_document_names_every_stage() -> None:
    text = (Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `scoring_")] == [
        f"scoring_{stage}" for stage in workers.STAGES
    ]


def test_preprocessing_is_not_decoding(engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_png(tmp_path / "in" / f"{number}.png", FRAMES[number])

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return preprocess(*arguments)

    monkeypatch.setattr(pipeline, "preprocess", slow)
    execute(Options((tmp_path / "in",), engine_path, tmp_path / "out", maps=False))
    seconds = json.loads((tmp_path / "out" / "run.json").read_text())["seconds"]
    assert seconds["scoring_preprocessing"] >= 0.5
    assert seconds["scoring_decoding"] < seconds["scoring_preprocessing"]
