"""Heat maps, colours and the report page."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qfae_runtime.arrays import UInt8
from qfae_runtime.engines.base import Scores
from qfae_runtime.geometry import Box, Geometry
from qfae_runtime.golden import Golden
from qfae_runtime.preprocess import PreprocessSpec, preprocess
from qfae_runtime.run import Options, execute
from qfae_runtime.writers import histogram
from qfae_runtime.writers import report as report_module
from qfae_runtime.writers.colours import colour_table, overlay
from qfae_runtime.writers.heatmap import ColourScale, Figure, draw, heatmap_names, is_ours, read_panels, save, thumbnail

from .conftest import write_png
from .tiny import SIZE, yardstick_of


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
    scores = Scores(maps.max(axis=(1, 2)), maps, images)
    scale = ColourScale.of(Golden(images, scores, yardstick_of(scores), 1))
    # Stress images are brighter than anything that is scored, and say nothing about it.
    more = Scores.joined([scores, scores._replace(score=scores.score * 9, anomaly_map=maps * 9)])
    stressed = Golden(np.concatenate([images, images]), more, yardstick_of(more), 1, (2, 3))
    assert ColourScale.of(stressed) == scale
    assert (scale.low, round(scale.high, 4)) == (0.0, 0.3996)
    assert scale.origin == "0 to the 99.9th percentile on the engine's 2 golden images"
    assert ColourScale.of(None).high == 1.0


def grey(levels: UInt8) -> UInt8:
    return np.repeat(levels[:, :, None], 3, axis=2)


def parts(figure: Figure, width: int) -> list[UInt8]:
    """The three panels of a figure, each `width` wide and no taller than its cell."""
    strip = np.asarray(figure.picture.crop(figure.panels))
    return [strip[:, n * (width + 8) : n * (width + 8) + width] for n in range(3)]


def test_figure_holds_three_panels_and_is_known_as_ours(tmp_path: Path) -> None:
    image, reconstruction = np.full((2, SIZE, SIZE, 3), [[[[10]]], [[[200]]]], np.uint8)
    flat, geometry = np.zeros((SIZE, SIZE), np.float32), Geometry.whole(SIZE, SIZE, SIZE)
    figure = draw(thumbnail(image), geometry, reconstruction, flat, ColourScale(0, 1, ""), 0.5, "good")
    assert [part[5, 5].tolist() for part in parts(figure, 224)] == [[10] * 3, [200] * 3, [10] * 3]
    save(figure, tmp_path / "x.png")
    assert is_ours(tmp_path / "x.png")
    write_png(tmp_path / "y.png", image[:, :, 0])
    assert not is_ours(tmp_path / "y.png")
    assert not is_ours(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [
        ((240, 240), (240, 240)),
        ((112, 112), (224, 224)),
        ((512, 1024), (168, 336)),
        ((1024, 512), (336, 168)),
        ((1, 1), (224, 224)),
        ((20, 3000), (32, 336)),
        ((3000, 20), (336, 32)),
    ],
)
def test_thumbnails_keep_the_aspect_unless_nothing_would_be_seen(
    shape: tuple[int, int], drawn: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    small = thumbnail(pixels)
    assert small.shape == (*drawn, 3)
    assert shape != drawn or small.tobytes() == pixels.tobytes()
    values = np.zeros((SIZE, SIZE), np.float32)
    square = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture, panels = draw(
        small, Geometry.whole(*shape, SIZE), square, values, ColourScale(0, 1, ""), 0.123456, "Ungood"
    )
    left, top, right, bottom = panels
    assert right - left >= 3 * max(drawn[1], 104) + 16
    assert bottom - top >= max(drawn[0], 64)
    assert picture.width > right
    assert picture.height > bottom


def test_what_the_engine_saw_is_drawn_where_it_was() -> None:
    """A wide image, a box low and right in it: the bright pixels of both squares land on the spot in the image."""
    pixels = np.zeros((200, 320, 3), np.uint8)
    pixels[90:190, 200:310] = 40
    pixels[150:160, 280:290] = 255
    square, geometry = preprocess(pixels, PreprocessSpec("liver", 224))
    assert geometry.place == Box(62, 57, 100, 110)
    values = np.zeros((224, 224), np.float32)
    spot = np.s_[62 + 60 : 62 + 70, 57 + 80 : 57 + 90]
    values[spot] = 1.0
    values[0, 0] = 1.0  # on the padding: it lies nowhere on the image
    reconstruction = np.full_like(square, 99)
    reconstruction[spot] = 200
    image, rebuilt, mapped = parts(
        draw(thumbnail(pixels), geometry, reconstruction, values, ColourScale(0, 1, ""), 1, None), 320
    )
    np.testing.assert_array_equal(image, pixels)
    expected = np.zeros((200, 320), np.uint8)
    expected[90:190, 200:310] = 99
    expected[150:160, 280:290] = 200
    np.testing.assert_array_equal(rebuilt, grey(expected))
    changed = (mapped != image).any(axis=2)
    assert changed[150:160, 280:290].all()
    changed[150:160, 280:290] = False
    assert not changed.any()


def test_panels_are_found_in_the_file_itself(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 300, 3), dtype=np.uint8)
    square, values = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((SIZE, SIZE), np.float32)
    figure = draw(thumbnail(pixels), Geometry.whole(100, 300, SIZE), square, values, ColourScale(0, 1, ""), 1, None)
    save(figure, tmp_path / "x.png")
    strip = read_panels(tmp_path / "x.png")
    assert strip is not None
    assert strip.size == (3 * 300 + 16, 100)
    assert np.asarray(strip)[:, :300].tobytes() == pixels.tobytes()
    for number, box in enumerate([(0, 0, 99999, 99999), (-1, 0, 5, 5), (5, 5, 5, 9)]):
        save(Figure(figure.picture, box), tmp_path / f"{number}.png")
        assert read_panels(tmp_path / f"{number}.png") is None
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "older.png").write_bytes(whole.replace(b"Panels", b"Others"))
    write_png(tmp_path / "foreign.png", pixels)
    for name in ("cut.png", "older.png", "foreign.png", "none.png"):
        assert read_panels(tmp_path / name) is None, name


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
    for key, name in (("pixel_auroc", "pixel AUROC"), ("aupro_30", "AUPRO at 30 % FPR")):
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


def test_heat_maps_have_the_aspect_of_their_images(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    write_png(dataset / "good" / "img" / "wide.png", np.full((20, 3000), 90, np.uint8))
    execute(Options((dataset,), engine_path, tmp_path / "out"))
    sizes = {}
    for path in (tmp_path / "out" / "heatmaps").rglob("*.png"):
        strip = read_panels(path)
        assert strip is not None
        sizes[path.stem] = strip.size
    assert sizes == {"wide": (3 * 336 + 16, 64), **{str(n): (3 * 224 + 16, 187) for n in range(6)}}
    text = (tmp_path / "out" / "report.html").read_text()
    strips = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    shown = {Image.open(io.BytesIO(base64.b64decode(strip))).size for strip in strips}
    assert shown == {(688, 187), (690, 43)}
