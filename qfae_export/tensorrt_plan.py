"""NAME.plan: an ONNX file of this project, built by TensorRT or TensorRT-RTX. The file is the bare plan.

    read the file's facts -> parse -> configure -> build -> prove that attention is fused -> write

Batches run in buckets, 1, 2, 4, ... up to the largest: the runtime fills a batch up to the next one and runs what it
captured for that size. TensorRT tunes kernels for one size of each profile, so there every bucket has a profile of
its own. TensorRT-RTX compiles kernels where it runs, for the sizes it meets: one profile serves all buckets as well,
and is loaded and built in a fraction of the time.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qfae_export.builders import BUILDERS, available, current_gpu, load, refuse_known_bad
from qfae_export.fusion import FusionReport, Kernel, kernels_of_engine, kernels_of_plan, prove
from qfae_export.onnx_facts import read_facts
from qfae_export.tensorrt_session import Profile, Session
from qfae_runtime.engines.cuda import Gpu
from qfae_runtime.errors import OutputError
from qfae_runtime.verdicts import cache_folder
from qfae_runtime.writers.whole import whole_file

RTX_TARGETS = ("SM80", "SM86", "SM89", "SM120")
"""Compute capabilities of an rtx-plan by the library's names: Ampere, Ada and Blackwell cards.

They are the library's own choice where none is made, said aloud so that it can be recorded. SM75 (Turing) is no part
of it: all targets share one program, written for the least of them, so Turing cards need a plan of their own.
"""


@dataclass(frozen=True)
class Plan:
    """A plan that was built and proven, and what its manifest and its runtime have to know.

    kind          "plan" or "rtx-plan"
    precision     of the ONNX file: "fp32" or "fp16"
    builder       the module that built it, `version` its version
    gpu           the card it was built on and is tied to; None: it is tied to `targets` alone
    targets       compute capabilities it was built for, like "SM86"; empty: that of `gpu`
    buckets       batch sizes to run
    profiles      one for each bucket, in their order, or one for all
    seconds       parsing and building
    """

    path: Path
    kind: str
    precision: str
    builder: str
    version: str
    gpu: Gpu | None
    targets: tuple[str, ...]
    buckets: tuple[int, ...]
    profiles: tuple[Profile, ...]
    seconds: float
    fusion: FusionReport

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest."""
        return {
            "builder": self.builder,
            "version": self.version,
            "gpu": asdict(self.gpu) if self.gpu is not None else None,
            "targets": list(self.targets),
            "buckets": list(self.buckets),
            "profiles": [asdict(profile) for profile in self.profiles],
            "tf32": False,
            "seconds": round(self.seconds, 1),
            "fusion": self.fusion.describe(),
        }


def build_plan(
    onnx: Path,
    out: Path,
    kind: str,
    max_batch: int,
    *,
    kept: Sequence[str] = (),
    targets: Sequence[str] = RTX_TARGETS,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda step: None,
) -> Plan:
    """Build the plan of an ONNX file of this project and write it to `out`, whole or not at all.

    `kind` is "plan" or "rtx-plan", `kept` are the selectors of the precision policy that the file was written with,
    `targets` the compute capabilities of an rtx-plan. `cache` is the folder in which TensorRT's timings are
    remembered (None: qfae's own). `say` is told each step as it begins.

    Raises:
        ExportError: the builder is missing, needs a card, or is known to be wrong; the file is none of this project
            or the builder refuses it; an attention is not fused.
        OutputError: the plan cannot be written.

    """
    builder, trt = BUILDERS[kind], load(kind, onnx.name)
    gpu = current_gpu() if builder.needs_gpu else None
    say(f"reading {onnx.name}")
    facts = read_facts(onnx)
    refuse_known_bad(builder, trt.__version__, facts.precision, gpu)
    start = time.perf_counter()
    with _quiet_stderr():
        session = Session(trt, builder, onnx, facts, gpu)
        session.parse()
        chosen = session.configure(targets)
        sizes = buckets(max_batch)
        profiles = profiles_for(sizes, portable=session.portable)
        session.add_profiles(profiles)
        cards = ", ".join(chosen) or (gpu.name if gpu is not None else "this machine")
        say(f"building {out.name} for {cards} with {session.title}")
        folder = cache or cache_folder()
        plan = session.build(folder / "timings" if folder is not None else None)
        seconds = time.perf_counter() - start
        say("proving that every attention is fused")
        kernels, source = _kernels(session, plan)
    attentions = facts.to_fuse(kept)
    fusion = prove(attentions, kernels, len(profiles), plan=out.name, builder=session.title, source=source)
    _write(plan, out)
    return Plan(
        path=out,
        kind=kind,
        precision=facts.precision,
        builder=builder.module,
        version=trt.__version__,
        gpu=gpu,
        targets=chosen,
        buckets=sizes,
        profiles=profiles,
        seconds=seconds,
        fusion=fusion,
    )


def buckets(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes to run, 1, 2, 4, ... and the largest."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch:
        sizes.append(sizes[-1] * 2)
    return (*sizes, max_batch) if max_batch > 1 else (1,)


def profiles_for(sizes: Sequence[int], *, portable: bool) -> tuple[Profile, ...]:
    """Return one profile for all buckets where kernels are compiled at run time, else one for each.

    None holds a single size. Where the batch is known, the queries of the cross-attention, which read no image, are
    folded into a constant and their cast with them, and no fused kernel takes what is left.
    """
    if portable:
        return (Profile(1, sizes[-1], max(2, sizes[-1])),)
    return tuple(Profile(max(1, size // 2), size, max(2, size)) for size in sizes)


def _kernels(session: Session, plan: Any) -> tuple[list[Kernel], str]:
    if session.portable:
        return kernels_of_plan(plan), "records of its kernels"
    return kernels_of_engine(session.trt, session.open(plan)), "layers of the engine inspector"


def _write(plan: Any, out: Path) -> None:
    """Write the plan.

    Raises:
        OutputError: it cannot be written; nothing of it is left.

    """
    content = memoryview(plan)
    try:
        with whole_file(out) as part:
            part.write_bytes(content)
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(out.parent).free / 1e9:.2f} GB are free"
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}; {content.nbytes / 1e9:.2f} GB are needed{free}); "
            "nothing of it was kept: free some space or choose another folder"
        ) from error


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep off the terminal what the libraries print there by themselves; the logger is told the same.

    Only the process's own descriptor is turned away. Python's sys.stderr goes on, a display of progress with it.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # closed: there is no terminal to keep quiet
        yield
        return
    before = sys.stderr
    ours = os.fdopen(os.dup(terminal), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        if before is not None:
            before.flush()
            sys.stderr = ours
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(terminal, 2)
        sys.stderr = before
        ours.close()
        os.close(nowhere)
        os.close(terminal)


__all__ = ["RTX_TARGETS", "Plan", "Profile", "available", "buckets", "build_plan", "profiles_for"]
