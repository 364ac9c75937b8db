"""`qfae-export --int8`: the engine it writes, its certificate, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import qfae_export.backends
import qfae_export.export
import qfae_export.trials
import tests.export.tiny
from qfae_export.errors import ExportError
from qfae_export.export import Exported, Options, ParityError, export
from qfae_export.graph import InferenceGraph
from qfae_export.int8 import int8_graph
from qfae_export.parity_report import ROUNDED
from qfae_export.precision import Precision
from qfae_export.verify import verify
from qfae_runtime import open_engine
from qfae_runtime.arrays import UInt8
from qfae_runtime.engines import openvino
from qfae_runtime.engines.base import Engine
from qfae_runtime.errors import EngineError, OutputError
from qfae_runtime.manifest import Manifest
from qfae_runtime.selftest import self_test
from tests.export.planted import CONFIG, cancellation_in_decoder_1, planted, retyper_of, write_untraced
from tests.export.test_backends import Off
from tests.export.test_cli import run
from tests.export.test_int8 import BLOCKS, PRODUCTS, products
from tests.export.tiny import SIZE, checkpoint_file, config_of, picture_folder, pictures


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("made")
    images = picture_folder(folder / "normal", 33)
    backends = ("onnxruntime", "openvino") if find_spec("openvino") is not None else ("onnxruntime",)
    options = Options(checkpoint, out=folder / "out", int8=True, calibration_images=images, backends=backends)
    return export(options)


def test_an_int8_engine_comes_with_its_certificate(made: Exported) -> None:
    assert made.engines == ("tiny.onnx", "tiny.int8.onnx")
    assert made.engine.name == "tiny.int8.onnx"
    manifest = Manifest.load(made.folder / "tiny.json")
    assert manifest.files["tiny.int8.onnx"].precision == "int8"
    assert manifest.precision["tiny.int8.onnx"]["policy"] == "int8"
    certificate = manifest.certified("tiny.int8.onnx", "onnxruntime", "cpu")
    assert certificate is not None
    assert certificate.contract.name == "int8"
    assert [link.target for link in certificate.links] == ["graph FP32", "ONNX FP32", "ONNX INT8"]
    assert [link.contract for link in certificate.links] == ["fp32", "fp32", "int8"]
    with open_engine(made.engine) as opened:
        assert self_test(opened).status == "passed"
        score = opened.engine.run(pictures(4)).score
    with open_engine(made.folder / "tiny.onnx") as opened:
        exact = opened.engine.run(pictures(4)).score
    assert 0 < np.abs(score - exact).max() < 0.05 * exact.max()


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_is_certified_on_it_by_the_same_contract(made: Exported) -> None:
    report = made.others["tiny.int8.onnx", "openvino"]
    assert report, report.failures()
    assert report.contract.name == "int8"
    assert made.manifest.certified("tiny.int8.onnx", "openvino", "cpu") is not None
    assert ("tiny.int8.onnx", "openvino-bf16") not in made.others


def test_scales_that_cut_off_are_caught(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: ranges of a tenth, as of images of another kind."""

    def narrow(*arguments: Any) -> InferenceGraph:
        graph = int8_graph(*arguments)
        for product in products(graph).values():
            low, high = product.input_range or (0, 0)
            product.input_range = (low / 10, high / 10)
        return graph

    monkeypatch.setattr("qfae_export.export.int8_graph", narrow)
    with pytest.raises(ParityError) as refused:
        export(Options(checkpoint, out=tmp_path / "out", int8=True))
    lines = str(refused.value).splitlines()
    assert lines[0] == (
        "tiny.int8.onnx: onnxruntime does not compute what PyTorch FP64 computes, so nothing was written:"
    )
    assert "the first step that is beyond its bounds: ONNX FP32 -> ONNX INT8" in lines
    assert lines[-1].startswith(
        "INT8 rounds more than this model bears, or its scales come from images of another kind:"
    )
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("asked", [None, ("decoder",)])
def test_the_encoder_stays_fp32_where_the_decoder_alone_is_not_enough(
    asked: tuple[str, ...] | None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: ranges that cut off, unless the encoder stays FP32. Who says what is kept gets just that."""

    def narrow(fp32: InferenceGraph, images: UInt8, policy: Precision) -> InferenceGraph:
        graph = int8_graph(fp32, images, policy)
        for product in products(graph).values():
            if product.input_range is not None and "encoder" not in policy.kept:
                product.input_range = (product.input_range[0] / 10, product.input_range[1] / 10)
        return graph

    monkeypatch.setattr("qfae_export.export.int8_graph", narrow)
    options = Options(checkpoint, out=tmp_path / "out", int8=True, int8_keep=asked)
    if asked is not None:
        with pytest.raises(ParityError):
            export(options)
        return
    exported = export(options)
    stored = json.loads((tmp_path / "out/tiny.json").read_text(encoding="utf-8"))
    assert stored["precision"]["tiny.int8.onnx"]["kept_fp32"] == ["decoder", "encoder"]
    assert exported.reports["tiny.int8.onnx"]
    [note] = [one for one in exported.notes if "stay FP32" in one]
    assert note.startswith(
        "tiny.int8.onnx: encoder and decoder stay FP32; the decoder alone was not enough: all images: "
    )
    assert note.endswith(" falls below 0.995")
    with open_engine(tmp_path / "out/tiny.int8.onnx") as opened:
        assert self_test(opened).status == "passed"


def test_the_command_line(capsys: pytest.CaptureFixture[str], checkpoint: Path, made: Exported, tmp_path: Path) -> None:
    done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8-keep", "decoder", "--parity-count", "40")
    assert done.code == 2
    assert "--int8-keep: says what stays FP32 in an INT8 engine; pass --int8 too" in done.err
    assert "--parity-count: counts images of a folder; pass --parity-images DIR too" in done.err
    done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--calibration-images", tmp_path / "none")
    assert "--calibration-images: gives INT8 its scales; pass --int8 too" in done.err
    done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", "--part", "scorer")
    assert "--int8: means nothing with --part, for it is measured as a whole; leave out --part" in done.err
    done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", "--calibration-images", tmp_path / "none")
    assert done.code == 1
    assert f"--calibration-images: {tmp_path / 'none'}: no such folder; name one that holds real images" in done.err
    done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", "--int8-keep", "decoder.9,mlp")
    assert (
        "qfae-export: --int8-keep: decoder.9, mlp: no such place in this model; expected, for example, encoder."
        in done.err
    )
    assert "scoring" not in done.err, "it is told before minutes have passed"
    done = run(capsys, "--ckpt", checkpoint, "--name", "x.int8")
    assert "--name: 'x.int8' ends like the files that an engine is accompanied by; pass another --name" in done.err
    for text in ("", "decoder,,encoder.3", "decoder,"):
        done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", "--int8-keep", text)
        assert (done.code, done.err.splitlines()[0]) == (
            2,
            f"qfae-export: --int8-keep: got {text!r}, expected places with a comma between, e.g. decoder,encoder.3, or "
            "none",
        )
    everything = ("--int8-keep", "encoder,decoder,perceptual")
    done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", *everything)
    assert done.code == 1
    assert (
        "qfae-export: --int8-keep: with encoder, decoder, perceptual in FP32, no product of this model is computed in "
        "eight bits; keep less, or leave out --int8"
    ) in done.err
    assert "scoring" not in done.err, "it is told before minutes have passed"
    few = picture_folder(tmp_path / "few", 5)
    done = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", "--calibration-images", few)
    assert done.err.splitlines()[-1] == (
        "qfae-export: 5 of the 5 images in few/: 5 different images, but INT8's scales need 32 at least; "
        "pass --calibration-images DIR with a folder of normal images, of the kind to be scored"
    )
    assert "writing" not in done.err, "it is told before minutes have passed"
    done = run(capsys, "--onnx", made.engine, "--format", "rtx-plan")
    assert done.code == 1
    assert "is an INT8 file, for CPUs; plans are made of FP32 and FP16 files: name one of those" in done.err


def test_verify_measures_it_again(capsys: pytest.CaptureFixture[str], checkpoint: Path, made: Exported) -> None:
    done = run(capsys, "verify", "--engine", made.engine, "--ckpt", checkpoint)
    assert done.code == 0, done.err
    assert "contract int8" in done.out
    assert "INT8's change of AUROC is not bounded: these images make " in done.out
    assert "rounding" not in done.err, "that step is FP16's"


def test_the_manifest_says_what_is_computed_how(made: Exported) -> None:
    stored = json.loads((made.folder / "tiny.json").read_text(encoding="utf-8"))["precision"]["tiny.int8.onnx"]
    assert stored["rules"]["the decoder's head"]["type"] == "float32"
    assert stored["kept_fp32"] == ["decoder"]
    assert stored["calibrated_on"] == {"images": 32, "from": "32 of the 33 images in normal/", "measured_on_too": 0}


def test_a_bound_cannot_be_shed_by_measuring_on_fewer_images(made: Exported, checkpoint: Path, tmp_path: Path) -> None:
    """Of an engine that was measured on labelled images, which bounds AUROC, no certificate without that bound."""
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    manifest = json.loads((folder / "tiny.json").read_text(encoding="utf-8"))
    [mine] = [
        one for one in manifest["certificate"] if (one["engine"], one["backend"]) == ("tiny.int8.onnx", "onnxruntime")
    ]
    mine["contract"]["bounds"]["auroc_change"] = 0.003
    mine["measured"]["auroc_change"] = 0.02
    mine["passed"] = False
    (folder / "tiny.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ExportError, match=r"tiny\.int8\.onnx was measured on 32 images, with bounds that these"):
        verify(folder / "tiny.int8.onnx", checkpoint, record=True)


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_integers_in_a_file_that_does_not_say_so_are_refused(made: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "_computed_in", lambda compiled: {"f32", "i8"})
    openvino.OpenVinoEngine(made.folder / "tiny.int8.onnx", SIZE, 8).close()
    with pytest.raises(EngineError, match=r"computes products in i8, expected f32; name another backend"):
        openvino.OpenVinoEngine(made.folder / "tiny.onnx", SIZE, 8)


# --- files of an earlier export stand for traced ones, which takes no time; all else happens as always ---

Change = Callable[[str, Any], Any]


@pytest.fixture
def quick(made: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qfae_export.export, "write_onnx", copying(made.folder))


def copying(folder: Path, change: Change = lambda name, array: array) -> Callable[[InferenceGraph, Path], list[Path]]:
    """Return a `write_onnx` that copies files; `change` may change the constants of INT8 ones, by name."""

    def write(graph: InferenceGraph, path: Path) -> list[Path]:
        model = onnx.load(str(folder / path.name))
        if graph.precision.name == "int8":
            for constant in model.graph.initializer:
                changed = np.asarray(change(constant.name, numpy_helper.to_array(constant)))
                constant.CopyFrom(numpy_helper.from_array(changed, constant.name))
        onnx.save(model, str(path))
        return [path]

    return write


@pytest.mark.usefixtures("quick")
def test_an_export_without_it_leaves_no_file_of_the_one_before(
    checkpoint: Path, made: Exported, tmp_path: Path
) -> None:
    for file in made.files:
        shutil.copy(file, tmp_path)
    (tmp_path / "tiny.int8.onnx.data").touch()
    with pytest.raises(OutputError, match=r"already holds tiny\.onnx, tiny\.int8\.onnx, tiny\.int8\.onnx\.data, "):
        export(Options(checkpoint, out=tmp_path))
    export(Options(checkpoint, out=tmp_path, overwrite=True))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.golden.npz", "tiny.json", "tiny.onnx"]
    assert "tiny.int8.onnx" not in Manifest.load(tmp_path / "tiny.json").files


@pytest.mark.usefixtures("quick")
def test_random_weights_are_calibrated_and_not_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qfae_export.export, "load_config", lambda source: config_of())
    arguments = ("--random-weights", 3, "--config", "my.toml", "--name", "tiny", "--out", tmp_path, "--int8")
    ran = run(capsys, *arguments)
    assert ran.code == 0, ran.err
    assert "qfae-export: taking INT8's scales from 32 brain slices that come with qfae" in ran.err
    assert "nothing was measured: random weights are for benchmarks alone" in ran.out
    assert "AUROC" not in ran.out
    assert "warning" not in ran.out, "images that stand in are as good as any for random weights"
    assert (tmp_path / "tiny.int8.onnx").is_file()
    manifest = Manifest.load(tmp_path / "tiny.json")
    assert manifest.certificate == ()
    assert manifest.precision["tiny.int8.onnx"]["calibrated_on"] == {
        "images": 36, "from": "32 brain slices that come with qfae", "measured_on_too": 0
    }  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_a_further_backend_that_fails_on_it_is_told_and_the_rest_is_written(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def load(path: Path, image_size: int, max_batch: int, backend: str) -> Engine:
        opened.append(path.name)
        if path.name == "tiny.int8.onnx":
            raise EngineError("no kernel for these bytes")
        engine = Off(path, image_size, max_batch)
        engine.backend, engine.version, engine.by = backend, "1.0", 0.0
        return engine

    monkeypatch.setattr(qfae_export.backends, "load_onnx", load)
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", "--backends", "onnxruntime,openvino")
    assert ran.code == 0, ran.err
    assert opened == ["tiny.onnx", "tiny.int8.onnx"]
    assert "openvino is not certified: no kernel for these bytes" in ran.out
    manifest = Manifest.load(tmp_path / "tiny.json")
    assert [(one.engine, one.backend) for one in manifest.certificate] == [
        ("tiny.onnx", "onnxruntime"), ("tiny.onnx", "openvino"), ("tiny.int8.onnx", "onnxruntime")
    ]  # fmt: skip
    assert (tmp_path / "tiny.int8.onnx").is_file()


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_a_further_backend_that_breaks_its_contract_is_not_certified(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bright pixel far beyond what eight bits may add, on the INT8 file alone."""

    def load(path: Path, image_size: int, max_batch: int, backend: str) -> Engine:
        engine = Off(path, image_size, max_batch)
        engine.backend, engine.version, engine.by = backend, "1.0", 100.0 if "int8" in path.name else 0.0
        return engine

    monkeypatch.setattr(qfae_export.backends, "load_onnx", load)
    ran = run(capsys, "--ckpt", checkpoint, "--out", tmp_path, "--int8", "--backends", "onnxruntime,openvino")
    assert ran.code == 0, ran.err
    assert "openvino: batch 16: map cosine, p1: " in ran.out
    assert "openvino: breaks its contract (int8) and is not certified; qfae-run does not take it" in ran.out
    manifest = Manifest.load(tmp_path / "tiny.json")
    assert manifest.certified("tiny.int8.onnx", "onnxruntime", "cpu") is not None
    assert manifest.certified("tiny.onnx", "openvino", "cpu") is not None
    assert manifest.certified("tiny.int8.onnx", "openvino", "cpu") is None
    assert manifest.broken("tiny.int8.onnx", "openvino", "cpu") is not None


@pytest.mark.usefixtures("quick")
def test_too_few_pairs_for_a_bound_of_auroc_are_told(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    for number, image in enumerate(pictures(32, size=40)):
        kind = folder / ("Ungood" if number % 2 else "good")
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(kind / f"{number:02}.png")
    arguments = ("--ckpt", checkpoint, "--out", tmp_path, "--overwrite", "--parity-images", folder)
    said = (
        "INT8's change of AUROC is not bounded: these images make 256 pairs of a normal and an anomalous one, expected "
        "3,334 or more; pass --parity-images DIR with folders good and Ungood, and --parity-count 116 or more, half of "
        "them of each kind"
    )
    ran = run(capsys, *arguments, "--int8")
    assert said in ran.out.splitlines()
    assert "AUROC" not in run(capsys, *arguments).out, "FP32 scores are bounded one by one"
    monkeypatch.setattr("qfae_runtime.contract.min_pairs", lambda precision: 256)
    monkeypatch.setattr("qfae_export.parity_report.min_pairs", lambda precision: 256)
    ran = run(capsys, *arguments, "--int8")
    assert ran.code == 0, ran.err
    assert "AUROC, change" in ran.out
    assert "is not bounded" not in ran.out


# --- beside FP16, and with the decoder ---


@pytest.fixture(scope="module")
def everywhere(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Nothing is kept in FP32 that INT8 can have; beside it an FP16 engine."""
    folder = tmp_path_factory.mktemp("everywhere")
    return export(Options(checkpoint, out=folder, int8=True, int8_keep=(), fp16=True, format="onnx"))


def test_none_is_kept_where_none_is_asked_for(everywhere: Exported) -> None:
    model = onnx.load(str(everywhere.folder / "tiny.int8.onnx"))
    quantised = [node.name.rpartition("/")[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(quantised) == sorted(PRODUCTS)
    assert "decoder.1" in BLOCKS
    assert Manifest.load(everywhere.folder / "tiny.json").precision["tiny.int8.onnx"]["kept_fp32"] == []


def test_fp16_goes_on_from_fp32_as_if_there_were_no_int8(everywhere: Exported, exported: Exported) -> None:
    assert everywhere.engines == ("tiny.onnx", "tiny.int8.onnx", "tiny.fp16.onnx")
    assert (everywhere.folder / "tiny.onnx").read_bytes() == exported.engine.read_bytes()
    links = {}
    for engine, contract in (("tiny.onnx", "fp32"), ("tiny.int8.onnx", "int8"), ("tiny.fp16.onnx", "fp16")):
        certificate = everywhere.manifest.certified(engine, "onnxruntime", "cpu")
        assert certificate is not None
        assert certificate.contract.name == contract
        links[engine] = [(link.source, link.target) for link in certificate.links]
    assert links["tiny.int8.onnx"] == [*links["tiny.onnx"], ("ONNX FP32", "ONNX INT8")]
    assert links["tiny.fp16.onnx"] == [*links["tiny.onnx"], ("ONNX FP32", "ONNX FP16"), ("graph FP32", ROUNDED)]


def test_a_bisection_of_fp16_leaves_int8_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tests.export.tiny, "scorer_of", lambda config: planted(cancellation_in_decoder_1))
    monkeypatch.setattr(qfae_export.trials, "Retyper", retyper_of)
    monkeypatch.setattr(qfae_export.trials, "write_onnx", write_untraced)
    checkpoint = checkpoint_file(tmp_path / "tiny.pt", CONFIG)
    ran = run(
        capsys,
        "--ckpt",
        checkpoint,
        "--out",
        tmp_path,
        "--int8",
        "--fp16",
        "--bisect",
        "--format",
        "onnx",
        "--max-batch",
        6,
    )
    assert ran.code == 0, ran.err
    manifest = Manifest.load(tmp_path / "tiny.json")
    assert manifest.precision["tiny.fp16.onnx"]["kept_fp32"] == ["decoder.1.fc1"]
    assert manifest.precision["tiny.int8.onnx"]["kept_fp32"] == ["decoder"]
    assert "bisected" not in manifest.precision["tiny.int8.onnx"]
    for engine in ("tiny.onnx", "tiny.int8.onnx", "tiny.fp16.onnx"):
        assert manifest.certified(engine, "onnxruntime", "cpu") is not None


@pytest.mark.parametrize("constant", ["weight_scale", "input_scale"])
def test_a_product_of_half_the_size_is_caught(
    everywhere: Exported, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    def halved(name: str, array: Any) -> Any:
        return array * array.dtype.type(0.5) if name == f"decoder.1.qkv.{constant}" else array

    monkeypatch.setattr(qfae_export.export, "write_onnx", copying(everywhere.folder))
    options = Options(checkpoint, out=tmp_path, int8=True, int8_keep=(), overwrite=True)
    assert export(options).report
    monkeypatch.setattr(qfae_export.export, "write_onnx", copying(everywhere.folder, halved))
    with pytest.raises(ParityError, match=r"reconstruction, p99\.9 grey levels: ") as refused:
        export(options)
    assert "the first step that is beyond its bounds: ONNX FP32 -> ONNX INT8" in str(refused.value).splitlines()
