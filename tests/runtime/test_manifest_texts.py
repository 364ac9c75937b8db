"""What a terminal or a browser would obey in a manifest: refused when it is read, written out when it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qfae_runtime import open_engine
from qfae_runtime.errors import ManifestError
from qfae_runtime.manifest import Manifest

from .test_cli import qfae_run
from .test_run import run

OBEYED = {
    "escape": "a\x1b[31mred\x1b]0;title\x07",
    "NUL": "a\0b",
    "line end": "fine\nqfae-run: all is well",
    "carriage return": "failed\rpassed",
    "backspace": "no\b\bok",
    "C1 escape": "a\x9b31m",
    "delete": "a\x7f",
    "right to left": "a\u202egnp.exe",
    "isolate": "a\u2066b\u2069",
    "zero width": "on\u200bnx",
    "line separator": "a\u2028b",
    "surrogate": "a\udc9bb",
}
HTML = '<script>alert(1)</script><img src=x onerror="alert(2)">&lt;{{ 7 * 7 }}'


def change(engine_path: Path, where: str, text: str) -> None:
    path = engine_path.with_suffix(".json")
    stored: Any = json.loads(path.read_text())
    inner, *keys = stored, *where.split(".")
    for key in keys[:-1]:
        inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, {})
    inner[keys[-1]] = text
    path.write_text(json.dumps(stored))


TEXTS = (
    "name",
    "golden",
    "certificate.0.backend",
    "certificate.0.gpu",
    "certificate.0.images_from",
    "certificate.0.reference",
    "certificate.0.created",
    "certificate.0.scale.threshold_from",
    "outputs.0.name",
    "provenance.checkpoint.file",
    "precision.tiny.onnx",
)


@pytest.mark.parametrize("where", TEXTS)
@pytest.mark.parametrize("kind", OBEYED)
def test_it_is_refused_and_not_repeated(where: str, kind: str, engine_path: Path) -> None:
    change(engine_path, where, OBEYED[kind])
    with pytest.raises(ManifestError) as caught:
        open_engine(engine_path)
    text = str(caught.value)
    assert text.startswith("tiny.json: ")
    assert text.isprintable(), text  # the fault names what was got, written out


@pytest.mark.parametrize("kind", OBEYED)
def test_in_keys_too(kind: str, engine_path: Path) -> None:
    change(engine_path, f"provenance.{OBEYED[kind]}", "x")
    with pytest.raises(ManifestError, match="key 'provenance': expected an object whose texts are characters that can"):
        open_engine(engine_path)


def test_texts_have_a_longest_length(engine_path: Path) -> None:
    change(engine_path, "certificate.0.images_from", "x" * 5000)
    with pytest.raises(ManifestError, match=r"key .certificate\.0\.images_from.: expected characters that can be"):
        open_engine(engine_path)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}


def test_html_is_text_in_the_report(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    for where in ("certificate.0.images_from", "certificate.0.reference", "certificate.0.created"):
        change(engine_path, where, HTML)
    change(engine_path, "certificate.0.scale.threshold_from", HTML)
    run(dataset, engine_path, tmp_path / "out")
    content = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    assert not page.tags & {"script", "iframe", "object"}
    assert not page.handlers
    assert "alert(1)" in content
    assert "<script>alert(1)" not in content
    assert "{{ 7 * 7 }}" in content


def test_letters_of_all_languages_are_texts(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    for text in ("Aufnahmen aus Köln ± 0,5 µm", "脑部影像", "صور الدماغ", "\U0001f9e0 10 %"):
        change(engine_path, "certificate.0.images_from", text)
        with open_engine(engine_path) as opened:
            assert opened.certificate is not None
            assert opened.certificate.images_from == text


def test_what_is_written_can_be_read(engine_path: Path) -> None:
    """An export takes names of files and folders into it, in which anything may be."""
    path = engine_path.with_suffix(".json")
    manifest = Manifest.load(path)
    [entry] = manifest.certificate
    odd = "".join(OBEYED.values())
    changed = replace(
        manifest,
        certificate=(replace(entry, images_from=f"32 of the images in {odd}/"),),
        provenance={"checkpoint": {"file": odd, odd: [odd, 1, None]}},
    )
    changed.save(path)
    again = Manifest.load(path)
    assert again.certificate[0].images_from.isprintable()
    assert "\\x1b[31mred" in again.certificate[0].images_from
    assert "\\u202egnp.exe" in again.provenance["checkpoint"]["file"]
    assert path.read_text(encoding="utf-8").replace("\n", "").isprintable()


def test_the_terminal_and_run_json_hold_none(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    change(engine_path, "certificate.0.gpu", OBEYED["escape"])
    shown = qfae_run(dataset, "--engine", engine_path, "--out", tmp_path / "out")
    assert shown.exit_code == 1
    assert "\x1b" not in shown.stdout + shown.stderr
    assert "\\x1b[31m" in shown.stderr
    assert not (tmp_path / "out").exists()
