"""Heat maps, colours and the report page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qfae_runtime.engines.base import Scores
from qfae_runtime.golden import Golden
from qfae_runtime.run import Options, execute
from qfae_runtime.writers import histogram
from qfae_runtime.writers import report as report_module
from qfae_runtime.writers.colours import colour_table, overlay
from qfae_runtime.writers.heatmap import ColourScale, draw, heatmap_names, is_ours, panels_box, save

from .conftest import write_png
from .tiny import SIZE


def test_colour_table_rises_in_lightness() -> None:
    linear = (colour_table().astype(float) / 255) ** 2.2
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -1e-4).all()
    assert luminance[0] < 0.02
    assert luminance[-1] > 0.85


def test_overlay_leaves_normal_pixels_alone() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    values = np.zeros((4, 4), np.float32)
    values[1, 1], values[2, 2] = 0.5, 99.0
    mixed = overlay(image, values, 0.0, 1.0)
    assert (mixed[0] == 100).all()
    assert (mixed[1, 1] != 100).any()
    assert (mixed[2, 2] == overlay(image, np.ones((4, 4), np.float32), 0.0, 1.0)[0, 0]).all()


def test_scale_comes_from_the_golden_images() -> None:
    maps = np.linspace(0, 0.4, 2 * SIZE * SIZE, dtype=np.float32).reshape(2, SIZE, SIZE)
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    scale = ColourScale.of(Golden(images, Scores(maps.max(axis=(1, 2)), maps, images)))
    assert (scale.low, round(scale.high, 4)) == (0.0, 0.3996)
    assert scale.origin == "0 to the 99.9th percentile on the engine's 2 golden images"
    assert ColourScale.of(None).high == 1.0


def test_figure_holds_three_panels_and_is_known_as_ours(tmp_path: Path) -> None:
    image, reconstruction = np.full((2, SIZE, SIZE, 3), [[[[10]]], [[[200]]]], np.uint8)
    figure = draw(image, reconstruction, np.zeros((SIZE, SIZE), np.float32), ColourScale(0, 1, ""), 0.5, "good")
    left, top, right, bottom = panels_box(SIZE)
    strip = np.asarray(figure.crop((left, top, right, bottom)))
    assert strip[5, 5].tolist() == [10] * 3
    assert strip[5, strip.shape[1] // 2].tolist() == [200] * 3
    assert strip[5, -5].tolist() == [10] * 3
    save(figure, tmp_path / "a" / "x.png")
    assert is_ours(tmp_path / "a" / "x.png")
    write_png(tmp_path / "y.png", image[:, :, 0])
    assert not is_ours(tmp_path / "y.png")
    assert not is_ours(tmp_path / "none.png")


def test_heatmap_names_never_collide() -> None:
    names = heatmap_names(["a/x.png", "a/x.PNG", "a/x.jpg", "a/x", "a/x.jpg.png"])
    assert names == ["a/x.png", "a/x~2.png", "a/x.jpg.png", "a/x~3.png", "a/x.jpg~2.png"]


def test_histogram_counts_everything_once() -> None:
    scores = {"good": [0.1, 0.2, 0.2], "Ungood": [0.3, 0.9], "no label": [0.5]}
    drawn = histogram.layout(scores, 0.4)
    assert drawn is not None
    assert sum(int(bar["title"].split()[0]) for bar in drawn["bars"]) == 6
    assert all(bar["y"] >= drawn["base"] for bar in drawn["bars"] if bar["label"] == "good")
    assert drawn["threshold"] is not None
    assert histogram.layout({}, None) is None


def test_histogram_of_skewed_scores_is_logarithmic() -> None:
    scores = {"good": [0.001, 0.002, 0.003, 0.01], "Ungood": [0.004, 0.1, 1.0]}
    drawn = histogram.layout(scores, 0.01)
    assert drawn is not None
    assert drawn["logarithmic"]
    assert sum(int(bar["title"].split()[0]) for bar in drawn["bars"]) == 7
    ticks = {tick["text"]: tick["x"] for tick in drawn["ticks"]}
    assert list(ticks) == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]
    assert ticks["0.01"] == drawn["threshold"]
    # Equal factors are equal distances, from one end to the other.
    assert [ticks["0.001"], ticks["1"]] == [drawn["left"], drawn["right"]]
    assert ticks["0.1"] - ticks["0.01"] == pytest.approx((drawn["right"] - drawn["left"]) / 3, abs=0.02)
    flat = histogram.layout({"no label": [0.0, 0.001, 1.0]}, None)  # zero has no logarithm
    assert flat is not None
    assert not flat["logarithmic"]


def test_histogram_of_equal_or_tiny_scores() -> None:
    for values in ([0.0, 0.0], [1e-30, 2e-30], [-1.0], [5e6, 5e6]):
        drawn = histogram.layout({"no label": values}, None)
        assert drawn is not None
        assert all(np.isfinite(bar["x"]) for bar in drawn["bars"])


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_report_is_one_file_sorted_and_offline(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    execute(Options((dataset,), engine_path, tmp_path / "out"))
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 12
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    shown = [float(one) for one in re.findall(r'<span class="score">([^<]+)</span>', text)]
    assert shown == sorted(shown, reverse=True)
    assert "certified engine" in text
    assert "not a medical device" in text
    assert "image AUROC" in text
    assert "0 to the 99.9th percentile on the engine&#39;s 5 golden images" in text


def test_report_shows_areas_with_their_intervals(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    summary = execute(Options((dataset,), engine_path, tmp_path / "out"))
    assert summary.metrics is not None
    text = (tmp_path / "out" / "report.html").read_text()
    for key, name in (("pixel_auroc", "pixel AUROC"), ("aupro_30", "AUPRO to 30 % FPR")):
        low, high = summary.metrics["intervals_95"][key]
        assert f"<b>{summary.metrics[key]:.4f}</b><span>{name}<br>95 %: {low:.4f} to {high:.4f}</span>" in text
    assert "95 % intervals from 1000 bootstrap resamples of the images." in text
    execute(Options((dataset / "good",), engine_path, tmp_path / "good"))
    text = (tmp_path / "good" / "report.html").read_text()
    assert "<b>–</b><span>image AUROC</span>" in text
    assert "all 6 scored images are normal" in text
    assert "95 %" not in text


def test_report_escapes_file_names(engine_path: Path, tmp_path: Path) -> None:
    name = "<script>alert(1)</script> & \"'.png".replace("/", "_")
    write_png(tmp_path / "in" / name, np.zeros((8, 8), np.uint8))
    (tmp_path / "in" / "<b>bad.png").touch()
    (tmp_path / "in" / 'comma, "quote"\nnewline.png').write_bytes((tmp_path / "in" / name).read_bytes())
    summary = execute(Options((tmp_path / "in",), engine_path, tmp_path / "out"))
    assert (summary.counts.done, summary.counts.errors) == (3, 1)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in text
    assert "<b>bad" not in text
    assert "&lt;b&gt;bad.png" in text


def test_report_stays_bounded(dataset: Path, engine_path: Path, tmp_path: Path, monkeypatch: object) -> None:
    limit = report_module.GALLERY_LIMIT
    report_module.GALLERY_LIMIT = 5
    try:
        execute(Options((dataset,), engine_path, tmp_path / "out"))
    finally:
        report_module.GALLERY_LIMIT = limit
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("<img") == 5
    assert "The 5 highest of 12 are shown; all rows are in scores.csv, all pictures in heatmaps/." in text


def test_panels_are_what_the_engine_saw(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    execute(Options((dataset,), engine_path, tmp_path / "out"))
    with Image.open(tmp_path / "out" / "heatmaps" / "Ungood" / "img" / "0.png") as figure:
        left, top, right, bottom = panels_box(SIZE)
        assert figure.width > right
        assert figure.height > bottom
        assert (right - left, bottom - top) == (3 * 224 + 16, 224)
