"""The proof that a plan runs every attention as one fused kernel.

An attention that falls apart into products and a softmax gives the same numbers at several times the cost, and no
builder says so. So the kernels of every plan are read back and held against the attentions of the ONNX file, by name,
once for every optimization profile: each profile is a program of its own.

Where the kernels are read from:

- TensorRT-RTX writes its programs into the plan as text, one record a kernel, followed by the kernels' sources.
  There is one program for all compute capabilities, compiled for the card when it is loaded, so what is proven of
  it is proven for each of them.
- TensorRT's plan is opened on the GPU that built it, and its engine inspector lists the kernels.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qfae_export.errors import ExportError
from qfae_export.onnx_facts import Attention

_PROGRAM = re.compile(rb"\nmain \{")
# One line of a program: a kernel, its name with a hash of its source, and the ONNX nodes whose work it does.
_RECORD = re.compile(rb'function=\{ name=(\S+) fqn=(\S+) [^\n]*?layers="([^"\n]*)"')
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# A fused kernel is called mha or fmha, whatever stands around it.
_FUSED = re.compile(r"mha", re.IGNORECASE)
# The head of a kernel's source, and what its matrix products accumulate in, named in the traits shortly before it.
_SOURCE = re.compile(rb"__global__[^{;]{0,300}?\b(\w*mha\w*)\(", re.IGNORECASE)
_ACCUMULATION = re.compile(rb"hmma_(fp32|fp16)_traits")
_TRAITS_WITHIN_BYTES = 1 << 16
_SHOWN = 3


@dataclass(frozen=True)
class Kernel:
    """One kernel of one program: its name, the ONNX nodes it computes, and what it accumulates in, if known."""

    program: int
    name: str
    nodes: tuple[str, ...]
    accumulates: str | None = None

    @property
    def fused(self) -> bool:
        """Say whether it is an attention in one piece; a kernel that merely prepares one names its nodes too."""
        return bool(_FUSED.search(self.name))


@dataclass(frozen=True)
class FusionReport:
    """A proof that succeeded: how many attentions every stage has, all of them fused in every profile.

    stages        attentions by stage, in the order of the computation
    profiles      optimization profiles, each with all of them
    accumulates   attentions by what their kernels accumulate in: "fp32", "fp16", or "unknown"
    source        where the kernels were read from
    """

    stages: dict[str, int]
    profiles: int
    accumulates: dict[str, int]
    source: str

    @property
    def attentions(self) -> int:
        """The number of attentions, each fused in every profile."""
        return sum(self.stages.values())

    def summary(self) -> str:
        """Say it in one line."""
        if not self.attentions:
            return "no attention to fuse"
        stages = ", ".join(f"{count} {stage}" for stage, count in self.stages.items())
        kinds = ", ".join(f"{count} accumulate in {kind}" for kind, count in self.accumulates.items())
        return f"{self.attentions} of {self.attentions} attentions fused ({stages}; {kinds})"

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest."""
        return {
            "attentions": self.attentions,
            "fused": self.attentions,
            "stages": dict(self.stages),
            "profiles": self.profiles,
            "accumulates": dict(self.accumulates),
            "source": self.source,
        }


def prove(
    attentions: Sequence[Attention], kernels: Iterable[Kernel], profiles: int, *, plan: str, builder: str, source: str
) -> FusionReport:
    """Hold the kernels of a plan against the attentions it must have fused.

    `plan`, `builder` and `source` are words for messages and report.

    Raises:
        ExportError: no kernel can be read, or an attention is not fused in one of the profiles; names them by stage.

    """
    kernels = list(kernels)
    if attentions and not any(kernel.nodes for kernel in kernels):
        raise ExportError(
            f"{plan}: the {source} name no ONNX nodes, expected one record for each kernel; whether {builder} fused "
            "the attentions cannot be told: use a version of it that this project is tested with"
        )
    fused = [kernel for kernel in kernels if kernel.fused]
    # Counted in programs, not in kernels: two kernels for one profile do not make up for none in another.
    programs = Counter(node for node, _ in {(node, kernel.program) for kernel in fused for node in kernel.nodes})
    missing = [one for one in attentions if programs[one.node] < profiles]
    if missing:
        raise ExportError(_shortfall(attentions, missing, plan, builder))
    accumulates = {node: kernel.accumulates or "unknown" for kernel in fused for node in kernel.nodes}
    return FusionReport(
        stages=dict(Counter(one.stage for one in attentions)),
        profiles=profiles,
        accumulates=dict(Counter(accumulates[one.node] for one in attentions)),
        source=source,
    )


def _shortfall(attentions: Sequence[Attention], missing: Sequence[Attention], plan: str, builder: str) -> str:
    total, lost = Counter(one.stage for one in attentions), Counter(one.stage for one in missing)
    stages = []
    for stage in total:
        if lost[stage]:
            names = [one.node for one in missing if one.stage == stage]
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            stages.append(f"{stage} has {total[stage] - lost[stage]} of {total[stage]}, without {shown}")
    return (
        f"{plan}: {builder} fused {len(attentions) - len(missing)} of {len(attentions)} attentions, expected all "
        f"({'; '.join(stages)}); the others would run at a fraction of the speed: try another version of it, or keep "
        "them in FP32 in the precision policy"
    )


def kernels_of_plan(plan: Any) -> list[Kernel]:
    """Return the kernels of a plan of TensorRT-RTX from its own text; `plan` is anything that holds bytes."""
    content = memoryview(plan)
    accumulations = _accumulations(content)
    programs = [match.start() for match in _PROGRAM.finditer(content)]
    kernels = []
    for record in _RECORD.finditer(content):
        name, unique, layers = (part.decode("utf-8", "replace") for part in record.groups())
        program = bisect(programs, record.start())
        kernels.append(Kernel(program, name, tuple(_ONNX_LAYER.findall(layers)), accumulations.get(unique)))
    return kernels


def _accumulations(plan: memoryview) -> dict[str, str]:
    """Return what fused kernels accumulate in, "fp32" or "fp16", by their unique names, as their sources say."""
    found = {}
    last = 0
    for source in _SOURCE.finditer(plan):
        # Between the kernel before and this one, and nearest to this one: then the traits are its own.
        before = bytes(plan[max(last, source.start() - _TRAITS_WITHIN_BYTES) : source.start()])
        traits = _ACCUMULATION.findall(before)
        if traits:
            found[source[1].decode("ascii", "replace")] = traits[-1].decode()
        last = source.end()
    return found


def kernels_of_engine(trt: Any, engine: Any) -> list[Kernel]:
    """Return the kernels of an opened engine, those of every optimization profile, from its inspector.

    Raises:
        ExportError: a profile's context cannot be made, or the inspector gives no JSON.

    """
    inspector = engine.create_engine_inspector()
    kernels = []
    for profile in range(engine.num_optimization_profiles):
        # No memory for activations: nothing is run.
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(profile, 0):
            raise ExportError(f"optimization profile {profile} of the plan cannot be opened on this GPU; see its log")
        inspector.execution_context = context
        kernels += kernels_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), profile)
    return kernels


def kernels_of_inspector(text: str, profile: int) -> list[Kernel]:
    """Return the kernels in what an engine inspector writes of one profile, detailed JSON.

    Raises:
        ExportError: it is no JSON of that kind.

    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"the engine inspector wrote no list of layers ({type(error).__name__}: {error}); "
            "use a version of TensorRT that this project is tested with"
        ) from None
    kernels = []
    for layer in layers:
        if isinstance(layer, dict):
            # Not by "Name": that one is made of the names of ONNX nodes.
            name = f"{layer.get('TacticName', '')} {layer.get('LayerType', '')}".strip()
            kernels.append(Kernel(profile, name, tuple(_ONNX_LAYER.findall(str(layer.get("Metadata", ""))))))
    return kernels
