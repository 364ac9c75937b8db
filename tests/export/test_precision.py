"""The policy as data: which places a selector covers, and what the manifest is told."""

from __future__ import annotations

import json

import pytest
import torch

from qfae_export.precision import FP16, FP32, Precision, covers, unknown_selectors


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


@pytest.mark.parametrize("policy", [FP32, FP16, Precision("fp16", ("encoder.3", "decoder.1.fc1"))])
def test_a_policy_is_read_back_from_the_manifest(policy: Precision) -> None:
    assert Precision.described(json.loads(json.dumps(policy.describe()))) == policy
