from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qfae_runtime import open_engine, verdicts
from qfae_runtime.arrays import UInt8
from qfae_runtime.contract import CONTRACTS
from qfae_runtime.coverage import calls_of
from qfae_runtime.engines.base import Scores
from qfae_runtime.errors import ManifestError, SelfTestError
from qfae_runtime.golden import load_golden
from qfae_runtime.manifest import FileEntry
from qfae_runtime.selftest import contract_for, self_test
from qfae_runtime.verdicts import Runner, cache_folder

from .tiny import SIZE, export_tiny, mend_hashes


def test_passes_once_and_is_remembered(engine_path: Path, cache: Path) -> None:
    with open_engine(engine_path) as opened:
        first, second, forced = self_test(opened), self_test(opened), self_test(opened, force=True)
    assert (first.status, first.images, first.remembered) == ("passed", 5, True)
    assert (second.status, second.summary) == ("passed before", first.summary)
    assert forced.status == "passed"
    assert len(list((cache / "selftest").iterdir())) == 1


def change_one_weight(engine_path: Path) -> None:
    model = onnx.load(engine_path)
    [kernel] = [one for one in model.graph.initializer if one.name == "kernel"]
    values = numpy_helper.to_array(kernel).copy()
    values[0, 0, 1, 1] *= 1.05
    kernel.CopyFrom(numpy_helper.from_array(values, "kernel"))
    onnx.save(model, engine_path)


def test_one_changed_weight_with_every_hash_mended_fails(engine_path: Path) -> None:
    with open_engine(engine_path) as opened:
        self_test(opened)  # the untouched engine's verdict must not cover the changed one
    change_one_weight(engine_path)
    mend_hashes(engine_path, certificate_too=True)
    with open_engine(engine_path) as opened, pytest.raises(SelfTestError) as caught:
        self_test(opened)
    text = str(caught.value)
    assert "self-test failed on onnxruntime" in text
    assert "score error, typical / PyTorch's own: " in text
    assert "map error, worst pixel / PyTorch's own: " in text
    assert " exceeds 30, worst at image" in text
    assert text.endswith(
        "do not use its scores; export the engine again, or use the backend version it was certified on"
    )


def test_bounds_are_tightened_to_the_certified_errors_and_never_widened(engine_path: Path) -> None:
    with open_engine(engine_path) as opened:
        certificate = opened.certificate
    assert certificate is not None

    def bounds(contract: str = "fp32", **measured: float) -> dict[str, float]:
        entry = replace(certificate, contract=CONTRACTS[contract], measured={**certificate.measured, **measured})
        return dict(contract_for(entry).bounds)

    # FP32's errors are in units of what rounding costs: there is nothing to tighten.
    few = CONTRACTS["fp32"].without(("spearman", "flips_beyond", "map_cosine_p1")).bounds
    assert bounds() == bounds(score_worst=1e-3, score_abs=1e-7) == dict(few)
    half = bounds("fp16", score_abs=2e-3, score_distance_max=5e-4, map_abs=9e-5, map_cosine_min=0.9998)
    assert half["score_abs"] == pytest.approx(2e-2)
    assert half["map_abs"] == pytest.approx(9e-4)
    assert half["score_distance_max"] == pytest.approx(5e-3)
    assert half["map_cosine_min"] == pytest.approx(0.998)
    assert half["stress_distance"] == pytest.approx(5e-5)  # another processor may differ by so much from no error
    assert bounds("fp16", score_distance_max=8e-3)["score_distance_max"] == 0.01  # the contract's
    # Single golden images may be as bad as the worst that was certified.
    assert bounds("fp16", score_distance_max=0.0101)["score_distance_max"] == 0.0101
    left_out = {"spearman", "flips", "flips_share", "auroc_change", "score_distance", "map_angle", "map_cosine_p1"}
    assert not left_out & half.keys()


def test_a_scale_that_makes_errors_small_is_found_out(engine_path: Path) -> None:
    path = engine_path.with_suffix(".json")
    stored = json.loads(path.read_text())
    stored["certificate"][0]["scale"]["score_iqr"] = 1e9
    path.write_text(json.dumps(stored))
    with (
        open_engine(engine_path) as opened,
        pytest.raises(SelfTestError, match="is beyond what its golden images span"),
    ):
        self_test(opened)


def test_without_a_certificate_the_contract_itself_holds() -> None:
    assert contract_for(None).bounds["score_worst"] == 30
    assert contract_for(None, "fp16").bounds["score_distance_max"] == 0.01


class Wrapped:
    """An engine of which `change` spoils what it gives for a batch."""

    def __init__(self, engine: Any, change: Callable[[UInt8, Scores], Scores]) -> None:
        self.engine, self.change, self.calls = engine, change, list[UInt8]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, images: UInt8, maps: bool = True) -> Scores:
        self.calls.append(images)
        return self.change(images, self.engine.run(images, maps))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_an_engine_that_is_wrong_at_one_batch_size_fails(engine_path: Path, size: int) -> None:
    """At whatever size: the last batch of a run may be of any below its own."""

    def spoil(images: UInt8, right: Scores) -> Scores:
        return right._replace(score=right.score * np.float32(1 if len(images) != size else 0.99))

    with open_engine(engine_path) as opened:
        wrong = replace(opened, engine=Wrapped(opened.engine, spoil))
        with pytest.raises(SelfTestError, match=f"batch {size}: score error, worst image / PyTorch's own: "):
            self_test(wrong, batch_size=16)
        if size == 16:  # no run at 8 meets it
            assert self_test(wrong, batch_size=8).status == "passed"


@pytest.mark.parametrize("size", [2, 8, 16])
def test_an_engine_that_is_wrong_at_one_place_of_a_batch_fails(engine_path: Path, size: int) -> None:
    for place in range(size):

        def spoil(images: UInt8, right: Scores, place: int = place) -> Scores:
            if len(images) == size:
                right.anomaly_map[place, 3, 4] += 0.01
            return right

        with open_engine(engine_path) as opened:
            wrong = replace(opened, engine=Wrapped(opened.engine, spoil))
            with pytest.raises(SelfTestError, match=f"batch {size}: map error, worst pixel / PyTorch's own: "):
                self_test(wrong, batch_size=16)


def test_the_highest_score_is_met_alone_and_in_every_place_of_every_batch(engine_path: Path) -> None:
    with open_engine(engine_path) as opened:
        golden = load_golden(
            engine_path.with_name("tiny.golden.npz").read_bytes(), "tiny.golden.npz", opened.manifest.image_size
        )
        engine = Wrapped(opened.engine, lambda images, right: right)
        self_test(replace(opened, engine=engine), batch_size=16)
    highest = golden.images[golden.scores.score.argmax()]
    met: dict[int, set[int]] = {size: set() for size in (1, 2, 4, 8, 16)}
    seen = set()
    for call in engine.calls:
        met[len(call)] |= {place for place, image in enumerate(call) if np.array_equal(image, highest)}
        seen |= {image.tobytes() for image in call}
    assert met == {size: set(range(size)) for size in met}
    assert seen == {image.tobytes() for image in golden.images}


def test_the_batches_that_are_timed_are_compared_as_well(engine_path: Path) -> None:
    calls = list[int]()

    def spoil(images: UInt8, right: Scores) -> Scores:
        calls.append(len(images))
        late = len(calls) > untimed
        return right._replace(score=right.score * np.float32(0.99 if late else 1))

    with open_engine(engine_path) as opened:
        untimed = sum(len(batches) for batches in calls_of(np.arange(5, dtype=np.float32), (1, 2, 4, 8, 16)).values())
        with pytest.raises(SelfTestError, match="batch 16: score error, worst image / PyTorch's own: "):
            self_test(replace(opened, engine=Wrapped(opened.engine, spoil)), batch_size=16)
    assert set(calls[untimed:]) == {16}


def test_images_that_are_prepared_otherwise_here(engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(pixels: UInt8, height: int, width: int) -> UInt8:
        rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), pixels.shape[:2], strict=True))
        sampled: UInt8 = pixels[rows][:, columns]
        return sampled

    monkeypatch.setattr(sys.modules["qfae_runtime.preprocess"], "resize", nearest)
    with open_engine(engine_path) as opened, pytest.raises(SelfTestError, match="prepares images otherwise than"):
        self_test(opened)


def test_damaged_memory_means_testing_again(engine_path: Path, cache: Path) -> None:
    with open_engine(engine_path) as opened:
        self_test(opened)
        [memory] = (cache / "selftest").iterdir()
        for text in ("", "[]", "{}", json.dumps({"environment": {}, "verdict": {"status": "passed"}})):
            memory.write_text(text)
            assert self_test(opened).status == "passed"


def test_cache_that_cannot_be_written_is_no_fault(
    engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QFAE_CACHE", str(tmp_path / "file" / "cache"))
    with open_engine(engine_path) as opened:
        verdict = self_test(opened)
    assert (verdict.status, verdict.remembered) == ("passed", False)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFAE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("QFAE_CACHE")
    assert cache_folder() == Path("/b/qfae")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/qfae").expanduser()


def test_a_user_without_a_home_folder_is_tested_every_time(engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered, and nothing ends for that."""
    for name in ("QFAE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # as of a user that the system does not know
    assert cache_folder() is None
    with open_engine(engine_path) as opened:
        for _ in range(2):
            verdict = self_test(opened)
            assert (verdict.status, verdict.remembered) == ("passed", False)


def test_missing_and_altered_golden_files_are_refused(engine_path: Path) -> None:
    golden = engine_path.with_name("tiny.golden.npz")
    content = golden.read_bytes()
    golden.write_bytes(content[:-1])
    with open_engine(engine_path) as opened, pytest.raises(ManifestError, match=r"do not match tiny\.json"):
        self_test(opened)
    golden.unlink()
    with open_engine(engine_path) as opened, pytest.raises(ManifestError, match="the golden file cannot be read"):
        self_test(opened)


def test_uncertified_engine_without_golden_file_is_skipped(tmp_path: Path) -> None:
    engine_path = export_tiny(tmp_path, certified=False)
    manifest_path = engine_path.with_suffix(".json")
    manifest_path.write_text(json.dumps({**json.loads(manifest_path.read_text()), "golden": None}))
    with open_engine(engine_path, allow_uncertified=True) as opened:
        assert self_test(opened).status == "skipped"


def test_hostile_golden_files_are_refused(tmp_path: Path) -> None:
    def refuse(says: str, **arrays: Any) -> None:
        path = tmp_path / "g.npz"
        np.savez_compressed(path, **arrays)
        with pytest.raises(ManifestError, match=says):
            load_golden(path.read_bytes(), "g.npz", SIZE)

    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    refuse("not a golden file", images=images)
    refuse("each once", images=np.zeros((300, SIZE, SIZE, 3), np.uint8))
    good: dict[str, Any] = {"score": np.zeros(2, np.float32), "anomaly_map": np.zeros((2, SIZE, SIZE), np.float32)}
    good |= {"stress": np.zeros(2, np.uint8), "factors": np.ones(2, np.uint8)}
    good |= {"own": np.zeros((2, 4)), "unit": np.zeros((2, 4))}
    refuse("array 'score': expected float32", images=images, reconstruction=images, **{**good, "score": np.zeros(2)})
    refuse("array 'own': expected", images=images, reconstruction=images, **{**good, "own": np.zeros((2, 3))})
    refuse(r"expected 1\.\.32 images, got 0", images=images[:0], reconstruction=images, **good)
    refuse("not a golden file", images=np.array([{}, {}]), reconstruction=images, **good)
    with pytest.raises(ManifestError, match="not a golden file"):
        load_golden(b"PK\x03\x04 nonsense", "g.npz", SIZE)


def test_golden_entry_describes_the_file(engine_path: Path) -> None:
    golden = engine_path.with_name("tiny.golden.npz")
    with open_engine(engine_path) as opened:
        assert opened.manifest.files[golden.name] == FileEntry.of(golden, "golden")


def environments(cache: Path) -> list[dict[str, Any]]:
    files = (cache / "selftest").iterdir()
    return [json.loads(path.read_text())["environment"] for path in files]


def test_each_number_of_threads_and_batch_size_is_tested_for_itself(engine_path: Path, cache: Path) -> None:
    for threads, batch in ((1, 4), (3, 4), (3, 2)):
        with open_engine(engine_path, backend="onnxruntime", threads=threads) as opened:
            for status in ("passed", "passed before"):
                verdict = self_test(opened, batch_size=batch)
                assert (verdict.status, verdict.batch_size) == (status, batch)
    kept = {(one["threads"], one["batch_size"]) for one in environments(cache)}
    assert kept == {(1, 4), (3, 4), (3, 2)}


@pytest.mark.parametrize("name", ["backend", "version", "device"])
def test_what_runs_it_is_a_part_of_the_memory(engine_path: Path, name: str) -> None:
    with open_engine(engine_path) as opened:
        self_test(opened)
        setattr(opened.engine, name, "another")
        assert self_test(opened).status == "passed"
        assert self_test(opened).status == "passed before"


def test_the_rate_is_that_of_full_batches_without_the_first(engine_path: Path) -> None:
    class Slow:
        """10 ms an image; the first run of each batch size takes 0.3 s longer."""

        def __init__(self, engine: Any) -> None:
            self.engine, self.seen = engine, set[int]()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

        def run(self, images: UInt8, maps: bool = True) -> Any:
            time.sleep(0.01 * len(images) + 0.3 * (len(images) not in self.seen))
            self.seen.add(len(images))
            return self.engine.run(images, maps)

    with open_engine(engine_path) as opened:
        slow = Slow(opened.engine)
        verdict = self_test(replace(opened, engine=slow), batch_size=8)
        before = self_test(opened, batch_size=8)
    assert slow.seen == {1, 2, 4, 8}  # all that a run in batches of 8 may meet
    assert verdict.images_per_second is not None
    assert 50 < verdict.images_per_second <= 100
    assert (before.status, before.images_per_second) == ("passed before", verdict.images_per_second)


def test_a_slow_engine_is_not_run_again_for_its_rate(engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfae_runtime.selftest._LONG_SECONDS", 0.0)
    with open_engine(engine_path) as opened:
        engine = opened.engine
        run, runs = opened.engine.run, list[int]()

        def counted(images: UInt8, maps: bool = True) -> Any:
            runs.append(len(images))
            return run(images, maps)

        monkeypatch.setattr(engine, "run", counted)
        verdict = self_test(opened)
        untimed = list(runs)
        assert untimed == [16, 16, 8, 8, 4, 4, 2, 2, 1, 1]
        assert verdict.images_per_second is not None
        monkeypatch.setattr(engine, "device", "cuda:0")  # there, the first run says nothing of the second
        self_test(opened)
    assert runs[len(untimed) : 2 * len(untimed)] == untimed
    assert set(runs[2 * len(untimed) :]) == {16}


def test_a_failure_is_never_recalled_as_a_verdict(engine_path: Path, cache: Path) -> None:
    change_one_weight(engine_path)
    mend_hashes(engine_path, certificate_too=True)
    for _ in range(2):
        with open_engine(engine_path) as opened, pytest.raises(SelfTestError, match="score error, typical / "):
            self_test(opened)
    [memory] = (cache / "selftest").iterdir()
    assert json.loads(memory.read_text())["verdict"]["status"] == "failed"


def test_cards_are_a_part_of_the_memory_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_NVIDIA", tmp_path)
    card = tmp_path / "gpus" / "0000:01:00.0" / "information"
    card.parent.mkdir(parents=True)
    card.write_text("Model: \t NVIDIA H100\nIRQ: 5\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA 580.1\nGCC\n")
    contract = CONTRACTS["fp32"]
    there = verdicts.environment_of("a", "b", contract, Runner("onnxruntime", "1", "cuda:0", 4), 16)
    here = verdicts.environment_of("a", "b", contract, Runner("onnxruntime", "1", "cpu", 4), 16)
    assert there["cards"] == ["NVIDIA H100", "NVIDIA 580.1"]
    assert (there["threads"], here["threads"], here["cards"]) == (None, 4, None)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:11:59 UTC 2025",
            "NVIDIA UNIX x86_64 Kernel Module 580.65.06 Sun Jul 27 07:11:59 UTC 2025",
        ),
        ("a line of another kind", "a line of another kind"),
    ],
)
def test_a_record_keeps_all_of_the_drivers_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, kept: str
) -> None:
    monkeypatch.setattr(verdicts, "_NVIDIA", tmp_path)
    (tmp_path / "version").write_text(f"{line}\nGCC\n")
    assert verdicts.hardware()["cards"] == [kept]
