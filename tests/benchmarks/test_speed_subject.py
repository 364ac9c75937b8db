"""What qfae-bench keeps of a model between runs, and that it takes no other one for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed import revision
from benchmarks.speed.revision import commit, writers
from benchmarks.speed.subject import RANDOM, SUBJECT, Asked, Subject, images_of, prepare
from benchmarks.speed.workers import Worker, WorkerError
from qfae_runtime.engines.base import Scores
from tests.export.tiny import checkpoint_file, config_of
from tests.train.made_up import toml


def test_the_measured_model_is_kept_and_another_is_not_taken_for_it(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(measured.parent)  # the checkpoint was named from there
    subject = Subject.load(measured / "model")
    assert subject.asked == Asked(ckpt="tiny.pt")
    images, labels, reference = images_of(measured / "model")
    assert len(images) == len(labels) == len(reference)
    with Worker(measured / "model", measured / "logs/again.log", 1) as worker:
        steps: list[str] = []
        same = {"asked": vars(Asked(ckpt="tiny.pt")), "flavours": ["onnx"], "max_batch": 4, "device": "cpu"}
        worker.ask("prepare", steps.append, **same)
        assert steps == []
        with pytest.raises(WorkerError, match=r"CheckpointError: checkpoint 'other\.pt': no such file"):
            worker.ask("prepare", steps.append, **{**same, "asked": vars(Asked(ckpt="other.pt"))})


@pytest.mark.usefixtures("quick_export")
def test_another_model_of_the_same_name_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    """Of the same size and time even: a checkpoint that was trained on, copied over the old one."""
    checkpoint, folder = checkpoint_file(tmp_path / "tiny.pt"), tmp_path / "model"
    steps: list[str] = []

    def trained_on(states: list[dict[str, torch.Tensor]]) -> None:
        states[0]["blocks.0.mlp.fc1.weight"] *= 2

    def prepared(batch: int = 4) -> tuple[Subject, Scores]:
        steps.clear()
        subject = prepare(Asked(ckpt=str(checkpoint)), folder, ["onnx"], batch, steps.append)
        return subject, images_of(folder)[2].scores

    before, scores = prepared()
    built = [folder / "model.fp32.cpu.pt2", folder / "model.fp16.plan"]
    for path in built:
        path.write_bytes(b"built of the first")
    assert prepared(batch=2)[0] == before
    assert steps == []
    status = checkpoint.stat()
    checkpoint_file(checkpoint, change=trained_on)
    os.utime(checkpoint, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert checkpoint.stat().st_size == status.st_size
    after, others = prepared()
    assert after.sources != before.sources
    assert np.abs(others.score - scores.score).max() > 1e-4
    assert not any(path.exists() for path in built)
    assert prepared(batch=8)[0].max_batch == 8, "the files say for which batches they are"
    assert steps != []
    (folder / SUBJECT).write_text('{"asked": {}, "of": "another version"}', encoding="utf-8")
    assert prepared()[0] == after


def test_scores_of_another_device_are_not_kept(tmp_path: Path) -> None:
    subject = Subject(Asked(ckpt="tiny.pt"), {}, 8, 32, 16, 1, (), {}, reference="cpu")
    subject.save(tmp_path)
    assert Subject.kept(tmp_path, subject.asked, {}, 8, "cpu") == subject
    assert Subject.kept(tmp_path, subject.asked, {}, 8, "cuda:0") is None


@pytest.mark.usefixtures("quick_export")
def test_what_another_candidate_had_written_stays(tmp_path: Path) -> None:
    asked, steps = Asked(ckpt=str(checkpoint_file(tmp_path / "tiny.pt"))), list[str]()
    for flavours in ([], ["onnx"], ["fp16"], ["onnx"], []):
        subject = prepare(asked, tmp_path / "model", flavours, 4, steps.append)
    assert subject.files == {"onnx": "model.onnx", "fp16": "model.fp16.onnx"}
    assert [step for step in steps if "writing" in step] == [
        "writing model.onnx", "writing model.onnx", "writing model.fp16.onnx",
    ]  # fmt: skip


@pytest.mark.usefixtures("quick_export")
def test_files_of_other_code_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, steps = Asked(ckpt=str(checkpoint_file(tmp_path / "tiny.pt"))), list[str]()
    prepare(asked, tmp_path / "model", ["onnx"], 4, steps.append)
    steps.clear()
    prepare(asked, tmp_path / "model", ["onnx"], 4, steps.append)
    assert steps == []
    (tmp_path / "model/model.fp16.plan").touch()
    now = {**writers(), "onnxscript": "0.0.1"}
    monkeypatch.setattr("benchmarks.speed.subject.writers", lambda: now)
    assert prepare(asked, tmp_path / "model", ["onnx"], 4, steps.append).sources["onnxscript"] == "0.0.1"
    assert "writing model.onnx" in steps
    assert not (tmp_path / "model/model.fp16.plan").exists()


def test_what_writes_a_model_is_known_by_code_and_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"code", "torch", "timm", "onnx", "onnxscript", "onnx_ir"} <= writers().keys()
    assert {root.name for root in revision._roots()} == {"qfae_export", "qfae_train", "qfae_runtime"}
    monkeypatch.setattr(revision, "_roots", lambda: [tmp_path])
    (tmp_path / "below").mkdir()
    digests = []
    for name, text in (("a.py", "1"), ("below/b.py", "1"), ("below/b.py", "2"), ("b.py", "2"), ("notes.md", "x")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        digests.append(writers()["code"])
    assert len(set(digests)) == 4
    assert digests[-1] == digests[-2], "what is not code does not count"


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        names = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *names, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "inner").mkdir()
    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None, "there is no commit yet"
    (tmp_path / "file").write_text("1", encoding="utf-8")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "-a", "-m", "v1", "v1")
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "other").touch()
    assert commit(tmp_path) == git("rev-parse", "HEAD"), "what is not tracked does not count"
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "+"
    assert commit(tmp_path / "inner") is None, "a package that is installed within another project's checkout"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


@pytest.mark.usefixtures("quick_export")
def test_random_weights_are_those_of_the_seed_that_is_asked_for(tmp_path: Path) -> None:
    """And of the file's present content."""
    file, folder = tmp_path / "tiny.toml", tmp_path / "model"
    scores = []
    for seed, blocks in ((0, [1, 2]), (1, [1, 2]), (1, [1])):
        file.write_text(toml(config_of(blocks=blocks)), encoding="utf-8")
        prepare(Asked(config=str(file), random_weights=seed), folder, ["onnx"], 4, lambda step: None)
        scores.append(images_of(folder)[2].scores.score)
    assert np.abs(scores[1] - scores[0]).max() > 1e-4
    assert np.abs(scores[2] - scores[1]).max() > 1e-4
    # A checkpoint that lies there itself makes no room for what is made of it.
    prepare(Asked(ckpt=str(folder / RANDOM)), folder, ["onnx"], 4, lambda step: None)
    assert (folder / RANDOM).exists()
    np.testing.assert_array_equal(images_of(folder)[2].scores.score, scores[2])
