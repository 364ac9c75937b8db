"""One PNG per picture: image | reconstruction | anomaly map over the image, and a colour bar with numbers.

All three panels have the image's own geometry: what the engine saw of it is brought back to where it was. Where it
saw nothing, the reconstruction is black and the image carries no colour.

One colour scale holds for the whole run, and for every run of the same engine: 0 to the 99.9th percentile of the
maps of the engine's golden images (the largest value may be one odd pixel). It is known before the first image is
scored, so nothing is kept back, and any two heat maps of one engine can be compared by eye. Values above the scale's
end take its last colour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from qfae_runtime.arrays import Float32, UInt8
from qfae_runtime.geometry import Geometry
from qfae_runtime.golden import Golden
from qfae_runtime.writers.colours import colour_table, overlay
from qfae_runtime.writers.names import name_for
from qfae_runtime.writers.whole import whole_file

SOFTWARE = "qfae-run"
_TOP_PERCENTILE = 99.9
_PANELS_KEY = "Panels"
_LONGER_SIDE = (224, 336)
_THINNEST_PANEL = 32
_CELL_HEIGHT, _CELL_WIDTH = 64, 104  # at least: the colour bar has three numbers, each panel a title
_MARGIN, _GAP, _CAPTION, _FOOTER, _BAR_GAP, _BAR, _NUMBERS = 12, 8, 24, 26, 16, 14, 64
_BACKGROUND, _TEXT, _QUIET = (17, 18, 22), (236, 237, 240), (150, 154, 164)
_SIGNATURE_BYTES = 256
_FRAME_NAME = re.compile(r"\.f\d{4,}\.png$")


@dataclass(frozen=True)
class ColourScale:
    """The map values at the two ends of the colour table, and in words where they come from."""

    low: float
    high: float
    origin: str

    @classmethod
    def of(cls, golden: Golden | None) -> ColourScale:
        """Take the scale from the golden images' maps, stress images left out; 0..1 where an engine has none."""
        real = [] if golden is None else golden.real
        if golden is None or not real:
            return cls(0.0, 1.0, "fixed at 0 to 1: the engine has no golden images to take it from")
        high = float(np.percentile(golden.scores.anomaly_map[real], _TOP_PERCENTILE))
        if not high > 0.0:
            return cls(0.0, 1.0, "fixed at 0 to 1: the engine has no golden images to take it from")
        return cls(0.0, high, f"0 to the {_TOP_PERCENTILE}th percentile on the engine's {len(real)} golden images")


class Figure(NamedTuple):
    """A drawn heat map, and where its three panels lie in it: left, top, right, bottom in pixels."""

    picture: Image.Image
    panels: tuple[int, int, int, int]


def thumbnail(pixels: UInt8) -> UInt8:
    """Resize an image uint8 (H, W, 3) to the size it is drawn at, uint8 (h, w, 3).

    Its longer side becomes 224 to 336 pixels and it keeps its aspect, unless it is so thin that nothing would be
    seen of it: no side is below 32 pixels.
    """
    height, width = pixels.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, _LONGER_SIDE[0]), _LONGER_SIDE[1]) / longer
    side = [max(_THINNEST_PANEL, round(length * scale)) for length in (width, height)]
    small = Image.fromarray(pixels).resize((side[0], side[1]), Image.Resampling.BICUBIC)
    return np.array(small, dtype=np.uint8)


def draw(
    image: UInt8,
    geometry: Geometry,
    reconstruction: UInt8,
    anomaly_map: Float32,
    scale: ColourScale,
    score: float,
    label: str | None,
) -> Figure:
    """Draw one figure.

    `image` is the `thumbnail` of the picture as read, uint8 (h, w, 3); `geometry` is the picture's own, in its full
    size, and brings back the engine's reconstruction uint8 (S, S, 3) and map float32 (S, S).
    """
    height, width = image.shape[:2]
    drawn = geometry.at_size(height, width)
    panels = {
        "image": image,
        "reconstruction": drawn.image_back(reconstruction),
        "anomaly map": overlay(image, drawn.map_back(anomaly_map), scale.low, scale.high),
    }
    rows = max(height, _CELL_HEIGHT)
    columns = max(width, _CELL_WIDTH, rows // 2)  # a very tall image must not make a very tall strip in the report
    left, top, right, bottom = box = (_MARGIN, _CAPTION, _MARGIN + 3 * columns + 2 * _GAP, _CAPTION + rows)
    figure = Image.new("RGB", (right + _BAR_GAP + _BAR + _NUMBERS, bottom + _FOOTER), _BACKGROUND)
    pen = ImageDraw.Draw(figure)
    for number, (title, pixels) in enumerate(panels.items()):
        x = left + number * (columns + _GAP)
        figure.paste(Image.fromarray(pixels), (x + (columns - width) // 2, top + (rows - height) // 2))
        pen.text((x, top - 6), title, fill=_QUIET, font=_font(), anchor="ls")
    _colour_bar(figure, pen, right + _BAR_GAP, top, rows, scale)
    known = f"     label {label}" if label else ""
    pen.text((left, bottom + 18), f"score {score:.6g}{known}", fill=_TEXT, font=_font(), anchor="ls")
    return Figure(figure, box)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, marked as ours (see is_ours), whole or not at all."""
    marks = PngImagePlugin.PngInfo()
    marks.add_text("Software", SOFTWARE)
    marks.add_text(_PANELS_KEY, " ".join(str(edge) for edge in figure.panels))
    with whole_file(path) as temporary:
        figure.picture.save(temporary, format="PNG", pnginfo=marks, compress_level=1)


def read_panels(path: Path) -> Image.Image | None:
    """Cut the three panels out of a heat map that `save` wrote; None where there is none, or it is damaged."""
    if not path.is_file() or not is_ours(path):
        return None
    try:
        with Image.open(path, formats=("PNG",)) as figure:
            left, top, right, bottom = (int(edge) for edge in figure.info[_PANELS_KEY].split())
            if not (0 <= left < right <= figure.width and 0 <= top < bottom <= figure.height):
                return None
            return figure.convert("RGB").crop((left, top, right, bottom))
    except (OSError, SyntaxError, ValueError, KeyError):  # what Pillow raises at a damaged PNG, and what int does
        return None


def is_ours(path: Path) -> bool:
    """Say whether a file is a heat map that this tool wrote, so that --overwrite removes nothing else."""
    try:
        with path.open("rb") as file:
            return b"tEXtSoftware\x00" + SOFTWARE.encode() in file.read(_SIGNATURE_BYTES)
    except OSError:
        return False


def heatmap_names(sources: Iterable[str]) -> list[str]:
    """Name each source's heat map: its own path, ending in .png; equal ones get ~2, ~3.

    So do those that end as a frame's does (see frame_path), so that no source can take the name of another's frame.
    """
    taken: set[str] = set()
    names = []
    for source in sources:
        path = PurePosixPath(source)
        stem = str(path.with_suffix("") if path.suffix.lower() == ".png" else path)
        name, number = name_for(stem, ".png"), 1
        while name in taken or _FRAME_NAME.search(name):
            number += 1
            name = name_for(f"{stem}~{number}", ".png")
        taken.add(name)
        names.append(name)
    return names


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _colour_bar(
    figure: Image.Image, pen: ImageDraw.ImageDraw, x: int, top: int, height: int, scale: ColourScale
) -> None:
    rows = np.linspace(255, 0, height).round().astype(np.intp)
    bar = np.repeat(colour_table()[rows][:, None, :], _BAR, axis=1)
    figure.paste(Image.fromarray(np.ascontiguousarray(bar)), (x, top))
    for share, mark in ((0.0, ""), (0.5, ""), (1.0, ">= ")):
        value = scale.low + share * (scale.high - scale.low)
        y = top + round((1.0 - share) * (height - 1))
        anchor = {0.0: "ls", 0.5: "lm", 1.0: "lt"}[share]
        pen.text((x + _BAR + 6, y), f"{mark}{value:.3g}", fill=_QUIET, font=_font(), anchor=anchor)
