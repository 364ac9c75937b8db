"""Frozen weights: from files of several kinds, and the sentences where they cannot be had."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qfae_train.autoencoder import assemble, build, frozen_entries
from qfae_train.backbone import blank, create, filled, own_image_size, read_frozen
from qfae_train.config import Backbone
from qfae_train.weights import WeightsError, hub_file, read_tensors, tensors_sha256

from . import tiny


def backbone(path: Path) -> Backbone:
    return Backbone(tiny.TIMM, 8, dict(tiny.ARGS), str(path))


def load_frozen(backbone: Backbone, size: int) -> tuple[nn.Module, dict[str, str]]:
    state, record = read_frozen(backbone, "--perceptual-weights FILE")
    return filled(backbone, state, size, record["source"]), record


def test_loaded_frozen_and_recorded(weights: Path) -> None:
    model, record = load_frozen(backbone(weights), tiny.SIZE)
    for name, tensor in load_file(weights).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert record == {"timm": tiny.TIMM, "source": weights.name, "sha256": read_tensors(weights)[1]}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_kinds_of_files(suffix: str, weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    model, _ = load_frozen(backbone(path), tiny.SIZE)
    assert tensors_sha256(model.state_dict()) == tensors_sha256(state)


def test_half_precision_files_become_float32(weights: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, tmp_path / "half.safetensors")
    model, _ = load_frozen(backbone(tmp_path / "half.safetensors"), tiny.SIZE)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float())


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_frozen(backbone(path), tiny.SIZE)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    assert refusal(path) == f"weights '{path}': no such file"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_not_a_file_of_tensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert refusal(path).startswith(f"weights '{path}': not a plain file of tensors (")
    assert "\n" not in refusal(path)


def test_not_names_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"epoch": 3, "model": [torch.ones(1)]}, path)
    assert refusal(path) == f"weights '{path}': expected names and tensors, got something else"


def test_weights_of_another_model_are_listed(weights: Path, tmp_path: Path) -> None:
    state: dict[str, Tensor] = load_file(weights)
    state["cls_token"] = torch.zeros(1, 1, 64)
    del state["blocks.0.norm1.bias"]
    del state["norm.bias"]  # nothing reads it
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    assert refusal(path) == (
        "weights 'other.safetensors' do not fit the model: blocks.0.norm1.bias is missing; "
        "cls_token: expected (1, 1, 32), got (1, 1, 64) (2 in all)"
    )


class Touch:
    """Pickles to a call that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    torch.save({"cls_token": Touch(trace)}, path)
    assert refusal(path) == (
        f"weights '{path}': not a plain file of tensors (it holds pickled objects, which could run code)"
    )
    assert not trace.exists()


DINOV2 = Backbone(
    "vit_small_patch14_reg4_dinov2.lvd142m", 14, {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1e-5}
)


def random_state(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


def test_the_original_names_of_dinov2(tmp_path: Path) -> None:
    """The release has a mask token, register tokens of another name, and a position for the class token."""
    state = random_state(create(DINOV2, 112))
    original = dict(state)
    original["register_tokens"] = original.pop("reg_token")
    original["pos_embed"] = torch.cat([torch.full((1, 1, 32), 0.5), state["pos_embed"]], dim=1)
    original["cls_token"] = state["cls_token"] - 0.5
    original["mask_token"] = torch.zeros(1, 32)
    torch.save(original, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    model, record = load_frozen(replace(DINOV2, weights=str(tmp_path / "dinov2_vits14_reg4_pretrain.pth")), 112)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6, msg=name)
    assert record["source"] == "dinov2_vits14_reg4_pretrain.pth"


def test_position_tables_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    state = random_state(create(DINOV2, 518))
    save_file(state, tmp_path / "w.safetensors")
    model, _ = load_frozen(replace(DINOV2, weights=str(tmp_path / "w.safetensors")), 224)
    grid = state["pos_embed"].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    small = nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        model.state_dict()["pos_embed"], small.permute(0, 2, 3, 1).reshape(1, 256, 32), rtol=0, atol=1e-5
    )


def test_the_original_file_of_mae(weights: Path, tmp_path: Path) -> None:
    """The release keeps its tensors under 'model'; those with the decoder have more names, which nothing reads."""
    state = load_file(weights)
    torch.save({"model": {**state, "mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.ones(4, 32)}},
               tmp_path / "mae.pth")  # fmt: skip
    model, _ = load_frozen(backbone(tmp_path / "mae.pth"), tiny.SIZE)
    assert tensors_sha256(model.state_dict()) == tensors_sha256(state)


def test_the_original_file_of_dino(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}, "epoch": 300},
               tmp_path / "dino.pth")  # fmt: skip
    model, _ = load_frozen(backbone(tmp_path / "dino.pth"), tiny.SIZE)
    assert tensors_sha256(model.state_dict()) == tensors_sha256(state)


def test_the_size_the_weights_were_trained_at() -> None:
    mae = Backbone("vit_base_patch16_224.mae", 16)
    assert own_image_size(mae, {"pos_embed": torch.zeros(1, 197, 8)}, 112) == 224
    assert own_image_size(mae, {"pos_embed": torch.zeros(1, 50, 8)}, 224) == 112
    assert own_image_size(mae, {"pos_embed": torch.zeros(1, 200, 8)}, 112) == 112  # not square: nothing to go by
    assert own_image_size(mae, {}, 112) == 112


MAE = "vit_large_patch16_224.mae"


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(WeightsError) as caught:
        hub_file(MAE, "--perceptual-weights FILE")
    assert str(caught.value) == (
        f"weights of '{MAE}': the hub could not supply model.safetensors of timm/{MAE} (no route to host); where there "
        "is no network, fetch that file (or the original release's) elsewhere and pass --perceptual-weights FILE, or "
        f"name it in the config (weights = 'FILE' beside timm = '{MAE}')"
    )


def test_the_hubs_cache_comes_first_and_its_file_is_hashed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(weights)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    _, record = read_frozen(Backbone(MAE, 16), "--perceptual-weights FILE")
    assert asked == [(f"timm/{MAE}", "model.safetensors", None)]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record == {"timm": MAE, "source": "hub", "sha256": digest}


def test_a_name_the_hub_does_not_have() -> None:
    with pytest.raises(WeightsError, match=r"^weights of 'vit_tiny_patch16_224.nosuch': timm's hub has none of that"):
        hub_file("vit_tiny_patch16_224.nosuch", "--backbone-weights NAME=FILE")


def test_the_digest_depends_on_names_types_and_values_only() -> None:
    one = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    assert tensors_sha256(one) == tensors_sha256(dict(reversed(one.items())))
    assert tensors_sha256(one) == tensors_sha256({**one, "b": torch.ones(3, 2).T})
    others = [{**one, "a": torch.arange(6)}, {**one, "a": one["a"].view(2, 3)}, {"a": one["b"], "b": one["a"]}]
    assert len({tensors_sha256(state) for state in [one, *others]}) == 4


def test_made_for_the_image_size() -> None:
    model = create(Backbone("vit_tiny_patch16_224", 16, {"depth": 1}), 64)
    assert model.state_dict()["pos_embed"].shape == (1, 17, 192)
    assert not [name for name in model.state_dict() if name.startswith("head")]


def test_what_no_file_brings_is_no_memory_as_it_came(weights: Path) -> None:
    """The norm behind the last block may be missing, for nobody reads it."""
    state = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("norm.")}
    model: Any = filled(backbone(weights), state, tiny.SIZE, "a file", blank)
    assert not model.norm.weight.any()
    assert not model.norm.bias.any()
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_seed_gives_the_weights_that_come_after_those_that_timm_draws(weights: Path) -> None:
    config = tiny.config(weights)
    torch.manual_seed(5)
    scorer, _ = build(config)
    torch.manual_seed(5)
    *encoders, perceptual = (create(entry, tiny.SIZE) for entry, _ in frozen_entries(config))
    expected = assemble(config, encoders, perceptual).autoencoder.trained_state()
    got = scorer.autoencoder.trained_state()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
