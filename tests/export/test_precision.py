"""The policy as data: which places a selector covers, and what the manifest is told."""

from __future__ import annotations

import json

import pytest
import torch

from qfae_export.precision import FP16, FP16_STREAMS, FP32, INT8, Precision, covers, unknown_selectors


@pytest.mark.parametrize(
    ("selector", "unit", "expected"),
    [
        ("perceptual", "perceptual.7.fc1", True),
        ("perceptual.7", "perceptual.7.fc1", True),
        ("perceptual.7.fc1", "perceptual.7.fc1", True),
        ("perceptual.7", "perceptual.70.fc1", False),
        ("encoder", "encoder2.1.fc1", False),
        ("perceptual.7.fc1", "perceptual.7", False),
    ],
)
def test_what_a_selector_covers(selector: str, unit: str, expected: bool) -> None:
    assert covers(selector, unit) is expected


def test_types() -> None:
    policy = Precision("fp16", ("decoder.2",))
    assert policy.dtype("decoder.2.fc1") == torch.float32
    assert policy.dtype("decoder.1.fc1") == torch.float16
    assert FP32.dtype("decoder.1.fc1") == torch.float32


BY_RULE = [
    "encoder.norm_pre",
    "encoder.23.norm1",
    "encoder2.1.norm2",
    "encoder.embed.table",
    "encoder.embed.prefix",
    "perceptual.embed16.table",
    "qformer.1.norm",
    "qformer.3.cross.norm_q",
    "qformer.1.cross.norm_out",
    "decoder.6.residual1",
    "perceptual.20.residual2",
    "decoder.norm",
]
ROUNDED = [
    "encoder.embed.product",
    "perceptual.embed16.product",
    "qformer.1.cross.q",
    "qformer.1.cross.null",
    "qformer.1.cross.kv1",
    "qformer.1.cross.out",
    "qformer.1.fc1",
    "encoder.1.qkv",
    "encoder.1.attention",
    "encoder.1.proj",
    "encoder.1.fc1",
    "encoder.1.fc2",
    "decoder.head",
]


@pytest.mark.parametrize("unit", BY_RULE)
def test_streams_and_norms_are_fp32_by_rule(unit: str) -> None:
    assert FP16.dtype(unit) == torch.float32
    assert FP16_STREAMS.dtype(unit) == torch.float16
    assert Precision("fp16", (unit,)).dtype(unit) == torch.float32, "a selector may name it"
    assert Precision("fp16", (unit,), streams="float16").dtype(unit) == torch.float32


@pytest.mark.parametrize("unit", ROUNDED)
def test_what_fp16_rounds(unit: str) -> None:
    assert FP16.dtype(unit) == FP16_STREAMS.dtype(unit) == torch.float16


def test_selectors_that_name_nothing() -> None:
    assert unknown_selectors(["encoder.1", "encoder.9", "head"], ["encoder.1.fc1", "decoder.head"]) == [
        "encoder.9",
        "head",
    ]


def test_the_manifest_repeats_the_policy() -> None:
    assert FP32.describe() == {"policy": "fp32"}
    stored = json.loads(json.dumps(Precision("fp16", ("encoder.3",)).describe()))
    assert stored["kept_fp32"] == ["encoder.3"]
    assert stored["rules"]["features to score"]["type"] == "float32"
    assert FP16.describe()["kept_fp32"] == []
    assert [stored["rules"][name]["type"] for name in ("residual streams", "LayerNorms")] == ["float32"] * 2
    other = FP16_STREAMS.describe()["rules"]
    assert [other[name]["type"] for name in ("residual streams", "LayerNorms")] == ["float16"] * 2
    assert list(other) == list(stored["rules"])


@pytest.mark.parametrize("policy", [FP32, FP16, FP16_STREAMS, INT8, Precision("fp16", ("encoder.3", "decoder.1.fc1"))])
def test_a_policy_is_read_back_from_the_manifest(policy: Precision) -> None:
    assert Precision.described(json.loads(json.dumps(policy.describe()))) == policy


def test_a_manifest_of_an_earlier_version_says_that_its_streams_are_fp16() -> None:
    rules = {
        "matrix products": {"type": "float16", "why": "nearly all of the work"},
        "residual streams": {"type": "float16", "why": "read and written around every product"},
        "LayerNorm statistics": {"type": "float32", "why": "sums of squares overflow float16"},
    }
    stored = {"policy": "fp16", "rules": rules, "kept_fp32": ["decoder.1"]}
    assert Precision.described(stored) == Precision("fp16", ("decoder.1",), streams="float16")
