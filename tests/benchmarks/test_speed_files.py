"""Files through qfae-run: which engine they are scored with, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.speed import bench
from benchmarks.speed.bench import Options, _end_to_end
from benchmarks.speed.candidates import KNOWN
from benchmarks.speed.rounds import Measured, Plan
from benchmarks.speed.rows import Judged
from benchmarks.speed.statistics import Visit
from benchmarks.speed.subject import Asked
from benchmarks.speed.table import whole_run
from benchmarks.speed.transfer import moved, transfer_seconds

SECONDS = {"onnxruntime": 3.0, "openvino": 2.0, "openvino-bf16": 1.0, "openvino-int8": 0.5}
ROW: dict[str, Any] = {
    "title": "OpenVINO", "precision": "int8", "batch": 4, "files": 8, "maps": False,
    "images_per_second": {"mean": 20.0, "low": None, "high": None},
    "share_of_engine": {"mean": 0.9, "low": None, "high": None},
    "seconds": {"scoring_decoding": 0.25, "scoring_engine": 0.5, "process": 2.0},
}  # fmt: skip


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for running qfae-run; the list holds what it would have been run with, and whether with maps."""
    found: list[str] = []

    def run(candidate: Any, workers: Any, out: Path, files: int, batch: int, rounds: int, maps: bool, say: Any) -> Any:
        found.append(f"{candidate.name} {batch} {maps}")
        yield from ({"candidate": candidate.name, "maps": maps, "rounds": number} for number in (1, 2))

    monkeypatch.setattr(bench, "end_to_end", run)
    monkeypatch.setattr(bench, "write_pictures", lambda *_: None)
    return found


def choose(tmp_path: Path, broken: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    """Return the rows after every round, and then why there are no more, if that was a failure."""
    options = Options(Asked(ckpt="x.pt"), tmp_path, (), Plan(batches=(1, 4)))
    visits = [Visit(name, batch, 0, (seconds,)) for name, seconds in SECONDS.items() for batch in (1, 4)]
    judged = {name: Judged({"score_iqr": 0.5}, {"kept": name not in broken}, None) for name in SECONDS}
    candidates, missing = [KNOWN[name] for name in SECONDS], list[dict[str, Any]]()
    measured = Measured(visits)
    found = list(_end_to_end(options, candidates, measured, cast(Any, None), judged, missing, lambda step: None))
    return [*found, missing] if missing else found


@pytest.mark.parametrize(
    ("broken", "taken"),
    [
        ((), "openvino-int8"),
        (("openvino-int8",), "openvino-bf16"),
        (("openvino-int8", "openvino-bf16"), "openvino"),
        (tuple(SECONDS), "openvino-int8"),
    ],
)
def test_the_fastest_that_keeps_its_contract_is_taken(
    scored: list[str], tmp_path: Path, broken: tuple[str, ...], taken: str
) -> None:
    choose(tmp_path, broken)
    assert scored == [f"{taken} 4 False", f"{taken} 4 True"]


def test_rows_of_files_are_there_after_every_round(scored: list[str], tmp_path: Path) -> None:
    """A run that is ended early loses one round of files; what follows takes the place of what was there before."""
    kept = [[(row["maps"], row["rounds"], row["error"]["score_iqr"]) for row in rows] for rows in choose(tmp_path)]
    assert kept == [
        [(False, 1, 0.5)],
        [(False, 2, 0.5)],
        [(False, 2, 0.5), (True, 1, 0.5)],
        [(False, 2, 0.5), (True, 2, 0.5)],
    ]


def test_scores_stand_beside_the_rate() -> None:
    row = {**ROW, "error": {"score_iqr": 0.125}, "contract": {"name": "int8", "kept": False, "broken": ["spearman"]}}
    assert whole_run(row) == (
        "qfae-run, 8 files of 240 x 240 px, OpenVINO INT8, batch 4, without heat maps: 20 images/s, 90% of the engine "
        "alone, score error 1.2e-01 of the IQR, contract broken (decoding 0.25 s, engine 0.50 s; whole process 2.0 s)"
    )
    faulty = {**row, "error": {"fault": "score: not finite"}}
    assert "alone, scores that cannot be compared, contract broken (decoding" in whole_run(faulty)
    assert "alone (decoding 0.25 s, engine 0.50 s; whole process 2.0 s)" in whole_run(ROW), "rows of before"


def test_what_the_way_to_a_gpu_costs_is_a_part_of_the_engine() -> None:
    text = whole_run({**ROW, "transfer_s": 0.031})
    assert "engine 0.50 s; of the engine about 0.03 s to the GPU and back; whole process" in text


def test_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images there, and back what is asked for; counted where ONNX Runtime would move it."""
    there: list[tuple[int, ...]] = []
    back: list[tuple[int, ...]] = []

    class Value:
        def __init__(self, array: Any) -> None:
            self.array = array

        @staticmethod
        def ortvalue_from_numpy(array: Any, kind: str, number: int) -> Value:
            assert (kind, number) == ("cuda", 1)
            there.append(array.shape)
            return Value(array)

        def numpy(self) -> Any:
            back.append(self.array.shape)
            return self.array

    monkeypatch.setattr("onnxruntime.OrtValue", Value)
    images, score, maps, reconstruction = (4, 32, 32, 3), (4,), (4, 32, 32), (4, 32, 32, 3)
    assert moved("cuda", 1, 32, 4, maps=True) > 0
    assert (set(there), set(back)) == ({images, score, maps, reconstruction}, {score, maps, reconstruction})
    there.clear()
    back.clear()
    assert moved("cuda", 1, 32, 4, maps=False) > 0
    assert (set(there), set(back)) == ({images, score}, {score})


def test_where_nothing_is_moved() -> None:
    for backend, device in (("onnxruntime", "cpu"), ("openvino", "cpu"), ("tensorrt", "cuda:0")):
        assert transfer_seconds(cast(Any, SimpleNamespace(backend=backend, device=device)), 4, maps=True) is None


def test_it_is_moved_to_the_engines_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def move(*arguments: Any) -> float:
        asked.append(arguments)
        return 0.5

    monkeypatch.setattr("benchmarks.speed.transfer.moved", move)
    engine = SimpleNamespace(backend="onnxruntime-tensorrt", device="cuda:1", image_size=224)
    assert transfer_seconds(cast(Any, engine), 8, maps=False) == 0.5
    assert asked == [("cuda", 1, 224, 8, False)]


def test_a_run_on_files_that_fails_is_told_and_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(bench, "write_pictures", fails)
    [[row]] = choose(tmp_path)
    assert (row["kind"], row["candidate"], row["reason"]) == ("missing", "qfae-run with openvino-int8", "disk full")
