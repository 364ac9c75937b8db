"""--deidentify: nothing in the results names anyone, everything leads back with the key. And --hash-inputs."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qfae_runtime.errors import OutputError, UsageError
from qfae_runtime.pseudonyms import Pseudonyms

from .test_cli import qfae_run
from .test_run import run, table

KEY = b"a secret of the hospital"
NAME = "Mustermann_Erika"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    return path


@pytest.fixture
def named(dataset: Path) -> Path:
    """The data set under a patient's name: folders, files, a damaged file, an unusable mask, a hidden file."""
    folder = dataset.rename(dataset.with_name(NAME))
    (folder / "good" / "img" / "0.png").rename(folder / "good" / "img" / f"{NAME}.png")
    (folder / "good" / "img" / f"{NAME}_torn.png").write_bytes(b"torn")
    (folder / "good" / "img" / f".{NAME}").write_bytes(b"")
    Image.new("L", (3, 3)).save(folder / "Ungood" / "label" / "1.png")
    return folder


def pseudonym(source: str) -> str:
    return hmac.new(KEY, os.fsencode(source), hashlib.sha256).hexdigest()[:32]


def test_no_output_names_anyone(named: Path, engine_path: Path, tmp_path: Path, key_file: Path) -> None:
    out = tmp_path / "out"
    shown = qfae_run(
        named, "--engine", engine_path, "--out", out, "--deidentify", key_file, "--save-maps", "--hash-inputs"
    )
    assert shown.exit_code == 3
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 25
    for path in files:
        assert NAME not in str(path.relative_to(out))
        assert NAME.encode() not in path.read_bytes(), path
        assert b"img/" not in path.read_bytes(), path
    assert NAME not in shown.stdout + shown.stderr.replace(str(out), "")
    record = json.loads((out / "run.json").read_text())
    assert record["inputs"]["root"] == pseudonym(str(named))
    assert record["inputs"]["ignored"] == {"hidden file": 1}
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"the first is the mask of {pseudonym('Ungood/img/1.png')}: got 3 x 3 pixels" in metrics["notes"][0]


def test_rows_lead_back_with_the_key(named: Path, engine_path: Path, tmp_path: Path, key_file: Path) -> None:
    run(named, engine_path, tmp_path / "plain")
    run(named, engine_path, tmp_path / "out", deidentify=key_file)
    plain, rows = table(tmp_path / "plain"), table(tmp_path / "out")
    assert [row["source"] for row in rows] == [pseudonym(row["source"]) for row in plain]
    for row, before in zip(rows, plain, strict=True):
        picture = f"heatmaps/{row['source']}.png" if row["status"] == "ok" else ""
        assert row["heatmap"] == picture
        assert not picture or (tmp_path / "out" / picture).is_file()
        assert {**row, "source": "", "heatmap": ""} == {**before, "source": "", "heatmap": ""}


def test_another_key_gives_other_names_and_another_run(
    named: Path, engine_path: Path, tmp_path: Path, key_file: Path
) -> None:
    out = tmp_path / "out"
    run(named, engine_path, out, deidentify=key_file, maps=False)
    (out / "report.html").unlink()
    assert run(named, engine_path, out, deidentify=key_file, maps=False, resume=True).counts.resumed == 13
    (out / "report.html").unlink()
    key_file.write_bytes(b"another secret of the hospital")
    with pytest.raises(OutputError, match="pseudonym_key_sha256: "):
        run(named, engine_path, out, deidentify=key_file, maps=False, resume=True)
    assert KEY not in (out / "run.json").read_bytes()


def test_the_line_of_the_docs_computes_a_pseudonym(tmp_path: Path, key_file: Path) -> None:
    """Of any name: the bytes that are no UTF-8 as well."""
    text = (Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if "hmac.new(" in line]
    code = line.split('python -c "')[1].split('" KEYFILE')[0]
    for source in ("ward3/scan7.png", "stra\u00dfe.png", os.fsdecode(b"caf\xe9.png")):
        shown = subprocess.run([sys.executable, "-c", code, key_file, source], capture_output=True, check=True)
        assert shown.stdout.decode().strip() == Pseudonyms(KEY).of(source)


def test_messages_name_no_one(named: Path, engine_path: Path, tmp_path: Path, key_file: Path) -> None:
    """What is said of labels and of a run that cannot be gone on with speaks of pseudonyms, or of no name."""
    out, labels = tmp_path / "out", tmp_path / "labels.csv"
    given = ["--engine", engine_path, "--out", out, "--no-maps", "--labels", labels]
    source = f"good/img/{NAME}.png"
    for text, says in (
        (f"{source},good\n{source},Ungood\n", f"line 3: {pseudonym(source)} has two different labels"),
        (f"good,{NAME}\n", f"line 2: label {pseudonym(NAME)}: accepted are good, normal, 0, ungood, anomalous, 1"),
        (f"{NAME}/9.png,good\n", f"the first is {pseudonym(NAME + '/9.png')}; a source is a path below the folder of "),
    ):
        labels.write_text("source,label\n" + text)
        shown = qfae_run(named, *given, "--deidentify", key_file)
        assert shown.exit_code == 2
        assert says in shown.stderr
        assert NAME not in shown.stderr
    labels.write_text(f"{NAME},1\n")
    shown = qfae_run(named, *given, "--deidentify", key_file)
    assert f"source,label, got [{pseudonym(NAME.lower())}, {pseudonym('1')}]\n" in shown.stderr

    labels.write_text(f"source,label\n{source},good\n")
    assert qfae_run(named, *given, "--deidentify", key_file).exit_code == 3
    (named / "good" / "img" / f"{NAME}.png").unlink()
    shutil.copy(named / "good" / "img" / "1.png", named / "good" / "img" / f"{NAME}_new.png")
    labels.write_text(f"source,label\n{source.replace('.png', '_new.png')},good\n")
    shown = qfae_run(named, *given, "--deidentify", key_file, "--resume")
    assert shown.exit_code == 1
    assert f"  inputs: 1 new: {pseudonym(source.replace('.png', '_new.png'))!r}\n" in shown.stderr
    assert f"  inputs: 1 missing: {pseudonym(source)!r}\n" in shown.stderr
    assert NAME not in shown.stderr


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_under_names_is_not_named_by_one_without(
    named: Path, engine_path: Path, tmp_path: Path, key_file: Path, moved: bool
) -> None:
    out = tmp_path / "out"
    run(named, engine_path, out, maps=False, deidentify=key_file if moved else None)
    images = named.rename(named.with_name(f"{NAME}_2")) if moved else named
    shown = qfae_run(images, "--engine", engine_path, "--out", out, "--no-maps", "--deidentify", key_file, "--resume")
    assert shown.exit_code == 1
    assert "  root: another folder than before\n" in shown.stderr
    assert ("pseudonym_key_sha256: was None, now " in shown.stderr) is not moved
    assert NAME not in shown.stderr


def test_options_and_list_of_inputs_name_no_one(named: Path, engine_path: Path, tmp_path: Path, key_file: Path) -> None:
    out = tmp_path / "out"
    run(named, engine_path, out, deidentify=key_file, maps=False, hash_inputs=True)
    options = json.loads((out / "run.json").read_text())["options"]
    assert options["images"] == [pseudonym(str(named))]
    assert (options["engine"], options["out"]) == (pseudonym(str(engine_path)), pseudonym(str(out)))
    assert (options["deidentify"], options["labels"]) == (pseudonym(str(key_file)), None)
    lines = [json.loads(line) for line in (out / "inputs.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == [row["source"] for row in table(out)]
    image = named / "Ungood" / "img" / "0.png"
    status = image.stat()
    assert lines[0] == {
        "source": pseudonym("Ungood/img/0.png"),
        "state": pseudonym(f"{status.st_size} {status.st_mtime_ns}"),
        "sha256": pseudonym(hashlib.sha256(image.read_bytes()).hexdigest()),
    }


def test_sentences_lose_names_and_uids() -> None:
    names = Pseudonyms(KEY)
    path = Path("/data/Ann_Lee/Ann_Lee 7.dcm")
    text = f"{path}: Ann_Lee 7.dcm of series 1.2.840.113619.2.55.3, pydicom 3.0.1: 7 frames"
    uid = pseudonym("1.2.840.113619.2.55.3")
    assert names.scrub(text, path, "P") == f"P: P of series {uid}, pydicom 3.0.1: 7 frames"
    assert names.scrub("got 1 of 12 pixels", Path("1.png"), "P") == "got 1 of 12 pixels"
    assert names.scrub("/d/2: got 12 of 22 frames, 2 cut", Path("/d/2"), "P2") == "P2: got 12 of 22 frames, 2 cut"
    assert repr(names) == "Pseudonyms()"


NOT_AN_IMAGE = "not a PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI image, whatever its name says"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (NOT_AN_IMAGE, "/x/not.png"),
        (NOT_AN_IMAGE, "/image/PNG/whatever its name says.dcm"),
        (NOT_AN_IMAGE, "/data/name/image"),
        ("damaged or truncated image (broken data stream when reading image file)", "/data/image/broken.png"),
        ("damaged DICOM image (bits allocated 16, stored 12, high bit 15 cannot be)", "/DICOM/stored/high bit.dcm"),
        ("too large: got 512 x 65536 pixels, the limit is 100,000", "/too large/512/65536.png"),
        ("cannot be read (Permission denied)", "/cannot be read/denied/permission.png"),
        ("annotation of frame 7, Pillow 13.0", "/x/ann.png"),
        ("holds 3 pictures, expected one; split it into single images", "/x/holds/one.tif"),
    ],
)
def test_ordinary_words_stay_whatever_files_are_called(text: str, path: str) -> None:
    assert Pseudonyms(KEY).scrub(text, Path(path), "P") == text


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("cannot identify image file '/x/not.png'", "/x/not.png", "cannot identify image file 'P'"),
        ("this is not what not.png says", "/x/not.png", "this is not what P says"),
        ("'not' is not one", "/x/not.png", "'P' is not one"),
        ('no file "/data/long/image.img" there', "/data/long/image.hdr", 'no file "P" there'),
        ("image.hdr lacks image.IMG", "/x/image.hdr", "P lacks P"),
        ("long/1.png is cut", "/data/long/1.png", "P is cut"),
        ("Mueller has no pixels", "/d/Mueller.dcm", "P has no pixels"),
        ("mueller has no pixels", "/d/MUELLER.dcm", "P has no pixels"),
        ("of Mueller_mask.png and MUELLER-2", "/d/mueller.dcm", "of P_mask.png and P-2"),
        ("of Mueller_Anna, 1970", "/d/Mueller_Anna/7.dcm", "of P, 1970"),
        ("see /d/Mueller_Anna/other.png: bad", "/d/Mueller_Anna/7.png", "see P: bad"),
        ("see /d/Mueller_Anna, bad", "/d/Mueller_Anna/x/7.png", "see P, bad"),
        ("/d/Anna Lee/scan 1.img is not there", "/d/Anna Lee/scan 1.hdr", "P is not there"),
        ("d\u00f6rte.png; do\u0308rte; d\\xf6rte", "/x/d\u00f6rte.png", "P; P; P"),
        ("b'/x/D\\xc3\\xb6rte.png' and /x/D%C3%B6rte.png", "/x/D\u00f6rte.png", "b'P' and P"),
        ("'/x/a\\nLee.png'", "/x/a\nLee.png", "'P'"),
        ("id 1234567 of 2345678", "/x/1234567.dcm", "id P of 2345678"),
        ("Mueller.nii and Mueller.img", "/x/Mueller.nii.gz", "P and P"),
    ],
)
def test_names_go_however_they_are_written(text: str, path: str, says: str) -> None:
    assert Pseudonyms(KEY).scrub(text, Path(path), "P") == says


def test_relative_paths_are_known_as_whole_ones_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = Pseudonyms(KEY)
    assert names.scrub(f"{tmp_path}/long/image.png is bad", Path("long/image.png"), "P") == "P is bad"
    assert names.scrub("long/image.png is bad", Path("long/image.png"), "P") == "P is bad"


@pytest.mark.parametrize("stem", ["not", "image", "truncated", "Mueller", "M\u00fcller Anna", "1234567", "damaged"])
def test_reasons_of_damaged_files_are_those_of_a_run_with_names(
    stem: str, engine_path: Path, tmp_path: Path, key_file: Path
) -> None:
    """Every kind of damage, under ordinary and other names: the sentences are the same, and hold no name."""
    folder = tmp_path / "scans" / stem
    folder.mkdir(parents=True)
    image = Image.effect_noise((40, 40), 60)
    image.save(folder / f"{stem} whole.png")
    content = (folder / f"{stem} whole.png").read_bytes()
    for suffix, damage in (
        ("png", content[:300]),
        ("jpg", b"\xff\xd8\xff\xe0 torn"),
        ("tif", b"II*\0\x08\0\0\0\xff\xff"),
        ("nii.gz", b"\x1f\x8b\x08\0torn"),
        ("nii", (348).to_bytes(4, "little") + bytes(100)),
        ("dcm", bytes(128) + b"DICMtorn"),
        ("bmp", b"text"),
        ("webp", b""),
    ):
        (folder / f"{stem}.{suffix}").write_bytes(damage)
    run(tmp_path / "scans", engine_path, tmp_path / "plain", maps=False)
    run(tmp_path / "scans", engine_path, tmp_path / "out", maps=False, deidentify=key_file)
    plain, rows = table(tmp_path / "plain"), table(tmp_path / "out")
    assert sum(row["status"] != "ok" for row in rows) >= 8
    assert [row["error"] for row in rows] == [row["error"] for row in plain]
    if stem not in ("not", "image", "truncated", "damaged"):
        assert not any(stem in row["error"] for row in rows)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read (No such file or directory); name a file that holds a secret"),
        (b"short", "holds 5 bytes, expected a secret of 16 to 4096"),
        (b"x" * 5000, "holds more than 4096 bytes"),
    ],
)
def test_keys_that_are_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Pseudonyms.from_file(path)
    assert str(caught.value).startswith(f"--deidentify {path}: {says}")


def test_the_digest_of_the_inputs_is_that_of_their_bytes(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    run(dataset, engine_path, tmp_path / "out", maps=False, hash_inputs=True)
    sources = [row["source"] for row in table(tmp_path / "out")]
    each = [hashlib.sha256((dataset / source).read_bytes()).hexdigest() for source in sources]
    fingerprint = json.loads((tmp_path / "out" / "run.json").read_text())["fingerprint"]
    assert fingerprint["inputs_content_sha256"] == hashlib.sha256("\0".join(each).encode()).hexdigest()
    # Bytes that changed behind an unchanged size and time are seen by this digest alone.
    (tmp_path / "out" / "report.html").unlink()
    victim = dataset / sources[3]
    status = victim.stat()
    victim.write_bytes(bytes(len(victim.read_bytes())))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        OutputError, match="inputs: 1 with another content, size and time of change as they were: 'Ungood/img/3"
    ):
        run(dataset, engine_path, tmp_path / "out", maps=False, hash_inputs=True, resume=True)
