"""Damaged files by the thousand through the readers: `python -m tests.runtime.fuzz --files 10000 --seed 1`.

Small valid files of every format are mutated by a seeded generator and read. Each must give pictures or an InputError,
within SECONDS_PER_FILE and MEMORY_BYTES. The files are read in a process of its own, so that one that a decoder
crashes is counted and named by its number; `--show NUMBER` writes a mutant to stdout.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pydicom.data
from PIL import Image

from qfae_runtime.errors import InputError
from qfae_runtime.readers import read_slices
from qfae_runtime.readers.contained import end_all

from .dicom_files import dicom_bytes

SECONDS_PER_FILE = 60.0
MEMORY_BYTES = 2 * 2**30
ROOT = Path(__file__).parents[2]
# Of pydicom's own files, the small ones of each compressed syntax.
_COMPRESSED = {
    "rle": "MR_small_RLE.dcm",
    "jpeg": "SC_rgb_small_odd_jpeg.dcm",
    "jpeg-ybr": "SC_rgb_dcmtk_+eb+cy+np.dcm",
    "jpeg-lossless": "SC_rgb_jpeg_gdcm.dcm",
    "jpeg-ls": "MR_small_jpeg_ls_lossless.dcm",
    "jpeg-ls-lossy": "SC_rgb_jls_lossy_line.dcm",
    "jpeg-2000": "MR_small_jp2klossless.dcm",
    "jpeg-2000-lossy": "SC_rgb_gdcm_KY.dcm",
    "deflated": "image_dfl.dcm",
    "enhanced": "SC_rgb_rle_2frame.dcm",
}


def seeds() -> dict[str, bytes]:
    """Return a small valid file of every format, by a name for it."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (16, 20), dtype=np.uint8)
    colour = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
    cmyk = Image.fromarray(rng.integers(0, 256, (16, 20, 4), dtype=np.uint8), "CMYK")
    pages = [Image.fromarray(np.roll(grey, n)) for n in range(3)]
    shades = [Image.fromarray(np.roll(colour, n)) for n in range(3)]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    more = {"save_all": True}
    made = {
        "png": _saved(Image.fromarray(colour), "PNG"),
        "png-16": _saved(deep, "PNG"),
        "png-palette": _saved(Image.fromarray(colour).quantize(16), "PNG"),
        "jpeg": _saved(Image.fromarray(colour), "JPEG"),
        "jpeg-progressive": _saved(Image.fromarray(colour), "JPEG", progressive=True),
        "jpeg-cmyk": _saved(cmyk, "JPEG"),
        "bmp": _saved(Image.fromarray(colour), "BMP"),
        "tiff-pages": _saved(pages[0], "TIFF", append_images=pages[1:], **more),
        "tiff-lzw": _saved(shades[0], "TIFF", compression="tiff_lzw"),
        "tiff-deflate": _saved(deep, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-jpeg": _saved(shades[0], "TIFF", compression="jpeg"),
        "tiff-fax": _saved(Image.fromarray(grey).convert("1"), "TIFF", compression="group4"),
        "webp": _saved(shades[0], "WEBP"),
        "webp-frames": _saved(shades[0], "WEBP", append_images=shades[1:], lossless=True, **more),
        "dicom": dicom_bytes(grey.astype(np.uint16) * 16, WindowCenter="2000", WindowWidth="4000"),
        "dicom-frames": dicom_bytes(np.stack([grey, grey, grey]).astype(np.int16)),
        "dicom-colour": dicom_bytes(colour),
        "dicom-float": dicom_bytes(rng.normal(size=(16, 20)).astype(np.float32)),
        "nifti": _volume(rng.integers(-900, 900, (9, 8, 7)).astype(np.int16), scale=2.0),
        "nifti-float": _volume(rng.normal(size=(9, 8, 7)).astype(np.float32)),
    }
    made |= {f"{name}.gz": gzip.compress(made[name], mtime=0) for name in ("nifti", "nifti-float")}
    folder = Path(pydicom.data.__file__).parent / "test_files"
    return made | {f"dicom-{name}": (folder / file).read_bytes() for name, file in _COMPRESSED.items()}


def mutant(originals: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """Return the mutant of a number, and the name of what it was made from."""
    rng = np.random.default_rng([seed, number])
    names = list(originals)
    name = names[number % len(names)]
    content = originals[name]
    inside = name.endswith(".gz") and rng.random() < 0.7
    content = gzip.decompress(content) if inside else content
    for _ in range(int(rng.integers(1, 4))):
        content = _mutated(content, rng)
    return name, gzip.compress(content, 1, mtime=0) if inside else content


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(content)
    size = max(1, len(data))
    # Most of what can go wrong is decided by the first bytes.
    at = int(rng.integers(0, size) if rng.random() < 0.5 else rng.integers(0, min(size, 600)))
    length = int(rng.integers(1, 64))
    match int(rng.integers(0, 8)):
        case 0:
            data[at : at + 1] = bytes([rng.integers(0, 256)])
        case 1:
            data[at : at + 1] = bytes([data[at] ^ (1 << int(rng.integers(0, 8)))]) if at < len(data) else b""
        case 2:
            data[at : at + length] = rng.bytes(length)
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length]
        case 5:
            del data[at:]
        case 6:
            extreme = rng.choice(np.array([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
            width = int(rng.choice(np.array([1, 2, 4])))
            masked = int(extreme) & ((1 << (8 * width)) - 1)
            data[at : at + width] = masked.to_bytes(width, "little" if rng.random() < 0.5 else "big")
        case _:
            data[at : at + length] = bytes(length)
    return _mended(bytes(data)) if rng.random() < 0.7 else bytes(data)


def _mended(content: bytes) -> bytes:
    """Mend the check sums of a PNG, without which nothing behind them is ever reached."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


@dataclass
class Findings:
    """What a number of mutants did: how they ended, the longest and which, the peak of memory, and what must not be."""

    files: int = 0
    pictures: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    longest_seconds: float = 0.0
    longest: str = ""
    peak_bytes: int = 0
    crashed_decoders: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_all(numbers: range, seed: int, status: Path | None = None) -> Findings:
    """Read mutants one after another; `status` is told the number of each before it is read."""
    originals, found, ended = seeds(), Findings(), Counter[str]()
    before = _peak_bytes(anew=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant"
        for number in numbers:
            name, content = mutant(originals, seed, number)
            path.write_bytes(content)
            if status is not None:
                status.write_text(str(number))
            begin = time.perf_counter()
            try:
                found.pictures += sum(1 for _ in read_slices(path, "mutant"))
                ended["read"] += 1
            except InputError as error:
                ended["refused"] += 1
                if "crashed" in error.reason or "given up" in error.reason:
                    found.crashed_decoders.append(f"{number} {name}: {error.reason}")
            except Exception as error:
                found.faults.append(f"{number} {name}: {type(error).__name__}: {error}")
            seconds = time.perf_counter() - begin
            if seconds > found.longest_seconds:
                found.longest_seconds, found.longest = seconds, f"{number} {name}"
            found.files += 1
    end_all()
    found.ended = dict(ended)
    found.peak_bytes = max(_peak_bytes() - before, 0)
    return found


def _peak_bytes(*, anew: bool = False) -> int:
    """Return the peak of this process's memory; `anew`: from now on, whatever it did before."""
    if anew:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _volume(values: np.typing.NDArray[np.generic], scale: float | None = None) -> bytes:
    image = nibabel.Nifti1Image(values, np.diag([2.0, -2.0, 3.0, 1.0]))
    image.header.set_slope_inter(scale, 0 if scale else None)
    return bytes(image.to_bytes())


def main() -> None:
    """Read as many mutants as asked for, in processes of 500 each that are replaced when one crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.show is not None:
        sys.stdout.buffer.write(mutant(seeds(), given.seed, given.show)[1])
        return
    numbers = range(given.first, given.first + given.files)
    if given.worker is not None:
        print(json.dumps(asdict(read_all(numbers, given.seed, given.worker))))
        return
    with tempfile.TemporaryDirectory() as folder:
        _in_workers(numbers, given.seed, Path(folder) / "status")


def _in_workers(numbers: range, seed: int, status: Path) -> None:
    total, ended, at = Findings(), Counter[str](), numbers.start
    while at < numbers.stop:
        count = min(500, numbers.stop - at)
        command = [sys.executable, "-m", "tests.runtime.fuzz", "--first", str(at), "--files", str(count)]
        done = subprocess.run(
            [*command, "--seed", str(seed), "--worker", str(status)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        if done.returncode != 0:
            crashed = int(status.read_text())
            total.faults.append(f"{crashed}: the reading process ended with {done.returncode} {done.stderr[-300:]}")
            at = crashed + 1
            continue
        found = Findings(**json.loads(done.stdout.splitlines()[-1]))
        total.files += found.files
        total.pictures += found.pictures
        ended.update(found.ended)
        total.faults += found.faults
        total.crashed_decoders += found.crashed_decoders
        total.peak_bytes = max(total.peak_bytes, found.peak_bytes)
        if found.longest_seconds > total.longest_seconds:
            total.longest_seconds, total.longest = found.longest_seconds, found.longest
        at += count
        total.ended = dict(ended)
        print(json.dumps(asdict(total)), file=sys.stderr, flush=True)
    print(json.dumps(asdict(total), indent=2))


if __name__ == "__main__":
    main()
