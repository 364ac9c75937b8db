"""One run of qfae-run, from the options to the results folder. `execute` is the order of events."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from qfae_runtime.calibration import Calibration, Decider, path_beside
from qfae_runtime.calibration import load as load_calibration
from qfae_runtime.engines import BACKENDS, DEVICES, OpenedEngine, open_engine
from qfae_runtime.errors import CanaryError, OutputError, QfaeError, RunInterruptedError, UsageError
from qfae_runtime.inputs import Inputs
from qfae_runtime.interruption import last_words
from qfae_runtime.jobs import Jobs
from qfae_runtime.labels import read_labels
from qfae_runtime.layout import Scan, scan
from qfae_runtime.metrics import PixelMetrics
from qfae_runtime.options import Options
from qfae_runtime.parts import DONE, FAILED, INTERRUPTED
from qfae_runtime.pipeline import Outcome, Pipeline
from qfae_runtime.pseudonyms import Pseudonyms
from qfae_runtime.record import Clock, Ledger, Subject, changes, fingerprint_of, ledger_of
from qfae_runtime.resuming import restart_of
from qfae_runtime.scorer import Scorer
from qfae_runtime.selftest import self_test
from qfae_runtime.verdicts import Verdict
from qfae_runtime.workers import Seconds
from qfae_runtime.writers.folder import Finished, ResultsFolder
from qfae_runtime.writers.heatmap import ColourScale
from qfae_runtime.writers.metrics import UnusableMasks, compute_metrics
from qfae_runtime.writers.records import OK, Row, RowWriter, read_rows, removed, write_csv
from qfae_runtime.writers.report import write_report


@dataclass
class Counts:
    """Files so far: `done` of `total`, `resumed` of them before this run; their `rows`, the `errors` among these."""

    total: int
    resumed: int = 0
    done: int = 0
    errors: int = 0
    rows: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return what run.json says of them."""
        return {
            "files": self.total,
            "rows": self.rows,
            "scored": self.rows - self.errors,
            "errors": self.errors,
            "resumed": self.resumed,
        }


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


_STEPS = ("preparing", "scoring", "results")

Progress = Callable[[Counts], None]
Say = Callable[[str], None]


def execute(options: Options, progress: Progress = lambda _: None, say: Say = lambda _: None) -> Summary:
    """Open and test the engine, find the images, score them, write everything; `progress` hears of every row.

    `say` is told in one line what runs the engine and why, where that was left open.

    Raises:
        QfaeError: see errors.py; RunInterruptedError on Ctrl-C, with whole rows written.

    """
    clock = Clock()
    given, options = options, _as_begun(options)
    found = find_inputs(options.images, options.listed, options.out)
    clock.lap("listing")
    with open_asked(options) as opened:
        check_batch_size(options, opened)
        clock.lap("opening")
        force = options.selftest or _went_wrong(options)
        verdict = self_test(opened, batch_size=options.batch_size, force=force)
        clock.lap("self_test")
        try:
            run = _Run(options, given, opened, verdict, found, clock)
            with closing(run):
                return run.go(progress, say)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise removed(options.out) from None
            raise OutputError(
                f"{options.out}: cannot be written ({error.strerror or error}); "
                "the rows written so far are whole, go on with --resume"
            ) from None


def open_asked(options: Options) -> OpenedEngine:
    """Open the engine as the options ask; errors as in open_engine."""
    return open_engine(
        options.engine,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        batch_size=options.batch_size,
        allow_uncertified=options.allow_uncertified,
    )


def check_batch_size(options: Options, opened: OpenedEngine) -> None:
    """Refuse a batch size that the engine does not take.

    Raises:
        UsageError: what it takes.

    """
    most = opened.engine.max_batch
    if options.batch_size is not None and options.batch_size > most:
        raise UsageError(f"--batch-size: got {options.batch_size}, this engine takes 1..{most}")


def other_batch_size(options: Options, scorer: Scorer) -> str | None:
    """Say in one line which batch size is used in place of the one asked for, where that was not measured."""
    if options.batch_size in (None, scorer.batch_size):
        return None
    used = scorer.batch_size
    return f"--batch-size {options.batch_size}: runs in batches of {used}, the largest size up to it that was measured"


def find_inputs(images: Sequence[Path], listed: Sequence[Path] = (), out: Path | None = None) -> Scan:
    """List the images below the paths given; the output folder is not searched. Paths `listed` need not be there.

    Raises:
        QfaeError: an input does not exist, is the output folder itself, or there is no image at all.

    """
    if out is not None and (same := [str(path) for path in (*images, *listed) if _is_same_folder(path, out)]):
        raise UsageError(f"--out {out}: is the input folder {same[0]} itself; choose another --out")
    try:
        found = scan(images, exclude=[out] if out is not None else [], listed=listed)
    except FileNotFoundError as error:
        raise QfaeError(f"{error}: no such file or folder; check the path of the images") from None
    if not found.images:
        passed_over = ", ".join(f"{count} x {name or 'without suffix'}" for name, count in found.ignored.items())
        where = ", ".join(str(path) for path in images) or "the list"
        raise QfaeError(
            f"{where}: no image in it (ignored: {passed_over or 'nothing'}; mask files: {found.mask_files}); "
            "pass a folder with PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI images"
        )
    return found


class _Run:
    """The state of one run after its engine was opened and tested."""

    def __init__(
        self, options: Options, given: Options, opened: OpenedEngine, verdict: Verdict, found: Scan, clock: Clock
    ) -> None:
        self.options, self.opened, self.verdict, self.found, self.clock = options, opened, verdict, found, clock
        self.folder = ResultsFolder(options.out)
        self.scorer = Scorer.of(opened, options.batch_size)
        self.names = Pseudonyms.from_file(options.deidentify) if options.deidentify else None
        self.sources = [self._named(found.source_of(path)) for path in found.images]
        self.scale = ColourScale.of(self.scorer.canary.golden if self.scorer.canary is not None else None)
        self.calibration = _calibration(options, opened)
        self.spent = Seconds()
        self.subject = Subject(
            options,
            given,
            opened,
            verdict,
            found,
            self.sources,
            self.scorer.batch_size,
            self.scale,
            self.calibration,
            self.names,
        )
        self.jobs = self._jobs()

    def close(self) -> None:
        """Let other runs into the results folder."""
        self.folder.release()

    def go(self, progress: Progress, say: Say) -> Summary:
        """Score what is left to score and write the results."""
        folder = self.folder
        inputs = Inputs.of(self.found.images, self.sources, self.names, hashed=self.options.hash_inputs)
        ledger, counts = self._begin(inputs)
        if ledger is None:
            return Summary(folder, counts, self.clock.total, folder.read_metrics(), self.verdict, nothing_left=True)
        if self.opened.choice is not None:
            say(self.opened.choice.sentence())
        if (line := other_batch_size(self.options, self.scorer)) is not None:
            say(line)
        try:
            folder.write_json(folder.run, ledger.record())
            if not counts.rows or not folder.inputs.is_file():
                folder.write_lines(folder.inputs, inputs.lines())
            del inputs  # megabytes, where there are many
            truth = _Truth() if self._wants_pixels() else None
            self.clock.lap("preparing")
            with last_words(partial(self._stopped_by_force, ledger, counts)):
                self._score(counts, truth, progress)
            self.clock.lap("scoring")
            metrics = self._results(ledger, counts, truth)
        except KeyboardInterrupt:
            self._stopped(ledger, INTERRUPTED, counts)
            raise RunInterruptedError(f"stopped: {self._how_far(counts)}") from None
        except CanaryError as error:
            self._stopped(ledger, FAILED, counts, error.first)
            raise CanaryError(
                error.reason,
                error.first,
                of="row",
                where=f" of {folder.jsonl}",
                cure="; the rows before it were followed by a right golden image, which excludes a fault that lasts, "
                "not one that came and went; --resume keeps them, and takes back the others and scores them again",
            ) from None
        except BaseException:
            self._stopped(ledger, FAILED, counts)
            raise
        return Summary(folder, counts, self.clock.total, metrics, self.verdict)

    def _begin(self, inputs: Inputs) -> tuple[Ledger | None, Counts]:
        """Make the folder ready and see what is done; no ledger where nothing is left to do."""
        options, folder = self.options, self.folder
        fingerprint = fingerprint_of(self.subject, inputs)
        folder.prepare(overwrite=options.overwrite, resume=options.resume)
        before, last_seen = Finished(), folder.last_seen()
        stored = folder.read_run() if options.resume else {}
        if options.resume:
            if begun := folder.begun():
                folder.refuse_another_run(changes(begun, fingerprint, inputs, folder.inputs))
            before = folder.finished_sources(self.sources, stored.get("untrusted_from_row"))
        done = before.files
        counts = Counts(total=len(self.jobs), resumed=done, done=done, rows=before.rows)
        if done:
            counts.errors = sum(row.status != OK for row in read_rows(folder.jsonl))
        if done == len(self.jobs) and folder.is_finished():
            return None, counts
        return ledger_of(self.subject, fingerprint, stored, self.clock.started, before.rows, last_seen), counts

    def _results(self, ledger: Ledger, counts: Counts, truth: _Truth | None) -> dict[str, Any] | None:
        """Write what is made of the rows: table, metrics, report, and the record last of all."""
        folder = self.folder
        write_csv(folder.jsonl, folder.csv)
        metrics = compute_metrics(
            read_rows(folder.jsonl),
            truth.pixels if truth else None,
            self._pixel_note(),
            truth.unusable if truth else None,
        )
        if metrics is not None:
            folder.write_json(folder.metrics, metrics)
        self.clock.lap("results")
        record = ledger.ended(DONE, counts.to_dict(), self.clock.seconds(self.spent), self.scorer)
        write_report(
            folder,
            record,
            metrics,
            self.opened,
            self.calibration,
            self.scale,
        )
        self.clock.lap("results")
        record = ledger.ended(DONE, counts.to_dict(), self.clock.seconds(self.spent), self.scorer)
        folder.write_json(folder.run, record)
        return metrics

    def _stopped(self, ledger: Ledger, status: str, counts: Counts, untrusted_from_row: int | None = None) -> None:
        """Put into run.json how this start ended, if that can be written: what ended it is told in any case."""
        self.clock.lap(next((step for step in _STEPS if step not in self.clock.laps), _STEPS[-1]))
        with suppress(OSError):
            seconds = self.clock.seconds(self.spent)
            record = ledger.ended(status, counts.to_dict(), seconds, self.scorer, untrusted_from_row)
            self.folder.write_json(self.folder.run, record)

    def _stopped_by_force(self, ledger: Ledger, counts: Counts) -> str:
        self._stopped(ledger, INTERRUPTED, counts)
        return self._how_far(counts)

    def _how_far(self, counts: Counts) -> str:
        return (
            f"{counts.done} of {counts.total} files have whole rows in {self.folder.jsonl}; "
            "go on with the same command and --resume"
        )

    def _jobs(self) -> Jobs:
        shown = self.names.of if self.names is not None else repr
        labels = read_labels(self.options.labels, shown) if self.options.labels else None
        if labels is not None:
            known = {self.found.source_of(path) for path in self.found.images}
            if unknown := sorted(set(labels) - known):
                raise UsageError(
                    f"--labels {self.options.labels}: {len(unknown)} sources are not among the images, the first is "
                    f"{shown(unknown[0])}; a source is a path below "
                    + ("the folder of the images" if self.names is not None else str(self.found.root))
                )
        heatmaps = self.folder.heatmaps if self.options.maps else None
        maps = self.folder.maps if self.options.save_maps else None
        return Jobs(self.found, self.sources, labels, heatmaps, maps)

    def _named(self, text: str) -> str:
        """Return what stands for a name in the results."""
        return self.names.of(text) if self.names is not None else text

    def _row(self, outcome: Outcome) -> Row:
        """Return the row as it is written: a reason may name the file it speaks of."""
        row = outcome.row
        if self.names is None or row.error is None:
            return row
        return replace(row, error=self.names.scrub(row.error, outcome.picture.job.path, row.source))

    def _score(self, counts: Counts, truth: _Truth | None, progress: Progress) -> None:
        """Score and write the files after the resumed ones, in the batches of an uninterrupted run.

        Of the resumed ones, those are scored again that share a batch with others; and all if `truth` must count their
        maps.
        """
        finished = counts.resumed
        restart = restart_of(self._rows(), self.scorer.batch_size, canaries=self.scorer.canary is not None)
        if truth is not None:
            restart = restart.from_the_first()
        elif finished == len(self.jobs):
            return
        pipeline = Pipeline(
            self.scorer,
            maps=self.options.maps,
            truth=truth is not None,
            scale=self.scale,
            decider=Decider(self.calibration) if self.calibration is not None else None,
            seconds=self.spent,
            reading=self.options.reading,
        )
        rows = RowWriter(self.folder.jsonl)
        try:
            # closing(): an interruption ends the pipeline's threads before anything else is written.
            jobs = self.jobs.from_number(finished, restart.file)
            with closing(pipeline.run(jobs, restart.start, restart.skip)) as outcomes:
                files = restart.file
                for outcome in outcomes:
                    new = files >= finished
                    if new:
                        with self.spent.measured("writing"):
                            rows.write(self._row(outcome))
                        counts.rows += 1
                        counts.done += outcome.picture.last
                        counts.errors += outcome.row.status != OK
                    files += outcome.picture.last
                    if truth is not None:
                        truth.count(outcome)
                    if new or truth is not None:
                        progress(counts)
        finally:
            rows.close()

    def _rows(self) -> Iterator[Row]:
        """Yield the rows that are there already."""
        return read_rows(self.folder.jsonl) if self.folder.jsonl.exists() else iter(())

    def _wants_pixels(self) -> bool:
        return self.options.maps and self.jobs.labelled()

    def _pixel_note(self) -> str | None:
        return None if self.options.maps else "the pixel metrics need the anomaly maps; run without --no-maps"


def _as_begun(options: Options) -> Options:
    """Return the options of a run to go on with, on the backend it began on: `auto` may choose otherwise by now."""
    if not options.resume or options.backend != "auto":
        return options
    begun = ResultsFolder(options.out).read_run().get("fingerprint")
    backend, device = (begun.get(key) for key in ("backend", "device")) if isinstance(begun, dict) else (None, None)
    if backend == "tensorrt-rtx":  # either kind of plan is asked for by one word
        backend = "tensorrt"
    if backend not in BACKENDS or device not in DEVICES:
        return options
    return replace(options, backend=backend, device=device)


def _went_wrong(options: Options) -> bool:
    """Say whether the run to resume ended because its engine went wrong: a self-test from before that says nothing."""
    return options.resume and ResultsFolder(options.out).read_run().get("untrusted_from_row") is not None


def _calibration(options: Options, opened: OpenedEngine) -> Calibration | None:
    """Return the calibration that was named, or else the one beside the engine, if there is one."""
    path = options.calibration or path_beside(opened.path)
    if options.calibration is None and not path.is_file():
        return None
    return load_calibration(path, opened, options.reading.to_dict())


def _is_same_folder(one: Path, other: Path) -> bool:
    try:
        return one.is_dir() and one.samefile(other)
    except OSError:  # one of them is not there, or is out of reach: each has its own message later
        return False


__all__ = [
    "Counts",
    "Options",
    "Progress",
    "Say",
    "Summary",
    "check_batch_size",
    "execute",
    "find_inputs",
    "open_asked",
    "other_batch_size",
]
