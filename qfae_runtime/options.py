"""What a run of qfae-run is asked to do; the home of the command's defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qfae_runtime.readers.base import ReadOptions

_MOST_PATHS = 100


@dataclass(frozen=True)
class Options:
    """What was asked for.

    images             files and folders, walked recursively
    engine             its manifest lies beside it
    out                folder for the results; nothing outside it is written
    batch_size         images per run of the engine; None: 16, or what the engine takes
    backend, device, threads, allow_uncertified
                       as engines.open_engine takes them
    maps               score, anomaly map and reconstruction; False: the score alone
    save_maps          keep every anomaly map as .npy
    overwrite, resume  what to do with results that are there: replace them, go on with them
    selftest           run the self-test even if it passed here before
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

    def to_dict(self, shown: Callable[[str], str] = str) -> dict[str, Any]:
        """Return all of them as plain JSON values, and the folder that relative paths start from.

        `shown` is what stands for a path. Of more than 100 images or listed paths only the number: they are the files
        of inputs.jsonl, below the run's root.
        """

        def told(paths: Sequence[Path]) -> list[str] | dict[str, int]:
            return {"number": len(paths)} if len(paths) > _MOST_PATHS else [shown(str(path)) for path in paths]

        values = asdict(self) | self.reading.to_dict()
        del values["reading"]
        named = {name: shown(str(value)) for name, value in values.items() if isinstance(value, Path)}
        lists = {"images": told(self.images), "listed": told(self.listed)}
        return {**values, **named, **lists, "working_folder": shown(str(Path.cwd()))}
