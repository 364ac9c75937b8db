"""What cannot be trained on is refused before the first epoch, in one sentence; sound small data sets are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from qfae_runtime.arrays import UInt8
from qfae_train import images_check
from qfae_train.autoencoder import build
from qfae_train.checkpoint import load
from qfae_train.cli import command
from qfae_train.config import Config
from qfae_train.data import DataError, Split
from qfae_train.images_check import check_features, check_images, different
from qfae_train.weights import WeightsError

from . import tiny
from .made_up import toml

WHY = "the model learns what different pictures have in common; look at what train/good holds, and at [preprocess]"
ENCODER = f"encoder '{tiny.TIMM}' (weights: w.safetensors)"
CURE = f"supply trained weights (--backbone-weights {tiny.TIMM}=FILE)"


def split(images: Tensor) -> Split:
    count = len(images)
    return Split(images, torch.zeros(count, dtype=torch.bool), torch.zeros(images.shape[:3]), torch.ones(count))


def pictures(count: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([tiny.picture(rng, tiny.SIZE, tiny.SIZE) for _ in range(count)]))[..., None]


def refusal(images: Tensor) -> str:
    with pytest.raises(DataError) as caught:
        check_images(Path("d"), split(images))
    return str(caught.value)


def scaled(picture: Tensor, gain: float, offset: float) -> Tensor:
    return (picture.float() * gain + offset).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize(("levels", "said"), [([0, 0], "black"), ([7, 7], "level 7"), ([3, 200], "levels 3 to 200")])
def test_images_without_a_picture(levels: list[int], said: str) -> None:
    images = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 16, 16, 3)
    assert refusal(images) == (
        f"data 'd': 2 training images, each of one colour throughout ({said}), expected pictures: {WHY}"
    )


def test_images_of_one_colour_each() -> None:
    images = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    images[..., 0], images[1, ..., 1] = 255, 80
    assert "each of one colour throughout (levels 0 to 255), expected pictures" in refusal(images)


def test_one_picture_repeated() -> None:
    same = pictures(1).expand(200, -1, -1, -1)
    assert refusal(same) == f"data 'd': 200 training images, all the same picture, expected different ones: {WHY}"
    assert refusal(same[:1]) == f"data 'd': 1 training image, expected different ones: {WHY}"


@pytest.mark.parametrize("with_black", [False, True])
def test_one_picture_at_different_brightness(with_black: bool) -> None:
    """Gains and offsets, some of them clipped at white, some negative; rounded to grey levels."""
    picture = pictures(1)[0]
    changes = [(1, 0), (0.2, 3), (0.5, 100), (1.5, 0), (3, -60), (-1, 255)]
    images = torch.stack([scaled(picture, *change) for change in changes])
    if with_black:
        images = torch.cat([torch.zeros_like(images[:2]), images])
    assert refusal(images) == (
        f"data 'd': {len(images)} training images that differ in nothing but brightness and contrast, expected "
        f"different ones: {WHY}"
    )


def test_a_black_and_white_picture_and_nothing() -> None:
    images = (pictures(1) > 100).to(torch.uint8).expand(4, -1, -1, -1) * 255
    images = torch.cat([images, torch.zeros_like(images)])
    assert "differ in nothing but brightness and contrast" in refusal(images)


def one_pixel() -> Tensor:
    """Two pictures that differ in one pixel by a little more than rounding."""
    images = pictures(1).repeat(2, 1, 1, 1)
    images[1, 5, 5] = images[0, 5, 5] + 5
    return images


SOUND: dict[str, Callable[[], Tensor]] = {
    "two pictures": lambda: pictures(2),
    "one pixel": one_pixel,
    "one in a thousand": lambda: torch.cat([pictures(1).expand(1000, -1, -1, -1), pictures(1, seed=1)]),
    "black and white": lambda: (pictures(3) > 100).to(torch.uint8) * 255,
    "dark": lambda: pictures(3) // 60,
    "two dark ones and a bright one": lambda: torch.cat([pictures(2) // 60, pictures(1, 1)]),
    "half of it white": lambda: (pictures(3).int() * 3).clamp(max=255).to(torch.uint8),
    "some black": lambda: torch.cat([torch.zeros(9, tiny.SIZE, tiny.SIZE, 1, dtype=torch.uint8), pictures(2)]),
    "coloured": lambda: torch.cat([pictures(2), pictures(2, 1), pictures(2, 2)], dim=-1),
}


@pytest.mark.parametrize("name", SOUND)
def test_small_sound_sets_are_taken(name: str) -> None:
    check_images(Path("d"), split(SOUND[name]()))


def test_different_images_are_found_wherever_they_are() -> None:
    images = pictures(1).repeat(500, 1, 1, 1)
    images[7], images[301] = pictures(2, seed=1)
    found = different(split(images), 4)
    assert found.shape == (3, tiny.SIZE, tiny.SIZE, 3)
    assert len(found.unique(dim=0)) == 3
    assert torch.equal(different(split(pictures(9)), 3)[..., :1], pictures(9)[[0, 4, 8]])


Change = Callable[[dict[str, Tensor]], None]


def weights_with(path: Path, change: Change) -> Path:
    """The tiny backbone's weights, changed; saved as w.safetensors in that folder."""
    path.mkdir(exist_ok=True)
    state = load_file(tiny.write_weights(path / "sound.safetensors"))
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "w.safetensors")
    return path / "w.safetensors"


def fill(value: float) -> Change:
    def apply(state: dict[str, Tensor]) -> None:
        for tensor in state.values():
            tensor.fill_(value)

    return apply


def blind(state: dict[str, Tensor]) -> None:
    """Patches reach nothing: tokens differ by their places alone."""
    state["patch_embed.proj.weight"].zero_()


def overflowing(state: dict[str, Tensor]) -> None:
    state["blocks.0.mlp.fc1.weight"].fill_(1e30)
    state["blocks.0.mlp.fc2.weight"].fill_(1e30)


def dead_channel(state: dict[str, Tensor]) -> None:
    """Nothing is ever written into channel 3, apart from its place."""
    for name, tensor in state.items():
        if name.startswith("patch_embed") or name.endswith(("attn.proj.weight", "attn.proj.bias")) or "fc2" in name:
            tensor[3] = 0


def checked(encoder: Path, perceptual: Path, images: Tensor, say: Callable[[str], None] = print) -> None:
    config = mixed(encoder, perceptual)
    torch.manual_seed(0)
    scorer, records = build(config)
    check_features(config, scorer, records, Path("d"), split(images), say)


def mixed(encoder: Path, perceptual: Path) -> Config:
    return tiny.config(encoder, perceptual={**tiny.table()["perceptual"], "weights": str(perceptual)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fill(0.0), "are the same for all images"),
        (blind, "are the same for all images"),
        (fill(0.02), "differ between images in one direction only"),
        (fill(-1.0), "differ between images in one direction only"),
    ],
)
def test_networks_that_see_nothing(change: Change, said: str, tmp_path: Path) -> None:
    sound, faulty = tiny.write_weights(tmp_path / "p.safetensors"), weights_with(tmp_path, change)
    with pytest.raises(WeightsError) as caught:
        checked(faulty, sound, pictures(20))
    assert str(caught.value) == (
        f"hidden states of the {ENCODER} {said}, of 32 directions, expected features that tell images apart; {CURE}"
    )
    with pytest.raises(WeightsError) as caught:
        checked(sound, faulty, pictures(20))
    assert str(caught.value) == (
        f"features of block 2 of the perceptual network '{tiny.TIMM}' (weights: w.safetensors) {said}, of 32 "
        "directions, expected features that tell images apart; supply trained weights (--perceptual-weights FILE)"
    )


def test_features_that_overflow(tmp_path: Path) -> None:
    faulty = weights_with(tmp_path, overflowing)
    with pytest.raises(WeightsError) as caught:
        checked(faulty, faulty, pictures(20))
    # 4 images of 17 tokens, 2 taps and 32 channels; blocks 2 and 3 both stand behind the overflow.
    assert str(caught.value) == (
        f"hidden states of the {ENCODER}: 4352 of 4352 values are not finite on training images; {CURE}"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["blocks.1.attn.qkv.weight"][0, :3] = value
        state["pos_embed"][0, 2, 2] = -value
        state["norm.weight"][0] = value  # read by nothing

    with pytest.raises(WeightsError) as caught:
        build(tiny.config(weights_with(tmp_path, change)))
    assert str(caught.value) == (
        "weights 'w.safetensors': values that are not finite in float32, in 2 tensors: "
        "blocks.1.attn.qkv.weight: 3 of 3072; pos_embed: 1 of 544; download or convert the file again"
    )


def test_a_float64_weight_beyond_float32(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["cls_token"] = state["cls_token"].double() * 1e200

    with pytest.raises(WeightsError, match="float32, in 1 tensors: cls_token: 32 of 32; download or convert"):
        build(tiny.config(weights_with(tmp_path, change)))


def test_fewer_states_than_dimensions(weights: Path) -> None:
    """17 tokens and one tap, for 32 dimensions."""
    config = tiny.config(weights, model={**tiny.table(weights)["model"], "hidden_states": [-1]})
    torch.manual_seed(0)
    scorer, records = build(config)
    with pytest.raises(DataError) as caught:
        check_features(config, scorer, records, Path("d"), split(pictures(1)), print)
    assert str(caught.value) == (
        f"data 'd': all training images have 1 x 17 hidden states, in 32 dimensions of the encoder '{tiny.TIMM}' "
        "(weights: tiny.safetensors), expected more states than dimensions; add images, at least 2 are needed"
    )
    check_features(config, scorer, records, Path("d"), split(pictures(2)), print)


def test_a_few_dead_directions_are_mentioned(weights: Path, tmp_path: Path) -> None:
    said: list[str] = []
    checked(weights_with(tmp_path, dead_channel), weights, pictures(20), said.append)
    assert said == [
        f"note: hidden states of the {ENCODER} vary in 31 of 32 directions, in the others they are the same for all "
        "images"
    ]
    said.clear()
    checked(weights, weights, pictures(20), said.append)
    checked(weights, weights, pictures(2), said.append)
    assert not said


def train(config: Config, data: Path, out: Path, *more: str) -> Result:
    path = out.with_suffix(".toml")
    path.write_text(toml(config), encoding="utf-8")
    given = ["--config", path, "--data", data, "--out", out, "--device", "cpu", *more]
    return CliRunner().invoke(command, [str(one) for one in given])


def data_of(root: Path, images: list[UInt8]) -> Path:
    tiny.write_data(root, train=0, valid=1)
    for number, image in enumerate(images):
        tiny.write_png(root / "train" / "good" / "img" / f"{number}.png", image)
    return root


ALIGNED = {**tiny.table()["model"]["qformer"], "query_init": "aligned"}


@pytest.mark.parametrize("aligned", [False, True])
def test_the_command_refuses_before_anything_is_trained(aligned: bool, weights: Path, tmp_path: Path) -> None:
    model = {**tiny.table(weights)["model"], **({"qformer": ALIGNED} if aligned else {})}
    config = tiny.config(weights, model=model)
    picture = tiny.picture(np.random.default_rng(0))
    faulty = {
        "black": (
            [np.zeros_like(picture)] * 8,
            "8 training images, each of one colour throughout (black), expected pi",
        ),
        "same": ([picture] * 8, "8 training images, all the same picture, expected different ones: " + WHY),
        "brighter": (
            [np.asarray(picture * gain, np.uint8) for gain in np.linspace(0.3, 1, 8)],
            "8 training images that differ in nothing but brightness and contrast, expected different ones: " + WHY,
        ),
    }
    for name, (images, said) in faulty.items():
        data = data_of(tmp_path / name, images)
        result = train(config, data, tmp_path / f"{name}.pt")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"qfae-train: data '{data}': {said}"), result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / f"{name}.pt").exists()


def test_the_command_refuses_a_backbone_of_zeros(data: Path, tmp_path: Path) -> None:
    result = train(tiny.config(weights_with(tmp_path, fill(0.0))), data, tmp_path / "m.pt")
    assert result.exit_code == 1
    assert result.stderr == (
        f"qfae-train: hidden states of the {ENCODER} are the same for all images, of 32 directions, expected features "
        f"that tell images apart; {CURE}\n"
    )


def test_a_handful_of_pictures_can_be_trained_on(weights: Path, tmp_path: Path) -> None:
    """Two pictures, of 34 hidden states each for 32 dimensions: little, but nothing is divided by zero."""
    rng = np.random.default_rng(0)
    data = data_of(tmp_path / "data", [tiny.picture(rng) for _ in range(2)])
    model = {**tiny.table(weights)["model"], "qformer": ALIGNED}
    result = train(tiny.config(weights, model=model, train={"batch_size": 2}), data, tmp_path / "m.pt")
    assert result.exit_code == 0, result.output
    trained = load(tmp_path / "m.pt").trained
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values())


def test_a_resumed_run_is_not_checked_again(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images and weights are those that were checked, by their hashes."""
    config = tiny.config(weights, train={"epochs": 1})
    assert train(config, data, tmp_path / "m.pt").exit_code == 0
    calls: list[str] = []
    monkeypatch.setattr("qfae_train.fit.check_images", lambda *_: calls.append("images"))
    monkeypatch.setattr("qfae_train.fit.check_features", lambda *_: calls.append("features"))
    assert train(config, data, tmp_path / "m.pt", "--resume").exit_code == 0
    assert calls == []
    assert train(config, data, tmp_path / "m.pt", "--overwrite").exit_code == 0
    assert calls == ["images", "features"]


def test_images_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_check, "_CHUNK", 2)
    assert "all the same picture" in refusal(pictures(1).expand(5, -1, -1, -1))
    check_images(Path("d"), split(torch.cat([pictures(1).expand(5, -1, -1, -1), pictures(1, 1)])))
