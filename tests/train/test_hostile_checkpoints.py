"""Checkpoints that hold what they should not: one sentence each, and nothing run, allocated or waited for."""

from __future__ import annotations

import pickle
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qfae_train import checkpoint_check
from qfae_train.backbone import filled
from qfae_train.checkpoint import CheckpointError, build_scorer, load
from qfae_train.config import Backbone
from qfae_train.official import open_checkpoint
from qfae_train.torch_archive import TorchFileError
from qfae_train.torch_file import read_torch_file
from qfae_train.weight_files import WeightFiles
from qfae_train.weights import WeightsError, read_tensors
from tests.commands import run

from . import conditionings, tiny
from .checkpoint_files import entries_of, refusal, rewrite, spoil, with_pickle
from .made_up import ARCHITECTURES, made_up

Content = dict[str, Any]


# ---------- types, layouts, claims of tensors


def replace_first(content: Content, tensor: Any) -> None:
    content["trained"]["qformer.queries"] = tensor


def sparse() -> torch.Tensor:
    return torch.zeros(1, 16, 32).to_sparse()


CODE = r"^it holds pickled objects, which could run code; only plain tensors are read$"

TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (sparse, r"^it holds a sparse tensor; only plain tensors are read$"),
    "meta": (
        lambda: torch.empty(2**40, device="meta"),
        r"^it holds a meta tensor, which has no values; only plain tensors are read$",
    ),
    **{
        str(kind): (
            partial(torch.zeros, 1, 16, 32, dtype=kind),
            rf"^damaged inside: trained\.qformer\.queries: expected float32, got {str(kind)[6:]}; train or download it",
        )
        for kind in (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16, torch.float64)
    },
    "stride 0": (
        lambda: torch.zeros(1).expand(1, 16, 2**34),
        r"^a tensor of shape \(1, 16, 17179869184\) and strides \(0, 0, 0\) claims more than its storage of 1 values$",
    ),
    "counter": (lambda: Counter("ab"), CODE),
    "bytes": (lambda: bytearray(8), CODE),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_another_kind(kind: str, saved: Path) -> None:
    make, expected = TENSORS[kind]
    content = torch.load(saved, weights_only=True)
    replace_first(content, make())
    torch.save(content, saved)
    assert re.search(expected, refusal(saved)), refusal(saved)


def test_parity_images_without_bytes_of_their_own(saved: Path) -> None:
    images = torch.zeros(1, dtype=torch.uint8).expand(2**20, tiny.SIZE, tiny.SIZE, 3)
    spoil(saved, lambda content: content.update(parity_images=images))
    assert refusal(saved) == (
        "a tensor of shape (1048576, 32, 32, 3) and strides (0, 0, 0, 0) claims more than its storage of 1 values"
    )


@pytest.mark.parametrize("images", [torch.zeros(2, 16, 16, 3).byte(), torch.zeros(2, 32, 32, 3), torch.zeros(2).byte()])
def test_parity_images_of_another_model(images: torch.Tensor, saved: Path) -> None:
    spoil(saved, lambda content: content.update(parity_images=images))
    got = f"{str(images.dtype)[6:]} {tuple(images.shape)}"
    assert refusal(saved) == (
        f"damaged inside: parity_images: expected uint8 (N, 32, 32, 3), got {got}; train or download it again"
    )


def test_a_storage_shorter_than_it_says(saved: Path) -> None:
    rewrite(saved, lambda name, content: content[:-4] if name.endswith("/data/0") else content)
    assert refusal(saved).startswith("storage '0' claims ")


def test_many_tensors_of_one_storage(tmp_path: Path) -> None:
    base = torch.zeros(1000)
    torch.save({str(n): base[:999] for n in range(50)}, tmp_path / "file.pt")
    with pytest.raises(TorchFileError, match=r"^its tensors claim 199800 bytes, all its storages hold 4000$"):
        read_torch_file(tmp_path / "file.pt")


def test_one_storage_of_two_types(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(8), "b": torch.zeros(8, dtype=torch.int32)}, path)
    [pickled] = [content for info, content in entries_of(path) if info.filename.endswith("/data.pkl")]
    with_pickle(path, pickled.replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000"))
    with pytest.raises(TorchFileError, match=r"^storage '0' is said to be of two types$"):
        read_torch_file(path)


# ---------- what rounding does


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (3, "expected a table, got int; qfae-train measures it"),
        ([], "expected a table, got list; qfae-train measures it"),
        ({}, "key 'rows' is missing; qfae-train measures it"),
        (
            {**conditionings.made().to_dict(), "images": 2**60},
            f"key 'images': expected a whole number in 1..{2**50}, got {2**60}",
        ),
        (
            {**conditionings.made().to_dict(), "threshold": float("inf")},
            "key 'threshold': expected a finite number, got inf",
        ),
    ],
)
def test_a_conditioning_that_nobody_measured(stored: Any, expected: str, saved: Path) -> None:
    spoil(saved, lambda content: content.update(conditioning=stored))
    assert refusal(saved) == f"damaged inside: conditioning: {expected}; train or download it again"


# ---------- configuration, preprocessing, records


@pytest.mark.parametrize("stored", [{"sha256": None}, {}, {"sha256": "0" * 64}, {"sha256": "0" * 64, "spec": 3}])
def test_preprocessing_that_is_not_described(stored: Content, saved: Path) -> None:
    spoil(saved, lambda content: content.update(preprocess=stored))
    assert refusal(saved) == (
        "trained on images preprocessed otherwise than this version does it: no specification and SHA-256 of it are "
        "stored"
    )


ABSURD: dict[str, tuple[Callable[[Content], object], str]] = {
    "depth": (
        lambda config: config["model"]["encoders"][0]["args"].update(depth=10**9),
        "model.encoders[0].args.depth: got 1000000000; accepted are whole numbers from 1 to 128",
    ),
    "width": (
        lambda config: config["perceptual"]["args"].update(embed_dim=2**40),
        "perceptual.args.embed_dim: got 1099511627776; accepted are whole numbers from 1 to 8192",
    ),
    "decoder": (
        lambda config: config["model"]["decoder"].update(depth=10**12),
        "model.decoder.depth: got 1000000000000; accepted are values up to 128",
    ),
    "whole model": (
        lambda config: config["model"]["decoder"].update(depth=128, dim=8192, heads=64),
        "model: 1e+11 trained parameters in Q-Former and decoder; accepted are up to 4e+09",
    ),
    "encoders": (
        lambda config: config["model"].update(encoders=config["model"]["encoders"] * 60),
        "model.encoders: got 60; accepted are at most 8",
    ),
    "list": (
        lambda config: config["score"].update(blocks=list(range(1, 100_000))),
        "score.blocks: got 99999 values; accepted are at most 64",
    ),
    "file": (
        lambda config: config["model"]["encoders"][0]["args"].update(checkpoint_path="evil.pth"),
        "model.encoders[0].args: got 'checkpoint_path' = 'evil.pth'; accepted are patch_size, embed_dim,",
    ),
    "folder": (
        lambda config: config["model"]["encoders"][0].update(timm="local-dir:/tmp/model"),
        "model.encoders[0].timm: got 'local-dir:/tmp/model'; accepted are names of timm's own models",
    ),
    "text": (
        lambda config: config["score"].update(fusion="x" * 10**6),
        f"score.fusion: got '{'x' * 199} ...; accepted are 'product', 'separate'",
    ),
    "keys": (lambda config: config.update({f"k{n}": n for n in range(1000)}), "k0: unknown key; config accepts model"),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_configurations(kind: str, saved: Path) -> None:
    change, expected = ABSURD[kind]
    spoil(saved, lambda content: change(content["config"]))
    text = refusal(saved)
    assert text.startswith(f"its configuration is not valid: {expected}")
    assert len(text) < 3000


def test_a_large_model_without_its_weights_is_refused_before_it_is_made(saved: Path) -> None:
    def change(content: Content) -> None:
        content["config"]["model"]["decoder"].update(depth=16, dim=4096, heads=64)

    spoil(saved, change)
    checkpoint = load(saved)
    with pytest.raises(CheckpointError, match=r"^checkpoint does not fit its configuration: decoder\.blocks\.0\."):
        build_scorer(checkpoint)


@pytest.mark.parametrize("name", ["source", "timm", "sha256"])
def test_records_that_would_write_to_the_terminal(name: str, saved: Path) -> None:
    spoil(saved, lambda content: content["frozen"][0].update({name: "\x1b[2J"}))
    assert refusal(saved) == (
        f"damaged inside: frozen[0].{name}: expected up to 255 printable letters, got '\\x1b[2J'; train or download it "
        "again"
    )


# ---------- embedded weights


def change_embedded(content: Content) -> None:
    [table] = content["embedded"].values()
    table["blocks.0.attn.qkv.weight"][0, 0] += 1e-3


def drop_digest(content: Content) -> None:
    del content[checkpoint_check.EMBEDDED_SHA256]


@pytest.mark.parametrize("digest", [True, False], ids=["digest of the table", "digest of the file alone"])
def test_embedded_weights_are_those_of_the_file(digest: bool, saved: Path, weights: Path) -> None:
    if not digest:  # as the first versions wrote it
        spoil(saved, drop_digest)
    assert len(load(saved).embedded) == 1
    spoil(saved, change_embedded)
    sha256 = read_tensors(weights)[1][:12]
    assert refusal(saved) == "; ".join(
        f"the frozen weights of '{tiny.TIMM}' in it are not those of '{weights.name}' with which it was trained, "
        f"SHA-256 {sha256}...; download it again, or pass the original file, {option}"
        for option in (f"--backbone-weights {tiny.TIMM}=FILE", "--perceptual-weights FILE")
    )


@pytest.mark.parametrize("kind", ["complex", "shared"])
def test_tables_that_no_file_could_hold(kind: str, saved: Path) -> None:
    def change(content: Content) -> None:
        drop_digest(content)
        [table] = content["embedded"].values()
        table["norm.weight"] = table["norm.bias"] if kind == "shared" else table["norm.weight"].to(torch.complex64)

    spoil(saved, change)
    assert refusal(saved).startswith(f"the frozen weights of '{tiny.TIMM}' in it are not those of ")


def test_the_original_file_takes_their_place(saved: Path, weights: Path) -> None:
    want = build_scorer(load(saved))(torch.zeros(1, tiny.SIZE, tiny.SIZE, 3, dtype=torch.uint8)).score
    spoil(saved, change_embedded)
    files = WeightFiles({tiny.TIMM: weights}, weights)
    got = build_scorer(open_checkpoint(saved, None, files), files)
    assert torch.equal(got(torch.zeros(1, tiny.SIZE, tiny.SIZE, 3, dtype=torch.uint8)).score, want)


def test_weights_of_no_known_file_are_not_taken_on_trust(saved: Path) -> None:
    """The first versions recorded the SHA-256 of a .pth file alone, which cannot be made again of its tensors."""

    def change(content: Content) -> None:
        drop_digest(content)
        for record in content["frozen"]:
            record["source"] = "original.pth"

    spoil(saved, change)
    assert "are not those of 'original.pth' with which it was trained" in refusal(saved)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_frozen_weights_of_another_type(kind: torch.dtype, weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state["norm.weight"] = state["norm.weight"].to(kind)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        filled(Backbone(tiny.TIMM, 8, dict(tiny.ARGS)), read_tensors(tmp_path / "w.pth")[0], tiny.SIZE, "w")
    assert str(caught.value) == (
        "weights 'w' do not fit the model: norm.weight: expected float32 or float16 or bfloat16 or float64, got "
        f"{str(kind)[6:]} (1 in all)"
    )


def test_kernels_that_would_be_resampled_for_hours(weights: Path) -> None:
    state = {**load_file(weights), "patch_embed.proj.weight": torch.zeros(1, 3, 1024, 1024)}
    with pytest.raises(WeightsError, match=r"has a kernel of \(1024, 1024\) pixels, accepted are up to 128$"):
        filled(Backbone(tiny.TIMM, 8, dict(tiny.ARGS)), state, tiny.SIZE, "w")


# ---------- weight files, the authors' files


SAFETENSORS: dict[str, bytes] = {
    "header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "header of a gigabyte": struct.pack("<Q", 2**30),
    "tensor beyond the end": struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}  ',
    "size unlike the bytes": struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}   1234',
    "no JSON": struct.pack("<Q", 4) + b"[[[[",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_that_claim_more_than_they_hold(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(SAFETENSORS[kind])
    with pytest.raises(WeightsError) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(f"weights '{path}': ")
    assert "\n" not in str(caught.value)


def test_weight_files_of_torch_have_the_same_bounds(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(WeightsError) as caught:
        read_tensors(path)
    assert str(caught.value) == (
        f"weights '{path}': not a plain file of tensors (a tensor of shape (1099511627776,) and strides (0,) claims "
        "more than its storage of 1 values)"
    )


@pytest.mark.parametrize("kind", [torch.int32, torch.float16, torch.complex64])
def test_the_authors_files_hold_float32(kind: torch.dtype, tmp_path: Path) -> None:
    made = made_up(tmp_path, next(iter(ARCHITECTURES.values())))
    state = dict(made.state)
    state["junction.queries"] = state["junction.queries"].to(kind)
    torch.save(OrderedDict(state), made.checkpoint)
    with pytest.raises(CheckpointError, match=rf"junction\.queries: expected float32, got {str(kind)[6:]}$"):
        open_checkpoint(made.checkpoint, made.config, made.files)


# ---------- command lines


@pytest.mark.parametrize(
    "command",
    [("qfae-export", "--ckpt"), ("qfae-train", "evaluate", "--ckpt")],
    ids=["export", "evaluate"],
)
def test_a_command_says_one_sentence_and_runs_nothing(command: tuple[str, ...], saved: Path, tmp_path: Path) -> None:
    evil, trace = tmp_path / "evil.pth", tmp_path / "trace"
    with evil.open("wb") as file:
        pickle.dump(Opens(trace), file)
    spoil(saved, lambda content: content["config"]["perceptual"]["args"].update(checkpoint_path=str(evil)))
    more = ("--out", "out") if command[0] == "qfae-export" else ("--data", "data")
    (tmp_path / "data").mkdir()
    done = run(*command, str(saved), *more, cwd=tmp_path)
    assert done.returncode == 1
    assert "perceptual.args: got 'checkpoint_path' = " in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in done.stderr
    assert not trace.exists()


class Opens:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_the_trap_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Opens(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()
