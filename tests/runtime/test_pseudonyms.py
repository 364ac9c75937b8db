"""--deidentify: nothing in the results names anyone, everything leads back with the key. And --hash-inputs."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
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


def test_sentences_lose_names_and_uids() -> None:
    names = Pseudonyms(KEY)
    path = Path("/data/Ann_Lee/Ann_Lee 7.dcm")
    text = f"{path}: Ann_Lee 7.dcm of series 1.2.840.113619.2.55.3, pydicom 3.0.1: 7 frames"
    uid = pseudonym("1.2.840.113619.2.55.3")
    assert names.scrub(text, path, "P") == f"P: P of series {uid}, pydicom 3.0.1: 7 frames"
    assert names.scrub("got 1 of 12 pixels", Path("1.png"), "P") == "got 1 of 12 pixels"
    assert names.scrub("/d/2: got 12 of 22 frames, 2 cut", Path("/d/2"), "P2") == "P2: got 12 of 22 frames, 2 cut"
    assert repr(names) == "Pseudonyms()"


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
    with pytest.raises(OutputError, match="inputs_content_sha256: "):
        run(dataset, engine_path, tmp_path / "out", maps=False, hash_inputs=True, resume=True)
