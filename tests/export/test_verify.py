"""Measuring an engine again: from the golden file, from the checkpoint, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qfae_export import reference
from qfae_export.cli import main
from qfae_export.export import Exported, Options, export
from qfae_export.graph import InferenceGraph
from qfae_export.parity import measure
from qfae_export.parity_report import ParityReport
from qfae_export.precision import FP16, FP16_STREAMS, Precision
from qfae_export.reference import Measured64
from qfae_export.rounded import RoundedEngine
from qfae_export.verify import _decided_too
from qfae_export.verify import verify as measured_again
from qfae_runtime.agreement import Scale
from qfae_runtime.arrays import UInt8
from qfae_runtime.cli import main as run_main
from qfae_runtime.contract import Contract
from qfae_runtime.engines import Scores, open_engine
from qfae_runtime.errors import EngineError
from qfae_runtime.hashing import sha256_of
from qfae_runtime.manifest import Manifest
from tests.export.echo import made_up, made_up_images
from tests.export.test_cli import Ran, run
from tests.export.tiny import checkpoint_file, config_of, picture_folder


@pytest.fixture
def here(exported: Exported, tmp_path: Path) -> Path:
    for file in exported.files:
        shutil.copy(file, tmp_path)
    return tmp_path


def verify(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    return run(capsys, "verify", *arguments)


def spoil(folder: Path, factor: float) -> None:
    """Scale the largest matrix and mend every hash, as someone would who wants it to pass."""
    model = onnx.load(folder / "tiny.onnx")
    largest = max(model.graph.initializer, key=lambda one: numpy_helper.to_array(one).size)
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(factor), largest.name))
    onnx.save(model, folder / "tiny.onnx")
    stored = json.loads((folder / "tiny.json").read_text())
    digest = sha256_of(folder / "tiny.onnx")
    stored["files"]["tiny.onnx"]["sha256"] = stored["certificate"][0]["engine_sha256"] = digest
    (folder / "tiny.json").write_text(json.dumps(stored))


def test_from_the_golden_images_alone(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    ran = verify(capsys, "--engine", here / "tiny.onnx")
    assert ran.code == 0, ran.err
    assert "measured on: the 32 golden images and PyTorch's outputs on them" in ran.out
    assert "on 18 images and 14 stress images, contract fp32" in ran.out
    assert ran.out.endswith("the engine keeps its contract (fp32)\n")
    assert "Spearman" not in ran.out  # 18 images are too few for ranks


def test_from_the_checkpoint_and_into_the_manifest(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path
) -> None:
    stored = json.loads((here / "tiny.json").read_text())
    stored["certificate"] = None
    (here / "tiny.json").write_text(json.dumps(stored))
    folder = picture_folder(here / "scans", 34)
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--parity-images", folder, "--record")
    assert ran.code == 0, ran.err
    assert "measured on: 32 of the 34 images in scans/" in ran.out
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert (entry.engine, entry.images_from, entry.passed) == ("tiny.onnx", "32 of the 34 images in scans/", True)
    # Again: the entry for this engine, backend and device is replaced, not added to.
    assert verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record").code == 0
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert entry.images_from == "validation images stored in tiny.pt"


def test_it_says_at_which_batch_sizes(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    ran = verify(capsys, "--engine", here / "tiny.onnx")
    assert "at batch sizes: 1, 2, 4, 8, 16" in ran.out.splitlines()


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_changed_engine_is_found_out(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path, with_checkpoint: bool
) -> None:
    spoil(here, 1.01)
    before = (here / "tiny.json").read_text()
    extra = ("--ckpt", checkpoint, "--record") if with_checkpoint else ()
    ran = verify(capsys, "--engine", here / "tiny.onnx", *extra)
    assert ran.code == 1
    assert "map error, worst image / PyTorch's own: " in ran.err
    assert "the engine breaks its contract (fp32) on this machine; do not use its scores" in ran.err
    if not with_checkpoint:
        assert (here / "tiny.json").read_text() == before
        return
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert not entry.passed  # the certificate that was there is taken back
    with pytest.raises(EngineError, match="its comparison with PyTorch failed on onnxruntime, cpu"):
        open_engine(here / "tiny.onnx")


def call_it(folder: Path, engine: str, precision: str, policy: dict[str, Any] | None = None) -> None:
    """Make the manifest say, twice, that an engine is of this precision."""
    stored = json.loads((folder / "tiny.json").read_text())
    stored["files"][engine]["precision"] = precision
    stored["precision"][engine] = policy or {"policy": precision}
    stored["files"][engine]["sha256"] = sha256_of(folder / engine)
    stored["certificate"] = [one for one in stored["certificate"] if one["engine"] != engine]
    (folder / "tiny.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("extra", [(), ("--ckpt",), ("--ckpt", "--record")])
@pytest.mark.parametrize("said", ["int8", "fp16", "bf16"])
def test_a_spoilt_engine_is_not_given_the_bounds_of_another_precision(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path, said: str, extra: tuple[str, ...]
) -> None:
    spoil(here, 1.01)
    call_it(here, "tiny.onnx", said)
    before = (here / "tiny.json").read_bytes()
    ran = verify(capsys, "--engine", here / "tiny.onnx", *extra[:1], *([checkpoint] if extra else []), *extra[1:])
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == (
        f"qfae-export verify: tiny.json: tiny.onnx is {said} in 'files', but the file computes in fp32 (it has neither "
        "16-bit floats nor QuantizeLinear), expected the same, for it decides which bounds hold; "
        "export the engine again"
    )
    assert (here / "tiny.json").read_bytes() == before


def test_one_idle_eight_bit_operation_makes_no_int8_engine(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path
) -> None:
    model = onnx.load(here / "tiny.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "one"))
    model.graph.node.append(onnx.helper.make_node("QuantizeLinear", ["score", "one"], ["idle"], name="idle"))
    onnx.save(model, here / "tiny.onnx")
    call_it(here, "tiny.onnx", "int8")
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 1
    said = ran.err.splitlines()[-1]
    assert said.startswith("qfae-export verify: tiny.json: of tiny.onnx, ")
    assert "operations are not what 'precision' says: encoder.2.qkv (fp32, expected int8), " in said
    assert said.endswith(" and others; export the engine again")
    # Without a checkpoint nobody knows its operations; what it was judged by stands in the last line.
    ran = verify(capsys, "--engine", here / "tiny.onnx")
    assert ran.out.endswith("the engine keeps its contract (int8)\n")


def test_a_certificate_with_more_bounds_is_not_replaced_and_they_are_named(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path
) -> None:
    stored = json.loads((here / "tiny.json").read_text())
    entry = stored["certificate"][0]
    entry["contract"]["bounds"]["flips_share"], entry["images"] = 0.05, 64
    (here / "tiny.json").write_text(json.dumps(stored))
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == (
        "qfae-export verify: --record: tiny.onnx was measured on 64 images, with bounds that these 32 do not show: "
        "decisions flipped / images; pass --parity-images DIR and --parity-count N with as many images and labels"
    )


def test_an_uncertified_engine_is_measured_in_the_unit_of_its_scores(here: Path) -> None:
    stored = json.loads((here / "tiny.json").read_text())
    certified = stored["certificate"][0]["scale"]["factors"]
    stored["certificate"] = None
    (here / "tiny.json").write_text(json.dumps(stored))
    report = measured_again(here / "tiny.onnx")
    assert report.whole is not None
    assert report.whole.scale is not None
    assert report.whole.scale.factors == certified == 2


def flips(threshold: float | None) -> ParityReport:
    """An engine that flips a tenth of the decisions at the threshold of the images, measured at this one."""
    images = made_up_images()
    reference = made_up(images)
    scores = reference.scores.score.copy()
    own = Scale.of(reference.scores, images.labels)
    number = int(np.argmin(np.where(scores < own.threshold, own.threshold - scores, np.inf)))
    scores[number] = own.threshold + 1e-3
    reference = replace(reference, scale=Scale.of(reference.scores, images.labels, threshold))
    outputs = reference.scores._replace(score=scores)
    contract = Contract("fp16", {"flips_share": 0.05, "score_worst": 0.0})
    report = ParityReport((), images, contract, outputs=outputs)
    chain: Any = SimpleNamespace(images=images, reference=reference)
    return _decided_too(chain, report)


def test_a_made_up_calibration_hides_no_flipped_decision() -> None:
    assert flips(None).faults == ()  # compared at that threshold anyway
    [said] = flips(1e6).faults
    assert "th percentile of the " in said
    assert said.endswith(": decisions flipped / images: 0.1 exceeds 0.05")
    assert not flips(1e6)


def test_steps_of_the_export_stay_in_the_certificate(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path
) -> None:
    before = Manifest.load(here / "tiny.json").certificate[0]
    assert verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record").code == 0
    [after] = Manifest.load(here / "tiny.json").certificate
    assert after.links == before.links != ()


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Exported:
    options = Options(checkpoint, out=tmp_path_factory.mktemp("half"), fp16=True, format="onnx", max_batch=4)
    return export(options)


def test_rounding_is_measured_again(capsys: pytest.CaptureFixture[str], checkpoint: Path, half: Exported) -> None:
    ran = verify(capsys, "--engine", half.folder / "tiny.fp16.onnx", "--ckpt", checkpoint)
    assert ran.code == 0, ran.err
    assert "qfae-export verify: rounding the graph as FP16 rounds" in ran.err


@pytest.mark.parametrize("kept", [["encoder"], ["perceptual.1.proj"], ["decoder.1.attention", "decoder.1.norm1"]])
def test_a_policy_that_is_not_the_files_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, half: Exported, tmp_path: Path, kept: list[str]
) -> None:
    """It would be rounded by it: what overflows in a part that is called FP32 would not be seen."""
    for file in half.files:
        shutil.copy(file, tmp_path)
    call_it(tmp_path, "tiny.fp16.onnx", "fp16", {"policy": "fp16", "kept_fp32": kept})
    ran = verify(capsys, "--engine", tmp_path / "tiny.fp16.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 1
    assert "operations are not what 'precision' says: " in ran.err
    assert f"{kept[0]}" in ran.err
    assert "(fp16, expected fp32)" in ran.err
    assert "scoring" not in ran.err, "said before minutes of work"


def test_streams_that_are_not_the_files_are_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, half: Exported, tmp_path: Path
) -> None:
    for file in half.files:
        shutil.copy(file, tmp_path)
    call_it(tmp_path, "tiny.fp16.onnx", "fp16", FP16_STREAMS.describe())
    ran = verify(capsys, "--engine", tmp_path / "tiny.fp16.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 1
    assert "encoder.1.norm1 (fp32, expected fp16), encoder.1.residual1 (fp32, expected fp16)" in ran.err


def test_rounding_that_a_processor_leaves_out_is_found(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    half: Exported,
    tmp_path: Path,
) -> None:
    """ONNX Runtime's CPU computes this engine well; only the rounding of its policy gives it away."""
    for file in half.files:
        shutil.copy(file, tmp_path)
    policies = []

    class Overflowing(RoundedEngine):
        def __init__(self, graph: InferenceGraph, precision: Precision, max_batch: int) -> None:
            policies.append(precision)
            super().__init__(graph, precision, max_batch)

        def run(self, images: UInt8, maps: bool = True) -> Scores:
            outputs = super().run(images, maps)
            outputs.score[0] = np.inf
            return outputs

    monkeypatch.setattr("qfae_export.chain.RoundedEngine", Overflowing)
    ran = verify(capsys, "--engine", tmp_path / "tiny.fp16.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 1
    assert "graph FP16: rounded as FP16 rounds, the graph gives values that are not finite" in ran.err
    assert policies == [FP16]
    [entry] = [one for one in Manifest.load(tmp_path / "tiny.json").certificate if one.engine == "tiny.fp16.onnx"]
    assert not entry.passed
    with pytest.raises(EngineError, match="its comparison with PyTorch failed"):
        open_engine(tmp_path / "tiny.fp16.onnx")


def test_an_engine_exported_anew_meanwhile_is_not_certified(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, here: Path
) -> None:
    def later(*arguments: Any) -> Any:
        report = measure(*arguments)
        spoil(here, 1.5)
        return report

    monkeypatch.setattr("qfae_export.chain.measure", later)
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert (ran.code, "tiny.onnx: was exported anew while it was measured; measure it again" in ran.err) == (1, True)


def test_what_is_refused(capsys: pytest.CaptureFixture[str], here: Path, tmp_path: Path) -> None:
    other = checkpoint_file(tmp_path / "other.pt", config_of(qformer_blocks=2))
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", other)
    assert ran.code == 1
    assert "but tiny.onnx was exported from" in ran.err
    assert ran.err.rstrip().endswith("pass the checkpoint it was exported from")
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--record")
    assert (ran.code, "--record: a certificate is measured on 32 images or more" in ran.err) == (1, True)
    ran = verify(capsys, "--engine", here / "nothing.onnx")
    assert (ran.code, "no such engine file" in ran.err) == (1, True)
    ran = verify(capsys, "--parity-images", "x", "y", "--devise=cpu")
    assert ran.code == 2
    assert [line.partition(": ")[2] for line in ran.err.splitlines()[:-1]] == [
        "'y': unexpected; everything is named by an option",
        "--devise: no such option; did you mean --device?",
        "--engine: missing; name the engine that qfae-export wrote",
        "--parity-images: means nothing without --ckpt, the checkpoint whose scores are computed anew",
    ]


def test_help_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["verify", "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.rstrip().endswith("--parity-images scans/ --record")


def test_stopped_by_the_user_the_manifest_is_as_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    before = (here / "tiny.json").read_bytes()

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qfae_export.verify.measure", stopped)
    ran = verify(capsys, "--engine", here / "tiny.onnx")
    assert (ran.code, ran.err.splitlines()[-1]) == (130, "qfae-export verify: interrupted; the manifest is as it was")
    assert (here / "tiny.json").read_bytes() == before


def calibrated(here: Path, engine: str = "tiny.onnx") -> float:
    normals = picture_folder(here / "normals", 30)
    arguments = ["calibrate", str(normals), "--engine", str(here / engine), "--fpr", "0.1", "--quiet"]
    with pytest.raises(SystemExit) as left:
        run_main(arguments)
    assert left.value.code == 0
    threshold: float = json.loads((here / f"{engine}.calibration.json").read_text())["threshold"]
    return threshold


def test_decisions_are_compared_at_the_threshold_of_the_calibration(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path
) -> None:
    threshold = calibrated(here)
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 0, ran.err
    assert f"decisions are compared at {threshold:.7g}, the threshold of tiny.onnx.calibration.json" in ran.err
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert (entry.scale.threshold, entry.scale.threshold_from) == (threshold, "calibrated")
    stored = json.loads((here / "tiny.onnx.calibration.json").read_text())
    (here / "tiny.onnx.calibration.json").write_text(json.dumps({**stored, "engine_sha256": "0" * 64}))
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 0, ran.err
    assert "not compared at a calibrated threshold" in ran.err
    assert "made with another engine" in ran.err
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert entry.scale.threshold_from != "calibrated"


@pytest.fixture
def two_levels_off(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Move one pixel of the reference by two grey levels, as if the engine were wrong there; and PyTorch FP32 too?"""

    def plant(*, pytorch_as_well: bool) -> None:
        def moved(*arguments: Any) -> Measured64:
            measured = reference.reference_of(*arguments)
            pixels = measured.reference.scores.reconstruction
            pixels[3, 4, 5, 1] += 2 if pixels[3, 4, 5, 1] < 128 else -2
            if not pytorch_as_well:
                return measured
            values = {**measured.pytorch.values, "reconstruction_levels": 2.0}
            return replace(measured, pytorch=replace(measured.pytorch, values=values))

        monkeypatch.setattr("qfae_export.chain.reference_of", moved)

    return plant


def test_a_certificate_is_taken_away_where_pytorch_keeps_the_bound(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path, two_levels_off: Any
) -> None:
    two_levels_off(pytorch_as_well=False)
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 1
    assert "reconstruction, grey levels: 2 exceeds 1, worst at image 3, y 4, x 5, channel 1 (image 3 stored" in ran.err
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert not entry.passed


def test_and_stays_where_pytorch_breaks_it_too(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path, two_levels_off: Any
) -> None:
    two_levels_off(pytorch_as_well=True)
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 0, ran.err
    told = "PyTorch FP32 itself breaks these bounds on these images, so they are left out: reconstruction, grey levels"
    assert told in ran.out.splitlines()
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert entry.passed
    with open_engine(here / "tiny.onnx") as opened:
        assert opened.certificate is not None


def test_a_bound_that_pytorch_breaks_excuses_no_other(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, here: Path, two_levels_off: Any
) -> None:
    spoil(here, 1.01)
    two_levels_off(pytorch_as_well=True)
    ran = verify(capsys, "--engine", here / "tiny.onnx", "--ckpt", checkpoint, "--record")
    assert ran.code == 1
    assert "map error, worst image / PyTorch's own: " in ran.err
    [entry] = Manifest.load(here / "tiny.json").certificate
    assert not entry.passed
