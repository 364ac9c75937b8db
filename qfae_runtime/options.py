"""What a run of qfae-run is asked to do; the home of the command's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qfae_runtime.readers.base import ReadOptions


@dataclass(frozen=True)
class Options:
    """What was asked for.

    images             files and folders, walked recursively
    engine             its manifest lies beside it
    out                folder for the results; nothing outside it is written
    batch_size         images per run of the engine; None: 16, or what the engine takes
    backend, device    "auto": what fits the engine file
    threads            compute threads of the engine; None: all cores
    maps               score, anomaly map and reconstruction; False: the score alone
    save_maps          keep every anomaly map as .npy
    overwrite, resume  what to do with results that are there: replace them, go on with them
    selftest           run the self-test even if it passed here before
    allow_uncertified  run an engine that was never compared with PyTorch
    labels             CSV file with source and label; None: folder names
    calibration        threshold to decide by; None: the one beside the engine, if there is one
    deidentify         file with the key of pseudonyms; None: names stay
    hash_inputs        put a digest of all input files in run.json
    reading            window, axis and slices of medical files
    listed             paths that a list named: unlike those of `images` they need not be there, each gets its row
    """

    images: tuple[Path, ...]
    engine: Path
    out: Path = Path("results")
    batch_size: int | None = None
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    maps: bool = True
    save_maps: bool = False
    overwrite: bool = False
    resume: bool = False
    selftest: bool = False
    allow_uncertified: bool = False
    labels: Path | None = None
    calibration: Path | None = None
    deidentify: Path | None = None
    hash_inputs: bool = False
    reading: ReadOptions = field(default_factory=ReadOptions)
    listed: tuple[Path, ...] = ()
