"""What of a configuration reaches timm: shapes, and nothing that reads a file or asks a network."""

from __future__ import annotations

import functools
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from qfae_train.backbone import create
from qfae_train.backbone_args import ACCEPTED, argument_faults
from qfae_train.config import Backbone, ConfigError, from_dict
from tests.commands import run

from . import tiny
from .made_up import toml


def entry(**args: Any) -> Backbone:
    return Backbone(tiny.TIMM, 8, {**tiny.ARGS, **args})


def faults(backbone: Backbone) -> list[str]:
    return list(argument_faults(backbone, "here"))


def test_none_of_the_factorys_own_arguments_is_accepted() -> None:
    own = set(inspect.signature(timm.create_model).parameters) - {"kwargs"}
    assert {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"} <= own
    assert not own & set(ACCEPTED)
    for name in [*own - {"model_name"}, "features_only", "device", "dtype", "block_fn", "act_layer", "img_size"]:
        backbone = entry(**{name: "FILE"})
        assert faults(backbone) == [f"here.args: got '{name}' = 'FILE'; accepted are {', '.join(ACCEPTED)}"]
        with pytest.raises(ValueError, match=rf"^backbone\.args: got '{name}' = 'FILE'"):
            create(backbone, tiny.SIZE)


NAMES = [
    "hf-hub:someone/model",
    "hf_hub:someone/model",
    "local-dir:/tmp/model",
    "timm/vit_tiny_patch16_224",
    "someone/model",
    "../model",
    "C:\\model",
    "vit_tiny_patch16_224\n",
    " vit_tiny_patch16_224",
    "hf\t-hub:someone/model",
    "vit_tiny_patch16_224.a.b",
    "vit_tiny_patch16_224\uff1a",
    "",
    "v" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_models_of_timms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(timm, "create_model", lambda *given, **_: called.append(given))
    tables = tiny.table()
    tables["model"]["encoders"][0]["timm"] = name
    tables["perceptual"]["timm"] = name
    with pytest.raises(ConfigError) as caught:
        from_dict(tables)
    assert [fault.partition(": got ")[0] for fault in caught.value.faults] == [
        "model.encoders[0].timm",
        "perceptual.timm",
    ]
    with pytest.raises(ValueError, match=r"^backbone\.timm: got "):
        create(Backbone(name, 8), tiny.SIZE)
    assert not called


@pytest.mark.parametrize("name", [*timm.list_models("vit_*", pretrained=True)[::40], "vit_large_patch16_224.mae"])
def test_every_name_of_timms_own_passes(name: str) -> None:
    assert not faults(Backbone(name, 16))


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "a switch for a number": ({"depth": True}, "depth: got True; accepted are whole numbers from 1 to 128"),
    "a text": ({"embed_dim": "128"}, "embed_dim: got '128'; accepted are whole numbers from 1 to 8192"),
    "a fraction": ({"num_heads": 2.0}, "num_heads: got 2.0; accepted are whole numbers from 1 to 256"),
    "not a number": ({"mlp_ratio": float("nan")}, "mlp_ratio: got nan; accepted are numbers from 0.1 to 16"),
    "infinite": ({"init_values": float("inf")}, "init_values: got inf; accepted are numbers from 1e-12 to 100"),
    "too deep": ({"depth": 10**9}, "depth: got 1000000000; accepted are whole numbers from 1 to 128"),
    "negative": ({"reg_tokens": -1}, "reg_tokens: got -1; accepted are whole numbers from 0 to 256"),
    "a number for a switch": ({"qk_norm": 1}, "qk_norm: got 1; accepted are true and false"),
    "a table": ({"qkv_bias": {"a": 1}}, "qkv_bias: got {'a': 1}; accepted are true and false"),
    "three sides": ({"patch_size": [8, 8, 8]}, "patch_size: got [8, 8, 8]; accepted are 1 to 128 pixels"),
    "oblong": ({"patch_size": [8, 4]}, "patch_size: got [8, 4]; accepted are 1 to 128 pixels"),
    "a pool": ({"global_pool": "map"}, "global_pool: got 'map'; accepted are 'token', 'avg', 'max', ''"),
    "a pool of lists": ({"global_pool": ["avg"]}, "global_pool: got ['avg']; accepted are 'token', 'avg', 'max', ''"),
    "none": ({"class_token": None}, "class_token: got None; accepted are true and false"),
    "tables in tables": (
        {"depth": functools.reduce(lambda inner, _: {"a": inner}, range(5000), dict[str, Any]())},
        "depth: got a dict too large to show; accepted are whole numbers from 1 to 128",
    ),
    "digits": ({"depth": 1 << 20000}, "depth: got a int too large to show; accepted are whole numbers from 1 to 128"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(case: str) -> None:
    args, expected = VALUES[case]
    assert faults(entry(**args)) == [f"here.args.{expected}"]


def test_what_is_accepted_shapes_the_model() -> None:
    args = {"mlp_ratio": 2, "init_values": 1e-5, "reg_tokens": 2, "qk_norm": True, "qkv_bias": False}
    state = create(entry(**args), tiny.SIZE).state_dict()
    assert state["blocks.0.mlp.fc1.weight"].shape == (64, 32)
    assert state["reg_token"].shape == (1, 2, 32)
    assert {"blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight"} <= state.keys()
    assert "blocks.0.attn.qkv.bias" not in state


def test_a_backbone_larger_than_any() -> None:
    tables = tiny.table()
    tables["perceptual"]["args"].update(embed_dim=8192, depth=128)
    with pytest.raises(ConfigError) as caught:
        from_dict(tables)
    assert caught.value.faults[0].endswith("has 1e+11 parameters; accepted are up to 4e+09")


class Opens:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("timms_name", [tiny.TIMM, "local-dir:."])
def test_a_toml_file_runs_nothing(timms_name: str, tmp_path: Path) -> None:
    """As a user types it; timm 1.0.22 to 1.0.25 unpickled the file that `checkpoint_path` names."""
    trace = tmp_path / "trace"
    torch.save({"state_dict": Opens(trace)}, tmp_path / "evil.pth")
    text = toml(tiny.config())
    args = 'args = { checkpoint_path = "evil.pth", '
    text = text.replace("args = { ", args).replace(f'"{tiny.TIMM}"', f'"{timms_name}"')
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    (tmp_path / "data").mkdir()
    done = run("qfae-train", "--config", "my.toml", "--data", "data", "--out", "a.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("args: got 'checkpoint_path' = 'evil.pth'; accepted are patch_size, ") == 2
    assert "Traceback" not in done.stderr
    assert not trace.exists()
    pickle.loads(pickle.dumps(Opens(trace)))
    assert trace.exists()  # the file is as bad as the test says
