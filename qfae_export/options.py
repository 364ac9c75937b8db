"""What `export` is asked to do; the home of the command's defaults. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from qfae_runtime.contract import MIN_IMAGES
from qfae_runtime.engines import CPU_BACKENDS
from qfae_runtime.engines.backends import NOT_INSTALLED, lacking, reference_of
from qfae_runtime.manifest import FORMATS
from qfae_train.weight_files import WeightFiles

DEFAULT_MAX_BATCH = 16
MOST_PARITY_IMAGES = 100_000
PARTS = ("full", "reconstruction", "scorer")
REFERENCE = reference_of("onnx").name
FP16_SUFFIX = ".fp16.onnx"
INT8_SUFFIX = ".int8.onnx"

_TAKEN = (".fp16", ".int8", ".rtx", ".golden", ".reconstruction", ".scorer")

# What a manifest accepts as a file name, with room for suffixes.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


@dataclass(frozen=True)
class Options:
    """One export.

    ckpt            checkpoint that qfae-train wrote, or the authors' last_ckpt.pth
    random_weights  in place of a checkpoint: seed of random weights for `config`, for benchmarks only
    onnx            in place of a checkpoint: an exported ONNX file, to build its plan on this machine
    config          preset or TOML file that describes the authors' checkpoint; None: qfae-train's brings its own
    weights         files of frozen weights that the checkpoint lacks; empty: timm's hub
    out             folder for the engine; None: the checkpoint's folder
    parity_images   folder of images to measure on; None: those in the checkpoint, or the slices in this package
    name            NAME of NAME.onnx, NAME.json, NAME.golden.npz; None: the checkpoint's name without suffix
    max_batch       largest batch of the engine; None: DEFAULT_MAX_BATCH, or as many as there are parity images
    fp16            write NAME.fp16.onnx as well
    int8            write NAME.int8.onnx as well
    int8_keep       selectors of what stays FP32 in it beside what always does; None: what precision.INT8 keeps
    calibration_images  folder of images that INT8's scales are taken from; None: the slices in this package
    parity_count    images of `parity_images` to measure on; None: 32, or the largest batch if that is more
    backends        CPU backends that FP32 and INT8 engines are measured on, "onnxruntime" among them; each gets a
                    certificate
    format          "onnx", "plan" or "rtx-plan"; None: a plan with fp16 where one can be built, else ONNX
    part            "full", or one half of the graph
    bisect          where FP16 breaks its contract, find what must stay FP32
    overwrite       replace an engine of that name
    """

    ckpt: Path | None = None
    out: Path | None = None
    parity_images: Path | None = None
    name: str | None = None
    max_batch: int | None = None
    overwrite: bool = False
    config: str | None = None
    weights: WeightFiles = field(default_factory=WeightFiles)
    fp16: bool = False
    int8: bool = False
    int8_keep: tuple[str, ...] | None = None
    calibration_images: Path | None = None
    parity_count: int | None = None
    format: str | None = None
    part: str = "full"
    bisect: bool = False
    random_weights: int | None = None
    onnx: Path | None = None
    backends: tuple[str, ...] = (REFERENCE,)

    @property
    def folder(self) -> Path:
        """The folder the engine is written to."""
        source = self.ckpt or self.onnx
        return self.out or (source.parent if source is not None else Path())

    @property
    def engine_name(self) -> str:
        """NAME, without suffix."""
        if self.name is not None:
            name = self.name
        elif self.ckpt is not None:
            name = self.ckpt.stem
        elif self.onnx is not None:
            name = self.onnx.name.removesuffix(FP16_SUFFIX).removesuffix(INT8_SUFFIX).removesuffix(".onnx")
        else:
            name = f"{Path(self.config or 'model').stem}-random"
        return name if self.part == "full" else f"{name}.{self.part}"

    def faults(self) -> list[str]:
        """Say what is wrong with the options themselves, one sentence each."""
        faults = []
        sources = [
            name
            for name, given in (
                ("--ckpt", self.ckpt is not None),
                ("--random-weights", self.random_weights is not None),
                ("--onnx", self.onnx is not None),
            )
            if given
        ]
        if not sources:
            faults.append("--ckpt: missing; name the checkpoint that qfae-train wrote")
        if len(sources) > 1:
            faults.append(f"{', '.join(sources)}: give one of them")
        if self.random_weights is not None and self.config is None:
            faults.append("--random-weights: of which model? Name it with --preset or --config")
        if self.format is not None and self.format not in FORMATS:
            faults.append(f"--format: got {self.format!r}, accepted are {', '.join(FORMATS)}")
        if self.part not in PARTS:
            faults.append(f"--part: got {self.part!r}, accepted are {', '.join(PARTS)}")
        if self.part in PARTS[1:] and self.format in FORMATS[1:]:
            faults.append(f"--format: a {self.format} is made of the whole graph; leave out --part, or pass onnx")
        if self.random_weights is not None:
            faults += [
                f"{name}: means nothing with --random-weights, which are measured on nothing"
                for name, given in (("--bisect", self.bisect), ("--parity-images", self.parity_images is not None))
                if given
            ]
        faults += self._faults_of_backends()
        faults += self._faults_of_int8()
        if self.bisect and not self.fp16 and self.onnx is None:
            faults.append("--bisect: finds what must stay FP32 in an FP16 engine; pass --fp16 too")
        if self.onnx is not None:
            faults += self._faults_of_rebuilding()
        if not is_plain_name(self.engine_name):
            option = "--name" if self.name is not None else sources[0] if sources else "--ckpt"
            faults.append(
                f"{option}: {self.engine_name!r} cannot name an engine; pass a --name of letters, digits and _ . + -"
            )
        elif self.engine_name.endswith(_TAKEN) and self.part == "full":
            faults.append(
                f"{'--name' if self.name is not None else sources[0] if sources else '--ckpt'}: {self.engine_name!r} "
                "ends like the files that an engine is accompanied by; pass another --name"
            )
        if self.folder.exists() and not self.folder.is_dir():
            faults.append(f"--out: {self.folder} is a file; name a folder")
        return faults

    def _faults_of_backends(self) -> list[str]:
        unknown = [
            f"--backends: got {name!r}, accepted are {', '.join(CPU_BACKENDS)}"
            for name in self.backends
            if name not in CPU_BACKENDS
        ]
        if unknown:
            return unknown
        faults = []
        if REFERENCE not in self.backends:
            faults.append(f"--backends: {REFERENCE} is missing, the reference that every export is measured on; add it")
        for name in self.backends:
            reason = lacking(name, "cpu")
            if reason is not None:
                cure = ": pip install 'qfae[openvino]'" if reason == NOT_INSTALLED else ""
                faults.append(f"--backends: {name}: {reason}{cure}")
        if self.backends != (REFERENCE,) and self.part != "full":
            faults.append("--backends: means nothing with --part, for half an engine scores nothing")
        if self.backends != (REFERENCE,) and self.random_weights is not None:
            faults.append("--backends: means nothing with --random-weights, which are measured on nothing")
        return faults

    def _faults_of_int8(self) -> list[str]:
        faults = []
        if self.int8 and self.part != "full":
            faults.append("--int8: means nothing with --part, for it is measured as a whole; leave out --part")
        if self.int8_keep is not None and not self.int8:
            faults.append("--int8-keep: says what stays FP32 in an INT8 engine; pass --int8 too")
        if self.calibration_images is not None and not self.int8:
            faults.append("--calibration-images: gives INT8 its scales; pass --int8 too")
        return faults + faults_of_count(self.parity_count, self.parity_images)

    def _faults_of_rebuilding(self) -> list[str]:
        idle = (
            ("--out", self.out is not None),
            ("--name", self.name is not None),
            ("--max-batch", self.max_batch is not None),
            ("--preset or --config", self.config is not None),
            ("--fp16", self.fp16),
            ("--int8", self.int8),
            ("--part", self.part != "full"),
            ("--bisect", self.bisect),
            ("--backends", self.backends != (REFERENCE,)),
        )
        faults = [
            f"{name}: means nothing with --onnx, whose plan is written beside it as its manifest says"
            for name, given in idle
            if given
        ]
        if self.format == "onnx":
            faults.append("--format: onnx is what --onnx names already; accepted are plan, rtx-plan")
        return faults


def faults_of_count(count: int | None, folder: object) -> list[str]:
    """Say what is wrong with a --parity-count, beside a --parity-images or none."""
    if count is None:
        return []
    if folder is None:
        return ["--parity-count: counts images of a folder; pass --parity-images DIR too"]
    if count < MIN_IMAGES:
        return [f"--parity-count: got {count}, a measurement needs {MIN_IMAGES} images at least"]
    return []


def is_plain_name(name: str) -> bool:
    """Say whether a manifest takes `name` as the beginning of its files' names."""
    return bool(_PLAIN_NAME.fullmatch(name)) and ".." not in name and not name.endswith(".")
