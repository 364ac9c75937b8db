"""What is built, when, and what becomes of builds that fail, take too long, or are interrupted."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest

from benchmarks.speed import bench, building
from benchmarks.speed.bench import Options
from benchmarks.speed.building import Builds
from benchmarks.speed.candidates import KNOWN, Candidate
from benchmarks.speed.rounds import Plan
from benchmarks.speed.subject import Asked, Subject
from benchmarks.speed.workers import Worker, WorkerError
from qfae_runtime.agreement import Reference, Scale
from qfae_runtime.engines.base import Scores

AOT, PLAN, EAGER = KNOWN["aotinductor-fp16"], KNOWN["tensorrt-fp16"], KNOWN["torch-fp16"]


class Builder:
    """Stands in for a process that builds until it is let go, or killed."""

    made: list[Builder]

    def __init__(self, folder: Path, log: Path, threads: int | None, *, own_group: bool) -> None:
        assert own_group
        self.name = log.stem
        self.free, self.dead = threading.Event(), False
        Builder.made.append(self)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert do == "build"
        assert arguments == {"candidate": self.name, "device": "cuda:0", "max_batch": 8}
        assert self.name == AOT.name or not any(one.name == AOT.name for one in Builder.made), "plans are built alone"
        if self.name == AOT.name:
            assert self.free.wait(20)
        if self.dead:
            raise WorkerError("its process ended with signal 9")
        return {"seconds": 7.0}

    def kill(self) -> None:
        self.dead = True
        self.free.set()

    def close(self) -> None:
        pass

    __enter__, __exit__ = lambda self: self, lambda *_: None


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Builder]]:
    Builder.made = []
    monkeypatch.setattr(building, "Worker", Builder)
    monkeypatch.setattr(building, "built_file", lambda one, folder, _: folder / "x" if one in (AOT, PLAN) else None)
    yield Builder.made
    for one in Builder.made:
        one.free.set()


def started(candidate: Candidate) -> Builder:
    """Return the process that builds a candidate, once it is there: builds beside are begun by threads."""
    for _ in range(500):
        if found := [one for one in Builder.made if one.name == candidate.name]:
            return found[0]
        time.sleep(0.01)
    raise AssertionError("no build was begun")


def builds(folder: Path, longest: float | None = None) -> Builds:
    return Builds(folder, folder / "logs", "cuda:0", None, 8, longest)


def test_packages_are_built_beside_and_plans_alone(builders: list[Builder], tmp_path: Path) -> None:
    said: list[str] = []
    with closing(builds(tmp_path)) as running:
        running.start([AOT, EAGER, PLAN], said.append)
        assert said == ["building tensorrt-fp16", "building aotinductor-fp16, beside what follows"]
        assert running.seconds(EAGER) is None
        assert running.seconds(PLAN) == 7
        assert running.running()
        assert (running.running(AOT), running.running(PLAN), running.running(EAGER)) == (True, False, False)
        started(AOT).free.set()
        assert running.seconds(AOT) == 7
        assert not running.running()


def test_what_takes_too_long_is_given_up(builders: list[Builder], tmp_path: Path) -> None:
    with closing(builds(tmp_path, longest=0.05)) as running:
        running.start([AOT], lambda step: None)
        with pytest.raises(WorkerError, match=r"^building it would take more than 0.05 s$"):
            running.seconds(AOT)
        assert builders[0].dead


def test_an_end_for_another_reason_is_told_as_it_is(builders: list[Builder], tmp_path: Path) -> None:
    with closing(builds(tmp_path, longest=50)) as running:
        running.start([AOT], lambda step: None)
        started(AOT).kill()
        with pytest.raises(WorkerError, match="signal 9"):
            running.seconds(AOT)


def test_nothing_goes_on_when_the_run_ends(builders: list[Builder], tmp_path: Path) -> None:
    running = builds(tmp_path)
    with closing(running):
        running.start([AOT], lambda step: None)
        assert running.running()
        process = started(AOT)
    assert process.dead
    assert not running.running()
    with pytest.raises(WorkerError, match="the run has ended"):
        running._worker(AOT)  # as a build would that had not got so far


def test_what_a_build_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler of its own, which would go on, and take the cores that others are measured on."""
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/pid.part\nmv {tmp_path}/pid.part {tmp_path}/pid\nwait\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with Worker(tmp_path, tmp_path / "worker.log", 1, own_group=True) as worker:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
        assert child.exists()
        worker.kill()
    for _ in range(500):
        try:
            if " Z " in child.read_text():
                return
        except OSError:
            return
        time.sleep(0.01)
    raise AssertionError("it went on")


def test_a_process_can_be_ended_from_another_thread(tmp_path: Path) -> None:
    with Worker(tmp_path, tmp_path / "worker.log", 1) as worker:
        threading.Timer(0.05, worker.kill).start()

        def ask_on() -> None:
            while True:
                worker.ask("memory")

        with pytest.raises(WorkerError, match=r"ended with signal 9; see worker\.log"):
            ask_on()


class Scored:
    """Stands in for all processes: each scores as the reference does; `asked` holds what was asked of whom."""

    def __init__(self, reference: Scores, asked: list[str], builder: list[Builder], *, fails: bool) -> None:
        self.reference, self.asked, self.builder, self.name, self.fails = reference, asked, builder, "", fails

    def of(self, candidate: Candidate) -> Self:
        self.name = candidate.name
        return self

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append(f"{self.name} {do} {arguments.get('batch', '')}".strip())
        if do == "score":
            np.savez(arguments["out"], **self.reference._asdict())
        if self.asked[-1] == "torch-compile-fp16 time 8":
            self.builder[-1].free.set()
            if self.fails:
                raise WorkerError("out of memory")
        return {}

    def note_memory(self, candidate: Candidate) -> None:
        pass

    def end(self, name: str) -> None:
        self.asked.append(f"{name} ended")


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_being_built_is_opened_last_and_compilers_work_beside(
    fails: bool, builders: list[Builder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch size that fails there is left to its round: what was scored stays judged."""
    rng = np.random.default_rng(0)
    maps, images = rng.random((32, 4, 4), dtype=np.float32), np.zeros((32, 4, 4, 3), np.uint8)
    reference = Scores(maps.max(axis=(1, 2)), maps, images)
    monkeypatch.setattr(
        bench, "images_of", lambda folder: (images, (None,) * 32, Reference(reference, Scale.of(reference)))
    )
    options = Options(Asked(), tmp_path, (), Plan(batches=(1, 8)), "cuda:0")
    (tmp_path / "logs").mkdir()
    subject = Subject(Asked(), {}, 8, 4, 32, 1, (), {})
    asked: list[str] = []
    workers: Any = Scored(reference, asked, builders, fails=fails)
    missing: list[dict[str, Any]] = []
    with closing(builds(tmp_path)) as running:
        candidates = [AOT, KNOWN["onnxruntime-fp16"], EAGER, KNOWN["torch-compile-fp16"]]
        running.start(candidates, lambda step: None)
        assert started(AOT)
        judged = bench._judged(options, candidates, subject, running, workers, missing, lambda step: None)
    assert asked == [
        "torch-fp16 score",
        "torch-compile-fp16 score",
        "torch-compile-fp16 time 1",
        "torch-compile-fp16 time 8",
        *(["torch-compile-fp16 ended"] if fails else []),
        # Its memory is what has come into use on the card: a build beside would be counted with it.
        *("aotinductor-fp16 score", "onnxruntime-fp16 score"),
    ]
    assert {name: one.build_s for name, one in judged.items()} == {
        "torch-fp16": None,
        "torch-compile-fp16": None,
        "onnxruntime-fp16": None,
        "aotinductor-fp16": 7,
    }
    assert missing == []


def test_what_could_not_be_built_is_listed(
    builders: list[Builder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, images = np.ones((2, 4, 4), np.float32), np.zeros((2, 4, 4, 3), np.uint8)
    scores = Scores(maps[:, 0, 0], maps, images)
    monkeypatch.setattr(bench, "images_of", lambda folder: (images, (None,) * 2, Reference(scores, Scale.of(scores))))
    missing: list[dict[str, Any]] = []
    options = Options(Asked(), tmp_path, (), device="cuda:0")
    subject = Subject(Asked(), {}, 8, 4, 2, 1, (), {})
    with closing(builds(tmp_path, longest=0.05)) as running:
        running.start([AOT], lambda step: None)
        workers: Any = SimpleNamespace(end=lambda name: None)
        assert bench._judged(options, [AOT], subject, running, workers, missing, lambda step: None) == {}
    assert [(row["candidate"], row["reason"]) for row in missing] == [
        (AOT.name, "building it would take more than 0.05 s")
    ]
