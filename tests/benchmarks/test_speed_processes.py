"""The processes of qfae-bench: replaced where they die, ended where memory is short, and what they hold."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.speed.candidates import KNOWN
from benchmarks.speed.opening import Ready
from benchmarks.speed.worker import Work, peak_bytes
from benchmarks.speed.workers import WorkerError, Workers, device_used
from qfae_runtime.engines.base import Scores
from tests.commands import ROOT, run


def test_a_process_that_dies_is_told_and_replaced(measured: Path) -> None:
    workers = Workers(measured / "model", measured / "logs", "cpu", 1, 4, 4)
    try:
        candidate = KNOWN["onnxruntime"]
        first = workers.of(candidate)
        assert workers.of(candidate) is first
        first._process.kill()
        with pytest.raises(WorkerError, match=r"its process ended with signal 9; see onnxruntime\.log"):
            first.ask("time", batch=1, seconds=0.0, calls=1, settle=False)
        workers.end(candidate.name)
        assert len(workers.of(candidate).ask("time", batch=1, seconds=0.0, calls=2, settle=False)["seconds"]) == 2
        assert len(workers.openings[candidate.name]) == 2  # every fresh start is kept
    finally:
        workers.close()


def test_the_log_says_where_a_process_was_when_a_library_crashed(measured: Path) -> None:
    workers = Workers(measured / "model", measured / "logs", "cpu", 1, 4, 4)
    try:
        worker = workers.of(KNOWN["onnxruntime"])
        worker._process.send_signal(signal.SIGSEGV)
        with pytest.raises(WorkerError, match=r"its process ended with signal 11; see onnxruntime\.log"):
            worker.ask("time", batch=1, seconds=0.0, calls=1, settle=False)
        log = worker.log.read_text(encoding="utf-8")
        assert "Fatal Python error: Segmentation fault" in log
        assert 'worker.py", line' in log
    finally:
        workers.close()


def test_a_process_that_died_while_it_waited_is_told_too(measured: Path) -> None:
    """What is asked of it is never read, and closing its pipe would try to send that again."""
    workers = Workers(measured / "model", measured / "logs", "cpu", 1, 4, 4)
    try:
        worker = workers.of(KNOWN["onnxruntime"])
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(WorkerError, match="its process ended with signal 9"):
            worker.ask("time", batch=1, seconds=0.0, calls=1, settle=False)
        workers.end("onnxruntime")
    finally:
        workers.close()


def test_the_very_first_call_of_a_size_is_kept_whoever_made_it(measured: Path, tmp_path: Path) -> None:
    """Scoring the images runs batches of 8, the last one filled up: compilers work there, before anything is timed."""
    ticks = iter(range(1000))
    work = Work(measured / "model", lambda answer: None)
    work.open("onnxruntime", "cpu", 1, 4, 8)
    assert work.opened is not None
    ready, slow = work.opened, {1: 50.0, 4: 40.0}

    def seconds(size: int, maps: bool) -> float:
        ready.seconds(size, maps)
        return slow.pop(size, 1.0 + next(ticks) / 1000)

    work.firsts.clear()
    work.opened = ready._replace(seconds=seconds)
    work._seconds(1)
    work.score(str(tmp_path / "scores.npz"))
    assert len(np.load(tmp_path / "scores.npz")["score"]) % 8 > 0
    assert work.firsts.keys() == {1, 8}
    before = dict(work.firsts)
    for size in (1, 8):
        answer = work.time(size, 0.0, 2, settle=True)
        assert answer["first"] == before[size]
    assert work.time(4, 0.0, 1, settle=True)["first"] == before.get(4, 40.0)


def test_the_peak_is_that_of_the_process_alone(tmp_path: Path) -> None:
    file = tmp_path / "status"
    file.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n", encoding="ascii")
    assert peak_bytes(file) == 2 * 2**20
    assert peak_bytes(tmp_path / "none") > 2**20


def test_where_memory_is_short_the_one_that_waited_longest_is_ended(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(measured / "model", measured / "logs", "cpu", 1, 4, 4)
    try:
        for name in ("onnxruntime", "openvino"):
            workers.of(KNOWN[name])
        workers.of(KNOWN["onnxruntime"])
        room = iter([0, 10**15])
        monkeypatch.setattr("benchmarks.speed.workers.memory_available", lambda: next(room))
        workers.of(KNOWN["gemm-numpy"])
        assert list(workers._open) == ["onnxruntime", "gemm-numpy"]
    finally:
        workers.close()


ENGINE_PROCESS = """
import sys
from pathlib import Path
from benchmarks.speed.worker import Work
work = Work(Path(sys.argv[1]), print)
work.open("onnxruntime", "cpu", 1, 4, 4)
work.memory()
print({"torch", "timm", "onnx", "qfae_train"} & set(sys.modules))
"""


def test_an_engine_process_loads_no_torch(measured: Path) -> None:
    """A cold start must be that of the engine."""
    assert run("python", "-c", ENGINE_PROCESS, str(measured / "model"), cwd=ROOT).stdout == "set()\n"


NVIDIA_SMI = """#!/bin/sh
cd "$(dirname "$0")"
echo "$@" >> asked
head -n 1 used
sed -i 1d used
"""


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an nvidia-smi that answers with one line after the other of a file."""
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(NVIDIA_SMI, encoding="utf-8")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def test_what_is_in_use_on_a_card_is_asked_of_nvidia_smi(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = card / "used"
    used.write_text("3\n81559\n[N/A]\n\n7\n9\n", encoding="utf-8")
    assert [device_used("cuda:0") for _ in range(4)] == [3 * 2**20, 81559 * 2**20, None, None]
    assert device_used("cpu") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8932f937")
    assert [device_used(f"cuda:{number}") for number in (0, 1)] == [7 * 2**20, 9 * 2**20]
    query = "--query-gpu=memory.used --format=csv,noheader,nounits"
    assert (card / "asked").read_text(encoding="utf-8").splitlines() == [
        *[f"--id=0 {query}"] * 4,
        *(f"--id={name} {query}" for name in ("2", "GPU-8932f937")),
    ]
    (card / "nvidia-smi").write_text("#!/bin/sh\necho 5\nexit 6\n", encoding="utf-8")
    assert device_used("cuda:0") is None
    (card / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(card))
    assert device_used("cuda:0") is None


def test_a_candidate_holds_what_came_into_use_at_its_own_visits(measured: Path, card: Path) -> None:
    workers = Workers(measured / "model", measured / "logs", "cuda:0", 1, 4, 4)
    first, second = KNOWN["gemm-numpy"], KNOWN["gemm-onnxruntime"]  # they need no card
    # In use before a visit and after it: the first one's, the second's, the first one's again.
    (card / "used").write_text("100\n600\n600\n1600\n1610\n1710\n", encoding="utf-8")
    try:
        for candidate in (first, second, first):
            workers.of(candidate)
            workers.note_memory(candidate)
        assert workers.device_held == {first.name: 600 * 2**20, second.name: 1000 * 2**20}
        workers.end(first.name)
        (card / "used").write_text("1100\n1300\n", encoding="utf-8")
        workers.of(first)
        workers.note_memory(first)
        assert workers.device_held[first.name] == 600 * 2**20, "the most, over all its processes"
        workers.note_memory(first)  # there are no more answers
        assert workers.device_held[first.name] == 600 * 2**20
    finally:
        workers.close()


def test_what_the_allocator_counted_is_believed(tmp_path: Path, card: Path) -> None:
    (card / "used").write_text("100\n" * 20, encoding="utf-8")
    workers, peaks = Workers(tmp_path, tmp_path / "logs", "cuda:0", 1, 4, 4), iter([5, 9, 7])
    eager = KNOWN["torch-fp16"]
    process: Any = SimpleNamespace(ask=lambda do: {"host": 1, "device": next(peaks)}, close=lambda: None)
    workers._open[eager.name] = process
    held = []
    for _ in range(3):
        workers.note_memory(eager)
        held.append(workers.device_held[eager.name])
    assert held == [5, 9, 9]


def test_a_process_tells_what_its_engine_knows_of_the_cards_memory(tmp_path: Path) -> None:
    work = Work(tmp_path, lambda answer: None)
    assert work.memory()["device"] is None
    engine: Any = SimpleNamespace(device_peak=lambda: 7)
    work.opened = Ready(lambda size, maps: 0.0, engine, 0)
    assert work.memory()["device"] == 7
    work.opened = Ready(lambda size, maps: 0.0, cast(Any, SimpleNamespace()), 0)
    assert work.memory()["device"] is None


def test_every_image_is_scored_once_in_batches_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 of them, as the full model has: the last batch is filled up, and what filled it is left out."""
    images = np.arange(36, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 3), np.uint8)
    monkeypatch.setattr("benchmarks.speed.worker.images_of", lambda folder: (images, (), None))
    sizes: list[int] = []

    def run(batch: NDArray[np.uint8]) -> Scores:
        sizes.append(len(batch))
        return Scores(batch[:, 0, 0, 0].astype(np.float32), batch[..., 0].astype(np.float32), batch)

    work = Work(tmp_path, lambda answer: None)
    engine: Any = SimpleNamespace(run=run, max_batch=64)
    work.opened = Ready(lambda size, maps: 0.0, engine, 0)
    work.score(str(tmp_path / "scores.npz"))
    assert sizes == [8] * 5
    with np.load(tmp_path / "scores.npz") as stored:
        np.testing.assert_array_equal(stored["score"], np.arange(36))
        np.testing.assert_array_equal(stored["reconstruction"], images)


FROM_A_COPY = """
import sys
from pathlib import Path
from benchmarks.speed.candidates import KNOWN
from benchmarks.speed.end_to_end import _run
from benchmarks.speed.workers import Worker, WorkerError, Workers
bench, out = map(Path, sys.argv[1:])
with Worker(bench / "model", out / "worker.log", 1) as worker:
    try:
        worker.ask("nothing")
    except WorkerError:
        pass
workers = Workers(bench / "model", out, "cpu", 1, 4, 4)
record, _ = _run(KNOWN["onnxruntime"], workers, bench / "pictures", out / "results", 4, False)
print(record["qfae"])
"""


def test_processes_import_what_started_them(measured: Path, tmp_path: Path) -> None:
    """As `make bench-gpu` does it: from a checkout that is not installed, or is not the one that is."""
    root, out = tmp_path / "checkout", tmp_path / "out"
    for name in ("benchmarks", "qfae_runtime"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "qfae_runtime/__init__.py").open("a", encoding="utf-8") as file:
        file.write('\n__version__ = "a copy"\n')
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", FROM_A_COPY, str(measured), str(out)],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a copy\n"
    assert str(root / "benchmarks/speed/worker.py") in (out / "worker.log").read_text(encoding="utf-8")
