"""One run of qfae-run, from the options to the results folder. `execute` is the order of events."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy
import PIL

import qfae_runtime
from qfae_runtime.engines import OpenedEngine, open_engine
from qfae_runtime.errors import OutputError, QfaeError, RunInterruptedError, UsageError
from qfae_runtime.golden import golden_bytes, load_golden
from qfae_runtime.hashing import sha256_of
from qfae_runtime.labels import read_labels
from qfae_runtime.layout import Scan, label_of, scan
from qfae_runtime.metrics import PixelMetrics
from qfae_runtime.pipeline import Job, Outcome, Pipeline
from qfae_runtime.readers import ReadOptions
from qfae_runtime.scorer import Scorer
from qfae_runtime.selftest import Verdict, self_test
from qfae_runtime.writers.folder import Finished, ResultsFolder
from qfae_runtime.writers.heatmap import ColourScale, heatmap_names
from qfae_runtime.writers.maps import map_name
from qfae_runtime.writers.metrics import UnusableMasks, compute_metrics
from qfae_runtime.writers.records import OK, RowWriter, read_rows, write_csv
from qfae_runtime.writers.report import write_report


@dataclass(frozen=True)
class Options:
    """What was asked for; the defaults of the command line live here. `batch_size` and `threads` None: chosen.

    `listed` are paths that a list named: unlike those of `images` they need not be there, each gets its row.
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
    reading: ReadOptions = field(default_factory=ReadOptions)
    listed: tuple[Path, ...] = ()


@dataclass
class Counts:
    """Files so far: `done` of `total`, `resumed` of them before this run; their `rows`, the `errors` among these."""

    total: int
    resumed: int = 0
    done: int = 0
    errors: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    folder: ResultsFolder
    counts: Counts
    seconds: float
    metrics: dict[str, Any] | None
    verdict: Verdict
    nothing_left: bool = False  # the run in the folder was finished, and nothing was written


@dataclass
class _Truth:
    """What the maps were counted against: `pixels`, and the masks that could not be used."""

    pixels: PixelMetrics = field(default_factory=PixelMetrics)
    unusable: UnusableMasks = field(default_factory=UnusableMasks)

    def count(self, outcome: Outcome) -> None:
        """Count the map of a scored picture; the others have none."""
        scored = outcome.scored
        if scored is not None and scored.anomaly_map is not None:
            self.pixels.add(scored.anomaly_map, outcome.picture.truth)
            self.unusable.count(outcome.picture.mask_fault)


Progress = Callable[[Counts], None]


def execute(options: Options, progress: Progress = lambda _: None) -> Summary:
    """Open and test the engine, find the images, score them, write everything; `progress` hears of every row.

    Raises:
        QfaeError: see errors.py; RunInterruptedError on Ctrl-C, with whole rows written.

    """
    start = time.perf_counter()
    found = find_inputs(options)
    with open_engine(
        options.engine,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        allow_uncertified=options.allow_uncertified,
    ) as opened:
        if options.batch_size is not None and options.batch_size > opened.engine.max_batch:
            most = opened.engine.max_batch
            raise UsageError(f"--batch-size: got {options.batch_size}, this engine takes 1..{most}")
        verdict = self_test(opened, force=options.selftest)
        try:
            return _Run(options, opened, verdict, found).go(start, progress)
        except OSError as error:
            raise OutputError(
                f"{options.out}: cannot be written ({error.strerror or error}); "
                "the rows written so far are whole, go on with --resume"
            ) from None


def find_inputs(options: Options) -> Scan:
    """List the images of a run; the output folder is not searched.

    Raises:
        QfaeError: an input does not exist, is the output folder itself, or there is no image at all.

    """
    if same := [str(path) for path in (*options.images, *options.listed) if _is_same_folder(path, options.out)]:
        raise UsageError(f"--out {options.out}: is the input folder {same[0]} itself; choose another --out")
    try:
        found = scan(options.images, exclude=[options.out], listed=options.listed)
    except FileNotFoundError as error:
        raise QfaeError(f"{error}: no such file or folder; check the path of the images") from None
    if not found.images:
        passed_over = ", ".join(f"{count} x {name or 'without suffix'}" for name, count in found.ignored.items())
        where = ", ".join(str(path) for path in options.images) or "the list"
        raise QfaeError(
            f"{where}: no image in it (ignored: {passed_over or 'nothing'}; mask files: {found.mask_files}); "
            "pass a folder with PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI images"
        )
    return found


class _Run:
    """The state of one run after its engine was opened and tested."""

    def __init__(self, options: Options, opened: OpenedEngine, verdict: Verdict, found: Scan) -> None:
        self.options, self.opened, self.verdict, self.found = options, opened, verdict, found
        self.folder = ResultsFolder(options.out)
        self.scorer = Scorer(opened.engine, opened.manifest, options.batch_size)
        self.sources = [found.source_of(path) for path in found.images]
        content = golden_bytes(opened)
        golden = load_golden(content, opened.manifest.golden or "", opened.manifest.image_size) if content else None
        self.scale = ColourScale.of(golden)
        self.jobs = self._jobs()

    def go(self, start: float, progress: Progress) -> Summary:
        """Score what is left to score and write the results."""
        options, folder = self.options, self.folder
        fingerprint = self._fingerprint()
        folder.prepare(overwrite=options.overwrite, resume=options.resume)
        before = folder.finished_sources(fingerprint, self.sources) if options.resume else Finished()
        done = before.files
        counts = Counts(total=len(self.jobs), resumed=done, done=done, rows=before.rows)
        if done:
            counts.errors = sum(row.status != OK for row in read_rows(folder.jsonl))
        if done == len(self.jobs) and folder.is_finished():
            return Summary(
                folder, counts, time.perf_counter() - start, folder.read_metrics(), self.verdict, nothing_left=True
            )
        record = self._record(fingerprint)
        folder.write_json(folder.run, {**record, "status": "running"})
        truth = _Truth() if self._wants_pixels() else None
        try:
            self._score(done, counts, truth, progress)
        except KeyboardInterrupt:
            folder.write_json(folder.run, {**record, "status": "interrupted", "counts": _counts(counts)})
            raise RunInterruptedError(
                f"stopped: {counts.done} of {counts.total} files have whole rows in {folder.jsonl}; "
                "go on with the same command and --resume"
            ) from None
        scored_seconds = time.perf_counter() - start
        write_csv(folder.jsonl, folder.csv)
        metrics = compute_metrics(
            read_rows(folder.jsonl),
            truth.pixels if truth else None,
            self._pixel_note(),
            truth.unusable if truth else None,
        )
        if metrics is not None:
            folder.write_json(folder.metrics, metrics)
        record |= {
            "status": "done",
            "finished": _now(),
            "counts": _counts(counts),
            "seconds": {"scoring": round(scored_seconds, 3)},
        }
        write_report(folder, record, metrics, self.opened, self.scale, dict(zip(self.sources, self.jobs, strict=True)))
        seconds = time.perf_counter() - start
        record["seconds"] |= {"total": round(seconds, 3)}
        folder.write_json(folder.run, record)
        return Summary(folder, counts, seconds, metrics, self.verdict)

    def _jobs(self) -> list[Job]:
        labels = read_labels(self.options.labels) if self.options.labels else None
        if labels is not None and (unknown := sorted(set(labels) - set(self.sources))):
            raise UsageError(
                f"--labels {self.options.labels}: {len(unknown)} sources are not among the images, the first is "
                f"{unknown[0]!r}; a source is a path below {self.found.root}"
            )
        names = heatmap_names(self.sources) if self.options.maps else [None] * len(self.sources)
        jobs = []
        for path, source, name in zip(self.found.images, self.sources, names, strict=True):
            label = labels.get(source) if labels is not None else label_of(path, self.found.root)
            heatmap = None if name is None else self.folder.heatmaps / name
            saved = self.folder.maps / map_name(source) if self.options.save_maps else None
            jobs.append(Job(path, source, label, heatmap, saved))
        return jobs

    def _score(self, finished: int, counts: Counts, truth: _Truth | None, progress: Progress) -> None:
        """Score and write the files after the `finished` ones, whose maps are made again if `truth` must count them.

        All of them are, in the batches of an uninterrupted run: the last digits of a map depend on its batch.
        """
        again = finished if truth is not None else 0
        jobs = [replace(job, heatmap=None, saved_map=None) for job in self.jobs[:again]] + self.jobs[finished:]
        threshold = self.opened.manifest.threshold
        pipeline = Pipeline(
            self.scorer,
            maps=self.options.maps,
            truth=truth is not None,
            scale=self.scale,
            threshold=threshold.value if threshold else None,
            inside=self.folder.root,
            reading=self.options.reading,
        )
        rows = RowWriter(self.folder.jsonl)
        try:
            # closing(): an interruption ends the pipeline's threads before anything else is written.
            with closing(pipeline.run(jobs)) as outcomes:
                files = 0
                for outcome in outcomes:
                    if files >= again:
                        rows.write(outcome.row)
                        counts.rows += 1
                        counts.done += outcome.picture.last
                        counts.errors += outcome.row.status != OK
                    files += outcome.picture.last
                    if truth is not None:
                        truth.count(outcome)
                    progress(counts)
        finally:
            rows.close()

    def _wants_pixels(self) -> bool:
        return self.options.maps and any(job.label is not None for job in self.jobs)

    def _pixel_note(self) -> str | None:
        return None if self.options.maps else "the pixel metrics need the anomaly maps; run without --no-maps"

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that decides what the rows hold: a run is resumed only if all of it is unchanged."""
        options, opened = self.options, self.opened
        threshold = opened.manifest.threshold
        return {
            "engine_sha256": opened.sha256,
            "preprocess_sha256": opened.manifest.preprocess.sha256(),
            "backend": opened.engine.backend,
            "backend_version": opened.engine.version,
            "device": opened.engine.device,
            "batch_size": self.scorer.batch_size,
            "maps": options.maps,
            "save_maps": options.save_maps,
            "window": list(options.reading.window) if options.reading.window else None,
            "axis": options.reading.axis,
            "slices": list(options.reading.slices) if options.reading.slices else None,
            "threshold": threshold.value if threshold else None,
            "labels_sha256": sha256_of(options.labels) if options.labels else None,
            "root": str(self.found.root),
            "inputs": len(self.sources),
            "inputs_sha256": _digest_of_list(self.sources),
            "inputs_state_sha256": _digest_of_list([_state_of(path) for path in self.found.images]),
        }

    def _record(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        opened, found = self.opened, self.found
        return {
            "qfae": qfae_runtime.__version__,
            "started": _now(),
            "engine": opened.path.name,
            "model": opened.manifest.name,
            "certified": opened.certificate is not None,
            "allow_uncertified": self.options.allow_uncertified,
            "self_test": self.verdict.to_dict(),
            "fingerprint": fingerprint,
            "threads": self.options.threads,
            "colour_scale": {"low": self.scale.low, "high": self.scale.high, "origin": self.scale.origin},
            "inputs": {"root": str(found.root), "ignored": found.ignored, "mask_files": found.mask_files},
            "versions": {
                "python": platform.python_version(),
                "numpy": numpy.__version__,
                "pillow": PIL.__version__,
                "opencv": cv2.__version__,
                opened.engine.backend: opened.engine.version,
            },
            "platform": platform.platform(),
        }


def _counts(counts: Counts) -> dict[str, int]:
    return {
        "files": counts.total,
        "rows": counts.rows,
        "scored": counts.rows - counts.errors,
        "errors": counts.errors,
        "resumed": counts.resumed,
    }


def _digest_of_list(sources: list[str]) -> str:
    text = "\0".join(sources).encode("utf-8", errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()


def _is_same_folder(one: Path, other: Path) -> bool:
    try:
        return one.is_dir() and one.samefile(other)
    except OSError:  # one of them is not there, or is out of reach: each has its own message later
        return False


def _state_of(path: Path) -> str:
    # Size and time of change instead of the content: a run must not read its inputs twice to find them unchanged.
    try:
        status = path.stat()
    except OSError:
        return "none"
    return f"{status.st_size} {status.st_mtime_ns}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
