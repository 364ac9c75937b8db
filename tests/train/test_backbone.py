"""Frozen weights: from files of several kinds, and the sentences where they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qfae_train.backbone import WeightsError, create, load_frozen, read_tensors, tensors_sha256
from qfae_train.config import Backbone

from . import tiny


def backbone(path: Path) -> Backbone:
    return Backbone(tiny.TIMM, 8, dict(tiny.ARGS), str(path))


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
    torch.save({"model": {"a": torch.ones(1)}}, path)
    assert refusal(path) == f"weights '{path}': expected names and tensors, got something else"


def test_weights_of_another_model_are_listed(weights: Path, tmp_path: Path) -> None:
    state: dict[str, Tensor] = load_file(weights)
    state["cls_token"] = torch.zeros(1, 1, 64)
    del state["norm.bias"]
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    assert refusal(path) == (
        "weights 'other.safetensors' do not fit the model: cls_token: expected (1, 1, 32), got (1, 1, 64); "
        "norm.bias is missing (2 in all)"
    )


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(WeightsError) as caught:
        load_frozen(Backbone("vit_large_patch16_224.mae", 16), 224)
    assert str(caught.value) == (
        "weights of 'vit_large_patch16_224.mae': timm's hub could not supply them (no route to host); where there is "
        "no network, download the model's file elsewhere and name it in the config "
        "(weights = 'FILE' beside timm = 'vit_large_patch16_224.mae')"
    )


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
