"""The authors' checkpoints: recognised, held against the configuration, and computing what a plain reading computes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qfae_runtime.errors import UsageError
from qfae_train.autoencoder import AnomalyScorer
from qfae_train.checkpoint import CheckpointError, build_scorer, save
from qfae_train.config import load
from qfae_train.official import NAMES, expected_shapes, open_checkpoint, ours, theirs
from qfae_train.weight_files import WeightFiles
from qfae_train.weights import WeightsError, tensors_sha256

from .made_up import ARCHITECTURES, MadeUp, config, images, made_up
from .official import Official
from .reference import Reference
from .test_checkpoint import Touch

SCORE_ABSOLUTE = 2e-5


def opened(made: MadeUp) -> AnomalyScorer:
    return build_scorer(open_checkpoint(made.checkpoint, made.config, made.files), made.files)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    return made_up(tmp_path_factory.mktemp("small"), config())


def test_the_reference_gives_the_authors_numbers() -> None:
    """Only then is it a source for architectures whose numbers the authors' code was not asked for."""
    official = Official()
    score = dataclasses.replace(official.config.score, patch_sizes=(16, 32, 56), fusion="product")
    reference = Reference(dataclasses.replace(official.config, score=score), official.authors_state, official.mae_state)
    uint8 = ((official.input * 0.226 + 0.449) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    got, pixel_map = reference.score(uint8)
    expected = official.expected
    np.testing.assert_allclose(got, expected["score_product_p16-32-56_max_mean"], rtol=0, atol=SCORE_ABSOLUTE)
    wanted = expected["map_mean_product_p16-32-56_max_mean"]
    np.testing.assert_allclose(pixel_map[:, ::4, ::4], wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_computes_what_the_plain_reading_does(name: str, tmp_path: Path) -> None:
    made = made_up(tmp_path, ARCHITECTURES[name])
    pictures = images(3, made.config.model.image_size)
    expected_score, expected_map = made.reference().score(pictures)
    result = opened(made)(pictures)
    assert float(expected_score.max() - expected_score.min()) > 1e-3
    torch.testing.assert_close(result.score, expected_score, rtol=0, atol=SCORE_ABSOLUTE)
    torch.testing.assert_close(result.anomaly_map, expected_map, rtol=0, atol=SCORE_ABSOLUTE)


def test_the_names_lead_both_ways() -> None:
    for preset in ("brats", "brats-dual"):
        for name in expected_shapes(load(preset)):
            assert theirs(ours(name)) == name
            assert name.endswith("pos_embed") or ours(name) != name, name
    assert len({our for our, _ in NAMES}) == len({their for _, their in NAMES}) == len(NAMES)


def test_a_full_size_checkpoint_has_the_released_sizes() -> None:
    shapes = expected_shapes(load("brats"))
    assert shapes["encoders.0.model.pos_embed"] == (1, 256, 1024)
    assert shapes["encoders.0.model.reg_token"] == (1, 4, 1024)
    assert shapes["encoders.0.final_projection.weight"] == (768, 1024)
    assert shapes["junction.queries"] == (1, 784, 768)
    assert shapes["junction.blocks.0.attn.Wqkv.weight"] == (768 + 96 + 96, 768)
    assert shapes["junction.blocks.0.cross_attn.null_kv"] == (2, 64)
    assert shapes["junction.blocks.0.cross_attn.to_kv.weight"] == (1024, 768)
    assert shapes["decoder.decoder_pos_embed"] == (1, 784, 768)
    assert shapes["decoder.decoder_prediction.weight"] == (192, 768)
    dual = expected_shapes(load("brats-dual"))
    assert dual["encoders.1.final_projection.weight"] == (768, 768)
    assert dual["encoders.1.model.pos_embed"] == (1, 785, 768)


def test_what_it_is_made_of_is_recorded(small: MadeUp) -> None:
    checkpoint = open_checkpoint(small.checkpoint, small.config, small.files)
    encoder = {n.removeprefix("encoders.0.model."): t for n, t in small.state.items() if ".model." in n}
    assert [record["source"] for record in checkpoint.frozen] == ["last_ckpt.pth", "mae.safetensors"]
    assert checkpoint.frozen[0]["sha256"] == tensors_sha256(encoder)
    assert len(checkpoint.parity_images) == 0


def refusal(made: MadeUp, state: object, tmp_path: Path) -> str:
    path = tmp_path / "last_ckpt.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, made.config, made.files)
    assert caught.value.exit_code == 1
    return str(caught.value).removeprefix(f"checkpoint '{path}': ")


def test_every_mismatch_is_listed(small: MadeUp, tmp_path: Path) -> None:
    state = dict(small.state)
    state["junction.queries"] = torch.zeros(1, 100, 48)
    state["junction.extra"] = torch.zeros(3)
    del state["decoder.decoder_norm.bias"]
    del state["encoders.0.model.norm.weight"]  # nothing reads it
    assert refusal(small, state, tmp_path) == (
        "does not fit the configuration (3 of its names); pass the --preset or --config it was trained with:\n"
        "  decoder.decoder_norm.bias: expected (36,), missing\n"
        "  junction.extra: not a part of this architecture, got (3,)\n"
        "  junction.queries: expected (1, 196, 48), got (1, 100, 48)"
    )


def test_a_checkpoint_of_another_architecture(small: MadeUp, tmp_path: Path) -> None:
    other = dict(made_up(tmp_path / "other", config(qformer={"blocks": 2})).state)
    message = refusal(small, other, tmp_path)
    assert "\n  junction.blocks.1.attn.Wqkv.weight: not a part of this architecture, got (72, 48)\n" in message


def test_another_position_table(small: MadeUp, tmp_path: Path) -> None:
    state = dict(small.state)
    state["decoder.decoder_pos_embed"] = state["decoder.decoder_pos_embed"].flip(1)
    assert "decoder.decoder_pos_embed: expected the sine-cosine table, got one that differs by up to" in refusal(
        small, state, tmp_path
    )


def test_code_is_refused_and_not_run(small: MadeUp, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    state = OrderedDict(small.state)
    state["junction.queries"] = Touch(trace)  # type: ignore[assignment]
    message = refusal(small, state, tmp_path)
    assert message == "it holds pickled objects, which could run code; only plain tensors are read"
    assert not trace.exists()


def test_truncated(small: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "last_ckpt.pth"
    path.write_bytes(small.checkpoint.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"not a file that torch\.save wrote, or cut short"):
        open_checkpoint(path, small.config, small.files)


def test_its_architecture_must_be_named(small: MadeUp) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(small.checkpoint)
    assert str(caught.value) == (
        f"{small.checkpoint}: a checkpoint of the authors' release, which does not say its architecture; name it with "
        "--preset or --config"
    )


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_a_wrapped_state_dict_is_taken_too(wrapper: str, small: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "last_ckpt.pth"
    torch.save({wrapper: {f"module.{name}": tensor for name, tensor in small.state.items()}, "epoch": 300}, path)
    scorer = build_scorer(open_checkpoint(path, small.config, small.files), small.files)
    assert torch.equal(scorer(images(2, 112)).score, opened(small)(images(2, 112)).score)


def test_something_else_is_not_said_to_be_ours(small: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"not written by qfae-train \(format, config"):
        open_checkpoint(path, small.config, small.files)


def test_ours_brings_its_own(small: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    save(path, open_checkpoint(small.checkpoint, small.config, small.files))
    assert torch.equal(build_scorer(open_checkpoint(path))(images(2, 112)).score, opened(small)(images(2, 112)).score)
    with pytest.raises(UsageError, match=r"holds its own configuration; leave them out \(they are for the authors'"):
        open_checkpoint(path, small.config)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another width": (
        lambda state: {name: tensor[..., : max(1, tensor.shape[-1] // 2)].clone() for name, tensor in state.items()},
        r"blocks.0.attn.proj.bias: expected \(48,\), got \(24,\)",
    ),
    "a deeper network": (
        lambda state: {**state, **{n.replace("blocks.3.", "blocks.4."): t.clone() for n, t in state.items()}},
        r"blocks.4.attn.proj.bias: not a part of the model",
    ),
    "another depth": (
        lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("blocks.3.")},
        r"blocks.3.attn.proj.bias is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_perceptual_weights(case: str, small: MadeUp, tmp_path: Path) -> None:
    change, said = WRONG[case]
    path = tmp_path / "mae.safetensors"
    save_file(change(small.perceptual), path)
    files = WeightFiles(perceptual=path)
    checkpoint = open_checkpoint(small.checkpoint, small.config, files)
    with pytest.raises(WeightsError, match=rf"^weights 'mae.safetensors.* do not fit the model: .*{said}"):
        build_scorer(checkpoint, files)


def test_no_perceptual_weights_to_be_had(small: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> Path:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("qfae_train.weights._from_hub", unreachable)
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(small.checkpoint, small.config)
    assert str(caught.value) == (
        "weights of 'vit_base_patch16_224.mae': the hub could not supply model.safetensors of "
        "timm/vit_base_patch16_224.mae (no route to host); where there is no network, fetch that file (or the original "
        "release's) elsewhere and pass --perceptual-weights FILE, or name it in the config (weights = 'FILE' beside "
        "timm = 'vit_base_patch16_224.mae')"
    )


def test_weights_of_an_encoder_that_is_not_there(small: MadeUp) -> None:
    files = WeightFiles(backbones={"vit_huge": small.checkpoint})
    with pytest.raises(UsageError, match=r"^--backbone-weights: no encoder is called 'vit_huge'; there is vit_small"):
        files.applied_to(small.config)
