from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfae_runtime.arrays import UInt8
from qfae_runtime.errors import ManifestError, UsageError
from qfae_runtime.geometry import Geometry
from qfae_runtime.preprocess import PreprocessSpec, preprocess


def anatomy_like(side: int) -> UInt8:
    """Smooth grey structure plus noise, as a scanner gives; three equal channels."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[0:side, 0:side] / side
    grey = 120 + 80 * np.sin(9 * x) * np.cos(7 * y) + rng.normal(0, 6, (side, side))
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


# At 1024 px torchvision rounds some weights otherwise: one level on 0.04 to 0.07 % of the pixels, by picture.
@pytest.mark.parametrize(("side", "share"), [(240, 0.0), (512, 0.0), (1024, 0.001)])
def test_equals_torchvision_resize(side: int, share: float) -> None:
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms.v2")
    pixels = anatomy_like(side)
    ours = preprocess(pixels, PreprocessSpec(image_size=224)).image
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    theirs = transforms.Resize((224, 224), antialias=True)(tensor).permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= (1 if share else 0)
    assert (difference.max(axis=2) > 0).mean() <= share


def test_result_is_owned_and_keeps_the_size() -> None:
    pixels = anatomy_like(48)
    prepared = preprocess(pixels, PreprocessSpec(image_size=32))
    assert prepared.image.shape == (32, 32, 3)
    assert prepared.image.flags.writeable
    assert prepared.geometry == Geometry.whole(48, 48, 32)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_refuses_what_is_not_pixels(wrong: UInt8) -> None:
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \(H, W, 3\), got"):
        preprocess(wrong, PreprocessSpec())


def test_unknown_kind_and_size_are_told_together() -> None:
    with pytest.raises(UsageError) as caught:
        PreprocessSpec(kind="crop", image_size=0)
    assert caught.value.faults == [
        "preprocess kind: got 'crop', accepted are 'resize', 'liver'",
        "image_size: got 0, expected a whole number in 1..4096",
    ]


def test_spec_survives_its_dict_and_hash_sees_changes() -> None:
    spec = PreprocessSpec(image_size=112)
    assert PreprocessSpec.from_dict(spec.to_dict()) == spec
    assert spec.sha256() == PreprocessSpec(image_size=112).sha256() != PreprocessSpec().sha256()
    assert PreprocessSpec(image_size=224).diff(spec) == ["image_size: 112 -> 224"]
    assert spec.diff(spec) == []


@pytest.mark.parametrize(
    ("size", "sha256"),
    [
        (224, "da9bc66cb1ff2ef3de6373cdaff2e5ec531ffe9a39ead8a6013eb4f8c50e7dfe"),
        (64, "90634b277c3ef4fdf60b25b61ff66e1e7bfe486fe8b856b95a4749a741746966"),
    ],
)
def test_the_hash_in_existing_checkpoints_and_manifests_holds(size: int, sha256: str) -> None:
    assert PreprocessSpec("resize", size).sha256() == sha256
    assert list(PreprocessSpec().to_dict()) == [
        "version",
        "colour",
        "bits",
        "resampling",
        "layout",
        "kind",
        "image_size",
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version: got 2, this version of qfae knows only 1"),
        ({"resampling": "opencv-area"}, "resampling: got 'opencv-area'"),
        ({"gamma": 2.2}, "unknown key 'gamma'"),
        ({"kind": "crop"}, "preprocess kind: got 'crop', accepted are 'resize'"),
        ({"kind": ["resize"]}, "preprocess kind: got"),
        ({"image_size": "224"}, "image_size: got '224'"),
    ],
)
def test_foreign_spec_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ManifestError) as caught:
        PreprocessSpec.from_dict({**PreprocessSpec().to_dict(), **change})
    assert says in str(caught.value)
    assert "use the qfae version that wrote it" in str(caught.value)


def test_missing_key_is_named() -> None:
    stored = PreprocessSpec().to_dict()
    del stored["colour"]
    with pytest.raises(ManifestError, match="key 'colour' is missing"):
        PreprocessSpec.from_dict(stored)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 40))
def test_maps_and_masks_travel_both_ways(height: int, width: int, size: int) -> None:
    geometry = Geometry.whole(height, width, size)
    back = geometry.map_back(np.full((size, size), 0.25, np.float32))
    assert back.shape == (height, width)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, 0.25, rtol=1e-6)
    warped = geometry.warp_mask(np.ones((height, width), np.bool_))
    assert warped.shape == (size, size)
    assert warped.dtype == np.uint8
    assert warped.min() == 1
