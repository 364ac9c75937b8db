from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from qfae_runtime import Scorer, open_engine, preprocess, read_image
from qfae_runtime.engines.base import Scores
from qfae_runtime.engines.onnxruntime import OnnxRuntimeEngine
from qfae_runtime.errors import EngineError, ManifestError, UsageError
from qfae_runtime.geometry import Geometry
from qfae_runtime.preprocess import Prepared

from .tiny import MAX_BATCH, SIZE, edit_manifest, export_tiny, golden_images, mend_hashes, model_bytes


def test_outputs_have_the_promised_types(engine_path: Path) -> None:
    with OnnxRuntimeEngine(engine_path, SIZE, MAX_BATCH, threads=1) as engine:
        scores = engine.run(golden_images(3))
        assert (engine.backend, engine.device, engine.image_size, engine.max_batch) == ("onnxruntime", "cpu", 32, 32)
        assert engine.version[0].isdigit()
    assert isinstance(scores, Scores)
    assert (scores.score.dtype.name, scores.score.shape) == ("float32", (3,))
    assert (scores.anomaly_map.dtype.name, scores.anomaly_map.shape) == ("float32", (3, SIZE, SIZE))
    assert (scores.reconstruction.dtype.name, scores.reconstruction.shape) == ("uint8", (3, SIZE, SIZE, 3))


def test_without_maps_only_the_score_comes() -> None:
    with OnnxRuntimeEngine(model_bytes(), SIZE, MAX_BATCH) as engine:
        full, bare = engine.run(golden_images(3)), engine.run(golden_images(3), maps=False)
    np.testing.assert_array_equal(full.score, bare.score)
    assert bare.anomaly_map.shape == (0, SIZE, SIZE)
    assert bare.reconstruction.shape == (0, SIZE, SIZE, 3)


def test_wrong_batches_are_refused_with_the_cure() -> None:
    with OnnxRuntimeEngine(model_bytes(), SIZE, 4) as engine:
        with pytest.raises(EngineError) as caught:
            engine.run(np.zeros((2, 3, SIZE, SIZE), np.float32))
        assert str(caught.value) == (
            "input 'images': expected uint8 (B, 32, 32, 3), got float32 (2, 3, 32, 32); "
            "pass images from preprocess(), the engine normalises them itself"
        )
        for count in (0, 5):
            with pytest.raises(EngineError, match=rf"expected 1\.\.4 images in a batch, got {count}"):
                engine.run(golden_images(8)[:count])
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.run(golden_images(1))


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"the engine: ONNX Runtime .* cannot load it: .*; export it again"):
        OnnxRuntimeEngine(b"no model", SIZE, MAX_BATCH)
    with pytest.raises(
        EngineError, match=r"tensor 'images': expected uint8 \(batch, 64, 64, 3\), got uint8 \(batch, 32"
    ):
        OnnxRuntimeEngine(model_bytes(), 64, MAX_BATCH)


def test_a_file_of_a_later_opset_is_sound_and_the_installation_old() -> None:
    model = onnx.load_from_string(model_bytes())
    model.opset_import[0].version = 99
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeEngine(model.SerializeToString(), SIZE, MAX_BATCH)
    assert re.fullmatch(
        r"the engine: its opset is 99, ONNX Runtime [\d.]+ reads up to \d+; install a newer one "
        r"\(pip install --upgrade onnxruntime\), FP16 files need 1\.23",
        str(caught.value),
    )


def test_scores_do_not_depend_on_the_batch(engine_path: Path) -> None:
    images = [Prepared(image, Geometry.whole(SIZE, SIZE, SIZE)) for image in golden_images(37)]
    with open_engine(engine_path) as opened:
        by_size = {
            size: [one.score for one in Scorer(opened.engine, opened.manifest, size).score(iter(images))]
            for size in (1, 5, 32)
        }
    assert len(by_size[1]) == 37
    np.testing.assert_allclose(by_size[5], by_size[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(by_size[32], by_size[1], rtol=0, atol=1e-5)


def test_the_api_of_the_package_scores_a_file(engine_path: Path, dataset: Path) -> None:
    path = dataset / "Ungood" / "img" / "0.png"
    with open_engine(engine_path) as opened:
        prepared = preprocess(read_image(path).pixels, opened.manifest.preprocess)
        [scored] = Scorer(opened.engine, opened.manifest).score([prepared])
    assert scored.anomaly_map is not None
    assert scored.score == scored.anomaly_map.max()


def test_scorer_refuses_what_does_not_fit(engine_path: Path) -> None:
    with open_engine(engine_path) as opened:
        with pytest.raises(EngineError, match=r"batch size: got 33, this engine takes 1\.\.32"):
            Scorer(opened.engine, opened.manifest, 33)
        wrong = Prepared(np.zeros((8, 8, 3), np.uint8), Geometry.whole(8, 8, 8))
        with pytest.raises(EngineError, match=r"image: expected uint8 \(32, 32, 3\), got uint8 \(8, 8, 3\); prepare"):
            list(Scorer(opened.engine, opened.manifest).score([wrong]))
    with OnnxRuntimeEngine(model_bytes(16), 16, 4) as small, pytest.raises(ManifestError, match="the engine takes 16"):
        Scorer(small, opened.manifest)


def test_missing_engine_and_manifest(tmp_path: Path, engine_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        open_engine(tmp_path / "none.onnx")
    assert str(caught.value) == (
        f"{tmp_path}/none.onnx: no such engine file; write one with: qfae-export --ckpt NAME.pt"
    )
    engine_path.with_suffix(".json").unlink()
    with pytest.raises(ManifestError, match=r"no manifest beside it \(looked for tiny\.json\)"):
        open_engine(engine_path)


def test_altered_bytes_are_refused(engine_path: Path) -> None:
    engine_path.write_bytes(model_bytes(scale=2.001))
    with pytest.raises(ManifestError, match=r"its bytes do not match tiny\.json: SHA-256 .*copy both again"):
        open_engine(engine_path)


def test_mended_hash_without_mended_certificate_is_refused(engine_path: Path) -> None:
    engine_path.write_bytes(model_bytes(scale=2.001))
    mend_hashes(engine_path, certificate_too=False)
    with pytest.raises(EngineError, match=r"the certificate in tiny\.json was issued for other bytes"):
        open_engine(engine_path)


def test_engine_of_another_model_is_refused(engine_path: Path) -> None:
    other = engine_path.with_name("tiny.fp16.onnx")
    other.write_bytes(engine_path.read_bytes())
    with pytest.raises(ManifestError, match=r"lists no engine 'tiny\.fp16\.onnx', only tiny\.onnx"):
        open_engine(other)


def test_uncertified_engine_needs_permission(tmp_path: Path) -> None:
    engine_path = export_tiny(tmp_path, certified=False)
    with pytest.raises(EngineError) as caught:
        open_engine(engine_path)
    assert str(caught.value) == (
        f"{engine_path}: tiny.json certifies nothing: it was never compared with PyTorch; "
        "export it again with qfae-export, or pass --allow-uncertified to run it all the same"
    )
    with open_engine(engine_path, allow_uncertified=True) as opened:
        assert opened.certificate is None


def test_failed_or_foreign_certificates_do_not_count(engine_path: Path) -> None:
    with open_engine(engine_path) as opened:
        assert opened.certificate is not None
        entry = opened.manifest.to_dict()["certificate"][0]
    edit_manifest(engine_path, certificate=[{**entry, "passed": False}])
    with pytest.raises(EngineError, match="its comparison with PyTorch failed on onnxruntime, cpu"):
        open_engine(engine_path)
    edit_manifest(engine_path, certificate=[{**entry, "device": "cuda:0"}])
    with pytest.raises(EngineError, match="certified for onnxruntime on cuda:0, not for onnxruntime on cpu"):
        open_engine(engine_path)


@pytest.mark.parametrize(("measured", "missing"), [([1, 7], "2, 4, 8, 16, 32"), ([1, 2, 4, 8, 32, 64], "16")])
def test_a_certificate_that_lacks_a_size_of_batch_does_not_count(
    engine_path: Path, measured: list[int], missing: str
) -> None:
    stored = json.loads(engine_path.with_suffix(".json").read_text())
    stored["certificate"][0]["batches"] = measured
    engine_path.with_suffix(".json").write_text(json.dumps(stored))
    with pytest.raises(EngineError) as caught:
        open_engine(engine_path)
    assert str(caught.value) == (
        f"{engine_path}: runs in batches of {missing} too, but it was measured in batches of "
        f"{', '.join(map(str, measured))} only; measure all: "
        f"qfae-export verify --engine {engine_path} --ckpt NAME.pt --backend onnxruntime --record"
    )
    with open_engine(engine_path, allow_uncertified=True) as opened:
        assert opened.certificate is None


def test_an_engine_runs_the_sizes_that_its_manifest_lists(engine_path: Path) -> None:
    stored = json.loads(engine_path.with_suffix(".json").read_text())
    stored["certificate"][0]["batches"] = [1, 3, 32]
    edit_manifest(engine_path, batch_sizes=[1, 3, 32], certificate=stored["certificate"])
    with open_engine(engine_path) as opened:
        assert (opened.engine.batches, opened.engine.max_batch) == ((1, 3, 32), 32)
        scorer = Scorer(opened.engine, opened.manifest, 8)
        images = [Prepared(image, Geometry.whole(SIZE, SIZE, SIZE)) for image in golden_images(8)]
        assert len(list(scorer.score(images))) == 8
    assert scorer.batch_size == 3  # the largest that is not above 8
    assert dict(scorer.batches_run) == {3: 2, 1: 2}


def test_unknown_backend_and_device_are_told_together(engine_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_engine(engine_path, backend="abacus", device="tpu")
    assert caught.value.faults == [
        "backend: got 'abacus', accepted are "
        "auto, onnxruntime, onnxruntime-tensorrt, openvino, openvino-bf16, tensorrt",
        "device: got 'tpu', accepted are auto, cpu, cuda:0",
    ]


@pytest.mark.parametrize("call", ["read_bytes", "is_file"])
def test_engine_that_may_not_be_read_is_told_in_words(
    engine_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    genuine = getattr(Path, call)

    def forbidden(path: Path) -> object:
        if path == engine_path:
            raise PermissionError(13, "Permission denied", str(path))
        return genuine(path)

    monkeypatch.setattr(Path, call, forbidden)
    with pytest.raises(EngineError) as caught:
        open_engine(engine_path)
    assert str(caught.value) == (
        f"{engine_path}: cannot be read (Permission denied); check who may read the engine's files and their folder"
    )


def test_without_onnx_runtime_the_package_is_named(engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfae_runtime.engines.backends.find_spec", lambda name: None)
    with pytest.raises(EngineError) as caught:
        open_engine(engine_path)
    assert str(caught.value) == "ONNX Runtime is not installed; install it with: pip install onnxruntime"
