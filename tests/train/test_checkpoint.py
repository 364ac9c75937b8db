"""The checkpoint file: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from qfae_runtime.errors import OutputError
from qfae_train.checkpoint import Checkpoint, CheckpointError, build_scorer, load, save
from qfae_train.config import from_dict
from qfae_train.weights import WeightsError

from . import conditionings, tiny
from .checkpoint_files import images, make, refusal, spoil


def test_outputs_are_identical_after_a_round_trip(checkpoint: Checkpoint, saved: Path) -> None:
    before = build_scorer(checkpoint)(images())
    loaded = load(saved)
    after = build_scorer(loaded)(images())
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert len(set(before.score.tolist())) == 3
    assert torch.equal(loaded.parity_images, checkpoint.parity_images)
    assert (loaded.record, loaded.resume, loaded.frozen) == (checkpoint.record, {}, checkpoint.frozen)


def test_what_was_measured_comes_out_and_checkpoints_without_it_load(checkpoint: Checkpoint, saved: Path) -> None:
    assert load(saved).conditioning is None
    spoil(saved, lambda content: content.pop("conditioning"))  # as earlier versions wrote it
    assert load(saved).conditioning is None
    measured = dataclasses.replace(checkpoint, conditioning=conditionings.made())
    save(saved, measured)
    assert load(saved).conditioning == conditionings.made()


def test_two_saves_give_the_same_bytes(checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / saved.name
    save(again, checkpoint)
    assert again.read_bytes() == saved.read_bytes()
    assert load(again).sha256 == load(saved).sha256 != ""


def test_the_file_is_written_whole_or_not_at_all(
    checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def stop(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        save(saved, checkpoint)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("enforce fail\nat line 9")])
def test_a_full_disk_is_one_sentence(
    error: Exception, checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(
        OutputError, match=r"^'.*tiny\.pt': cannot be written \(.*\); free the disk or name another --out$"
    ):
        save(saved, checkpoint)
    assert [path.name for path in saved.parent.iterdir()] == ["tiny.pt"]


def test_it_needs_no_file_beside_it(weights: Path, tmp_path: Path) -> None:
    moved = tmp_path / "gone.safetensors"
    moved.write_bytes(weights.read_bytes())
    own = make(tiny.config(moved))
    save(tmp_path / "own.pt", own)
    before = build_scorer(own)(images())
    moved.unlink()
    assert torch.equal(build_scorer(load(tmp_path / "own.pt"))(images()).score, before.score)


def test_equal_frozen_weights_are_embedded_once(checkpoint: Checkpoint, weights: Path, tmp_path: Path) -> None:
    assert len(checkpoint.frozen) == 2
    assert len(checkpoint.embedded) == 1
    tables = tiny.table(weights)
    tables["perceptual"]["weights"] = str(tiny.write_weights(tmp_path / "other.safetensors", seed=1))
    assert len(make(from_dict(tables)).embedded) == 2


def test_no_folder_of_the_machine_is_stored(saved: Path, weights: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert content["config"]["perceptual"]["weights"] == weights.name
    assert content["config"]["model"]["encoders"][0]["weights"] == weights.name
    shown = repr({name: part for name, part in content.items() if name not in ("trained", "embedded")})
    assert str(weights.parent) not in shown
    assert str(Path.home()) not in shown
    assert str(weights.parent).encode() not in saved.read_bytes()


class Touch:
    """Pickles to a call that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = torch.load(saved, weights_only=True)
    content["record"] = Touch(trace)
    torch.save(content, saved)
    assert refusal(saved) == "it holds pickled objects, which could run code; only plain tensors are read"
    assert not trace.exists()
    torch.load(saved, weights_only=False)
    assert trace.exists()  # the file is as bad as the test says


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert refusal(path) == "it holds pickled objects, which could run code; only plain tensors are read"


NO_CHECKPOINT = {
    "empty": b"",
    "text": b"hello world\n",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "noise": bytes(range(255, 0, -1)) * 9,
    "pickle": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_not_a_checkpoint(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(NO_CHECKPOINT[kind])
    assert refusal(path) == "not a file that torch.save wrote, or cut short"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(share: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    assert refusal(saved) == "not a file that torch.save wrote, or cut short"


def test_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pt") == "no such file"
    assert refusal(tmp_path) == "no such file"


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(torch.ones(3), path)
    assert refusal(path) == "expected a table of parts, got Tensor"
    torch.save({"encoder.weight": torch.ones(3)}, path)
    assert refusal(path) == (
        "not written by qfae-train (format, config, trained, frozen, embedded, preprocess, parity_images, record, "
        "resume missing or damaged)"
    )


def test_parts_of_another_kind(saved: Path) -> None:
    spoil(saved, lambda content: content.update(trained=[torch.ones(1)], preprocess="resize"))
    assert refusal(saved) == "not written by qfae-train (trained, preprocess missing or damaged)"


def test_parts_that_are_damaged_inside(saved: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        [digest] = content["embedded"]
        content["frozen"] = [{}, "hub", {"timm": "a", "source": "hub", "sha256": 3}]
        content["trained"] = {"a": "text", 7: torch.ones(1)}
        content["embedded"] = {digest: {"b": [1.0]}, "f" * 64: "gone"}

    spoil(saved, change)
    digest = next(iter(torch.load(saved, weights_only=True)["embedded"]))[:12]
    assert refusal(saved) == (
        "damaged inside: frozen[0].timm: expected a text, got nothing; frozen[0].source: expected a text, got nothing; "
        "frozen[0].sha256: expected a text, got nothing; frozen[1]: expected a record, got str; "
        "frozen[2].sha256: expected a text, got int; embedded.ffffffffffff: expected a table of tensors, got str; "
        "trained.a: expected a tensor, got str; trained: expected names of tensors, got 7; and 1 more; "
        "train or download it again"
    )
    spoil(saved, lambda content: content.update(frozen=[], trained={}, embedded={digest: {"b": [1.0]}}))
    assert refusal(saved) == (
        f"damaged inside: embedded.{digest}.b: expected a tensor, got list; train or download it again"
    )


def test_another_format(saved: Path) -> None:
    spoil(saved, lambda content: content.update(format=99))
    assert refusal(saved) == (
        "format 99, but this version reads 1; install the qfae version that wrote it, or train again"
    )


def test_a_configuration_that_is_not_valid(saved: Path) -> None:
    spoil(saved, lambda content: content["config"]["score"].update(fusion="sum"))
    assert refusal(saved) == (
        "its configuration is not valid: score.fusion: got 'sum'; accepted are 'product', 'separate'"
    )


def test_other_preprocessing_shows_the_difference(saved: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["preprocess"] = {"spec": {**content["preprocess"]["spec"], "image_size": 64}, "sha256": "0" * 64}

    spoil(saved, change)
    assert refusal(saved) == (
        "trained on images preprocessed otherwise than this version does it: image_size: 32 -> 64"
    )


def test_preprocessing_of_a_version_to_come(saved: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["preprocess"] = {"spec": {**content["preprocess"]["spec"], "version": 2}, "sha256": "0" * 64}

    spoil(saved, change)
    assert refusal(saved) == (
        "trained on images preprocessed otherwise than this version does it: preprocessing specification: "
        "version: got 2, this version of qfae knows only 1; use the qfae version that wrote it"
    )


def test_tensors_that_do_not_fit_are_listed(checkpoint: Checkpoint) -> None:
    trained = dict(checkpoint.trained)
    trained["qformer.queries"] = torch.zeros(1, 9, 32)
    trained["qformer.extra"] = torch.zeros(1)
    del trained["decoder.norm.bias"]
    with pytest.raises(CheckpointError) as caught:
        build_scorer(dataclasses.replace(checkpoint, trained=trained))
    assert str(caught.value) == (
        "checkpoint does not fit its configuration: decoder.norm.bias: missing; "
        "qformer.extra: not a part of this model; qformer.queries: expected (1, 16, 32), got (1, 9, 32)"
    )


def test_frozen_weights_of_another_size_are_listed(checkpoint: Checkpoint) -> None:
    [(digest, state)] = checkpoint.embedded.items()
    state = {**state, "pos_embed": torch.zeros(1, 17, 8)}
    del state["cls_token"]
    with pytest.raises(WeightsError) as caught:
        build_scorer(dataclasses.replace(checkpoint, embedded={digest: state}))
    assert str(caught.value) == (
        "weights 'tiny.safetensors, embedded in the checkpoint' do not fit the model: cls_token is missing; "
        "pos_embed: expected (1, 17, 32), got (1, 17, 8) (2 in all)"
    )


def test_number_of_backbones(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError) as caught:
        build_scorer(dataclasses.replace(checkpoint, frozen=checkpoint.frozen[:1]))
    assert str(caught.value) == "checkpoint: 2 frozen backbones in its config, 1 recorded"
