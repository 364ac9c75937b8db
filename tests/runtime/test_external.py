"""Which files an ONNX file takes weights from, and that none is opened whose hash nobody holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qfae_runtime import open_engine
from qfae_runtime.engines.external import external_files
from qfae_runtime.errors import EngineError, ManifestError
from qfae_runtime.manifest import FileEntry

from .tiny import certify_too, edit_manifest, export_tiny, golden_images, mend_hashes, model_bytes


def outside(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_a_model_of_one_piece_refers_to_nothing() -> None:
    assert external_files(model_bytes(), "m") == set()


def test_every_place_for_a_tensor_is_looked_at() -> None:
    model = onnx.load_from_string(model_bytes())
    model.graph.initializer.append(outside("initializer"))
    inner = helper.make_graph([], "inner", [], [], [outside("deep")])
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside("constant")))
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))
    sparse = onnx.SparseTensorProto(dims=[1])
    sparse.values.CopyFrom(outside("sparse"))
    model.graph.sparse_initializer.append(sparse)
    body = [helper.make_node("Constant", [], ["c"], value=outside("function"))]
    model.functions.append(helper.make_function("d", "f", [], ["c"], body, [helper.make_opsetid("", 18)]))

    found = external_files(model.SerializeToString(), "m")

    assert found == {"initializer", "deep", "constant", "sparse", "function"}


@pytest.mark.parametrize("content", [model_bytes()[:-7], b"no model at all", b"\xff" * 40, b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_cut_short_or_no_protobuf_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError) as caught:
        external_files(content, "a.onnx")
    assert str(caught.value) == "a.onnx: no ONNX file, or cut short; export it again with qfae-export"


def with_external_data(folder: Path) -> Path:
    """The toy engine with its kernel in tiny.onnx.data, certified as a whole."""
    path = export_tiny(folder)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="tiny.onnx.data", size_threshold=120)
    mend_hashes(path, certificate_too=True)
    list_weights(path)
    return path


def list_weights(path: Path) -> None:
    import json

    files = json.loads(path.with_suffix(".json").read_text())["files"]
    weights = FileEntry.of(path.with_name("tiny.onnx.data"), "weights")
    files["tiny.onnx.data"] = {
        "role": "weights", "sha256": weights.sha256, "bytes": weights.bytes, "format": None, "precision": None
    }  # fmt: skip
    edit_manifest(path, files=files)


def test_weights_beside_the_engine_are_used_and_held_against_the_manifest(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    with open_engine(path, backend=None) as opened:
        scores = opened.engine.run(golden_images(2))
    with open_engine(export_tiny(tmp_path / "whole"), backend=None) as whole:
        assert whole.engine.run(golden_images(2)).score.tolist() == scores.score.tolist()
    weights = tmp_path / "tiny.onnx.data"
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    for changed in (bytes(content), weights.read_bytes()[:-1]):
        weights.write_bytes(changed)
        with pytest.raises(ManifestError, match=r"tiny\.onnx\.data: its bytes do not match tiny\.json: SHA-256"):
            open_engine(path)
    weights.unlink()
    with pytest.raises(ManifestError, match=r"tiny\.onnx\.data: listed in tiny\.json but not there; copy it beside"):
        open_engine(path)


def test_weights_that_nobody_holds_a_hash_of_are_refused(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "other.data"
    (tmp_path / "tiny.onnx.data").rename(tmp_path / "other.data")
    path.write_bytes(model.SerializeToString())
    mend_hashes(path, certificate_too=True)
    with pytest.raises(EngineError) as caught:
        open_engine(path)
    assert str(caught.value) == (
        f"{path}: takes weights from 'other.data', which tiny.json holds no hash of; export it again with qfae-export"
    )


def test_a_certificate_does_not_pass_to_other_weights(tmp_path: Path) -> None:
    """The graph is the same file and the manifest is mended: the certificate is still of other weights."""
    path = with_external_data(tmp_path)
    with open_engine(path, backend=None) as opened:
        assert opened.certificate is not None
        assert opened.certificate.engine_sha256 == opened.sha256 != opened.manifest.files["tiny.onnx"].sha256
    weights = tmp_path / "tiny.onnx.data"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    list_weights(path)
    with pytest.raises(EngineError, match=r"the certificate in tiny\.json was issued for other bytes than this file's"):
        open_engine(path, backend=None)


def in_one_store(folder: Path) -> Path:
    """As caches lay files out: all under their hashes in one folder, and links to them in another."""
    path = with_external_data(folder / "source")
    store, links = folder / "blobs", folder / "snapshots" / "revision"
    store.mkdir()
    links.mkdir(parents=True)
    for number, file in enumerate(sorted(path.parent.iterdir())):
        file.rename(store / f"{number:040x}")
        (links / file.name).symlink_to(f"../../blobs/{number:040x}")
    return links / path.name


def each_in_a_folder(folder: Path) -> Path:
    path = with_external_data(folder / "source")
    links = folder / "links"
    links.mkdir()
    for file in sorted(path.parent.iterdir()):
        store = folder / "store" / file.name
        store.mkdir(parents=True)
        file.rename(store / file.name)
        (links / file.name).symlink_to(store / file.name)
    return links / path.name


def weights_alone_linked(folder: Path) -> Path:
    path = with_external_data(folder / "source")
    weights = path.with_name("tiny.onnx.data")
    weights.rename(folder / "w")
    weights.symlink_to(folder / "w")
    return path


def engine_alone_linked(folder: Path) -> Path:
    path = with_external_data(folder / "source")
    path.rename(folder / "m")
    path.symlink_to(folder / "m")
    return path


def hard_linked(folder: Path) -> Path:
    path = with_external_data(folder / "source")
    (folder / "links").mkdir()
    for file in path.parent.iterdir():
        (folder / "links" / file.name).hardlink_to(file)
    return folder / "links" / path.name


def folder_linked(folder: Path) -> Path:
    path = with_external_data(folder / "source")
    (folder / "link").symlink_to(path.parent)
    return folder / "link" / path.name


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("lay", "refused_by"),
    [
        (in_one_store, {"openvino": "OpenVINO"}),
        (each_in_a_folder, {"onnxruntime": "every backend", "openvino": "every backend"}),
        (weights_alone_linked, {"onnxruntime": "every backend", "openvino": "every backend"}),
        (engine_alone_linked, {}),
        (hard_linked, {}),
        (folder_linked, {}),
    ],
)
def test_engine_and_weights_through_links(
    lay: Callable[[Path], Path], refused_by: dict[str, str], backend: str, tmp_path: Path
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    path = lay(tmp_path)
    certify_too(path, "openvino")
    if backend in refused_by:
        with pytest.raises(EngineError) as caught:
            open_engine(path, backend=backend)
        lies = path.with_name("tiny.onnx.data").resolve().parent
        assert str(caught.value) == (
            f"{path}: its weights tiny.onnx.data are a link to {lies}, and {refused_by[backend]} reads them from the "
            "engine's own folder alone; copy both as files into one folder (cp -L)"
        )
    else:
        with open_engine(path, backend=backend) as opened:
            assert opened.engine.run(golden_images(2)).score.shape == (2,)


def test_a_link_to_other_weights_is_refused_by_their_hash(tmp_path: Path) -> None:
    path = in_one_store(tmp_path)
    weights = path.with_name("tiny.onnx.data")
    (tmp_path / "blobs" / "other").write_bytes(bytes(reversed(weights.read_bytes())))
    weights.unlink()
    weights.symlink_to(tmp_path / "blobs" / "other")
    with pytest.raises(ManifestError, match="its bytes do not match"):
        open_engine(path, backend="onnxruntime")
