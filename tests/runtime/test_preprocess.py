from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfae_runtime import resample
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


def torchvision_resize(pixels: UInt8, size: int) -> UInt8:
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms.v2")
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    resized: UInt8 = transforms.Resize((size, size), antialias=True)(tensor).permute(1, 2, 0).numpy()
    return resized


@pytest.mark.parametrize("shape", [(240, 240), (512, 512), (512, 1024), (1024, 1024), (224, 224), (300, 150)])
def test_equals_torchvision_resize(shape: tuple[int, int]) -> None:
    pixels = anatomy_like(max(shape))[: shape[0], : shape[1]]
    ours = preprocess(pixels, PreprocessSpec(image_size=224)).image
    np.testing.assert_array_equal(ours, torchvision_resize(pixels, 224))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    size=st.sampled_from([16, 32, 112, 224, 336]),
    seed=st.integers(0, 2**32 - 1),
    grey=st.booleans(),
)
def test_equals_torchvision_resize_at_any_size(height: int, width: int, size: int, seed: int, grey: bool) -> None:
    """Noise is the hardest image: every rounding shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = np.repeat(pixels[..., :1], 3, axis=2) if grey else pixels
    ours = preprocess(pixels, PreprocessSpec(image_size=size)).image
    np.testing.assert_array_equal(ours, torchvision_resize(pixels, size))


def test_large_images_are_resized_in_parts_with_the_same_result() -> None:
    pixels = anatomy_like(1400)
    whole = preprocess(pixels, PreprocessSpec(image_size=32)).image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "_AT_ONCE", 1)
        np.testing.assert_array_equal(preprocess(pixels, PreprocessSpec(image_size=32)).image, whole)


@pytest.mark.parametrize("size", [32, 112, 224, 518])
@pytest.mark.parametrize("side", [240, 512, 1024, 4096, 8192])
def test_no_product_is_large_enough_for_threads_of_its_own(
    side: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 65536 x 4 multiplications OpenBLAS takes several; those of several pictures get in each other's way."""
    work, genuine = [0], np.matmul

    def counting(rows: npt.NDArray[Any], weights: npt.NDArray[Any], **options: Any) -> Any:
        work.append(len(rows) * weights.size)
        return genuine(rows, weights, **options)

    monkeypatch.setattr(np, "matmul", counting)
    resample.resize(np.zeros((side, side, 3), np.uint8), size, size)
    assert max(work) <= 65536 * 4
    if side > 240:
        assert max(work) > 65536  # nor are they needlessly small


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
        (224, "4bf7f78874c171a822ec6bf9936b2c2029c5bd9a9023abaea0ed9399cbb60d53"),
        (64, "5a782ba69f815341e4a02131fccf7e2df2164089150e9a390831b09755b9b3b1"),
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
