"""Configurations: presets load, and every fault is named, all of them at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime.preprocess import PreprocessSpec
from qfae_train.config import ConfigError, differences, from_dict, load, presets

from .made_up import ARCHITECTURES, toml
from .tiny import SIZE, TIMM, config, table


def faults_of(tables: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(tables)
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


@pytest.mark.parametrize("name", presets())
def test_presets_load(name: str) -> None:
    preset = load(name)
    assert preset.preprocess_spec() == PreprocessSpec(preset.preprocess.kind, preset.model.image_size)
    for weights in [preset.perceptual.weights, *(encoder.weights for encoder in preset.model.encoders)]:
        assert not weights or Path(weights).is_file()


def test_the_demo_is_a_preset() -> None:
    assert "demo" in presets()


def test_round_trip_through_plain_tables_and_json() -> None:
    for original in [load("demo"), config("w.safetensors", score={"fusion": "separate", "patch_sizes": [8]})]:
        plain = original.to_dict()
        assert from_dict(plain) == original
        assert from_dict(json.loads(json.dumps(plain))) == original


def test_a_toml_file_of_everything_gives_the_same_configuration(tmp_path: Path) -> None:
    for name, original in ARCHITECTURES.items():
        path = tmp_path / "my.toml"
        path.write_text(toml(original), encoding="utf-8")
        assert load(path) == original, name


def test_defaults_are_the_published_method() -> None:
    published = from_dict(
        {"model": {"encoders": [{"timm": "vit_large_patch14_reg4_dinov2.lvd142m", "patch_size": 14}]}}
    )
    assert published.model.hidden_states == (-2, -4)
    assert (published.loss.patch_sizes, published.loss.blocks) == ((32, 56), (16, 20))
    assert (published.score.patch_sizes, published.score.blocks) == ((16, 32, 56), (12, 16, 20))
    score = published.score
    assert (score.fusion, score.spatial, score.across, score.pixel_map) == ("product", "max", "mean", "mean")
    train = published.train
    assert (train.epochs, train.batch_size, train.lr, train.pct_start) == (300, 64, 8e-5, 0.15)
    assert train.pixel_warmup == 0
    augment = published.augment
    assert (augment.crop_scale, augment.crop_ratio) == ((0.9, 1.0), (0.8, 1.2))
    assert (augment.rotation, augment.vertical_flip, augment.jitter) == (10, 0.5, 0.1)


def test_no_such_preset() -> None:
    with pytest.raises(ConfigError) as caught:
        load("nosuch")
    assert caught.value.faults == [
        f"config 'nosuch': no such file or preset; presets are {', '.join(presets())}",
    ]


def test_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^config '.*my\.toml': not valid TOML: .*line 1"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"^config '.*my\.toml': not valid TOML: "):
        load(path)


def test_weights_are_found_beside_the_toml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "my.toml"
    path.write_text(
        f"""
        [model]
        image_size = {SIZE}
        hidden_states = [-1]
        encoders = [
            {{ timm = "{TIMM}", patch_size = 8, args = {{ patch_size = 8, depth = 3 }}, weights = "a.pt" }},
            {{ timm = "{TIMM}", patch_size = 16, weights = "/elsewhere/b.pt" }},
        ]
        [model.qformer]
        queries = 16
        [perceptual]
        timm = "{TIMM}"
        weights = "c.pt"
        [loss]
        patch_sizes = [8]
        blocks = [1]
        [score]
        patch_sizes = [8]
        blocks = [1]
        """,
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    loaded = load("folder/my.toml")
    assert [Path(encoder.weights) for encoder in loaded.model.encoders] == [
        Path("folder/a.pt"),
        Path("/elsewhere/b.pt"),
    ]
    assert Path(loaded.perceptual.weights) == Path("folder/c.pt")


def test_every_wrong_key_and_type_at_once() -> None:
    tables = table(
        train={"epoch": 3, "epochs": "many", "lr": float("nan"), "batch_size": True, "seed": 1.5},
        score={"fusion": "sum", "blocks": 3, "patch_sizes": [8, "16"]},
        augment={"enabled": 1, "crop_scale": [0.9]},
        colour={},
    )
    tables["model"]["qformer"]["width"] = 32
    tables["model"]["decoder"] = 7
    tables["model"]["encoders"] = [{"timm": TIMM}, "dino"]
    assert faults_of(tables) == [
        "colour: unknown key; config accepts model, perceptual, loss, score, preprocess, data, augment, train",
        "model.encoders[0].patch_size: missing; it is pixels per side of a patch; weights of another size are "
        "resampled by timm",
        "model.encoders[1]: expected a table, got 'dino'",
        "model.qformer.width: unknown key; model.qformer accepts "
        "blocks, dim, queries, heads, cross_head_dim, mlp_ratio, dropout, query_init",
        "model.decoder: expected a table, got 7",
        "score.patch_sizes[1]: expected a whole number, got '16'",
        "score.blocks: expected a list, got 3",
        "score.fusion: got 'sum'; accepted are 'product', 'separate'",
        "augment.enabled: expected true or false, got 1",
        "augment.crop_scale: expected 2 values, got [0.9]",
        "train.epoch: unknown key; train accepts epochs, batch_size, lr, pct_start, seed, pixel_warmup, "
        "grad_clip, validate_every, precision, workers",
        "train.epochs: expected a whole number, got 'many'",
        "train.batch_size: expected a whole number, got True",
        "train.lr: expected a finite number, got nan",
        "train.seed: expected a whole number, got 1.5",
    ]


@pytest.mark.parametrize("tables", [[], "demo", None, 3])
def test_not_a_table(tables: Any) -> None:
    assert faults_of(tables) == [f"config: expected a table, got {tables!r}"]


def test_a_model_is_needed() -> None:
    assert faults_of({}) == ["model: missing; it is the autoencoder"]


def test_whole_numbers_serve_as_numbers() -> None:
    assert config(augment={"rotation": 5}).augment.rotation == 5.0


def test_impossible_ranges_all_at_once() -> None:
    tables = table(
        train={
            "epochs": 0,
            "batch_size": -1,
            "lr": 0.0,
            "pct_start": 1.5,
            "pixel_warmup": -0.1,
            "validate_every": 0,
            "workers": -1,
        },
        augment={"crop_scale": [1.0, 0.9], "crop_ratio": [0.0, 1.0], "jitter": -0.5, "vertical_flip": 2.0},
        preprocess={"kind": "stretch"},
    )
    tables["model"]["qformer"]["blocks"] = 0
    tables["model"]["decoder"]["register_tokens"] = -1
    faults = faults_of(tables)
    assert faults[:-1] == [
        "model.qformer.blocks: got 0; it must be above 0",
        "train.epochs: got 0; it must be above 0",
        "train.batch_size: got -1; it must be above 0",
        "train.lr: got 0.0; it must be above 0",
        "train.validate_every: got 0; it must be above 0",
        "model.decoder.register_tokens: got -1; it must not be negative",
        "train.workers: got -1; it must not be negative",
        "augment.jitter: got -0.5; it must not be negative",
        "train.pct_start: got 1.5; accepted are values from 0 to 1",
        "train.pixel_warmup: got -0.1; accepted are values from 0 to 1",
        "augment.vertical_flip: got 2.0; accepted are values from 0 to 1",
        "augment.crop_scale: got [1.0, 0.9]; it must be a range of positive numbers, smallest first",
        "augment.crop_ratio: got [0.0, 1.0]; it must be a range of positive numbers, smallest first",
    ]
    assert faults[-1].startswith("preprocess.kind: got 'stretch'; accepted are 'resize'")


def test_differences_name_each_changed_value() -> None:
    before = config().to_dict()
    now = config(train={"epochs": 5, "lr": 1.0, "batch_size": 8, "validate_every": 1, "workers": 0}).to_dict()
    now["model"]["qformer"]["heads"] = 4
    assert differences(before, before) == []
    assert differences(before, now) == [
        "model.qformer.heads: 2 -> 4",
        "train.epochs: 4 -> 5",
        "train.lr: 0.003 -> 1.0",
    ]


def test_types_ranges_and_contradictions_at_once() -> None:
    tables = table(train={"epochs": 0, "lr": -1, "color": 3}, preprocess={"kind": "stretch"})
    tables["model"]["qformer"]["dim"] = "big"
    tables["model"]["decoder"]["heads"] = 7
    tables["loss"]["blocks"] = [9]
    faults = faults_of(tables)
    assert [fault.split(": ")[0] for fault in faults] == [
        *("model.qformer.dim", "train.color"),
        *("model.decoder.heads", "train.epochs", "train.lr", "preprocess.kind", "loss.blocks"),
    ]
    assert faults[2] == "model.decoder.heads: 7 heads do not divide the width 32"


@pytest.mark.parametrize("spoilt", ["image_size", "decoder", "qformer", "encoders"])
def test_what_depends_on_a_faulty_value_is_not_told(spoilt: str) -> None:
    tables = table()
    tables["model"][spoilt] = "big"
    assert [fault.split(": ")[0] for fault in faults_of(tables)] == [f"model.{spoilt}"]


def test_what_depends_on_a_misspelt_key_is_not_told() -> None:
    tables = table()
    tables["model"]["imagesize"] = tables["model"].pop("image_size")
    tables["model"]["qformer"]["querys"] = tables["model"]["qformer"].pop("queries")
    tables["model"]["encoders"][0]["hidden_state"] = [-1]
    faults = faults_of(tables)
    assert len(faults) == 3
    assert all("unknown key" in fault for fault in faults)


def test_a_whole_number_too_large_for_a_number() -> None:
    assert faults_of(table(train={"lr": 10**400})) == ["train.lr: expected a finite number, got inf"]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "my.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_the_text(newline: str, tmp_path: Path) -> None:
    text = toml(config("w.safetensors")).replace("\n", newline)
    assert load(written(tmp_path, b"\xef\xbb\xbf" + text.encode())) == load(written(tmp_path, text))


UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "lists": ("a = " + "[" * 5000 + "]" * 5000, "lists or tables nested too deeply; a configuration has 4 levels"),
    "tables": ("a = " + "{b = " * 5000 + "1" + "}" * 5000, "lists or tables nested too deeply; a configuration has 4"),
    "open lists": ("a = " + "[" * 5000, "lists or tables nested too deeply; a configuration has 4 levels"),
    "digits": ("[train]\nseed = " + "9" * 5000, "not valid TOML: Exceeds the limit"),
    "size": ("#" * (2**20 + 1), "1048577 bytes; a configuration has at most 1048576"),
    "UTF-16": ("a = 1".encode("utf-16"), "not valid TOML: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_toml_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    text, expected = UNREADABLE[case]
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"config '{path}': {expected}")
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("table", ["perceptual.args", "model.qformer", "colour", "train.seed"])
def test_keys_nested_deeply(table: str, tmp_path: Path) -> None:
    """Dotted keys do not nest in the parser, only in what it returns."""
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, toml(config("w.pt")) + f"\n[{table}.{'.'.join(['a'] * 5000)}]\nb = 1\n"))
    assert len(str(caught.value)) < 3000


def test_numbers_of_more_than_64_bits(tmp_path: Path) -> None:
    tables = table(train={"seed": 1 << 20000, "lr": 1 << 20000}, score={"blocks": [1 << 64]})
    assert faults_of(tables) == [
        "score.blocks[0]: expected a whole number of at most 64 bits, got 18446744073709551616",
        "train.lr: expected a finite number, got inf",
        "train.seed: expected a whole number of at most 64 bits, got a int too large to show",
    ]
