"""Golden files that claim what they do not hold: each is refused in one sentence, before anything is allocated."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qfae_runtime import open_engine
from qfae_runtime.canary import Canary
from qfae_runtime.errors import ManifestError, SelfTestError
from qfae_runtime.golden import MAX_IMAGES, Golden, load_golden, save_golden
from qfae_runtime.selftest import self_test

from .tiny import SIZE, export_tiny, yardstick_of

S = SIZE
HEADERS = {
    "images": f"{{'descr': '|u1', 'fortran_order': False, 'shape': (2, {S}, {S}, 3), }}",
    "score": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }",
    "anomaly_map": f"{{'descr': '<f4', 'fortran_order': False, 'shape': (2, {S}, {S}), }}",
    "reconstruction": f"{{'descr': '|u1', 'fortran_order': False, 'shape': (2, {S}, {S}, 3), }}",
    "stress": "{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }",
    "factors": "{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }",
    "own": "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 4), }",
    "unit": "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 4), }",
}
BYTES = {
    "images": 2 * S * S * 3,
    "score": 8,
    "anomaly_map": 2 * S * S * 4,
    "reconstruction": 2 * S * S * 3,
    "stress": 2,
    "factors": 2,
    "own": 2 * 4 * 8,
    "unit": 2 * 4 * 8,
}


def npy(header: str, content: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    said = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(said)) + said + content


def golden(
    changed: dict[str, bytes] | None = None, *, compression: int = zipfile.ZIP_DEFLATED, twice: str = ""
) -> bytes:
    """Return a golden file of two black images; `changed` entries take the place of its own, or join them."""
    held = {name: npy(HEADERS[name], bytes(BYTES[name])) for name in HEADERS}
    held |= {"factors": npy(HEADERS["factors"], b"\x03\x03")} | (changed or {})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in held.items():
            archive.writestr(f"{name}.npy", content)
        if twice:
            archive.writestr(f"{twice}.npy", held[twice])
    return file.getvalue()


def refusal(content: bytes, form: str = "not a golden file") -> str:
    with pytest.raises(ManifestError) as caught:
        load_golden(content, "g.npz", S)
    text = str(caught.value)
    if form == "not a golden file":
        assert text.startswith(f"g.npz: not a golden file for images of {S} px: ")
    assert text.endswith("; export the engine again")
    assert "\n" not in text
    return text


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    for content in (golden(), golden(compression=zipfile.ZIP_STORED)):
        read = load_golden(content, "g.npz", S)
        assert read.images.shape == (2, S, S, 3)
        assert all(array.flags.writeable for array in (read.images, *read.scores))
    rng = np.random.default_rng(1)
    scores = read.scores._replace(score=rng.random(2, np.float32), anomaly_map=rng.random((2, S, S), np.float32))
    images, yardstick = rng.integers(0, 256, (2, S, S, 3), np.uint8), yardstick_of(scores)
    save_golden(tmp_path / "g.npz", Golden(images, scores, yardstick, 3, (1,)))
    again = load_golden((tmp_path / "g.npz").read_bytes(), "g.npz", S)
    for mine, theirs in zip((*scores, *yardstick), (*again.scores, *again.yardstick), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (again.stress, again.real, again.factors) == ((1,), [0], 3)


@pytest.mark.parametrize("error", [-1e-9, np.inf, np.nan])
@pytest.mark.parametrize("name", ["own", "unit"])
def test_errors_of_pytorch_that_are_none_are_refused(name: str, error: float) -> None:
    said = refusal(golden({name: npy(HEADERS[name], np.array([[1e-6] * 3 + [error]] * 2).tobytes())}), form="own")
    assert said == "g.npz: PyTorch's own errors must be finite and not below 0; export the engine again"


def marks(name: str, *values: int) -> bytes:
    return golden({name: npy(HEADERS[name], bytes(values))})


def test_stress_images_alone_are_refused() -> None:
    assert refusal(marks("stress", 1, 1), form="own") == (
        "g.npz: all of its 2 images are marked as stress images, expected others too, whose scores errors are compared "
        "with; export the engine again"
    )
    for one in ((0, 0), (0, 1), (1, 0)):
        assert load_golden(marks("stress", *one), "g.npz", S).real


@pytest.mark.parametrize(("values", "said"), [((0, 0), "0"), ((65, 65), "65"), ((1, 3), "1, 3"), ((255, 255), "255")])
def test_scores_multiply_one_number_of_distances(values: tuple[int, int], said: str) -> None:
    assert refusal(marks("factors", *values), form="own") == (
        f"g.npz: scores multiply {said} distances, expected one number in 1..64; export the engine again"
    )


def uncertified(folder: Path, precision: str, factors: int, ratio: float) -> Path:
    """An engine without a certificate whose highest golden score is `ratio` times what it computes."""
    path = export_tiny(folder, certified=False)
    golden_path, manifest_path = path.with_name("tiny.golden.npz"), path.with_suffix(".json")
    read = load_golden(golden_path.read_bytes(), "g.npz", S)
    read.scores.score[read.scores.score.argmax()] *= np.float32(ratio)
    save_golden(golden_path, read._replace(factors=factors))
    stored = json.loads(manifest_path.read_text())
    stored["files"]["tiny.onnx"]["precision"] = precision
    manifest_path.write_text(json.dumps(stored))
    point_to(path, hashlib.sha256(golden_path.read_bytes()).hexdigest())
    return path


# A score of 0.89: 2 % more are 0.018 of a distance, and 0.006 of each of three that are multiplied.
@pytest.mark.parametrize(
    ("precision", "ratio"), [("fp16", 1.02), ("int8", 1.3)], ids=["2 percent in FP16", "30 percent in INT8"]
)
@pytest.mark.parametrize(("factors", "kept"), [(1, False), (3, True)])
def test_an_uncertified_engine_is_tested_in_the_unit_of_its_scores(
    tmp_path: Path, precision: str, ratio: float, factors: int, kept: bool
) -> None:
    path = uncertified(tmp_path, precision, factors, ratio)
    with open_engine(path, allow_uncertified=True) as opened:
        canary = Canary.of(opened)
        assert canary is not None
        [number] = canary.numbers(0, 1)
        said = canary.compare([number], opened.engine.run(canary.image(number)[None]))
        assert [text.partition(":")[0] for text in said] == ([] if kept else ["score error as distance, largest"])
        if kept:
            assert self_test(opened).status == "passed"
            return
        with pytest.raises(SelfTestError, match="score error as distance, largest"):
            self_test(opened)


def test_a_certificate_of_scores_in_another_unit_is_refused(engine_path: Path) -> None:
    path = engine_path.with_suffix(".json")
    stored = json.loads(path.read_text())
    stored["certificate"][0]["scale"]["factors"] = 3
    path.write_text(json.dumps(stored))
    with open_engine(engine_path) as opened:
        for use in (self_test, Canary.of):
            with pytest.raises(ManifestError, match="multiply 3 distances, the golden file's multiply 1; export"):
                use(opened)


UNWRITTEN = 'expected a header as numpy.savez writes it for numbers, got "{'


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("images", f"({2**40}, {S}, {S}, 3)", f"expected 1..{MAX_IMAGES} images, got {2**40}"),
        ("images", f"({2**63}, {S}, {S}, 3)", f"expected 1..{MAX_IMAGES} images, got {2**63}"),
        ("images", f"(0, {S}, {S}, 3)", f"expected 1..{MAX_IMAGES} images, got 0"),
        ("images", f"(33, {S}, {S}, 3)", f"expected 1..{MAX_IMAGES} images, got 33"),
        ("images", f"({2**70}, {S}, {S}, 3)", UNWRITTEN),
        ("images", f"(-1, {S}, {S}, 3)", UNWRITTEN),
        ("images", f"(True, {S}, {S}, 3)", UNWRITTEN),
        ("images", "()", f"array 'images': expected uint8 (n, {S}, {S}, 3), got |u1 ()"),
        ("images", f"(2, {2**32}, {2**32}, 3)", f"array 'images': expected uint8 (n, {S}, {S}, 3), got |u1 (2, 4294"),
        ("images", f"(3, {S}, {S}, 3)", "array 'score': expected float32 (3,), got <f4 (2,)"),
        ("score", f"({2**40},)", f"array 'score': expected float32 (2,), got <f4 ({2**40},)"),
        ("score", "()", "array 'score': expected float32 (2,), got <f4 ()"),
        ("score", "(-2,)", UNWRITTEN),
        ("score", "(2.0,)", UNWRITTEN),
        ("anomaly_map", f"(2, {S}, -{S})", UNWRITTEN),
        ("anomaly_map", "(" * 3000, UNWRITTEN),
        ("anomaly_map", "-" * 3000 + "1", UNWRITTEN),
        ("anomaly_map", "(" + "9" * 3000 + ",)", UNWRITTEN),
        ("reconstruction", "(2, 1)", f"array 'reconstruction': expected uint8 (2, {S}, {S}, 3), got |u1 (2, 1)"),
    ],
)
def test_claimed_shapes_allocate_nothing(name: str, shape: str, said: str) -> None:
    true = HEADERS[name].partition("'shape': ")[2].removesuffix(", }")
    content = golden({name: npy(HEADERS[name].replace(true, shape), bytes(BYTES[name]))})
    tracemalloc.start()
    try:
        assert said in refusal(content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "got", "claimed", "said"),
    [
        ("score", "'<f4'", "'|O'", "array 'score': expected float32 (2,), got |O (2,)"),
        ("score", "'<f4'", "'>f4'", "array 'score': expected float32 (2,), got >f4 (2,)"),
        ("score", "'<f4'", "'<f8'", "array 'score': expected float32 (2,), got <f8 (2,)"),
        ("score", "'<f4'", "[('a', '<f4')]", UNWRITTEN),
        ("images", "'|u1'", "'|S1000000000'", "array 'images': expected uint8"),
        ("images", "'|u1'", "'nonsense'", "got nonsense (2, "),
        ("images", "False", "True", "array 'images': expected the order of C, got that of Fortran"),
        ("anomaly_map", "False", "True", "array 'anomaly_map': expected the order of C, got that of Fortran"),
        ("anomaly_map", "'fortran_order'", "'order'", UNWRITTEN),
        ("score", "{'descr'", "__import__('os').abort() or {'descr'", UNWRITTEN[:-2]),
    ],
)
def test_claimed_types(name: str, got: str, claimed: str, said: str) -> None:
    assert said in refusal(golden({name: npy(HEADERS[name].replace(got, claimed), bytes(BYTES[name]))}))


def test_headers_that_contradict_the_size_of_their_entry() -> None:
    for change in (-1, 1, 4096):
        content = npy(HEADERS["images"], bytes(BYTES["images"] + change))
        size = len(npy(HEADERS["images"], bytes(BYTES["images"])))
        assert refusal(golden({"images": content})).startswith(
            f"g.npz: not a golden file for images of {S} px: array 'images': its header says {size} bytes in all, the "
            f"entry has {size + change};"
        )


def test_entries_that_numpy_would_not_write() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = golden(twice="score")
    assert "'reconstruction.npy', 'score.npy', 'score.npy', 'stress.npy', 'unit.npy'; ex" in refusal(twice)
    assert "'../x.npy', 'anomaly_map.npy'" in refusal(golden({"../x": b""}))
    assert "is encrypted or packed in a way that numpy.savez does not use" in refusal(
        golden(compression=zipfile.ZIP_LZMA)
    )
    for content in (
        npy(HEADERS["images"], bytes(BYTES["images"]), (2, 0)),
        npy(HEADERS["images"] + " " * 5000, bytes(BYTES["images"] - 5000)),
    ):
        assert "expected a header as numpy.savez writes it" in refusal(golden({"images": content}))
    assert "cannot be read (" in refusal(golden({"images": b""}))


def test_a_bomb_is_not_unpacked() -> None:
    bomb = golden({"images": npy(HEADERS["images"], bytes(2**26))})
    assert len(bomb) < 2**20
    assert f"more than {MAX_IMAGES} images need" in refusal(bomb)


@pytest.mark.parametrize("field", ["file_size", "compress_size", "CRC", "flag_bits", "compress_type", "header_offset"])
def test_a_directory_that_lies(field: str) -> None:
    content = golden()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entry = archive.getinfo("score.npy")
    at = content.index(b"PK\x01\x02")
    while content[at + 46 : at + 46 + 9] != b"score.npy":
        at = content.index(b"PK\x01\x02", at + 4)
    offset, kind = {
        "flag_bits": (8, "<H"),
        "compress_type": (10, "<H"),
        "CRC": (16, "<L"),
        "compress_size": (20, "<L"),
        "file_size": (24, "<L"),
        "header_offset": (42, "<L"),
    }[field]
    value = {"flag_bits": 1, "compress_type": 99}.get(field, getattr(entry, field) // 2)
    wrong = bytearray(content)
    struct.pack_into(kind, wrong, at + offset, value)
    refusal(bytes(wrong))


def test_every_cut_and_every_flipped_byte_of_a_header_is_a_sentence() -> None:
    content = golden(compression=zipfile.ZIP_STORED)
    for length in range(0, len(content), 211):
        refusal(content[:length])
    rng = np.random.default_rng(0)
    for at in rng.choice(200, 60, replace=False):
        wrong = bytearray(content)
        wrong[at] ^= int(rng.integers(1, 256))
        try:
            load_golden(bytes(wrong), "g.npz", S)
        except ManifestError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some flips do no harm: the time of an entry, say


def point_to(engine_path: Path, digest: str) -> Any:
    path = engine_path.with_suffix(".json")
    stored = json.loads(path.read_text())
    stored["files"]["tiny.golden.npz"]["sha256"] = digest
    path.write_text(json.dumps(stored))


def test_what_is_no_file_is_not_waited_for(engine_path: Path) -> None:
    golden_path = engine_path.with_name("tiny.golden.npz")
    golden_path.unlink()
    os.mkfifo(golden_path)
    with open_engine(engine_path) as opened, pytest.raises(ManifestError, match="no golden file, or longer than"):
        self_test(opened)
    golden_path.unlink()
    golden_path.symlink_to("/dev/zero")
    with open_engine(engine_path) as opened, pytest.raises(ManifestError, match="no golden file, or longer than"):
        self_test(opened)


def test_a_file_far_too_long_is_not_read(engine_path: Path) -> None:
    golden_path = engine_path.with_name("tiny.golden.npz")
    with golden_path.open("wb") as file:
        file.truncate(2**40)  # a hole: takes no space on the disk
    point_to(engine_path, hashlib.sha256(b"").hexdigest())
    with open_engine(engine_path) as opened, pytest.raises(ManifestError, match="no golden file, or longer than"):
        self_test(opened)
