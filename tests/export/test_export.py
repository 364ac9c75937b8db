"""From checkpoint to certified engine; and what is left behind when something is wrong on the way: nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qfae_export.export
from qfae_export.describe import provenance_of
from qfae_export.export import Exported, Options, ParityError, export
from qfae_export.layers import Linear
from qfae_export.onnx_file import write_onnx
from qfae_export.options import is_plain_name
from qfae_runtime.engines import open_engine
from qfae_runtime.errors import EngineError, ManifestError, OutputError, UsageError
from qfae_runtime.manifest import Manifest
from qfae_runtime.selftest import self_test
from qfae_train.checkpoint import build_scorer, load
from qfae_train.stress import stress_images
from tests.export.tiny import SIZE, checkpoint_file, picture_folder, pictures
from tests.train import conditionings


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def change_a_weight(path: Path) -> None:
    """Multiply the largest matrix by 1.01."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda one: numpy_helper.to_array(one).size)
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(1.01), largest.name))
    onnx.save(model, path)


def spoil_written_file(monkeypatch: pytest.MonkeyPatch, engine: bytes) -> None:
    """Leave `engine` where the ONNX file is expected, as a fault between export and measurement would."""

    def write(graph: object, path: Path) -> list[Path]:
        path.write_bytes(engine)
        return [path]

    monkeypatch.setattr(qfae_export.export, "write_onnx", write)


def test_engine_opens_passes_its_self_test_and_scores_like_pytorch(
    exported: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    images = pictures(9)
    scorer = build_scorer(load(checkpoint))
    with open_engine(exported.engine, threads=2) as opened:
        assert opened.certificate is not None
        assert opened.certificate.batches == (1, 2, 4, 8, 16)
        assert (opened.certificate.images, opened.certificate.stress_images) == (32, 14)
        assert opened.certificate.reference == "PyTorch FP64"
        assert opened.certificate.pytorch is not None
        assert 0.2 < (opened.certificate.pytorch["map_typical"] or 0) < 2
        assert opened.certificate.contract.name == "fp32"
        assert [link.target for link in opened.certificate.links] == ["graph FP32", "ONNX FP32"]
        verdict = self_test(opened, force=True, cache=tmp_path)
        assert (verdict.status, verdict.images) == ("passed", 18 + 14)
        got = opened.engine.run(images)
    import torch

    np.testing.assert_allclose(got.score, scorer(torch.from_numpy(images)).score.numpy(), atol=1e-5)


def test_manifest_says_where_the_engine_comes_from(exported: Exported, checkpoint: Path) -> None:
    manifest = Manifest.load(exported.engine.with_suffix(".json"))
    manifest.verify_files(exported.engine.parent)
    stored = load(checkpoint)
    assert set(manifest.files) == {"tiny.onnx", "tiny.golden.npz"}
    assert manifest.max_batch == 16
    assert manifest.precision == {"tiny.onnx": {"policy": "fp32"}}
    assert manifest.provenance["checkpoint"] == {"file": "tiny.pt", "sha256": stored.sha256}
    assert manifest.provenance["config"]["score"] == stored.config.to_dict()["score"]
    assert [one["sha256"] for one in manifest.provenance["frozen"]] == list(stored.embedded)
    assert manifest.provenance["training"] == {"epoch": 3, "loss": "nan"}  # JSON knows no NaN
    assert manifest.provenance["conditioning"] is None  # nobody measured it
    measured = dataclasses.replace(stored, conditioning=conditionings.made())
    assert provenance_of(measured, "tiny.pt")["conditioning"] == conditionings.made().to_dict()
    assert {"torch", "onnx", "onnxruntime", "opsets"} <= manifest.provenance["exported_by"].keys()
    assert {path.name for path in exported.files} == {"tiny.onnx", "tiny.golden.npz", "tiny.json"}


def test_golden_file_holds_stored_images_from_low_to_high_and_stress_images(exported: Exported) -> None:
    chain = exported.chain
    assert chain is not None
    assert chain.reference.yardstick is not None
    with np.load(exported.engine.with_name("tiny.golden.npz")) as golden:
        stored = {image.tobytes() for image in pictures(32)}
        assert golden["stress"].tolist() == [0] * 18 + [1] * 14
        assert {image.tobytes() for image in golden["images"][:18]} < stored
        np.testing.assert_array_equal(golden["images"][18:], stress_images(SIZE, pictures(32))[0])
        assert np.all(np.diff(golden["score"][:18]) >= 0)
        numbers = [[one.tobytes() for one in chain.images.pixels].index(one.tobytes()) for one in golden["images"]]
        np.testing.assert_array_equal(golden["score"], chain.reference.scores.score[numbers])
        np.testing.assert_array_equal(golden["own"], chain.reference.yardstick.own[numbers])
        np.testing.assert_array_equal(golden["unit"], chain.reference.yardstick.unit[numbers])


def test_nothing_else_is_left_in_the_folder(exported: Exported) -> None:
    assert set(listing(exported.engine.parent)) == {"tiny.onnx", "tiny.golden.npz", "tiny.json"}


@pytest.mark.usefixtures("quick")
def test_images_from_a_folder_and_a_name_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "scans", 33)
    made = export(Options(checkpoint, tmp_path / "new" / "deep", folder, name="brain-1", max_batch=4))
    [entry] = Manifest.load(tmp_path / "new" / "deep" / "brain-1.json").certificate
    assert (entry.engine, entry.batches, entry.images) == ("brain-1.onnx", (1, 2, 4), 32)
    assert entry.images_from == "32 of the 33 images in scans/"
    assert made.engine == tmp_path / "new" / "deep" / "brain-1.onnx"


def test_a_changed_weight_is_caught_and_leaves_nothing(
    exported: Exported, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = tmp_path / "faulty.onnx"
    faulty.write_bytes(exported.engine.read_bytes())
    change_a_weight(faulty)
    spoil_written_file(monkeypatch, faulty.read_bytes())
    with pytest.raises(ParityError) as error:
        export(Options(checkpoint, tmp_path / "out"))
    assert error.value.exit_code == 1
    assert not error.value.report
    lines = str(error.value).splitlines()
    assert lines[0] == ("tiny.onnx: onnxruntime does not compute what PyTorch FP64 computes, so nothing was written:")
    assert any("batch 16: map error, worst pixel / PyTorch's own: " in line and ", y " in line for line in lines)
    assert lines[-2] == "the first step that is beyond its bounds: graph FP32 -> ONNX FP32"
    assert listing(tmp_path / "out") == {}


def test_a_failed_export_leaves_the_old_engine(
    exported: Exported, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in exported.files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = listing(tmp_path)
    spoil_written_file(monkeypatch, exported.engine.read_bytes()[:-5000])
    with pytest.raises(EngineError, match="cannot load it"):
        export(Options(checkpoint, tmp_path, overwrite=True))
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(qfae_export.export, "save_golden", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); nothing was exported"):
        export(Options(checkpoint, tmp_path / "out"))
    assert listing(tmp_path / "out") == {}


@pytest.mark.usefixtures("quick")
def test_existing_files_are_replaced_only_on_request(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text("{}")
    (tmp_path / "tiny.onnx.data").write_text("weights of an engine that lay here before")
    with pytest.raises(OutputError, match=r"already holds tiny\.onnx\.data, tiny\.json; pass --overwrite"):
        export(Options(checkpoint, tmp_path))
    export(Options(checkpoint, tmp_path, overwrite=True))
    assert set(listing(tmp_path)) == {"tiny.onnx", "tiny.golden.npz", "tiny.json"}


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_without_images_is_measured_on_slices(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path / "bare.pt", parity_images=pictures(3)[:0])
    done = export(Options(path, tmp_path / "out"))
    assert done.report.images.stands_in
    assert done.manifest.certificate[0].images_from == "32 brain slices that come with qfae"


def test_a_manifest_of_another_engine_is_refused_by_the_runtime(exported: Exported, tmp_path: Path) -> None:
    for file in exported.files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_a_weight(tmp_path / "tiny.onnx")
    with pytest.raises(ManifestError, match="do not match"):
        open_engine(tmp_path / "tiny.onnx")


def test_faults_of_options_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as error:
        export(Options(tmp_path / "a b.pt", out=tmp_path / "file"))
    assert [fault.partition(":")[0] for fault in error.value.faults] == ["--ckpt", "--out"]


@pytest.mark.parametrize("name", ["brats", "brats.last", "a-1_b+c", "9"])
def test_names_a_manifest_takes(name: str, exported: Exported) -> None:
    stored = json.loads(exported.engine.with_suffix(".json").read_text())
    assert is_plain_name(name)
    assert Manifest.from_dict(stored | {"name": name}).name == name


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", ".hidden", "a..b", "ends.", "x" * 101, "ä"])
def test_names_that_are_refused(name: str) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize("part", ["reconstruction", "scorer"])
def test_a_half_is_measured_and_no_engine_of_its_own(checkpoint: Path, tmp_path: Path, part: str) -> None:
    done = export(Options(checkpoint, tmp_path, part=part))
    assert [file.name for file in done.files] == [f"tiny.{part}.onnx", f"tiny.{part}.json"]
    [entry] = done.manifest.certificate
    assert entry.passed
    inputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in done.manifest.inputs}
    outputs = [tensor.name for tensor in done.manifest.outputs]
    if part == "scorer":
        assert inputs["pixels"] == ("float32", ("batch", 32, 32, 3))
        assert outputs == ["score", "anomaly_map"]
    else:
        assert list(inputs) == ["images"]
        assert outputs == ["reconstruction", "pixels"]
    with pytest.raises(EngineError, match=r"half an engine, without .*; it cannot score images by itself: export the"):
        open_engine(done.engine)


@pytest.mark.parametrize("part", ["reconstruction", "scorer"])
def test_a_changed_half_is_caught(checkpoint: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(graph: Any, path: Path) -> list[Path]:
        for unit in graph.modules():
            if isinstance(unit, Linear):
                unit.weight.mul_(1.01)
        return write_onnx(graph, path)

    monkeypatch.setattr(qfae_export.export, "write_onnx", write)
    with pytest.raises(ParityError, match="the first step that is beyond its bounds: PyTorch FP32 -> ONNX FP32"):
        export(Options(checkpoint, tmp_path, part=part))
    assert listing(tmp_path) == {}


def test_a_disk_that_is_too_full_is_told_before_anything_is_scored(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said: list[str] = []
    with pytest.raises(OutputError, match=r"100\.0 kB are free, but the engine takes 5\d\d\.\d kB; nothing was exp"):
        export(Options(checkpoint, tmp_path / "out"), said.append)
    assert said == ["reading the checkpoint"]


def test_a_disk_that_fills_up_while_weights_are_written_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """No file may pass 200 kB here, as on a disk that is full; the engine takes 570 kB."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from qfae_export.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--ckpt", str(checkpoint), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written (File too large); nothing was exported: free some space" in done.stderr
    assert listing(tmp_path / "out") == {}


def test_a_request_to_end_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """As from a batch system: SIGTERM while the hidden folder is there."""
    script = (
        "import os, signal, sys\n"
        "import qfae_export.export as export\n"
        "def write(*arguments):\n"
        "    print([name[:6] for name in os.listdir(sys.argv[-1])], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "export.write_onnx = write\n"
        "from qfae_export.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--ckpt", str(checkpoint), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['.tiny-']\n"
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("qfae-export: interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_below_a_file_is_told_with_its_cure(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    said = (
        r"file/out: cannot be written \(Not a directory\); nothing was exported: a part of that path is a file: choose"
    )
    with pytest.raises(OutputError, match=said):
        export(Options(checkpoint, tmp_path / "file" / "out"))


@pytest.mark.usefixtures("quick")
def test_a_large_models_certificate_says_what_was_compared_with_fp64(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfae_export.reference.LARGE_PARAMETERS", 1000)
    made = export(Options(checkpoint, tmp_path))
    [entry] = made.manifest.certificate
    assert entry.reference == "PyTorch FP64 (12 images) and FP32 (the others)"
    assert entry.passed
    with open_engine(made.engine) as opened:
        assert self_test(opened).status == "passed"
