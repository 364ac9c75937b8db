"""The document on reading states the limits and defaults that the code has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from qfae_runtime import pipeline, record
from qfae_runtime.readers import base, contained, jpeg, window
from qfae_runtime.readers.dicom import MISSING
from qfae_runtime.readers.dicom_header import SHORT_HEADER_BYTES

from . import fuzz

ROOT = Path(__file__).parents[2]
TEXT = " ".join((ROOT / "docs" / "reading.md").read_text(encoding="utf-8").split())


def test_limits() -> None:
    for said in (
        f"{base.MAX_PIXELS:,} pixels, {base.MAX_SIDE:,} on a side",
        f"{base.MAX_FRAMES:,} pictures; {base.MAX_DECODED_BYTES // 2**30} GiB of pixels, decompressed",
        f"{base.MAX_VOLUME_BYTES // 2**30} GiB as stored, decompressed",
        f"{contained.SECONDS_PER_PICTURE:.0f} seconds, {contained.MEMORY_BYTES // 2**30} GiB of address space",
        f"| a JPEG | {jpeg.MAX_SCANS} scans",
        f"; {jpeg.MAX_SEGMENTS:,} segments |",
        f"| {base.MAX_HEADER_BYTES // 2**20} MiB have to be read",
        f"more than {SHORT_HEADER_BYTES // 2**20} MiB has to be read",
        f"decoded {pipeline.FRAMES_AT_ONCE} frames at a time",
        f"within {fuzz.SECONDS_PER_FILE:.0f} seconds and {fuzz.MEMORY_BYTES // 2**30} GiB",
        f"the {window.LOW_PERCENTILE}th and {window.HIGH_PERCENTILE}th percentile of the frame",
        MISSING.partition("with: ")[2],
    ):
        assert said in TEXT, said


def test_the_decoders_of_the_table_are_in_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = {re.split(r"[>=<]", one)[0] for one in project["optional-dependencies"]["medical"]}
    for name in ("pylibjpeg-rle", "python-gdcm", "pyjpegls", "pylibjpeg-openjpeg"):
        assert f"| {name} |" in TEXT
        assert name in extra
    assert "pylibjpeg-libjpeg" not in extra


def test_every_decoder_is_recorded() -> None:
    """Another version of one may give other pixels: a run is not resumed on it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = {re.split(r"[>=<]", one)[0] for one in project["optional-dependencies"]["medical"]}
    assert extra | {"numpy", "pillow", "opencv-python-headless", "pylibjpeg-libjpeg"} == set(record._READERS)
